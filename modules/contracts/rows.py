"""Rows of one call of the target: where each stands and what it attends to.

Shape legend: B sequences, N rows of one call, S committed slots.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Rows:
    """Rows to run through layers: where each one stands and which others it sees.

    position_ids_BN: int64 [B,N].
    visible_BNN: bool [B,N,N], `visible[b, i, j]`: row i attends to row j of the same call (itself
    included).
        Cached rows may have columns before those N: rows that earlier calls wrote and did not keep.
    cached: the rows also attend to the session's committed KV cache, and their own keys and values
    are written
        behind it, for `Session.commit` to keep.
    """

    position_ids_BN: Tensor
    visible_BNN: Tensor
    cached: bool = False
