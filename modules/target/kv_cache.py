"""The target's KV cache: one preallocated buffer, written after each sequence's own length.

Shape legend: L layers, B sequences, K key/value heads, S slots, D head size, N rows of one call,
J rows since the last commit, A accepted rows, X slots that a call reads, T prompt tokens, H hidden
size, V vocabulary.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers.cache_utils import Cache, DynamicCache

from modules.contracts.rows import Rows, causal_rows
from modules.contracts.shapes import StateName
from modules.contracts.verification import Accepted
from modules.target.stock.recurrent import RecurrentStates


@dataclass
class Buffers:
    """Keys and values at fixed addresses, allocated when the first keys arrive.

    store: [L,2,B,K,S,D], for what moves rows of all layers at once. keys, values: of every layer
    [B,K,S,D], views of it.
    """

    store: Tensor | None = None
    keys: list[Tensor] = field(default_factory=list)
    values: list[Tensor] = field(default_factory=list)

    def hold(self, store: Tensor) -> None:
        """Use this store from now on."""
        self.store, self.keys, self.values = store, [*store[:, 0]], [*store[:, 1]]
        for buffer in (*self.keys, *self.values):
            torch._dynamo.mark_static_address(buffer)


@dataclass(frozen=True)
class EncodedSource:
    """An encoder's output, to which every call of an encoder-decoder model's decoder attends. No
    commit changes it.

    states_BSH: of the source's S tokens. mask_BNS: additive, [B,1,1,S]. cache: the decoder layers'
    keys and values of it, which the first call computes.
    """

    states_BSH: Tensor
    mask_BNS: Tensor
    cache: DynamicCache

    def select(self, sequences_S: Tensor) -> EncodedSource:
        """The same of these sequences alone (int64 [S]), which may repeat."""
        layers = [
            (layer.keys[sequences_S], layer.values[sequences_S])
            for layer in cast(list[Any], self.cache.layers)
        ]
        return EncodedSource(
            self.states_BSH[sequences_S], self.mask_BNS[sequences_S], DynamicCache(layers)
        )


class SlotCache(Cache):
    """A Hugging Face cache whose slot s of sequence b is position s, committed up to `lengths[b]`.

    Rows of a call are written from `lengths[b]` on, after those of earlier calls that they still
    attend to; `commit` keeps the accepted ones and moves only those.

    Args:
        num_layers: layers that will write.
        batch_size: sequences.
        capacity: slots per sequence; the buffer is allocated once, when the first keys arrive.
        devices: of every layer, where they are not all on one; each device has a buffer for its
            layers.
        fixed: buffers at fixed addresses (`modules.target.kernels.compiled_calls`), new or used
            before; every call then sees all slots, and its mask excludes the unused ones.
        apart: whether each layer has a buffer of its own, because not all of them write.
    """

    def __init__(
        self,
        num_layers: int,
        batch_size: int,
        capacity: int,
        devices: Sequence[torch.device] = (),
        fixed: Buffers | None = None,
        apart: bool = False,
    ) -> None:
        super().__init__(layers=[])
        self._apart = apart
        self.num_layers, self.capacity = num_layers, capacity
        self.lengths = [0] * batch_size
        self._lengths_B: Tensor | None = None
        self._devices, self.fixed = list(devices), fixed
        self._spread = len(set(self._devices)) > 1
        self._stores: dict[Hashable, Tensor] = {}
        """[L,2,B,K,S,D] of the layers of each device, or of each layer; [L,1,B,K,S,D] of keys and
        of values where their shapes differ."""
        self._layers: dict[int, tuple[Tensor, Tensor]] = {}
        """Keys and values of the layers that have written, views of the stores."""
        if fixed is not None and fixed.store is not None:
            self._stores[fixed.store.device] = fixed.store
        self._slots: Tensor | None = None
        self._read_BX: Tensor | None = None
        self.ahead = 0
        """Rows of earlier calls, written since the last commit, that come before those of this
        call.
        """
        self.positions_BJ: Tensor | None = None
        """Positions of the rows written since the last commit."""
        self.bytes_read = 0
        """Bytes of keys and values that calls have read so far; calls through `torch.compile` are
        not counted."""
        self.recurrent = RecurrentStates()
        """Of layers that keep a state in place of keys and values."""
        self.offsets_B: Tensor | None = None
        """How far rotary positions are from slots, behind images."""
        self.encoded: EncodedSource | None = None
        """Of an encoder-decoder model, what its encoder read."""

    @property
    def batch_size(self) -> int:
        """Number of sequences in the cache."""
        return len(self.lengths)

    @property
    def uniform(self) -> bool:
        """Whether slices are enough: all sequences have the same length, and buffers have no fixed
        addresses.
        """
        return self.fixed is None and len(set(self.lengths)) == 1

    @property
    def slots_BN(self) -> Tensor:
        """int64 [B,N]: where the rows of the next call are written, if not by slices."""
        assert self._slots is not None, "begin() a call first"
        return self._slots

    def lengths_tensor(self, device: torch.device) -> Tensor:
        """int64 [B]: committed tokens. The tensor stays on the device, where `commit` updates
        it."""
        if self._lengths_B is None or self._lengths_B.device != device:
            self._lengths_B = torch.tensor(self.lengths, device=device)
        return self._lengths_B

    def window(self, width: int) -> int:
        """Slots that a call of `width` rows attends to; refuses a call that does not fit."""
        end = max(self.lengths) + width
        if end > self.capacity:
            raise ValueError(
                f"the KV cache holds {self.capacity} tokens, {end} are needed: open it with more "
                "capacity"
            )
        return end if self.fixed is None else self.capacity

    def reserve(self, width: int) -> None:
        """Make room for `width` rows after the longest sequence, by doubling the capacity if
        necessary.
        """
        needed = max(self.lengths) + width
        if needed > self.capacity:
            grown = max(needed, 2 * self.capacity)
            self._change(lambda store: F.pad(store, (0, 0, 0, grown - self.capacity)))
            self.capacity = grown

    def begin(self, rows: Rows) -> None:
        """Choose the slots of the next call's rows, after those of earlier calls that they still
        see, and the slots that they read.
        """
        batch, width = self.batch_size, rows.position_ids_BN.shape[1]
        ahead = rows.visible_BNJ.shape[2] - width
        # 1. Positions of all rows since the last commit.
        self.window(ahead + width)
        self._slots, self.ahead = None, ahead
        here = rows.position_ids_BN.expand(batch, -1)
        earlier = (
            here[:, :0] if self.positions_BJ is None or not ahead else self.positions_BJ[:, :ahead]
        )
        self.positions_BJ = torch.cat([earlier, here], dim=1)
        # 2. Where the new rows are written.
        if not self.uniform:
            first_B1 = self.lengths_tensor(here.device)[:, None] + ahead
            self._slots = first_B1 + torch.arange(width, device=here.device)
        # 3. What they read: chosen committed slots, then all rows since the last commit.
        self._read_BX = None
        if rows.committed_BS is not None:
            since = torch.arange(ahead + width, device=here.device)
            recent_BJ = self.lengths_tensor(here.device)[:, None] + since
            chosen_BS = rows.committed_BS.clamp(min=0).expand(batch, -1)
            self._read_BX = torch.cat([chosen_BS, recent_BJ], dim=1)

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *_: Any, **__: Any
    ) -> tuple[Tensor, Tensor]:
        """Write [B,K,N,D] keys and values of one layer and return all that the rows may attend
        to.
        """
        # 1. Write the rows.
        keys, values = self._buffers(layer_idx, key_states, value_states)
        self._write(keys, key_states)
        self._write(values, value_states)
        # 2. What they read: the chosen slots, or all up to the last row.
        if self._read_BX is not None:
            keys, values = self._chosen(keys), self._chosen(values)
        else:
            end = self.window(self.ahead + key_states.shape[2])
            keys, values = keys.narrow(2, 0, end), values.narrow(2, 0, end)
        self.bytes_read += 2 * keys.numel() * keys.element_size()
        return keys, values

    def _chosen(self, buffer_BKSD: Tensor) -> Tensor:
        """Rows [B,K,X,D] at the slots that the next call reads."""
        assert self._read_BX is not None
        index = self._read_BX.to(buffer_BKSD.device)[:, None, :, None]
        return buffer_BKSD.gather(
            2, index.expand(-1, buffer_BKSD.shape[1], -1, buffer_BKSD.shape[3])
        )

    def _buffers(self, layer: int, keys_BKND: Tensor, values_BKND: Tensor) -> tuple[Tensor, Tensor]:
        """Where a layer's keys and values [B,K,S,D] are, on the device where it computes. Their
        shapes may differ.
        """
        if layer not in self._layers:
            alike = keys_BKND.shape == values_BKND.shape
            self._layers[layer] = (
                self._buffer(layer, keys_BKND, 0, alike),
                self._buffer(layer, values_BKND, 1, alike),
            )
        return self._layers[layer]

    def _buffer(self, layer: int, like_BKND: Tensor, side: int, alike: bool) -> Tensor:
        """The keys (`side` 0) or values (1) of a layer; `alike`: both are in one store."""
        device = like_BKND.device
        # 1. One store per device for all of its layers.
        shared = layer if self._apart else device
        place: Hashable = shared if alike else (shared, side)
        if place not in self._stores:
            layers = self._devices.count(device) if self._spread else self.num_layers
            layers = 1 if self._apart else layers
            self._stores[place] = self._blank(layers, 2 if alike else 1, like_BKND)
            if self.fixed is not None:
                if not alike:
                    raise ValueError("compile: the target's keys and values differ: leave it out")
                self.fixed.hold(self._stores[place])
        store, row = self._stores[place], self._row(layer, device)
        if store.shape[3] == like_BKND.shape[1] and store.shape[5] == like_BKND.shape[3]:
            return store[row, side if alike else 0]
        # 2. A layer of other dimensions than the first has a store of its own.
        if (layer, side) not in self._stores:
            self._stores[layer, side] = self._blank(1, 1, like_BKND)
        return self._stores[layer, side][0, 0]

    def _blank(self, layers: int, sides: int, like_BKND: Tensor) -> Tensor:
        batch, heads, _, size = like_BKND.shape
        return like_BKND.new_zeros(layers, sides, batch, heads, self.capacity, size)

    def _change(self, how: Callable[[Tensor], Tensor]) -> None:
        """Replace every buffer by `how(buffer)`, at another address."""
        self.fixed = None
        self._layers.clear()
        self._stores = {place: how(store) for place, store in self._stores.items()}

    def _write(self, buffer_BKSD: Tensor, rows_BKND: Tensor) -> None:
        if self._slots is None:
            start = self.lengths[0] + self.ahead
            buffer_BKSD.narrow(2, start, rows_BKND.shape[2]).copy_(rows_BKND)
        else:
            slots_BN = self._slots.to(rows_BKND.device)
            buffer_BKSD.scatter_(2, slots_BN[:, None, :, None].expand_as(rows_BKND), rows_BKND)

    def commit(self, accepted: Accepted) -> None:
        """Keep, per sequence, the accepted rows of the last call, in the order of their path."""
        assert self._stores, "nothing was written yet"
        self.recurrent.commit(accepted)
        for sequence, rows in enumerate(accepted.paths):
            # Rows at their final slots need not move.
            in_place = next((i for i, row in enumerate(rows) if row != i), len(rows))
            if in_place < len(rows):
                self._compact(sequence, accepted.path_BA[sequence, in_place : len(rows)], in_place)
            self.lengths[sequence] += len(rows)
        if self._lengths_B is not None:
            self._lengths_B = self._lengths_B + accepted.lengths_B.to(self._lengths_B.device)

    def layer_keys(self, count: int) -> list[Tensor]:
        """Keys [B,K,S,D] of the first `count` layers, up to the longest committed length."""
        assert self._stores, "nothing was written yet"
        if not all(isinstance(place, torch.device) for place in self._stores):
            raise ValueError(
                "slots are chosen by keys that are as large as values in every layer: use a target "
                "whose layers all attend, without latent attention"
            )
        end = max(self.lengths)
        devices = self._devices if self._spread else [next(iter(self._stores))] * count
        return [
            self._stores[device][self._row(layer, device), 0][:, :, :end]
            for layer, device in enumerate(devices)
        ]

    def committed_layers(self) -> list[tuple[Tensor, Tensor]]:
        """Copies of the keys and values [B,K,S,D] of every layer, up to the longest committed
        length.
        """
        end = max(self.lengths)
        return [
            (keys[:, :, :end].clone(), values[:, :, :end].clone())
            for _, (keys, values) in sorted(self._layers.items())
        ]

    def _row(self, layer: int, device: Hashable) -> int:
        """Where a layer lies in the store of its device."""
        if self._apart:
            return 0
        return self._devices[:layer].count(cast(Any, device)) if self._spread else layer

    def rewind(self, lengths: list[int]) -> None:
        """Forget what is committed after so many tokens of each sequence.

        Raises:
            ValueError: layers keep a state, which cannot be taken back.
        """
        if self.recurrent.committed and lengths != self.lengths:
            raise ValueError(
                "committed tokens of a model with recurrent layers cannot be forgotten: use a "
                "drafter that does not rewind, or one whose layers all attend"
            )
        assert all(0 <= short <= now for short, now in zip(lengths, self.lengths, strict=True))
        self.lengths, self._lengths_B = list(lengths), None

    def _compact(self, sequence: int, tail_M: Tensor, in_place: int) -> None:
        """Move the rows after the first `in_place` ones, which need not move."""
        start = self.lengths[sequence]
        target = start + in_place
        for store in self._stores.values():
            buffer = store[..., sequence, :, :, :]
            moved = buffer.index_select(-2, tail_M.to(buffer.device) + start)
            buffer[..., target : target + len(tail_M), :] = moved

    def select(self, sequences_S: Tensor) -> SlotCache:
        """A cache of these sequences alone (int64 [S]), without the rows that are not committed."""
        chosen = SlotCache(
            self.num_layers, len(sequences_S), self.capacity, self._devices, apart=self._apart
        )
        chosen.lengths = [self.lengths[i] for i in sequences_S.tolist()]
        chosen._stores = {
            place: store[:, :, sequences_S.to(store.device)]
            for place, store in self._stores.items()
        }
        chosen.offsets_B = None if self.offsets_B is None else self.offsets_B[sequences_S]
        chosen.recurrent = self.recurrent.chosen(sequences_S)
        chosen.encoded = None if self.encoded is None else self.encoded.select(sequences_S)
        return chosen

    def keep(self, sequences: list[int]) -> None:
        """Keep only these sequences, which may repeat."""
        self.lengths, self._lengths_B = [self.lengths[i] for i in sequences], None
        self._change(lambda store: store[:, :, sequences].contiguous())
        self.recurrent = self.recurrent.chosen(torch.tensor(sequences))
        self.offsets_B = None if self.offsets_B is None else self.offsets_B[sequences]
        if self.encoded is not None:
            rows_S = torch.tensor(sequences, device=self.encoded.states_BSH.device)
            self.encoded = self.encoded.select(rows_S)

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Longest committed length (part of Hugging Face's interface)."""
        return max(self.lengths)

    def get_query_offset(self, layer_idx: int = 0) -> int:
        """Position of the first row of a call."""
        return max(self.lengths)

    def get_mask_sizes(self, query_length: int, layer_idx: int = 0) -> tuple[int, int]:
        """Number of slots that a call sees, and the first of them."""
        return max(self.lengths) + query_length, 0


class AppendedCache(SlotCache):
    """Keys and values of the rows of a few calls, none committed, concatenated into new tensors.
    Gradients reach the rows of the last call, not those of earlier calls.
    """

    def __init__(self, num_layers: int, batch_size: int, capacity: int) -> None:
        super().__init__(num_layers, batch_size, capacity)
        self._appended: dict[int, tuple[Tensor, Tensor]] = {}

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *_: Any, **__: Any
    ) -> tuple[Tensor, Tensor]:
        """Append [B,K,N,D] keys and values of one layer and return all so far."""
        keys, values = self._appended.get(layer_idx, (key_states[:, :, :0], value_states[:, :, :0]))
        keys, values = torch.cat([keys, key_states], 2), torch.cat([values, value_states], 2)
        self._appended[layer_idx] = (keys.detach(), values.detach())
        return keys, values


# -- prompts that several decoders read ------------------------------------------------------------

PROMPTS_IN_USE: ContextVar[PromptMemory | None] = ContextVar("prompts in use", default=None)
"""The memory inside of `PromptMemory.used`."""


@dataclass(frozen=True)
class ReadPrompts:
    """What a model's empty session holds after prompts: keys and values [B,K,S,D] by layer, logits
    [B,V], states [B,T,H]; and the seconds that reading took.
    """

    model: Any
    ids_BT: Tensor
    lengths: list[int]
    layers: list[tuple[Tensor, Tensor]]
    logits_BV: Tensor
    states: dict[StateName, Tensor]
    seconds: float

    def serves(
        self, model: Any, ids_BT: Tensor, lengths: list[int], names: Sequence[StateName]
    ) -> bool:
        """Whether these are the prompts that a session is to read, and these states are there."""
        same = model is self.model and lengths == self.lengths and set(names) <= self.states.keys()
        return same and torch.equal(ids_BT, self.ids_BT)

    @property
    def bytes(self) -> int:
        """Of keys and values."""
        return sum(rows.nbytes for layer in self.layers for rows in layer)


@dataclass
class PromptMemory:
    """The prompts that targets read last, for the next decoder that reads the same ones: at 16,000
    tokens this takes longer than the answer.

    limit: bytes of keys and values; the newest prompts are always kept. spared: seconds that
    recalls have spared since `used` began.
    """

    limit: int = 0
    spared: float = 0.0
    _read: list[ReadPrompts] = field(default_factory=list)

    @contextmanager
    def used(self) -> Iterator[None]:
        """Prompts that are read inside are kept and recalled here."""
        self.spared, before = 0.0, PROMPTS_IN_USE.set(self)
        try:
            yield
        finally:
            PROMPTS_IN_USE.reset(before)

    def recall(
        self,
        model: Any,
        cache: SlotCache,
        ids_BT: Tensor,
        counts_B: Tensor,
        names: Sequence[StateName],
    ) -> tuple[Tensor, dict[StateName, Tensor]] | None:
        """Fill an empty cache with these prompts, of which the first `counts_B` tokens are no
        padding; returns logits [B,V] and states [B,T,H], or None where they are not kept.
        """
        began, lengths = time.perf_counter(), counts_B.tolist()
        read = next((r for r in self._read if r.serves(model, ids_BT, lengths, names)), None)
        if read is None:
            return None
        # Written as a call of the layers writes them.
        order_T = torch.arange(ids_BT.shape[1], device=ids_BT.device)
        cache.begin(causal_rows(torch.zeros_like(counts_B), ids_BT.shape[1]))
        for layer, (keys, values) in enumerate(read.layers):
            cache.update(keys, values, layer)
        cache.commit(Accepted(order_T.expand(len(lengths), -1), counts_B, counts_B))
        self.spared += read.seconds - (time.perf_counter() - began)
        return read.logits_BV.clone(), {name: read.states[name].clone() for name in names}

    def keep(
        self,
        model: Any,
        cache: SlotCache,
        ids_BT: Tensor,
        read: tuple[Tensor, dict[StateName, Tensor]],
        seconds: float,
    ) -> None:
        """Remember what an empty cache holds after these prompts.

        Args:
            model: that read them.
            cache: of their session.
            ids_BT: the prompts, padded on the right.
            read: logits [B,V] and states [B,T,H].
            seconds: that it took.
        """
        states = {name: state.clone() for name, state in read[1].items()}
        layers, lengths = cache.committed_layers(), list(cache.lengths)
        newest = ReadPrompts(model, ids_BT, lengths, layers, read[0].clone(), states, seconds)
        self._read.append(newest)
        while len(self._read) > 1 and sum(read.bytes for read in self._read) > self.limit:
            del self._read[0]
