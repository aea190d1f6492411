"""Lexinvariant language models: no token has a vector of its own (Huang et al. 2023, arXiv
2305.16349).

Shape legend: B rows, T tokens, H width, V units and the end, D distinct tokens.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from modules.tokenization.blocks import backbone
from modules.tokenization.contract import PAD, LanguageModel, Score
from modules.tokenization.units import Units
from modules.tokenization.words import unicode_words

TOGETHER = 8
"""Held-out rows that are scored at a time, as each has a table of its own."""


class Lexinvariant(LanguageModel):
    """A causal transformer whose embedding is drawn anew for every row, E ~ N(0, I/H), and is its
    LM head too: logits h·Eᵀ. What a token means must be inferred from how it repeats.

    Args:
        units: tokens.
        width: H. layers: of the backbone. heads: of its attention.
        length: tokens of a training row.
        random_share: of the tokens of a row that have a drawn vector, the others have a learned
            one: 1 is lexinvariant, 0.2 the paper's regularisation, 0 an ordinary model.
        orthonormal: the drawn vectors of a row are orthonormal, uniformly distributed, instead of
            Gaussian ones, which overlap in a small width.
        curriculum: in training each row draws a share s, 1 with probability 1/4, else from 0 to 1
            with density 2s, and each token of it has a drawn vector with probability s, else a
            learned one. Rows of all shares are mixed; those with few unknown tokens are learnt
            first. In evaluation all vectors are drawn.
        induction: attention that is made for copying what followed a token; see `backbone`.

    The last three are not the paper's, whose models have 150 million weights: with them one of 0.2
    million deciphers a part of a text of few words.

    Raises:
        ValueError: a share outside of 0 to 1, a curriculum with another random_share than 1, or
            orthonormal vectors that are more than the width (the end has one too).
    """

    def __init__(
        self,
        units: Units,
        width: int = 256,
        layers: int = 4,
        heads: int = 4,
        length: int = 512,
        random_share: float = 1.0,
        orthonormal: bool = False,
        curriculum: bool = False,
        induction: bool = False,
    ) -> None:
        super().__init__(units)
        if not 0 <= random_share <= 1:
            raise ValueError(f"random_share must be from 0 to 1, got {random_share}")
        if curriculum and random_share != 1:
            raise ValueError(
                f"curriculum needs random_share 1, got {random_share}: leave one of them out"
            )
        if orthonormal and width <= units.size:
            raise ValueError(
                f"orthonormal needs a width above the {units.size} units, got {width}: raise "
                "width, lower vocabulary, or set orthonormal to false"
            )
        self.width, self.length = width, length
        self.random_share, self.curriculum = random_share, curriculum
        self.orthonormal = orthonormal
        self.backbone = backbone(width, layers, heads, induction)
        self.embedding_VH = (
            nn.Parameter(torch.randn(units.size + 1, width) / math.sqrt(width))
            if random_share < 1 or curriculum
            else None
        )

    def rows(self, text: str) -> list[Tensor]:
        """Rows [T] of tokens; the end's token ends the text."""
        tokens = [token for word in unicode_words(text) for token in self.units.encode(word)]
        return list(torch.tensor([*tokens, self.end]).split(self.length))

    def tables(self, count: int, draws: torch.Generator) -> Tensor:
        """An embedding [B,V,H] for each row; with a curriculum, in training, partly learned."""
        size, device = self.units.size + 1, self.unit_bytes.device
        drawn = torch.randn(count, size, self.width, generator=draws, device=device)
        if self.orthonormal:
            # Q of a Gaussian matrix is uniformly distributed once its signs are R's.
            vectors_BHV, right_BVV = torch.linalg.qr(drawn.mT)
            drawn = (vectors_BHV * right_BVV.diagonal(dim1=1, dim2=2).sign()[:, None]).mT
        else:
            drawn = drawn / math.sqrt(self.width)
        in_curriculum = self.curriculum and self.training
        if self.embedding_VH is None or (self.random_share == 1 and not in_curriculum):
            return drawn
        share_B1: Tensor | float = self.random_share
        if in_curriculum:
            # Above 1 in a quarter of the rows: all of their vectors are drawn.
            share_B1 = (torch.rand(count, 1, generator=draws, device=device) / 0.75).sqrt()
        random_BV = torch.rand(count, size, generator=draws, device=device) < share_B1
        return torch.where(random_BV[..., None], drawn, self.embedding_VH)

    def states(self, before_BT: Tensor, tables_BVH: Tensor, layer: int | None = None) -> Tensor:
        """The backbone's states [B,T,H]; behind so many layers: 0 are the vectors, None all."""
        indices = before_BT.clamp(min=0)[..., None].expand(-1, -1, self.width)
        embedded_BTH = tables_BVH.to(self.dtype).gather(1, indices)
        output = self.backbone(
            inputs_embeds=embedded_BTH, use_cache=False, output_hidden_states=layer is not None
        )
        return output.last_hidden_state if layer is None else output.hidden_states[layer]

    @property
    def dtype(self) -> torch.dtype:
        """The type of its weights."""
        return next(self.parameters()).dtype

    def token_losses(self, rows: Tensor, draws: torch.Generator) -> Tensor:
        """Nats [B,T] of every token, given those before it; 0 at `PAD`."""
        tables_BVH = self.tables(len(rows), draws)
        before_BT = nn.functional.pad(rows[:, :-1], (1, 0), value=self.end)
        logits_BTV = self.states(before_BT, tables_BVH) @ tables_BVH.to(self.dtype).mT
        return nn.functional.cross_entropy(
            logits_BTV.flatten(0, 1), rows.flatten(), ignore_index=PAD, reduction="none"
        ).view(rows.shape)

    def score(self, rows: Tensor, draws: torch.Generator) -> Score:
        """Of every token in rows [B,T]; words are not counted."""
        losses_BT = self.token_losses(rows, draws)
        return Score(losses_BT.sum(), int((rows != PAD).sum()), self.spelled(rows), 0, 0)

    @torch.no_grad()
    def details(self, held_out: Tensor) -> dict[str, float]:
        """Nats per token in the first and the last quarter of held-out rows."""
        draws = torch.Generator(held_out.device).manual_seed(0)
        parts = [self.token_losses(rows, draws) for rows in held_out.split(TOGETHER)]
        losses_BT, quarter = torch.cat(parts), max(1, self.length // 4)
        counted_BT = held_out != PAD
        return {
            f"loss_{name}_quarter": float(losses_BT[:, part].sum() / counted_BT[:, part].sum())
            for name, part in (("first", slice(quarter)), ("last", slice(-quarter, None)))
        }
