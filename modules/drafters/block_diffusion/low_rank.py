"""A bias of low rank by the drafted tokens, on DFlash's logits.

Shape legend: B sequences, M blocks of a batch, K tokens of a block, W frontier nodes, N any rows,
R rank of the bias, S size of a path's state, H hidden size, X = H + R, D draft vocabulary.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from modules.contracts.batches import TextBatch
from modules.contracts.drafter import Context, Frontier
from modules.contracts.rows import rows_at
from modules.drafters.block_diffusion.dflash import DFlash, DFlashState
from modules.drafters.blocks.base import BlockState
from modules.losses.chunked import Head, TrainingRows
from modules.target.kernels.cpu_kernels import narrow_linear

if TYPE_CHECKING:
    from modules.contracts.target import Target


@dataclass
class PathState(DFlashState):
    """State of a drafter whose head reads the path so far.

    paths_BRS: the path's state after each row of the proposal, in its order; None before the
    first.
    """

    paths_BRS: Tensor | None = None

    def before(self, frontier: Frontier, size: int) -> Tensor:
        """The states [B,W,S] before the frontier's tokens: their parents', zeros at the root."""
        if frontier.depth == 0 or self.paths_BRS is None:
            assert self.outputs_BKH is not None
            self.paths_BRS = None
            return self.outputs_BKH.new_zeros(*frontier.tokens_BW.shape, size)
        return rows_at(self.paths_BRS, frontier.parents_BW)

    def add(self, after_BWS: Tensor) -> None:
        """Append the states after the frontier's tokens."""
        parts = [after_BWS] if self.paths_BRS is None else [self.paths_BRS, after_BWS]
        self.paths_BRS = torch.cat(parts, 1)


class LowRankDFlash(DFlash):
    """Base of DFlash's extensions by a bias: the logits of slot d are U_d + W m, with m a vector
    that reads the tokens before the slot, from the anchor on.

    Subclasses define `bias_weight`, `path_size` and `step`.
    """

    @property
    @abstractmethod
    def bias_weight(self) -> Tensor:
        """W [D,R] of the bias."""

    @property
    @abstractmethod
    def path_size(self) -> int:
        """S, numbers that are carried along a path."""

    @abstractmethod
    def step(
        self, depth: int, tokens_N: Tensor, hidden_NH: Tensor, before_NS: Tensor, target: Target
    ) -> tuple[Tensor, Tensor]:
        """m [...,R] of a slot, and the path's state [...,S] after the token before it.

        Args:
            depth: the slot.
            tokens_N: target ids of the tokens before the slot.
            hidden_NH: the slot's outputs.
            before_NS: the path's state before these tokens.
            target: whose embeddings may be read.
        """

    def head(self, depth: int, target: Target) -> Head:
        """The target's LM head on the outputs, and W on the rest of [...,X]."""
        base, size = self.base_head(target), self.shape.hidden_size
        return lambda wide: (
            base(wide[..., :size]) + narrow_linear(wide[..., size:], self.bias_weight)
        )

    def unrolled(
        self, batch: TextBatch, target: Target, rows: TrainingRows
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Outputs and m [M,X] of each slot, given the data's tokens."""
        return self.conditional(rows, self.block_outputs(batch, target, rows), target)

    def conditional(
        self, rows: TrainingRows, outputs_MKH: Tensor, target: Target
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """The same from the outputs of the blocks."""
        state_MS = outputs_MKH.new_zeros(len(outputs_MKH), self.path_size)
        for depth, hidden_MH in enumerate(outputs_MKH.unbind(1)):
            tokens_M = rows.tokens_MK1[:, depth]
            memory_MR, state_MS = self.step(depth, tokens_M, hidden_MH, state_MS, target)
            wide_MX = torch.cat([hidden_MH, memory_MR], -1)
            yield wide_MX, wide_MX

    def blank_state(self, context: Context) -> PathState:
        """State with empty caches and no path."""
        return PathState(**vars(super().blank_state(context)))

    def conditioned(self, state: BlockState, frontier: Frontier, logits_BWD: Tensor) -> Tensor:
        """The logits [B,W,D] after the frontier's tokens."""
        assert isinstance(state, PathState) and state.outputs_BKH is not None
        hidden_B1H = state.outputs_BKH[:, frontier.depth, None]
        memory_BWR, after_BWS = self.step(
            frontier.depth,
            frontier.tokens_BW,
            hidden_B1H.expand(-1, frontier.tokens_BW.shape[1], -1),
            state.before(frontier, self.path_size),
            state.context.target,
        )
        state.add(after_BWS)
        return logits_BWD + narrow_linear(memory_BWR, self.bias_weight)
