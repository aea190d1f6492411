"""The rows of a large table that have the largest inner product with a query, searched exactly or
by an approximate nearest-neighbour index.

Shape legend: V rows, W width, K rows that are searched for.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

EXACT = "exact"


class NearestRows:
    """Rows by their inner product with a query.

    Args:
        rows_VW: the table, float32.
        index: `exact` compares all rows. Anything else is a faiss index factory, such as
            `IVF1024,Flat` or `HNSW32`, which compares some.
        settings: of the index's search, such as `nprobe=32` or `efSearch=64`.

    Raises:
        ValueError: faiss is missing, or knows no such index or settings.
    """

    def __init__(self, rows_VW: Tensor, index: str = EXACT, settings: str = "") -> None:
        self.device, self.size = rows_VW.device, len(rows_VW)
        self._rows_VW, self._index = rows_VW, None
        if index != EXACT:
            self._rows_VW, self._index = None, _built(rows_VW, index, settings)
        elif settings:
            raise ValueError(f"search {settings!r} is for an index: exact search has no settings")

    def search(self, query_W: Tensor, count: int) -> tuple[Tensor, Tensor]:
        """Inner products [K] and numbers [K] of the nearest rows, the largest first. An index may
        find fewer than `count`, and not always the best.
        """
        count = min(count, self.size)
        if self._rows_VW is not None:
            products_K, rows_K = (self._rows_VW @ query_W).topk(count)
            return products_K, rows_K
        assert self._index is not None
        products, rows = self._index.search(query_W.float().cpu().numpy()[None], count)
        # Missing ones are at the end.
        missing = rows[0] < 0
        products_K, rows_K = torch.from_numpy(products[0]), torch.from_numpy(rows[0])
        keep_K = torch.from_numpy(~missing)
        return products_K[keep_K].to(self.device), rows_K[keep_K].to(self.device)


def _built(rows_VW: Tensor, index: str, settings: str) -> Any:
    """A faiss index over the rows."""
    try:
        import faiss
    except ImportError as error:
        raise ValueError(
            f"index {index!r} needs faiss: install the extra `index`, or leave index out"
        ) from error
    rows = rows_VW.float().cpu().contiguous().numpy()
    try:
        built = faiss.index_factory(rows.shape[1], index, faiss.METRIC_INNER_PRODUCT)
        built.train(rows)
        built.add(rows)
        if settings:
            faiss.ParameterSpace().set_index_parameters(built, settings)
    except RuntimeError as error:
        line = " ".join(str(error).split())
        raise ValueError(f"index {index!r} with search {settings!r}: {line}") from error
    return built
