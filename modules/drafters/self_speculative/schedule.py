"""How many layers run at each position: SkipDecode's schedule (Del Corro et al. 2023, arXiv
2307.02628).

Shape legend: B sequences, T tokens of a packed row, N active rows of a layer, H hidden size.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from modules.contracts.batches import PADDING_DOCUMENT, TextBatch
from modules.contracts.rows import Rows

LATE = 1 << 30
"""A position that runs the last budget of every schedule."""
RunLayers = Callable[[Rows, Tensor, int, int], Tensor]
"""Rows, their states [B,N,H], a first layer and the one to stop before -> states [B,N,H]."""


@dataclass(frozen=True)
class Schedule:
    """The layer budgets k_t of positions t = 0, 1, …; the last one holds for all later positions.

    A position runs the first w layers and the last k_t − w ones. Budgets never increase, so every
    layer that runs has keys and values of all earlier positions.

    layers: of the model. warm_up: w. budgets: k_t.

    Raises:
        ValueError: budgets that increase or are out of range, warm-up layers that leave none.
    """

    layers: int
    warm_up: int
    budgets: tuple[int, ...]

    def __post_init__(self) -> None:
        """Check the range and the order of the budgets."""
        if not 1 <= self.warm_up < self.layers:
            raise ValueError(
                f"warm_up must lie between 1 and {self.layers - 1}, below the model's "
                f"{self.layers} layers, got {self.warm_up}"
            )
        low, high = self.warm_up + 1, self.layers
        wrong = [budget for budget in self.budgets if not low <= budget <= high]
        if wrong or not self.budgets:
            raise ValueError(
                f"budgets must be from {low} (warm_up and one more) to {high} layers, got "
                f"{wrong[0] if wrong else 'none'}"
            )
        for early, late in pairwise(self.budgets):
            if late > early:
                raise ValueError(
                    f"budgets rise from {early} to {late}: keys and values of the earlier position "
                    "would be missing, let them never increase"
                )

    @staticmethod
    def linear(layers: int, warm_up: int, most: float, least: float, length: int) -> Schedule:
        """k_t = round(k_max − (k_max − k_min) · min(1, t / S)).

        Args:
            layers: of the model.
            warm_up: w.
            most, least: k_max and k_min: above 1 layers, up to 1 a share of the layers. Shares are
                rounded, and not below w + 1.
            length: S.
        """
        if length < 1:
            raise ValueError(f"length must be at least 1 position, got {length}")
        if not 0 < least <= most:
            raise ValueError(f"most must be at least least, and both above 0: {most}, {least}")
        high, low = (
            float(value if value > 1 else max(warm_up + 1, round(value * layers)))
            for value in (most, least)
        )
        steps = (round(high - (high - low) * t / length) for t in range(length + 1))
        return Schedule(layers, warm_up, tuple(steps))

    def budget(self, t: int) -> int:
        """k_t; before the schedule starts (t < 0) all layers."""
        return self.layers if t < 0 else self.budgets[min(t, len(self.budgets) - 1)]

    def first_upper(self, t: int) -> int:
        """The first layer above the skipped ones at position t."""
        return self.layers - (self.budget(t) - self.warm_up)

    def first_uppers(self, t: Tensor) -> Tensor:
        """The same of many positions."""
        table = torch.tensor(self.budgets, device=t.device)
        budgets = table[t.clamp(0, len(self.budgets) - 1)]
        return self.layers - torch.where(t < 0, self.layers, budgets) + self.warm_up

    def total(self, start: int, count: int) -> int:
        """Layers that `count` positions from t = `start` on run together."""
        return sum(self.budget(t) for t in range(start, start + count))

    def groups(self, whole_prompt: bool) -> Iterator[tuple[int, int]]:
        """Ranges of layers above the first w ones that run for the same positions, the same for
        every text. Layers that no position runs are in none.

        Args:
            whole_prompt: whether some positions come before the schedule.
        """
        firsts = {self.layers - budget + self.warm_up for budget in self.budgets}
        firsts |= {self.warm_up} if whole_prompt else set()
        return pairwise([*sorted(firsts), self.layers])


def schedule_positions(batch: TextBatch, whole_prompt: bool) -> Tensor:
    """t of every token [B,T], counted in its document: from its start, or from its first assistant
    token on. Padding is `LATE`.
    """
    positions, documents = batch.position_ids, batch.document_ids
    if not whole_prompt:
        return torch.where(documents == PADDING_DOCUMENT, LATE, positions)
    # The first assistant token of each document; a document without one is a prompt.
    count, length = int(documents.max()) + 2, batch.input_ids.shape[1]
    beyond = torch.full((len(documents), count), length, device=positions.device)
    answered = torch.where(batch.loss_mask, positions, length)
    first = beyond.scatter_reduce(1, documents - PADDING_DOCUMENT, answered, "amin")
    t = positions - first.gather(1, documents - PADDING_DOCUMENT)
    return torch.where(documents == PADDING_DOCUMENT, LATE, t)


def run_sliced(
    run: RunLayers,
    hidden_BTH: Tensor,
    rows: Rows,
    firsts_BT: Tensor,
    schedule: Schedule,
    groups: Sequence[tuple[int, int]],
) -> Tensor:
    """States [B,T,H] behind all layers, each layer run over its active rows alone.

    The active rows of a layer are a prefix of every document. They are gathered, run, and put back;
    the others keep their state. A layer without active rows runs over one, whose result is dropped,
    so that all processes of a training run the same layers.

    Args:
        run: runs layers over rows.
        hidden_BTH: inputs of the first layer.
        rows: all of them.
        firsts_BT: first upper layer of every row, as `Schedule.first_uppers` gives it.
        schedule: which layers are the warm-up layers.
        groups: ranges of upper layers, as `Schedule.groups` gives them.
    """
    hidden_BTH = run(rows, hidden_BTH, 0, schedule.warm_up)
    for start, stop in groups:
        active_BT = firsts_BT <= start
        if bool(active_BT.all()):
            hidden_BTH = run(rows, hidden_BTH, start, stop)
            continue
        # 1. Active rows first, in their order.
        width = max(1, int(active_BT.sum(1).max()))
        index_BN = active_BT.int().argsort(dim=1, descending=True, stable=True)[:, :width]
        batch = torch.arange(len(index_BN), device=index_BN.device)[:, None]
        visible = rows.visible_BNJ[batch[..., None], index_BN[..., None], index_BN[:, None]]
        some = Rows(rows.position_ids_BN.expand(len(index_BN), -1).gather(1, index_BN), visible)
        # 2. Run them, and put back what counts.
        before_BNH = hidden_BTH[batch, index_BN]
        after_BNH = run(some, before_BNH, start, stop)
        counted = active_BT.gather(1, index_BN)[..., None]
        hidden_BTH = hidden_BTH.index_put(
            (batch, index_BN), torch.where(counted, after_BNH, before_BNH)
        )
    return hidden_BTH
