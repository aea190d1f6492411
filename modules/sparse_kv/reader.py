"""The attention of all policies: gather the chosen slots, and attend to them.

Keys are gathered from the cache with the angles of their positions; a selection may turn what was
gathered to consecutive positions.

Shape legend: B sequences, Q query heads, K key/value heads, G query heads that share a choice, h
heads with a choice of their own, R rows with a choice of their own, N rows of one call, J rows
since the last commit, X chosen slots, S slots, D head size.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from enum import Enum

import torch
from torch import Tensor
from torch.nn import functional as F

from modules.contracts.verification import Accepted
from modules.sparse_kv.offload import Fetcher, HostCache
from modules.sparse_kv.policy import KVReads, LayerCall, Selection, Step, gathered_rows, selected
from modules.target.kernels.attention_hook import LayerAttention
from modules.target.kv_cache import SlotCache
from modules.target.stock.key_rotation import KeyRotation


class Phase(Enum):
    """How calls read.

    PROMPT, WATCHED: a prompt, sparsely or in full. SPARSE: every row by its own choice. HELD: by
    the choice of the last refresh. REFRESH: in full, refreshing the choice.
    """

    PROMPT = "prompt"
    WATCHED = "watched"
    SPARSE = "sparse"
    HELD = "held"
    REFRESH = "refresh"


@dataclass
class SparseReader:
    """The attention hook of one session under a selection.

    Args:
        cache: of the session.
        selection: which chooses.
        held: by layer, the slots [B,h,1,X] that the last refresh chose; None: all of them.
        reads: bytes so far.
        fetcher: fetches rows from host memory, where the cache lies there.
    """

    cache: SlotCache
    selection: Selection
    held: dict[int, Tensor | None] = field(default_factory=dict)
    reads: KVReads = field(default_factory=KVReads)
    fetcher: Fetcher | None = None

    def __post_init__(self) -> None:
        """Begin outside of a call."""
        self._phase = Phase.SPARSE
        self._tokens_BN = torch.zeros(self.cache.batch_size, 0, dtype=torch.int64)
        self._counts_B: Tensor | None = None
        self._refreshed: dict[int, Tensor | None] = {}
        self._shared: tuple[Tensor, tuple[Tensor, ...]] | None = None

    def select(self, sequences_S: Tensor) -> SparseReader:
        """The reader of these sequences alone (int64 [S]), after the cache has dropped the others.
        What is read goes on being counted.
        """
        held = selected(self.held, sequences_S)
        fetcher = selected(self.fetcher, sequences_S)
        selection = self.selection.select(sequences_S)
        return SparseReader(self.cache, selection, held, self.reads, fetcher)

    def enter(self, phase: Phase, tokens_BN: Tensor, counts_B: Tensor | None = None) -> None:
        """From now on calls read so, over rows of these ids, of which the first `counts_B` are no
        padding.
        """
        self._phase, self._tokens_BN, self._counts_B = phase, tokens_BN, counts_B
        if isinstance(self.cache, HostCache):
            self.cache.whole = phase is not Phase.SPARSE

    def __call__(self, attention: LayerAttention) -> Tensor:
        """A layer's output [B,N,Q,D]."""
        call = self._call(attention)
        both = 2 * attention.key_BKSD.numel() * attention.key_BKSD.element_size()
        before = self.reads.total
        mixed = self._attend(attention, call, both)
        # The cache has counted all slots that it handed over.
        self.cache.bytes_read += self.reads.total - before - both
        return mixed

    def _attend(self, attention: LayerAttention, call: LayerCall, both: int) -> Tensor:
        # 1. Full attention by the model's own kernel, whose values no choice changes.
        if self._phase is Phase.REFRESH:
            self._refreshed[call.layer] = with_itself(call, self.selection.refresh(call))
        elif self._phase is Phase.WATCHED:
            self.selection.choose_prompt(call)
        if self._phase in (Phase.REFRESH, Phase.WATCHED):
            self.reads.attention += both
            return attention.stock()
        # 2. The choice; a choice from all keys has read them already.
        if self._phase is Phase.PROMPT:
            slots = self.selection.choose_prompt(call)
        elif self._phase is Phase.HELD:
            slots = self._held(call)
        else:
            slots = self.selection.choose(call)
        if self.fetcher is not None and self._phase is Phase.SPARSE:
            return self._fetched(attention, call, slots)
        if slots is None and call.scored:
            self.reads.attention += both // 2
            return from_probabilities(call, attention.value_BKSD)
        if slots is None:
            self.reads.attention += both
            return attention.stock()
        rows, rotation = _on_device(call, attention.value_BKSD), self.selection.rotation
        if rotation is not None and self.cache.offsets_B is not None:
            raise ValueError("positions: those behind images cannot be re-assigned: use original")
        return gathered_attention(call, slots, rows, rotation)

    def _fetched(self, attention: LayerAttention, call: LayerCall, slots: Tensor | None) -> Tensor:
        """Attention to rows in host memory."""
        fetcher, buffers = self.fetcher, (call.keys_BKSD, attention.value_BKSD)
        assert fetcher is not None
        if slots is None:
            slots = torch.arange(call.slots, device=call.lengths_B.device)[None, None, None]

        def rows(slots_BhRX: Tensor, heads: int) -> tuple[Tensor, Tensor]:
            return fetcher.fetch(call.layer, buffers, slots_BhRX, call.lengths_B, heads)

        return gathered_attention(call, slots, rows)

    def _held(self, call: LayerCall) -> Tensor | None:
        """The choice of the last refresh, and the rows since then."""
        slots = self.held.get(call.layer)
        if slots is None or call.query_BQND.shape[2] > 1:
            return slots
        pending = call.pending_slots_BJ[:, None, None].expand(-1, slots.shape[1], -1, -1)
        return torch.cat([slots, pending], 3)

    def _call(self, attention: LayerAttention) -> LayerCall:
        query, keys = attention.query_BQND, attention.key_BKSD
        lengths, rows, positions_BS = self._places(query.shape[2], keys)
        visible = attention.mask_BNS[:, 0] > torch.finfo(attention.mask_BNS.dtype).min / 2
        counts = self._counts_B
        return LayerCall(
            layer=attention.layer,
            query_BQND=query,
            keys_BKSD=keys,
            scaling=attention.scaling,
            visible_BNS=visible.expand(len(query), -1, -1),
            lengths_B=lengths,
            row_slots_BN=rows,
            positions_BN=positions_BS.gather(1, rows),
            positions_BS=positions_BS,
            tokens_BN=self._tokens_BN,
            counts_B=torch.full_like(lengths, query.shape[2]) if counts is None else counts,
            pending=self.cache.ahead + query.shape[2],
            reads=self.reads,
        )

    def _places(self, count: int, keys_BKSD: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Committed lengths [B], slots of the call's rows [B,N], positions of all slots [B,S]: the
        same in all layers of a call.
        """
        device = self._tokens_BN.device
        positions_BJ = self.cache.positions_BJ
        assert positions_BJ is not None
        if self._shared is None or self._shared[0] is not positions_BJ:
            lengths = self.cache.lengths_tensor(device)
            first_B1 = lengths[:, None] + self.cache.ahead
            rows = first_B1 + torch.arange(count, device=device)
            slots = torch.arange(keys_BKSD.shape[2], device=device).expand(len(lengths), -1).clone()
            recent = lengths[:, None] + torch.arange(positions_BJ.shape[1], device=device)
            places = slots.scatter(1, recent, positions_BJ.to(device))
            self._shared = positions_BJ, (lengths, rows, places)
        lengths, rows, places = self._shared[1]
        return lengths, rows, places

    def commit(self, accepted: Accepted, tokens_BN: Tensor, lengths_B: Tensor) -> None:
        """Tell the selection what a commit keeps of rows of these ids.

        lengths_B: committed tokens before them.
        """
        tokens = accepted.along_path(tokens_BN)
        step = Step(accepted.path_BA, accepted.lengths_B, tokens, lengths_B)
        self.selection.commit(step)
        # The newest row's choice serves the rows after it.
        for layer, slots in self._refreshed.items():
            self.held[layer] = None if slots is None else newest_choice(step, slots)
        self._refreshed = {}


def with_itself(call: LayerCall, slots_BhNX: Tensor | None) -> Tensor | None:
    """Slots that rows chose, and each row's own."""
    if slots_BhNX is None:
        return None
    itself = call.row_slots_BN[:, None, :, None]
    others = torch.where(slots_BhNX == itself, -1, slots_BhNX)
    itself = itself.expand(len(others), others.shape[1], -1, -1)
    return torch.cat([others.expand(-1, -1, itself.shape[2], -1), itself], 3)


def newest_choice(step: Step, slots_BhNX: Tensor) -> Tensor:
    """[B,h,1,X]: what the deepest accepted row chose, where the commit moves it."""
    batch, heads, _, width = slots_BhNX.shape
    last_BX = step.at_last(slots_BhNX.transpose(1, 2).flatten(2))
    return step.moved(last_BX).view(batch, heads, 1, width)


def from_probabilities(call: LayerCall, value_BKSD: Tensor) -> Tensor:
    """Attention [B,N,Q,D] to all slots, from the scores that the choice has computed."""
    weights = call.probabilities_BKGNS.to(value_BKSD.dtype)
    mixed = torch.einsum("bkgns,bksd->bnkgd", weights, value_BKSD)
    return mixed.flatten(2, 3)


RowsAt = Callable[[Tensor, int], tuple[Tensor, Tensor]]
"""Slots [B,h,R,X] and a number of heads -> keys and values [B,heads,R,X,D]."""


def _on_device(call: LayerCall, value_BKSD: Tensor) -> RowsAt:
    """Rows of buffers that lie where the call computes."""

    def rows(slots_BhRX: Tensor, heads: int) -> tuple[Tensor, Tensor]:
        keys, values = (
            gathered_rows(buffer, slots_BhRX, heads) for buffer in (call.keys_BKSD, value_BKSD)
        )
        return keys, values

    return rows


def gathered_attention(
    call: LayerCall,
    slots_BhRX: Tensor,
    rows_at_slots: RowsAt,
    rotation: KeyRotation | None = None,
) -> Tensor:
    """Attention [B,N,Q,D] to chosen slots, for any numbers of heads and rows that choose alone.

    Every row reads itself as well, or where all rows share a choice, the rows since the last commit
    that it sees. With a rotation, what a row reads stands at consecutive positions.
    """
    batch, heads, rows, size = call.query_BQND.shape
    alone = slots_BhRX.shape[2] == rows
    # 1. The rows that are always read, once.
    always_B11X = call.row_slots_BN[:, None, :, None]
    if not alone:
        always_B11X = call.pending_slots_BJ[:, None, None]
        slots_BhRX = torch.where(slots_BhRX < call.lengths_B[:, None, None, None], slots_BhRX, -1)
    else:
        slots_BhRX = torch.where(slots_BhRX == always_B11X, -1, slots_BhRX)
    always = always_B11X.expand(batch, slots_BhRX.shape[1], -1, -1)
    slots_BhRX = torch.cat([slots_BhRX.expand(batch, -1, -1, -1), always], 3)
    # 2. What each row sees of them.
    index = slots_BhRX.clamp(min=0).expand(-1, -1, rows, -1)
    visible_BhNS = call.visible_BNS[:, None].expand(-1, index.shape[1], -1, -1)
    seen_BhNX = visible_BhNS.gather(3, index) & (slots_BhRX >= 0)
    # 3. Keys and values of heads that choose alone.
    kv_heads = call.keys_BKSD.shape[1]
    apart = max(slots_BhRX.shape[1], kv_heads)
    keys, values = rows_at_slots(slots_BhRX, apart)
    call.reads.attention += 2 * keys.numel() * keys.element_size()
    # 4. Heads, or rows of heads, as the heads of one call of the kernel.
    query = call.query_BQND.reshape(batch, apart, heads // apart, rows, size)
    if rotation is not None:
        keys_at, rows_at = consecutive(call, slots_BhRX, seen_BhNX)
        keys = rotation.turned(call.layer, keys, places_of(call, slots_BhRX), keys_at)
        here = call.positions_BN[:, None, None]
        query = rotation.turned(call.layer, query, here, rows_at[:, :, None])
    seen = seen_BhNX.expand(-1, apart, -1, -1)[:, :, None].expand(-1, -1, query.shape[2], -1, -1)
    if alone:
        query, seen = query.transpose(2, 3), seen.transpose(2, 3)
    choices = apart * (rows if alone else 1)
    mixed = F.scaled_dot_product_attention(
        query.reshape(batch, choices, -1, size),
        keys.flatten(1, 2),
        values.flatten(1, 2),
        attn_mask=seen.reshape(batch, choices, -1, seen.shape[-1]),
        scale=call.scaling,
    )
    # 5. Back to [B,N,Q,D].
    if alone:
        mixed = mixed.view(batch, apart, rows, -1, size).permute(0, 2, 1, 3, 4)
    else:
        mixed = mixed.view(batch, apart, -1, rows, size).permute(0, 3, 1, 2, 4)
    return mixed.reshape(batch, rows, heads, size)


def places_of(call: LayerCall, slots_BhRX: Tensor) -> Tensor:
    """int64 [B,h,R,X]: positions in the text of slots, 0 for those below 0."""
    places = call.positions_BS[:, None, None].expand(*slots_BhRX.shape[:3], -1)
    return places.gather(3, slots_BhRX.clamp(min=0)).masked_fill(slots_BhRX < 0, 0)


def consecutive(call: LayerCall, slots_BhRX: Tensor, seen_BhNX: Tensor) -> tuple[Tensor, Tensor]:
    """Positions from 0 on without a gap, in the order of the text: of the slots that are read
    [B,h,R,X], and of the rows that read them [B,h,N].

    seen_BhNX: which of the slots each row sees.
    """
    places = places_of(call, slots_BhRX)
    # 1. Rows that choose alone: each is the last of what it sees.
    if slots_BhRX.shape[2] == seen_BhNX.shape[2]:
        return ranks(places, seen_BhNX), seen_BhNX.sum(-1) - 1
    # 2. A choice that all rows share: what is committed, then the rows since, whatever each sees.
    committed = (slots_BhRX >= 0) & (slots_BhRX < call.lengths_B[:, None, None, None])
    moved_Bh1 = committed.sum(-1) - call.lengths_B[:, None, None]
    after = torch.where(committed, ranks(places, committed), places + moved_Bh1[..., None])
    return after, call.positions_BN[:, None] + moved_Bh1


def ranks(places_X: Tensor, counted_X: Tensor) -> Tensor:
    """int64 [..., X]: how many of the counted places are before each."""
    last = torch.iinfo(places_X.dtype).max
    return places_X.masked_fill(~counted_X, last).argsort(-1).argsort(-1)
