"""Domino: DFlash with a recurrent network over the tokens drafted so far (2026, arXiv 2605.29707).

Shape legend: N any rows, P the same, flat, R rank of the bias, S size of the recurrent state, H
hidden size, D draft vocabulary.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal, cast

import torch
from torch import Tensor, nn

from modules.contracts.batches import TextBatch
from modules.contracts.losses import Losses
from modules.contracts.shapes import TargetShape
from modules.drafters.block_diffusion.low_rank import LowRankDFlash
from modules.trees.named_trees import Path

if TYPE_CHECKING:
    from modules.contracts.target import Target


class Domino(LowRankDFlash):
    """Slot d has the logits U_d + W_b SiLU(W_a [h_d ; s_d]), with s_d the state of a GRU over the
    target's embeddings of x_a … x_{a+d}; the first `pure_slots` slots have U_d alone.

    Loss: (1 − λ) · DFlash's loss of these logits + λ · DFlash's loss of U. λ falls from 1 to 0 over
    the first `base_share` of training; validation has λ = 0.

    Args:
        shape: the target's dimensions.
        block: K, tokens drafted per pass.
        layers: decoder layers.
        draft_vocabulary: how many token ids can be drafted; null for all.
        fused_layers: see `DFlash`.
        layout: see `DFlash`; published: `shift`.
        mask_token: see `DFlash`.
        anchors: see `DFlash`.
        labels: see `DFlash`.
        weights: see `DFlash`.
        gamma: γ, in slots.
        smoothing: β of D-PACE.
        hidden: S, size of the GRU's state.
        rank: R of the bias.
        pure_slots: first slots without a bias.
        base_share: share of training over which λ falls to 0.
        tree: see `DFlash`; paths get the likeliest tokens after the tokens on them.
    """

    def __init__(
        self,
        shape: TargetShape,
        block: int = 8,
        layers: int = 2,
        draft_vocabulary: int | None = None,
        fused_layers: list[int] | None = None,
        layout: Literal["fill_in", "shift"] = "shift",
        mask_token: int | None = None,
        anchors: int = 32,
        labels: Literal["hard", "soft"] = "hard",
        weights: Literal["decay", "expected_length"] = "decay",
        gamma: float = 4.0,
        smoothing: float = 0.5,
        hidden: int = 256,
        rank: int = 64,
        pure_slots: int = 1,
        base_share: float = 0.5,
        tree: list[Path] | str | None = None,
    ) -> None:
        for name, value in (("hidden", hidden), ("rank", rank)):
            if value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        if not 0 <= pure_slots < block:
            raise ValueError(f"pure_slots must be below block ({block}), got {pure_slots}")
        if not 0 < base_share <= 1:
            raise ValueError(f"base_share must lie in (0, 1], got {base_share}")
        super().__init__(
            shape,
            block,
            layers,
            draft_vocabulary,
            fused_layers,
            layout,
            mask_token,
            anchors,
            labels,
            weights,
            gamma,
            smoothing,
            tree,
        )
        self.hidden, self.pure_slots, self.base_share = hidden, pure_slots, base_share
        # Named as in the release.
        self.prefix_gru = nn.GRU(shape.hidden_size, hidden, bias=False, batch_first=True)
        self.embed_proj = nn.Sequential(
            nn.Linear(shape.hidden_size + hidden, rank, bias=False),
            nn.SiLU(),
            nn.Linear(rank, self.draft_size, bias=False),
        )

    @property
    def bias_weight(self) -> Tensor:
        """W_b [D,R] of the bias."""
        return cast(Tensor, self.embed_proj[2].weight)

    @property
    def path_size(self) -> int:
        """The size of the GRU's state."""
        return self.hidden

    def step(
        self, depth: int, tokens_N: Tensor, hidden_NH: Tensor, before_NS: Tensor, target: Target
    ) -> tuple[Tensor, Tensor]:
        """SiLU(W_a [h ; s]) and s; 0 in the first slots."""
        vectors_NH = target.embed(tokens_N).to(self.precision)
        flat_P1H = vectors_NH.reshape(-1, 1, self.shape.hidden_size)
        before_1PS = before_NS.reshape(1, -1, self.hidden).to(flat_P1H.dtype)
        after_P1S, _ = self.prefix_gru(flat_P1H, before_1PS.contiguous())
        after_NS = after_P1S.reshape(before_NS.shape)
        memory_NR = self.embed_proj[:2](torch.cat([hidden_NH, after_NS.to(hidden_NH.dtype)], -1))
        return memory_NR * (depth >= self.pure_slots), after_NS

    def loss(self, batch: TextBatch, target: Target, progress: float) -> Losses:
        """The mixture of both losses at `progress`; metrics are of the final logits."""
        rows = self.blocks(batch, target)
        outputs_MKH = self.block_outputs(batch, target, rows)
        distributions = self.distributions(batch, target, rows)
        wide = self.conditional(rows, outputs_MKH, target)
        final = self.slot_losses(self.scored(batch, target, rows, distributions, wide))
        share = max(0.0, 1 - progress / self.base_share)
        base = self.base_loss(batch, target, rows, distributions, outputs_MKH)
        return Losses((1 - share) * final.mean() + share * base.mean(), final.metrics)
