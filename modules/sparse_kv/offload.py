"""Keys and values in host memory, for policies that choose without them.

The model computes on its device; what a choice names is fetched row by row. Rows of the last choice
stay on the device and serve the next one, so that a step fetches only rows that it did not read
before: the next rows are there ahead of it wherever the choice persists. Not run on a GPU here.

Shape legend: B sequences, K key/value heads, h heads with a choice of their own, R rows with a
choice of their own, X chosen slots, Y = R times X, S slots, D head size.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from modules.sparse_kv.policy import gathered_rows
from modules.target.kv_cache import SlotCache


class HostCache(SlotCache):
    """A KV cache in host memory, pinned where the model is on a GPU.

    whole: whether calls get all slots on their device (prompts), or views of host memory.
    """

    whole = True

    def _buffers(self, layer: int, like_BKND: Tensor, values_BKND: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values [B,K,S,D] of a layer, on the host."""
        if like_BKND.shape != values_BKND.shape:
            raise ValueError(
                "keys and values in host memory are of one shape: use a target without latent "
                "attention"
            )
        device = like_BKND.device
        if device not in self._stores:
            batch, heads, _, size = like_BKND.shape
            layers = self._devices.count(device) if self._spread else self.num_layers
            self._stores[device] = torch.zeros(
                (layers, 2, batch, heads, self.capacity, size),
                dtype=like_BKND.dtype,
                pin_memory=device.type == "cuda",
            )
        row = self._row(layer, device)
        return self._stores[device][row, 0], self._stores[device][row, 1]

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *_: Any, **__: Any
    ) -> tuple[Tensor, Tensor]:
        """Write [B,K,N,D] keys and values of one layer, and return all up to the last row."""
        keys, values = self._buffers(layer_idx, key_states, value_states)
        self._write(keys, key_states.cpu())
        self._write(values, value_states.cpu())
        end = self.window(self.ahead + key_states.shape[2])
        keys, values = keys[:, :, :end], values[:, :, :end]
        self.bytes_read += 2 * keys.numel() * keys.element_size()
        if self.whole:
            return keys.to(key_states.device), values.to(key_states.device)
        return keys, values


@dataclass
class LastRows:
    """A layer's rows of the last choice, on the device.

    slots_BhY: ascending; -1 for those that may have changed since. keys_BhYD, values_BhYD: theirs.
    """

    slots_BhY: Tensor
    keys_BhYD: Tensor
    values_BhYD: Tensor

    def select(self, sequences_S: Tensor) -> LastRows:
        """The rows of these sequences alone (int64 [S])."""
        return LastRows(*(part[sequences_S] for part in vars(self).values()))


@dataclass
class Fetcher:
    """Fetches chosen rows from host memory.

    last: by layer. fetched, served: rows that came from the host, and from the last choice.
    """

    last: dict[int, LastRows] = field(default_factory=dict)
    fetched: int = 0
    served: int = 0

    def fetch(
        self,
        layer: int,
        buffers: tuple[Tensor, Tensor],
        slots_BhRX: Tensor,
        lengths_B: Tensor,
        heads: int,
    ) -> tuple[Tensor, Tensor]:
        """Keys and values [B,heads,R,X,D] at slots, on the device of the slots.

        Args:
            layer: whose rows they are.
            buffers: keys and values [B,K,S,D] on the host.
            slots_BhRX: below 0 where there is none.
            lengths_B: committed slots, which the next calls do not change.
            heads: that choose alone.
        """
        slots = slots_BhRX.clamp(min=0).expand(-1, heads, -1, -1)
        ascending, order = slots.flatten(2).sort(-1)
        # 1. Rows that were read before, and the others.
        last = self.last.get(layer)
        if last is None or last.slots_BhY.shape[1] != heads:
            rows = tuple(self._fetched(buffer, ascending, heads) for buffer in buffers)
            self.fetched += ascending.numel()
        else:
            place = torch.searchsorted(last.slots_BhY, ascending)
            place = place.clamp(max=last.slots_BhY.shape[2] - 1)
            hit = last.slots_BhY.gather(2, place) == ascending
            rows = self._completed(last, place, hit, buffers, ascending)
        # 2. What the next choice may read again.
        lasting = torch.where(ascending < lengths_B[:, None, None], ascending, -1)
        again, place_order = lasting.sort(-1)
        self.last[layer] = LastRows(again, *(_taken(part, place_order) for part in rows))
        # 3. In the order of the choice.
        back = order.argsort(-1)
        keys, values = (_taken(part, back).unflatten(2, slots.shape[2:]) for part in rows)
        return keys, values

    def _completed(
        self,
        last: LastRows,
        place_BhY: Tensor,
        hit_BhY: Tensor,
        buffers: tuple[Tensor, Tensor],
        slots_BhY: Tensor,
    ) -> tuple[Tensor, ...]:
        missing = (~hit_BhY).nonzero(as_tuple=True)
        self.fetched += len(missing[0])
        self.served += hit_BhY.numel() - len(missing[0])
        sequence, head, _ = (index.cpu() for index in missing)
        slot = slots_BhY[missing].cpu()
        group = slots_BhY.shape[1] // buffers[0].shape[1]
        rows = []
        for buffer, before in zip(buffers, (last.keys_BhYD, last.values_BhYD)):
            new_MD = buffer[sequence, head // group, slot].to(before.device, non_blocking=True)
            rows.append(_taken(before, place_BhY).index_put(missing, new_MD))
        return tuple(rows)

    @staticmethod
    def _fetched(buffer: Tensor, slots_BhY: Tensor, heads: int) -> Tensor:
        rows = gathered_rows(buffer, slots_BhY.cpu()[:, :, None], heads)[:, :, 0]
        return rows.to(slots_BhY.device, non_blocking=True)

    def select(self, sequences_S: Tensor) -> Fetcher:
        """The fetcher of these sequences alone (int64 [S]); it goes on counting."""
        last = {layer: rows.select(sequences_S) for layer, rows in self.last.items()}
        return Fetcher(last, self.fetched, self.served)


def _taken(rows_BhYD: Tensor, index_BhY: Tensor) -> Tensor:
    """Rows at per-head indices."""
    return rows_BhYD.gather(2, index_BhY[..., None].expand(-1, -1, -1, rows_BhYD.shape[-1]))
