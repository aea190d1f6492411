"""A sliding window with attention sinks (StreamingLLM, Xiao et al. 2024, arXiv 2309.17453), at the
positions of the text.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from modules.contracts.target import Target
from modules.sparse_kv.policy import LayerCall, Policy, Selection, checked


def window_slots(call: LayerCall, sinks: int, window: int) -> Tensor | None:
    """int64 [B,1,N,X]: the first `sinks` slots and those of the newest `window` positions of each
    row; None where these are all slots.
    """
    if sinks + window >= call.slots:
        return None
    newest = call.newest_slots(window)
    return torch.cat([call.first_slots(sinks), torch.where(newest < sinks, -1, newest)], 3)


@dataclass
class WindowSelection(Selection):
    """The first and the newest slots."""

    sinks: int
    window: int

    def choose(self, call: LayerCall) -> Tensor | None:
        """The same in every layer."""
        return window_slots(call, self.sinks, self.window)


class Window(Policy):
    """A sliding window with sinks; prompts are read in full.

    Args:
        window: newest positions, the row's own included.
        sinks: first slots.

    Raises:
        ValueError: a window without a position, or fewer than no sinks.
    """

    without_keys = True

    def __init__(self, window: int = 1020, sinks: int = 4) -> None:
        checked(window=(window, 1), sinks=(sinks, 0))
        self.window, self.sinks = window, sinks

    def start(self, target: Target, batch: int) -> WindowSelection:
        """A selection without a state."""
        return WindowSelection(self.sinks, self.window)
