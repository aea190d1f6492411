"""The contract of a policy: which slots of the KV cache a layer's attention reads.

A `Policy` holds settings. `start` gives the `Selection` of a batch, which holds what it remembers
of the sequences. In every layer of every call the selection sees queries and keys and names slots;
`modules.sparse_kv.reader` reads them. Slots are chosen for every row alone, from what the row may
see: committed tokens and the rows of its own path. A row of a tree is therefore computed as in a
chain, and as in plain decoding.

Shape legend: B sequences, Q query heads, K key/value heads, G query heads per key/value head, X
chosen slots, R rows with a choice of their own (N, or 1 for all rows together), h heads with a
choice of their own (1, K or Q), N rows of one call, J rows since the last commit, S slots, D head
size, A accepted rows.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, field, fields, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from typing_extensions import Self

from modules.contracts.rows import rows_at
from modules.contracts.target import Target
from modules.target.session import PROMPT_ROWS
from modules.target.stock.key_rotation import KeyRotation


@dataclass
class KVReads:
    """Bytes of keys and values that calls have read.

    attention: for the attention itself, each gathered row counted as often as it was gathered.
    selection: keys, or their summaries, to choose slots by.
    """

    attention: int = 0
    selection: int = 0

    @property
    def total(self) -> int:
        """Bytes read for attention and selection."""
        return self.attention + self.selection


@dataclass
class LayerCall:
    """What a selection sees of one layer in one call.

    layer: its index. query_BQND, keys_BKSD: after the rotation. scaling: of their products.
    visible_BNS: bool [B,N,S], slots that each row may attend to. lengths_B: committed slots.
    row_slots_BN: the slot of each row of the call. positions_BN: its position. positions_BS: the
    position of each slot. tokens_BN: ids of the rows. counts_B: rows of each sequence that are
    none of the padding. pending: J, rows since the last commit. reads: where what is read is
    counted.
    """

    layer: int
    query_BQND: Tensor
    keys_BKSD: Tensor
    scaling: float
    visible_BNS: Tensor
    lengths_B: Tensor
    row_slots_BN: Tensor
    positions_BN: Tensor
    positions_BS: Tensor
    tokens_BN: Tensor
    counts_B: Tensor
    pending: int = 1
    reads: KVReads = field(default_factory=KVReads)

    @property
    def grouped_BKGND(self) -> Tensor:
        """Queries by the key/value head that they read."""
        batch, heads, rows, size = self.query_BQND.shape
        kv_heads = self.keys_BKSD.shape[1]
        return self.query_BQND.view(batch, kv_heads, heads // kv_heads, rows, size)

    @property
    def slots(self) -> int:
        """Slots that the call may read."""
        return self.keys_BKSD.shape[2]

    @cached_property
    def logits_BKGNS(self) -> Tensor:
        """`products` of the rows, -inf where a row sees nothing."""
        hidden = ~self.visible_BNS[:, None, None]
        return self.products(self.grouped_BKGND).masked_fill(hidden, -torch.inf)

    def products(self, query_BKGRD: Tensor) -> Tensor:
        """Scaled products [B,K,G,R,S] with the keys of all slots, at least in float32. Reads all
        keys.
        """
        self.reads.selection += self.keys_BKSD.numel() * self.keys_BKSD.element_size()
        products = torch.einsum("bkgnd,bksd->bkgns", query_BKGRD, self.keys_BKSD)
        return widened(products) * self.scaling

    @cached_property
    def probabilities_BKGNS(self) -> Tensor:
        """Attention of every query head to all slots."""
        return self.logits_BKGNS.softmax(-1)

    @property
    def scored(self) -> bool:
        """Whether all keys were read for the choice."""
        return "logits_BKGNS" in self.__dict__

    @cached_property
    def pending_slots_BJ(self) -> Tensor:
        """Slots of the rows since the last commit, this call's last."""
        order = torch.arange(self.pending, device=self.lengths_B.device)
        return self.lengths_B[:, None] + order

    @cached_property
    def path_BNJ(self) -> Tensor:
        """bool: rows since the last commit that each row descends from, itself included."""
        slots = self.pending_slots_BJ[:, None].expand(-1, self.visible_BNS.shape[1], -1)
        return self.visible_BNS.gather(2, slots)

    def newest_slots(self, count: int) -> Tensor:
        """int64 [B,1,N,X]: the slots of the newest `count` positions that each row sees, itself
        among them; -1 where there are fewer.
        """
        offsets = torch.arange(1 - count, 1, device=self.lengths_B.device)
        committed_BNX = self.positions_BN[..., None] + offsets
        inside = (committed_BNX >= 0) & (committed_BNX < self.lengths_B[:, None, None])
        # Rows since the last commit are in the order of their calls, not of their positions.
        pending_B1J = self.pending_slots_BJ[:, None]
        place_B1J = self.positions_BS.gather(1, self.pending_slots_BJ)[:, None]
        near = self.path_BNJ & (self.positions_BN[..., None] - place_B1J < count)
        return torch.cat(
            [torch.where(inside, committed_BNX, -1), torch.where(near, pending_B1J, -1)], 2
        )[:, None]

    def first_slots(self, count: int) -> Tensor:
        """int64 [B,1,N,X]: the first `count` slots."""
        rows, batch = self.positions_BN.shape[1], len(self.lengths_B)
        first = torch.arange(min(count, self.slots), device=self.lengths_B.device)
        return first.expand(batch, 1, rows, -1)


@dataclass(frozen=True)
class Step:
    """What a commit keeps, as selections see it.

    path_BA: accepted rows of the last call since the commit before, 0 after `counts_B`. tokens_BA:
    their ids. lengths_B: committed tokens before them.
    """

    path_BA: Tensor
    counts_B: Tensor
    tokens_BA: Tensor
    lengths_B: Tensor

    @property
    def last_B1(self) -> Tensor:
        """The deepest accepted row."""
        return self.path_BA.gather(1, (self.counts_B[:, None] - 1).clamp(min=0))

    def at_last(self, rows_BNX: Tensor) -> Tensor:
        """What rows [B,N,X] hold at the deepest accepted one [B,X]."""
        return rows_at(rows_BNX, self.last_B1)[:, 0]

    def moved(self, slots_BX: Tensor) -> Tensor:
        """Slots that were chosen before the commit, where it moves them: a row's to its place in
        the path; -1 for rows that are dropped.
        """
        row_BX = slots_BX - self.lengths_B[:, None]
        valid = torch.arange(self.path_BA.shape[1], device=slots_BX.device) < self.counts_B[:, None]
        same_BXA = (row_BX[..., None] == self.path_BA[:, None]) & valid[:, None]
        place = self.lengths_B[:, None] + same_BXA.int().argmax(-1)
        return torch.where(row_BX < 0, slots_BX, torch.where(same_BXA.any(-1), place, -1))


@dataclass
class Selection(ABC):
    """The choice of slots for some sequences, and what it remembers of them: tensors that lead with
    B, dicts and lists of such, and parts with a `select` of their own.
    """

    @property
    def rotation(self) -> KeyRotation | None:
        """What turns chosen slots to consecutive positions; None: they keep those of the text."""
        return None

    @abstractmethod
    def choose(self, call: LayerCall) -> Tensor | None:
        """int64 [B,h,R,X]: the slots that each row reads, each once, -1 where there are fewer; or
        None for all of them. A row always reads itself.
        """

    def refresh(self, call: LayerCall) -> Tensor | None:
        """The same for rows that read all slots, but whose choice later rows will read."""
        return self.choose(call)

    def choose_prompt(self, call: LayerCall) -> Tensor | None:
        """The same for rows of a prompt, of which every row always reads those that it sees of its
        own call.
        """
        return None

    def read_prompt(self, ids_BT: Tensor, lengths_B: Tensor) -> None:
        """Prompts that the next calls read, after what is committed."""
        return

    def end_prompt(self, keys: list[Tensor], lengths_B: Tensor) -> None:
        """Keys [B,K,S,D] of every layer after the prompts, of which `lengths_B` are committed."""
        return

    def commit(self, step: Step) -> None:
        """Advance over accepted rows."""
        return

    def select(self, sequences_S: Tensor) -> Self:
        """The selection of these sequences alone (int64 [S]), which may repeat."""
        parts = {f.name: selected(getattr(self, f.name), sequences_S) for f in fields(self)}
        return replace(self, **parts)


class Policy(ABC):
    """Settings of a way to choose slots.

    prompt_rows: tokens of a prompt in one call. observed: newest tokens of a prompt whose queries a
    selection wants to have seen, also where the prompt was read without it. without_keys: whether
    rows are chosen without reading the keys, so that these may lie in host memory. any_length:
    whether all that is read stands at positions within the target's context, however long the text
    is.
    """

    prompt_rows: int = PROMPT_ROWS
    observed: int = 0
    without_keys: bool = False
    any_length: bool = False

    @abstractmethod
    def start(self, target: Target, batch: int) -> Selection:
        """The selection of new sequences.

        Raises:
            ValueError: settings that do not fit the target.
        """


def highest(scores: Tensor, count: int, ties: bool = False) -> tuple[Tensor, Tensor]:
    """The `count` highest scores along the last dimension, and where they stand.

    ties: whether equal scores are to be expected, as after a maximum over neighbours; then the
    first ones are taken, whatever the other sequences of a batch are.
    """
    if not ties:
        return scores.topk(count, dim=-1)
    values, order = scores.sort(dim=-1, descending=True, stable=True)
    return values[..., :count], order[..., :count]


def top_slots(
    scores_BhRS: Tensor, visible_BNS: Tensor, count: int, ties: bool = False
) -> Tensor | None:
    """int64 [B,h,R,X]: the `count` slots of the highest scores among those that each row sees, in
    their order; None where there are no more slots. `ties` as in `highest`.
    """
    if count >= scores_BhRS.shape[-1]:
        return None
    masked = scores_BhRS.masked_fill(~visible_BNS[:, None], -torch.inf)
    values, slots = highest(masked, count, ties)
    return torch.where(values > -torch.inf, slots, -1).sort(-1).values


def selected(part: Any, sequences_S: Tensor) -> Any:
    """A part of a selection's state, of these sequences alone (int64 [S])."""
    if isinstance(part, Tensor):
        return part[sequences_S]
    if isinstance(part, dict):
        return {name: selected(inner, sequences_S) for name, inner in part.items()}
    if hasattr(part, "select"):
        return part.select(sequences_S)
    return [selected(inner, sequences_S) for inner in part] if isinstance(part, list) else part


def checked(**least: tuple[int, int]) -> None:
    """ValueError for a setting below its least value: `name=(value, least)`."""
    for name, (value, low) in least.items():
        if value < low:
            raise ValueError(f"{name} must be at least {low}, got {value}")


def widened(values: Tensor) -> Tensor:
    """The values in float32 at least."""
    return values.float() if values.dtype.itemsize < 4 else values


def gathered_rows(buffer_BKSD: Tensor, slots_BhRX: Tensor, heads: int) -> Tensor:
    """Rows [B,heads,R,X,D] of a buffer at slots, those below 0 at slot 0. Query heads read their
    group's key/value head.
    """
    batch, kv_heads, _, size = buffer_BKSD.shape
    device = buffer_BKSD.device
    slots_BhRX = slots_BhRX.to(device)
    head = torch.arange(heads, device=device) // (heads // kv_heads)
    sequence = torch.arange(batch, device=device)
    slots = slots_BhRX.clamp(min=0).expand(-1, heads, -1, -1)
    step = buffer_BKSD.stride()
    if size and step[3] == 1 and not any(jump % size for jump in step[:3]):
        # One copy of whole rows, from the buffer where it lies.
        offset = sequence[:, None] * (step[0] // size) + head * (step[1] // size)
        flat = slots * (step[2] // size) + offset[..., None, None]
        count = sum((n - 1) * jump for n, jump in zip(buffer_BKSD.shape, step)) // size + 1
        table = buffer_BKSD.as_strided((count, size), (size, 1))
        return table.index_select(0, flat.reshape(-1)).view(*slots.shape, size)
    return buffer_BKSD[sequence[:, None, None, None], head[None, :, None, None], slots]
