"""Packing documents into rows of at most T tokens, and rows into batches.

Best fit replaces buckets by length: rows are nearly full whatever the lengths of the documents, so
a batch of B rows has about B · T tokens.

Shape legend: B rows, T tokens of a row, H hidden size.
"""

from __future__ import annotations

import bisect
from collections.abc import Sequence

import torch
from torch import Tensor

from data.conversations import Tokens
from modules.contracts.batches import PADDING_DOCUMENT, TextBatch
from modules.contracts.shapes import StateName


def pack(lengths: Sequence[int], max_length: int, seed: int = 0, epoch: int = 0) -> list[list[int]]:
    """Rows of document indices whose lengths sum to at most `max_length`, deterministic in (seed,
    epoch).

    The documents are shuffled, then each goes to the fullest row with enough room (best fit), so
    that rows are mixed and well filled. Callers truncate documents to `max_length`.
    """
    assert not lengths or max(lengths) <= max_length, (
        "documents are truncated before they are packed"
    )
    # Rows sorted by free space, so that a bisection finds the tightest fit.
    shuffled = torch.randperm(len(lengths), generator=generator(seed, epoch)).tolist()
    rows: list[list[int]] = []
    space: list[tuple[int, int]] = []
    for document in shuffled:
        at = bisect.bisect_left(space, (lengths[document], -1))
        if at == len(space):
            rows.append([])
            free, row = max_length, len(rows) - 1
        else:
            free, row = space.pop(at)
        rows[row].append(document)
        bisect.insort(space, (free - lengths[document], row))
    return rows


def generator(seed: int, epoch: int) -> torch.Generator:
    """The random number generator of one epoch."""
    return torch.Generator().manual_seed((seed * 1_000_003 + epoch) % 2**63)


def collate(
    rows: Sequence[Sequence[Tokens]],
    states: Sequence[Sequence[dict[StateName, Tensor]]] | None = None,
    device: torch.device | str = "cpu",
) -> TextBatch:
    """One batch of packed rows, padded to the longest.

    Positions restart at 0 with each document; documents of a row are numbered from 0; padding has
    number -1 and attends only to itself.

    Args:
        states: per row and document, `{name: [T,H]}` from the feature cache; the dtype is
            unchanged.
    """
    # Empty rows, as wide as the longest.
    width = max(sum(map(len, row)) for row in rows)
    ids = torch.zeros(len(rows), width, dtype=torch.long)
    mask = torch.zeros(len(rows), width, dtype=torch.bool)
    positions, documents = torch.zeros_like(ids), torch.full_like(ids, PADDING_DOCUMENT)
    # Documents of a row side by side.
    for b, row in enumerate(rows):
        start = 0
        for number, document in enumerate(row):
            span = slice(start, start + len(document))
            ids[b, span], mask[b, span] = document.input_ids, document.loss_mask
            positions[b, span], documents[b, span] = torch.arange(len(document)), number
            start += len(document)
    filled = {} if states is None else _place(states, width)
    return TextBatch(
        ids.to(device),
        mask.to(device),
        positions.to(device),
        documents.to(device),
        {name: tensor.to(device) for name, tensor in filled.items()},
    )


def _place(
    states: Sequence[Sequence[dict[StateName, Tensor]]], width: int
) -> dict[StateName, Tensor]:
    """Cached states arranged like their rows [B,T,H], zero on padding."""
    first = states[0][0]
    placed = {
        name: torch.zeros(len(states), width, tensor.shape[-1], dtype=tensor.dtype)
        for name, tensor in first.items()
    }
    for b, row in enumerate(states):
        start = 0
        for document in row:
            for name, tensor in document.items():
                placed[name][b, start : start + tensor.shape[0]] = tensor
            start += next(iter(document.values())).shape[0] if document else 0
    return placed
