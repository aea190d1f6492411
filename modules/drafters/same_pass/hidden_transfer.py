"""Hidden Transfer: a linear map of the newest token's state in a middle layer stands for the state
of a later token there, and goes through the remaining layers beside the real one (Wu et al. 2024,
arXiv 2404.12022; the same idea as FIRP, 2024, arXiv 2410.20488).

h^l_t is the state at position t after l layers. h~^l_{t+k} = W_k h^l_t + b_k with l = l_k is guess
k of `modules.drafters.same_pass.base`: its state after the last layer gives the logits of
x_{t+k+1}.

Shape legend: B sequences, T tokens of a packed row, N nodes, M training rows, P pseudo states, K
offsets, H hidden size, D draft vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace
from functools import partial
from itertools import islice, pairwise
from typing import TYPE_CHECKING, Literal, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from modules.contracts.batches import TextBatch
from modules.contracts.losses import Losses
from modules.contracts.rows import Rows, rows_at
from modules.contracts.shapes import StateName, TargetShape
from modules.contracts.trainable import Stage, Trainable, TrainingResult
from modules.drafters.same_pass.base import SamePassDrafter
from modules.drafters.same_pass.guess_rows import GuessRows, guess_rows
from modules.drafters.same_pass.sparse_tree import SparseTrees, owned_trees, sparse_trees
from modules.drafters.trained import DraftStep
from modules.losses.chunked import Head, TrainingRows, smooth_l1
from modules.losses.row_subsets import document_sizes
from modules.trees.named_trees import Path, optimised_size
from modules.trees.static import StaticTree

if TYPE_CHECKING:
    from modules.contracts.target import Target

MOST_OFFSETS = 64
"""Limit on the offsets, each of which has a map of H² numbers."""


class OffsetMap(nn.Module):
    """W h + b, which starts as the identity.

    With a rank r, W = I + U V with U [H,r] and V [r,H]; U starts at zero.
    """

    def __init__(self, size: int, rank: int | None) -> None:
        super().__init__()
        self.down = None if rank is None else nn.Linear(size, rank, bias=False)
        self.map = nn.Linear(size if rank is None else rank, size)
        with torch.no_grad():
            nn.init.zeros_(self.map.bias)
            nn.init.zeros_(self.map.weight) if rank else nn.init.eye_(self.map.weight)

    def forward(self, hidden: Tensor) -> Tensor:
        """States [..., H] -> states [..., H]."""
        return self.map(hidden) if self.down is None else hidden + self.map(self.down(hidden))


class HiddenTransfer(SamePassDrafter):
    """Linear maps from a token's state in a middle layer to those of the next ones; the rest of the
    frozen target makes guesses of them.

    Loss: Σ_k decay^(k-1) [KL(p_k ‖ q_k) + state_weight · SmoothL1(h~^L_k, h^L_k)], with q_k the
    distribution of pseudo state k and p_k the target's own at position t + k of the data. Only W_k
    and b_k learn. Pseudo state k sees the text up to t and pseudo states 1 … k of t.

    The abstracts say that states are predicted in middle layers by a linear map; all further
    choices here are inferred.

    Args:
        shape: the target's dimensions.
        offsets: K, pseudo states of a token, and how many tokens can be drafted in a row.
        transfer: where states are transferred, as a share of the target's layers, rounded: 0.5 is
            after half of them, 1 after the last (then a Medusa head that is linear). A list has one
            for each offset, ascending: later offsets enter deeper.
        rank: of W_k - I; null: W_k is a full matrix.
        interaction: whether pseudo states of a token see its earlier ones; else themselves alone.
        labels: `soft` learns the target's distribution, `hard` the tokens of the data.
        state_weight: μ, of the distance to the real state after the last layer.
        anchor_share: positions that are trained, as a share of the tokens: random ones in the
            answers, evenly spaced in validation.
        groups_per: whether that share is of each packed `row` or of each `document` in it, by its
            own length.
        draft_vocabulary: how many token ids can be drafted; null for all.
        tree: paths, or a name of `modules.trees.named_trees`; null is the tree with the most
            expected tokens by the measured accuracies, as Medusa's.
        rows: of a call: the newest token, drafts and pseudo states; null is 12, on a GPU 64, or
            with a `tree` all of it. The budget of an evaluation is one less.
        owners: nodes of the tree, the root included, that have pseudo states at most, all K of
            them, the likeliest ones. After another node nothing is drafted. null: nodes have 1 to K
            pseudo states, those that promise the most tokens (PPD's sparse trees); with a `tree` or
            a `least_probability`, any number of owners.
        least_probability: a node whose path is right less often is no owner.
        accuracies: how often the rank-r token of each offset is right; filled in by `finish`.
        decay: offset k weighs decay^(k-1).
        sequential: train W_1 first, then W_2, …, the earlier ones fixed, instead of all together.
            The last one is trained by the recipe's own settings.
        stage_epochs, stage_lr: epochs and peak learning rate of each of the others.
        divergence: how the target's distribution is learnt (`modules.losses.divergences`).
    """

    depth_unit = "offsets"
    guess_state = "pre_norm"
    training_reads: tuple[StateName, ...] = ("final", "pre_norm")
    first_exponent = 0

    def __init__(
        self,
        shape: TargetShape,
        offsets: int = 3,
        transfer: float | list[float] = 0.5,
        rank: int | None = None,
        interaction: bool = True,
        labels: Literal["soft", "hard"] = "soft",
        state_weight: float = 0.0,
        anchor_share: float = 0.25,
        groups_per: Literal["row", "document"] = "row",
        draft_vocabulary: int | None = None,
        tree: list[list[int]] | str | None = None,
        rows: int | None = None,
        owners: int | None = None,
        least_probability: float = 0.0,
        accuracies: list[list[float]] | None = None,
        decay: float = 0.8,
        sequential: bool = False,
        stage_epochs: int = 1,
        stage_lr: float = 1e-3,
        divergence: str = "forward_kl",
    ) -> None:
        if stage_epochs < 1 or stage_lr <= 0:
            raise ValueError(
                "stage_epochs must be at least 1 and stage_lr above 0, got "
                f"{stage_epochs} and {stage_lr}"
            )
        if not 1 <= offsets <= MOST_OFFSETS:
            raise ValueError(f"offsets must be from 1 to {MOST_OFFSETS}, got {offsets}")
        if not 0 < anchor_share <= 1:
            raise ValueError(f"anchor_share must be above 0 and at most 1, got {anchor_share}")
        if rank == 0 or owners == 0:
            raise ValueError(f"rank and owners must be at least 1 or null, got {rank}, {owners}")
        super().__init__(
            shape, offsets, 1, draft_vocabulary, decay, labels, groups_per, accuracies, rows
        )
        self.use_divergence(divergence)
        self.interaction, self.state_weight, self.anchor_share = (
            interaction,
            state_weight,
            anchor_share,
        )
        self.owners, self.least_probability = owners, least_probability
        self.layers = transfer_layers(transfer, offsets, shape.num_layers)
        self.maps = nn.ModuleList(OffsetMap(shape.hidden_size, rank) for _ in range(offsets))
        self.sequential, self.stage_epochs, self.stage_lr = sequential, stage_epochs, stage_lr
        if sequential:
            self.maps[:-1].requires_grad_(False)
        # Paths of a tree are drafted in their order, as far as a call's rows allow.
        if tree is not None and optimised_size(tree) is not None:
            raise ValueError(f"tree {tree!r}: give null, the optimised tree, and its size as rows")
        self.use_static_tree("narrow" if tree is None else cast("list[Path] | str", tree))
        self.pattern = None if tree is None else cast(StaticTree, self._builder).paths
        self.owned = bool(owners or least_probability or self.pattern)
        self.check_rows()

    @property
    def least_budget(self) -> int:
        """All pseudo states of the root, and a draft, with one of its own unless nodes may have
        none.
        """
        return self.guesses + (1 if self.owned else 2)

    @property
    def default_budget(self) -> int:
        """Rows beside the newest token's; with a given tree all that it has."""
        if self.pattern is None or self.call_rows is not None:
            return super().default_budget
        nodes = 1 + len(self.pattern)
        return nodes - 1 + self.guesses * min(self.owners or nodes, nodes)

    def sparse_trees(self, budget: int) -> SparseTrees:
        """The trees by the number of guesses, for calls of so many rows beside the newest
        token's.
        """
        table = tuple(row[: self.draft_size] for row in self.accuracies)
        if not self.owned:
            return sparse_trees(table, budget + 1)
        return owned_trees(table, budget + 1, self.owners, self.least_probability, self.pattern)

    def following(self, rows: Rows, counts_BN: Tensor, width: int) -> GuessRows:
        """The first `counts_BN` pseudo states of each row."""
        return guess_rows(
            lambda owner_BP, entry_BP: partial(self.transferred, owner_BP, entry_BP),
            self.guesses,
            1,
            rows,
            counts_BN,
            width,
            "chain" if self.interaction else "itself",
            self.layers,
        )

    def transferred(self, owner_BP: Tensor, entry_BP: Tensor, hidden_BNH: Tensor) -> Tensor:
        """Pseudo states [B,P,H] of the given offsets from their owners' states."""
        at_BPH = rows_at(hidden_BNH, owner_BP).to(self.precision)
        every_BPKH = torch.stack([offset(at_BPH) for offset in self.maps], dim=2)
        index = entry_BP[..., None, None].expand(-1, -1, 1, at_BPH.shape[-1])
        return every_BPKH.gather(2, index)[:, :, 0]

    def head(self, depth: int, target: Target) -> Head:
        """The target's final norm and LM head on states after the last layer."""
        return lambda hidden: target.logits(
            target.final_norm(hidden), self.vocabulary_D, self.precision
        )

    # -- training ----------------------------------------------------------------------------------

    @property
    def stages(self) -> tuple[Stage, ...]:
        """The maps of all offsets but the last, where they are trained one after another."""
        first = range(self.guesses - 1 if self.sequential else 0)
        return tuple(
            Stage(
                f"offset_{offset + 1}",
                OneOffset(self.shape, self, offset),
                self.stage_epochs,
                self.stage_lr,
            )
            for offset in first
        )

    @property
    def trained_size(self) -> int:
        """The numbers of all maps, those trained in stages too."""
        return sum(parameter.numel() for parameter in self.maps.parameters())

    def rows(self, batch: TextBatch, target: Target) -> TrainingRows:
        """The share `anchor_share` of the positions of each packed row or document."""
        if self.groups_per == "document":
            counts_BT = (self.anchor_share * document_sizes(batch)).long()
            return self.cuts(batch, counts_BT.clamp(min=1))
        return self.cuts(batch, max(1, int(self.anchor_share * batch.input_ids.shape[1])))

    def step_loss(self, step: DraftStep, batch: TextBatch) -> Tensor:
        """A step's divergence, and the weighted distance of its states from the real ones."""
        loss = super().step_loss(step, batch)
        if not self.state_weight:
            return loss
        real_MH = batch.states["pre_norm"].flatten(0, 1)[step.flat_M]
        distances_M = smooth_l1(step.feature_MH, real_MH)
        return loss + self.state_weight * step.mean(distances_M)

    @torch.no_grad()
    def similarities(self, batch: TextBatch, target: Target) -> tuple[Tensor, Tensor]:
        """Sums [K,L+1] of the cosine similarity of pseudo and real states after l layers, and the
        number of pairs [K]; 0 where an offset has not entered yet.
        """
        rows, depth = self.measured_rows(batch, target), target.shape.num_layers
        names: list[StateName] = [*range(self.layers[0], depth), "pre_norm"]
        states, after = self.passed(batch, target, rows, tuple(names))
        sums_KL = torch.zeros(self.guesses, depth + 1)
        for layer, name in enumerate(names, self.layers[0]):
            real_MKH = states[name].flatten(0, 1)[rows.flat_MK1[:, 1:]]
            cosines_MK = F.cosine_similarity(after[name].float(), real_MKH.float(), dim=-1)
            sums_KL[:, layer] = (cosines_MK * rows.valid_MK).sum(0).cpu()
        entered = torch.arange(depth + 1) >= torch.tensor(self.layers)[:, None]
        return sums_KL * entered, rows.valid_MK.sum(0).cpu()

    def finish(self, batches: Iterable[TextBatch], target: Target) -> TrainingResult:
        """Adds a page of how similar pseudo and real states are, layer by layer."""
        sums = [torch.zeros(self.guesses, target.shape.num_layers + 1), torch.zeros(self.guesses)]

        def watched() -> Iterator[TextBatch]:
            for batch in batches:
                for total, more in zip(sums, self.similarities(batch, target), strict=True):
                    total += more
                yield batch

        result = super().finish(watched(), target)
        means_KL = sums[0] / sums[1].clamp(min=1)[:, None]
        return replace(result, pages={"hidden_states.md": similarity_page(means_KL, self.layers)})


class OneOffset(Trainable):
    """One offset's map as a stage of training, by the loss of this offset alone.

    Args:
        shape: the target's dimensions.
        whole: the drafter, whose other maps stay as they are.
        offset: counted from 0.
    """

    def __init__(self, shape: TargetShape, whole: HiddenTransfer, offset: int) -> None:
        super().__init__()
        # A list hides the drafter from nn.Module: only this map is trained.
        self.whole, self.offset, self.map = [whole], offset, whole.maps[offset]

    @property
    def online(self) -> bool:
        """True: pseudo states pass through the target in every step."""
        return True

    def loss(self, batch: TextBatch, target: Target, progress: float) -> Losses:
        """The offset's loss, and its metrics."""
        whole = self.whole[0].to(batch.input_ids.device).train(self.training)
        batch, steps = whole.guessed(batch, target)
        step = next(islice(steps, self.offset, None))
        return Losses(whole.step_loss(step, batch), step.metrics())


def transfer_layers(transfer: float | list[float], offsets: int, layers: int) -> tuple[int, ...]:
    """After how many of the target's layers each offset is transferred.

    Raises ValueError for shares outside of 0 to 1, that descend, or of another number of offsets.
    """
    shares = transfer if isinstance(transfer, list) else [transfer] * offsets
    if len(shares) != offsets:
        raise ValueError(
            f"transfer lists {len(shares)} shares for {offsets} offsets: give one for each, or a "
            "number for all"
        )
    if any(not 0 <= share <= 1 for share in shares) or any(a > b for a, b in pairwise(shares)):
        raise ValueError(f"transfer must ascend within 0 to 1, got {transfer}")
    return tuple(round(share * layers) for share in shares)


def similarity_page(means_KL: Tensor, layers: tuple[int, ...]) -> str:
    """Mean cosine similarities of pseudo and real states [K,L+1], as Markdown."""
    shown = range(layers[0], means_KL.shape[1])
    lines = [f"| after layer | {' | '.join(map(str, shown))} |", "|---|" + "---:|" * len(shown)]
    for offset, (means_L, first) in enumerate(zip(means_KL.tolist(), layers, strict=True), 1):
        cells = [f"{means_L[layer]:.3f}" if layer >= first else "–" for layer in shown]
        lines.append(f"| offset {offset} | {' | '.join(cells)} |")
    title = "# Cosine similarity of pseudo and real states, held out"
    return "\n".join([title, "", *lines, ""])
