"""Some of a batch's training rows, for drafters that compute many rows for each of them.

Shape legend: B sequences, T tokens of a packed row, M training rows.
"""

from __future__ import annotations

import torch
from torch import Tensor

from modules.contracts.batches import PADDING_DOCUMENT, TextBatch
from modules.losses.chunked import TrainingRows


def some_rows(
    rows: TrainingRows, batch: TextBatch, most: int | Tensor, per_document: bool, randomly: bool
) -> TrainingRows:
    """Up to `most` of the rows of every packed row, or of every document.

    Args:
        rows: of the batch.
        batch: whose documents count.
        most: rows of each unit, or int64 [B,T] of the unit that each token is in.
        per_document: the unit is a document instead of a packed row.
        randomly: random rows instead of evenly spaced ones.
    """
    flat_M = rows.flat_MK1[:, 0]
    unit = flat_M // batch.input_ids.shape[1]
    if per_document:
        documents = batch.document_ids
        unit = unit * (documents.max() + 1) + documents.flatten()[flat_M]
    most = most.flatten()[flat_M] if isinstance(most, Tensor) else most
    return rows.only(some_of_each(unit, most, randomly))


def document_sizes(batch: TextBatch) -> Tensor:
    """int64 [B,T]: tokens of the document that each token is in, padding as one of its own."""
    documents = batch.document_ids - PADDING_DOCUMENT
    width = int(documents.max()) + 1
    unit_BT = torch.arange(len(documents), device=documents.device)[:, None] * width + documents
    return unit_BT.flatten().bincount()[unit_BT]


def some_of_each(unit_M: Tensor, most: int | Tensor, randomly: bool) -> Tensor:
    """Indices of up to `most` rows of each unit (int64 [M]), evenly spaced or at random; `most` may
    be a tensor [M] of each row's unit.
    """
    count = len(unit_M)
    order = torch.randperm(count, device=unit_M.device) if randomly else torch.arange(count)
    order = order.to(unit_M.device)
    order = order[unit_M[order].argsort(stable=True)]
    _, inverse, sizes = unit_M[order].unique_consecutive(return_inverse=True, return_counts=True)
    place = torch.arange(count, device=unit_M.device) - (sizes.cumsum(0) - sizes)[inverse]
    size = sizes[inverse]
    retained = size.clamp(max=most[order] if isinstance(most, Tensor) else most)
    # Row r of c is chosen where the count of chosen ones, r * retained / c rounded down, goes up.
    chosen = (place + 1) * retained // size > place * retained // size
    return order[chosen].sort().values
