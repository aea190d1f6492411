"""Recurrent states along drafted paths.

Shape legend: B sequences, W frontier nodes, R rows of a proposal, X size of a state.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from modules.contracts.drafter import Frontier
from modules.contracts.rows import rows_at
from modules.drafters.block_diffusion.dflash import DFlashState


@dataclass
class PathState(DFlashState):
    """State of a drafter whose head reads the path so far.

    paths_BRX: the head's state after each row of the proposal; None before the first.
    """

    paths_BRX: Tensor | None = None

    def before(self, frontier: Frontier, size: int) -> Tensor:
        """The states [B,W,X] before the frontier's tokens: their parents', zeros at the root."""
        if frontier.depth == 0 or self.paths_BRX is None:
            self.paths_BRX = None
            like = self.outputs_BKH if self.outputs_BKH is not None else self.newest_B
            return like.new_zeros(*frontier.tokens_BW.shape, size)
        return rows_at(self.paths_BRX, frontier.parents_BW)

    def add(self, after_BWX: Tensor) -> None:
        """Append the states after the frontier's tokens."""
        parts = [after_BWX] if self.paths_BRX is None else [self.paths_BRX, after_BWX]
        self.paths_BRX = torch.cat(parts, 1)
