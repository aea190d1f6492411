"""All slots: what other policies are compared with."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from modules.contracts.target import Target
from modules.sparse_kv.policy import LayerCall, Policy, Selection


@dataclass
class FullSelection(Selection):
    """Every row reads all that it sees."""

    def choose(self, call: LayerCall) -> Tensor | None:
        """None: every row reads all slots."""
        return None


class Full(Policy):
    """Attention to all slots."""

    def start(self, target: Target, batch: int) -> FullSelection:
        """A selection without a state."""
        return FullSelection()
