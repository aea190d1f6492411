"""Rows of one call of the target: where each stands and what it attends to.

Shape legend: B sequences, N rows of one call, J rows since the last commit, S slots.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Rows:
    """Rows to run through layers: where each one stands and which others it sees.

    In a call with a KV cache they also attend to what is committed there, and their own keys and
    values are written behind it, for a commit to keep.

    position_ids_BN: int64 [B,N].
    visible_BNJ: bool [B,N,J], whether row i attends to row j since the last commit. The last N are
        the rows of this call (each sees itself), those before them rows of earlier calls, in the
        order in which they were written.
    committed_BS: int64 [B,S], the committed slots that the rows may attend to, each once, -1 where
        there are fewer; None: all of them.
    """

    position_ids_BN: Tensor
    visible_BNJ: Tensor
    committed_BS: Tensor | None = None
