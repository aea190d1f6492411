"""Segments of layers with one KV cache each, which run rows of an earlier exit when they are
needed.

A row that exits after an early segment has no keys in the later ones. Its hidden state stays there
as pending; when a later row goes deeper, the segment runs all pending rows and that row in a single
call. The result equals running every layer on every row.

Shape legend: B sequences, N rows of one call, P pending prefix rows, R rows of a proposal, J rows
of a call in the order they are written, W frontier nodes, H hidden size.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from modules.contracts.rows import Rows, rows_at
from modules.contracts.shapes import TargetShape
from modules.layers.decoder_layer import LayerCache, run_layers


@dataclass(frozen=True)
class Pending:
    """Prefix rows that a segment has yet to run: hidden_BPH [B,P,H], the first `counts_B` of each
    sequence.
    """

    hidden_BPH: Tensor
    counts_B: Tensor

    @staticmethod
    def none(like_BNH: Tensor) -> Pending:
        """No rows, for as many sequences as `like_BNH` has."""
        return Pending(
            like_BNH[:, :0], torch.zeros(len(like_BNH), dtype=torch.long, device=like_BNH.device)
        )

    def and_then(self, more: Pending) -> Pending:
        """These rows followed by others, sequence by sequence."""
        held = self.hidden_BPH.shape[1]
        if held == 0 or more.hidden_BPH.shape[1] == 0:
            return more if held == 0 else self
        both, counts = (
            torch.cat([self.hidden_BPH, more.hidden_BPH], dim=1),
            self.counts_B + more.counts_B,
        )
        # Real rows of both parts move together; padding of the first is skipped.
        place = torch.arange(int(counts.max()), device=counts.device).expand(len(counts), -1)
        counts_B1 = self.counts_B[:, None]
        index = torch.where(place < counts_B1, place, held + place - counts_B1).clamp(
            max=both.shape[1] - 1
        )
        return Pending(rows_at(both, index), counts)

    def select(self, sequences_S: Tensor) -> Pending:
        """The rows of these sequences alone (int64 [S])."""
        return Pending(self.hidden_BPH[sequences_S], self.counts_B[sequences_S])


@dataclass
class Segment:
    """State of one segment of layers.

    caches: keys and values of its layers.
    pending: prefix rows that it has not run.
    rows_BRH: its inputs for the rows of this proposal that reached it; it has run the first
    `written`.
    """

    caches: list[LayerCache]
    pending: Pending
    rows_BRH: Tensor
    written: int = 0

    @staticmethod
    def empty(shape: TargetShape, layers: int, like_BNH: Tensor) -> Segment:
        """An empty segment for as many sequences as `like_BNH` has."""
        pending = Pending.none(like_BNH)
        caches = [LayerCache.empty(shape, pending.counts_B, like_BNH.dtype) for _ in range(layers)]
        return Segment(caches, pending, pending.hidden_BPH)

    def select(self, sequences_S: Tensor) -> Segment:
        """The segment of these sequences alone (int64 [S])."""
        return Segment(
            [cache.select(sequences_S) for cache in self.caches],
            self.pending.select(sequences_S),
            self.rows_BRH[sequences_S],
            self.written,
        )

    def forget_proposal(self) -> None:
        """Drop the rows of the proposal; prefix rows stay."""
        self.rows_BRH, self.written = self.rows_BRH[:, :0], 0

    def catch_up(
        self, layers: nn.ModuleList, above_BRR: Tensor, position_ids_BR: Tensor
    ) -> tuple[Pending, Tensor]:
        """Run all pending rows in one call.

        Returns the outputs of the pending prefix rows and of the proposal's pending rows [B,N,H].

        Args:
            layers: the segment's layers.
            above_BRR: which rows of the proposal each one sees, itself included.
            position_ids_BR: their positions.
        """
        start, stop = self.written, self.rows_BRH.shape[1]
        pending, held = self.pending, self.pending.hidden_BPH.shape[1]
        assert start == 0 or held == 0, "prefix rows come before the proposal's"
        # 1. Inputs and positions of prefix rows, then of the proposal's rows.
        hidden = torch.cat([pending.hidden_BPH, self.rows_BRH[:, start:]], dim=1)
        offsets = torch.arange(held, device=hidden.device)
        positions = torch.cat(
            [self.caches[0].lengths_B[:, None] + offsets, position_ids_BR[:, start:stop]], dim=1
        )
        # 2. Padding is written last, so that real rows are contiguous in the cache.
        order_BJ = _written_order(pending.counts_B, held, stop - start)
        visible = _visible(pending.counts_B, held, above_BRR[:, start:stop, :stop])
        rows = Rows(positions.gather(1, order_BJ), _reordered(visible, order_BJ))
        outputs = run_layers(layers, rows_at(hidden, order_BJ), rows, self.caches)
        # 3. The caches keep prefix rows for good; outputs go back to their order.
        for cache in self.caches:
            cache.keep(pending.counts_B)
        outputs = rows_at(outputs, order_BJ.argsort(1))
        self.pending, self.written = Pending.none(hidden), stop
        return Pending(outputs[:, :held], pending.counts_B), outputs[:, held:]


def _written_order(counts_B: Tensor, held: int, new: int) -> Tensor:
    """int64 [B,J]: the order of writing: real prefix rows, the proposal's rows, padding of the
    prefix rows.
    """
    place, count = torch.arange(held + new, device=counts_B.device), counts_B[:, None]
    return torch.where(
        place < count, place, torch.where(place < count + new, held + place - count, place - new)
    )


def _visible(counts_B: Tensor, held: int, above_BNR: Tensor) -> Tensor:
    """bool [B,P+N,P+R]: prefix rows see earlier ones; the proposal's rows see the prefix and their
    ancestors.
    """
    causal = (
        torch.ones(held, held, dtype=torch.bool, device=counts_B.device)
        .tril()
        .expand(len(counts_B), -1, -1)
    )
    prefix = torch.arange(held, device=counts_B.device) < counts_B[:, None]
    below = torch.cat([prefix[:, None].expand(-1, above_BNR.shape[1], -1), above_BNR], dim=2)
    return torch.cat([F.pad(causal, (0, above_BNR.shape[2])), below], dim=1)


def _reordered(visible_BNJ: Tensor, order_BJ: Tensor) -> Tensor:
    """The mask with its rows, and the last J of its columns, in the order of writing."""
    count = order_BJ.shape[1]
    rows = rows_at(visible_BNJ, order_BJ)
    new_columns = rows[..., -count:].gather(2, order_BJ[:, None].expand(-1, count, -1))
    return torch.cat([rows[..., :-count], new_columns], dim=2)
