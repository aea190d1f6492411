"""Hydra++: Medusa-like heads that see the drafted tokens' embeddings (Ankner et al. 2024, arXiv
2402.05109).

Shape legend: B sequences, N rows of one call, H hidden size, K heads, X = (K+1)·H, the longest
concatenation.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from modules.contracts.rows import Rows
from modules.contracts.shapes import StateName, TargetShape
from modules.drafters.heads.base import HeadDrafter, refuse_unknown, soft_labels
from modules.layers.decoder_layer import DecoderLayer, LayerCache, ResBlock
from modules.layers.token_scale import token_scale

if TYPE_CHECKING:
    from modules.contracts.target import Target

RANDOM_WIDTH = 0.02
"""Standard deviation of a Llama model's weights before training."""


class FirstBlock(nn.Module):
    """W_res c + SiLU(W c) with W = 0 at initialisation: [..., inputs] -> [..., H]."""

    def __init__(self, inputs: int, hidden_size: int) -> None:
        super().__init__()
        self.residual, self.linear = nn.Linear(inputs, hidden_size), nn.Linear(inputs, hidden_size)
        nn.init.zeros_(self.linear.weight)
        nn.init.zeros_(self.linear.bias)

    def forward(self, inputs_NX: Tensor) -> Tensor:
        """[..., inputs] -> [..., H]."""
        return self.residual(inputs_NX) + F.silu(self.linear(inputs_NX))


def _head_blocks(
    inputs: int, size: int, count: int, shared: bool, dropout: float, everywhere: bool
) -> nn.Sequential:
    """A head's blocks, from its inputs [..., inputs] to its LM head's input [..., size]."""
    later = [ResBlock(size)] * (count - 1) if shared else [ResBlock(size) for _ in range(count - 1)]
    parts: list[nn.Module] = []
    for block in (FirstBlock(inputs, size), *later):
        parts += [nn.Dropout(dropout), block] if everywhere else [block]
    return nn.Sequential(*parts, nn.Dropout(dropout))


class Hydra(HeadDrafter):
    """Head i reads c_i = [f'_t ; s·e_{t+1} ; … ; s·e_{t+1+i}] and drafts x_{t+2+i}, trained on
    the target's distribution.

    f' is the target's state after one more decoder layer (the prefix layer), normalised; e are the
    target's input embeddings, frozen, and s brings them to the size of f'
    (`modules.layers.token_scale`). By default the prefix layer reads the state before the target's
    final norm, starts as a copy of the target's last layer, and its outputs go through that norm,
    frozen.

    The release has s = 1, `prefix_start: random`, `dropout_at: every_block` and `shared_block:
    true`; there the biases of the first blocks and of the LM heads start at random, here at 0.

    Args:
        shape: the target's dimensions.
        heads: K.
        blocks: layers per head, the first one (concatenation to H) included.
        prefix: whether there is a prefix layer (Hydra++) or heads read f_t itself (Hydra).
        lm_head: `"own"` (a trainable copy with a bias per head) or `"shared"` (the target's,
            frozen).
        dropout: on each head's last hidden state, or more often (`dropout_at`).
        draft_vocabulary: how many token ids can be drafted; None for all.
        tree: paths, or a name of `modules.trees.named_trees`; None is `narrow`, on a GPU the
            paper's, `mc_sim_7b_63`.
        decay: head i weighs decay^i (the release weighs all alike: 1).
        labels: `"soft"`, the target's distribution, or `"hard"`, the tokens of the data (Hydra
            without the teacher).
        prefix_start: `"target"`, or `"random"`: the prefix layer starts at random, reads the
            target's final state, and is followed by a trained norm.
        dropout_at: `"lm_head"`, before the LM head only, or `"every_block"`: also before each
            block, on the first block's inputs too.
        shared_block: whether the blocks of a head after its first share their weights.
        divergence: how the target's distribution is learnt (`modules.losses.divergences`).
    """

    reads: StateName = "pre_norm"
    first_exponent: ClassVar[int] = 0
    stored_bytes: ClassVar[tuple[float, float, float]] = (72.0, 40.0, 26.0)
    token_scale: Tensor

    def __init__(
        self,
        shape: TargetShape,
        heads: int = 4,
        blocks: int = 4,
        prefix: bool = True,
        lm_head: Literal["own", "shared"] = "own",
        dropout: float = 0.2,
        draft_vocabulary: int | None = None,
        tree: list[list[int]] | str | None = None,
        decay: float = 1.0,
        labels: Literal["soft", "hard"] = "soft",
        prefix_start: Literal["target", "random"] = "target",
        dropout_at: Literal["lm_head", "every_block"] = "lm_head",
        shared_block: bool = False,
        divergence: str = "cross_entropy",
    ) -> None:
        super().__init__(shape, heads, draft_vocabulary, decay)
        refuse_unknown("lm_head", lm_head, ("own", "shared"))
        refuse_unknown("prefix_start", prefix_start, ("target", "random"))
        refuse_unknown("dropout_at", dropout_at, ("lm_head", "every_block"))
        self.soft_labels = soft_labels(labels)
        self.use_divergence(divergence)
        # 1. The prefix layer; one that starts at random has its own norm.
        self.layers = nn.ModuleList([DecoderLayer(shape)] if prefix else [])
        self.norm = None
        if prefix and prefix_start == "random":
            self.reads, self.norm = "final", nn.RMSNorm(shape.hidden_size, shape.norm_eps)
        # 2. Head i reads a concatenation of i + 2 vectors.
        self.register_buffer("token_scale", torch.ones(()))
        self.blocks = nn.ModuleList(
            _head_blocks(
                (depth + 2) * shape.hidden_size,
                shape.hidden_size,
                blocks,
                shared_block,
                dropout,
                dropout_at == "every_block",
            )
            for depth in range(heads)
        )
        if lm_head == "own":
            self.use_own_lm_heads(bias=True)
        self.use_tree(tree)

    @torch.no_grad()
    def initialise(self, target: Target) -> None:
        """Also measure the scale that brings embeddings to the size of the target's states."""
        super().initialise(target)
        self.token_scale.fill_(token_scale(target))

    def start_layers(self, target: Target) -> None:
        """Copy the target's last layer, or draw random weights as Llama models do."""
        if self.norm is None:
            return super().start_layers(target)
        for part in self.layers.modules():
            if isinstance(part, nn.Linear):
                nn.init.normal_(part.weight, 0, RANDOM_WIDTH)
                if part.bias is not None:
                    nn.init.zeros_(part.bias)
        return None

    def begin(
        self,
        hidden_BNH: Tensor,
        next_BN: Tensor,
        target: Target,
        rows: Rows,
        caches: list[LayerCache] | None,
    ) -> Tensor:
        """f' [B,N,H], zero-padded to [B,N,X] to hold the embeddings of a whole path."""
        hidden = self.run_own_layers(hidden_BNH, rows, caches)
        hidden = target.final_norm(hidden) if self.norm is None else self.norm(hidden)
        return F.pad(hidden, (0, self.heads * self.shape.hidden_size))

    def step(self, depth: int, memory_NX: Tensor, tokens_N: Tensor, target: Target) -> Tensor:
        """Write the token's embedding after those of its path."""
        used, size = (depth + 1) * self.shape.hidden_size, self.shape.hidden_size
        vectors = target.embed(tokens_N).to(memory_NX.dtype) * self.token_scale
        return torch.cat([memory_NX[..., :used], vectors, memory_NX[..., used + size :]], dim=-1)

    def feature(self, depth: int, memory_NX: Tensor, tokens_N: Tensor, target: Target) -> Tensor:
        """The head's blocks applied to c_depth."""
        return self.blocks[depth](memory_NX[..., : (depth + 2) * self.shape.hidden_size])
