"""The slots of the largest attention weights in every layer: the upper bound of all policies, which
reads all keys to find them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from modules.contracts.target import Target
from modules.sparse_kv.policy import LayerCall, Policy, Selection, checked, top_slots

Heads = Literal["query", "key_value", "layer"]
"""Heads that share a choice: none, those of a key/value head, or all of a layer."""


def weights_of(call: LayerCall, heads: Heads) -> Tensor:
    """Attention weights [B,h,N,S], summed over the query heads that share a choice."""
    weights = call.probabilities_BKGNS
    if heads == "query":
        return weights.flatten(1, 2)
    return weights.sum(2) if heads == "key_value" else weights.sum((1, 2))[:, None]


def checked_heads(heads: str) -> Heads:
    """The name, if it is one of `Heads`.

    Raises:
        ValueError: another one.
    """
    if heads not in ("query", "key_value", "layer"):
        raise ValueError(f"heads {heads!r} is unknown: use query, key_value or layer")
    return heads


@dataclass
class ExactSelection(Selection):
    """The largest weights of the row itself."""

    budget: int
    heads: Heads

    def choose(self, call: LayerCall) -> Tensor | None:
        """The top slots of each row."""
        if self.budget >= call.slots:
            return None
        return top_slots(weights_of(call, self.heads), call.visible_BNS, self.budget)


class ExactTopK(Policy):
    """Exact top-k attention; prompts are read in full.

    Args:
        budget: k, slots that a row reads.
        heads: which share a choice, by the sum of their weights.

    Raises:
        ValueError: no budget, or unknown heads.
    """

    def __init__(self, budget: int = 1024, heads: Heads = "query") -> None:
        checked(budget=(budget, 1))
        self.budget = budget
        self.heads: Heads = checked_heads(heads)

    def start(self, target: Target, batch: int) -> ExactSelection:
        """A selection without a state."""
        return ExactSelection(self.budget, self.heads)
