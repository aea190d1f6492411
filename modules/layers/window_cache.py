"""The KV cache of a drafter layer that reads a window and the first positions of the text: what
no row can read again is dropped, so that memory does not grow with the text.

Shape legend: B sequences, N rows of one call, S attended slots, X chosen slots, C cache capacity,
G key/value heads, D head size.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import torch
from torch import Tensor
from torch.nn import functional as F

from modules.contracts.rows import Rows
from modules.contracts.shapes import TargetShape
from modules.layers.decoder_layer import LayerCache

BLOCK = 256
"""Slots beside those of the window and the first positions. Half of them fill up before slots are
dropped, together; the others are for the rows of a proposal."""


@dataclass
class WindowCache(LayerCache):
    """A cache whose slots are the first positions of the text and the newest ones.

    Rows name slots by their positions in the text. `lengths_B` counts slots.

    window: newest positions that a row reads, itself included. sinks: first positions. dropped_B:
    int64 [B], positions between them that have no slot any more.
    """

    window: int = 1
    sinks: int = 0
    dropped_B: Tensor = field(default_factory=lambda: torch.zeros(1, dtype=torch.int64))

    @staticmethod
    def reaching(
        window: int, sinks: int, shape: TargetShape, lengths_B: Tensor, dtype: torch.dtype
    ) -> WindowCache:
        """A cache without rows for as many sequences as `lengths_B` has."""
        blank = LayerCache.empty(shape, lengths_B, dtype)
        none_B = torch.zeros_like(lengths_B)
        cache = WindowCache(blank.keys_BGCD, blank.values_BGCD, none_B, window, sinks, none_B)
        cache._host_lengths = [0] * len(lengths_B)
        return cache

    @property
    def positions_B(self) -> Tensor:
        """int64 [B]: positions that are counted, dropped ones among them."""
        return self.lengths_B + self.dropped_B

    @property
    def most(self) -> int:
        """Slots of a sequence that are allocated, but for calls that write more rows at once."""
        return self.sinks + self.window + BLOCK

    def select(self, sequences_S: Tensor) -> WindowCache:
        """The cache of these sequences alone (int64 [S])."""
        keys, values, lengths, dropped = (
            part[sequences_S]
            for part in (self.keys_BGCD, self.values_BGCD, self.lengths_B, self.dropped_B)
        )
        return WindowCache(keys, values, lengths, self.window, self.sinks, dropped)

    def keep(self, counts_B: Tensor, counts: list[int] | None = None) -> None:
        """Count the first `counts_B` of the rows written last, and drop slots once half a block of
        them is full."""
        super().keep(counts_B, counts)
        if self.longest > self.most - BLOCK // 2:
            self._drop()

    def chosen(
        self, rows: Rows, keys_BSGD: Tensor, values_BSGD: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """What rows read of the slots: keys and values [B,X,G,D], and which of them each row sees
        [B,N,X]."""
        assert rows.committed_BS is not None, "rows name the positions that they reach"
        places_BX = rows.committed_BS
        slots_BX = torch.where(
            places_BX < self.sinks, places_BX, places_BX - self.dropped_B[:, None]
        )
        return super().chosen(replace(rows, committed_BS=slots_BX), keys_BSGD, values_BSGD)

    def _drop(self) -> None:
        """Keep the first positions and the window of each sequence, in new buffers."""
        count = self.sinks + self.window
        excess_B = (self.lengths_B - count).clamp(min=0)
        # 1. Later rows reach back less far than the newest one does.
        order = torch.arange(count, device=excess_B.device)
        slots_BC = torch.where(order < self.sinks, order, order + excess_B[:, None])
        index = slots_BC[:, None, :, None]
        for name in ("keys_BGCD", "values_BGCD"):
            buffer = getattr(self, name)
            moved = buffer.gather(2, index.expand(-1, buffer.shape[1], -1, buffer.shape[3]))
            setattr(self, name, F.pad(moved, (0, 0, 0, BLOCK)))
        # 2. Count what is left.
        self.lengths_B, self.dropped_B = self.lengths_B - excess_B, self.dropped_B + excess_B
        self._host_lengths = [min(length, count) for length in self.host_lengths]

    def _capacity(self, needed: int, capacity: int) -> int:
        """Slots to allocate: no more than `most`, unless more are needed at once."""
        return max(needed, min(super()._capacity(needed, capacity), self.most))
