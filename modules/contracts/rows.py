"""Rows of one call of the target: the position of each and what it attends to.

Shape legend: B sequences, N rows of one call, J rows since the last commit, P auxiliary rows,
S slots, H hidden size.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F


@dataclass(frozen=True)
class Rows:
    """Rows to run through layers: the position of each and which others it sees.

    In a call with a KV cache they also attend to what is committed there, and their own keys and
    values are written after it, until a commit keeps them.

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

    def at(self, position_ids_BN: Tensor) -> Rows:
        """The same rows at other positions."""
        return replace(self, position_ids_BN=position_ids_BN)

    def beside(self, auxiliary: AuxiliaryRows) -> Rows:
        """These rows followed by the auxiliary ones, which these do not see."""
        positions = torch.cat([self.position_ids_BN, auxiliary.position_ids_BP], dim=1)
        visible_BNJ = F.pad(self.visible_BNJ, (0, auxiliary.position_ids_BP.shape[1]))
        visible = torch.cat([visible_BNJ, auxiliary.visible_BPX], dim=1)
        return Rows(positions, visible, self.committed_BS)


class DocumentRows(Rows):
    """Rows of packed texts: each token sees earlier ones of its own document and itself; padding
    sees itself alone, so that no softmax is empty. The mask of all pairs is made when it is asked
    for, parts of it where rows are too long for that.

    Args:
        position_ids_BN: int64 [B,T].
        document_ids_BT: int64 [B,T], of padding `padding`.
        padding: the id of padding.
    """

    def __init__(self, position_ids_BN: Tensor, document_ids_BT: Tensor, padding: int) -> None:
        object.__setattr__(self, "position_ids_BN", position_ids_BN)
        object.__setattr__(self, "committed_BS", None)
        object.__setattr__(self, "document_ids_BT", document_ids_BT)
        object.__setattr__(self, "real_BT", document_ids_BT != padding)
        object.__setattr__(self, "padding", padding)
        object.__setattr__(self, "block_masks", {})

    document_ids_BT: Tensor
    padding: int
    real_BT: Tensor
    """bool [B,T]: tokens that are no padding."""
    block_masks: dict[int | None, Any]
    """Masks that an attention kernel made of these rows, by window."""

    @cached_property
    def visible_BNJ(self) -> Tensor:  # pyright: ignore[reportIncompatibleVariableOverride]
        """bool [B,T,T]: the mask of all pairs."""
        return self.visible(0, self.document_ids_BT.shape[1])

    def visible(self, start: int, stop: int, first: int = 0, window: int | None = None) -> Tensor:
        """bool [B,N,S]: which of the tokens `first … stop-1` the rows `start … stop-1` see, no
        further back than `window` positions.
        """
        rows = torch.arange(start, stop, device=self.document_ids_BT.device)
        return self.visible_at(rows.expand(len(self.document_ids_BT), -1), first, stop, window)

    def visible_at(
        self,
        rows_BN: Tensor,
        first: int = 0,
        stop: int | None = None,
        window: int | None = None,
    ) -> Tensor:
        """The same of any rows [B,N]."""
        documents, slots_S = (
            self.document_ids_BT,
            torch.arange(first, stop or self.document_ids_BT.shape[1], device=rows_BN.device),
        )
        same = documents.gather(1, rows_BN)[..., None] == documents[:, None, first:stop]
        back = rows_BN[..., None] - slots_S
        near = same & (back >= 0) & self.real_BT.gather(1, rows_BN)[..., None]
        if window is not None:
            near = near & (back < window)
        return near | (back == 0)

    def at(self, position_ids_BN: Tensor) -> DocumentRows:
        """The same rows at other positions."""
        return DocumentRows(position_ids_BN, self.document_ids_BT, self.padding)

    def sequence(self, number: int) -> DocumentRows:
        """The rows of one sequence alone."""
        alone = slice(number, number + 1)
        positions = self.position_ids_BN.expand_as(self.document_ids_BT)[alone]
        return DocumentRows(positions, self.document_ids_BT[alone], self.padding)


Inputs = Tensor | Callable[[Tensor], Tensor]
"""States [B,P,H] of auxiliary rows, or a function of the other rows' states [B,N,H] at that layer
that gives them."""


def _entering(inputs: Inputs, hidden_BNH: Tensor) -> Tensor:
    made = inputs if isinstance(inputs, Tensor) else inputs(hidden_BNH)
    return made.to(hidden_BNH.dtype)


@dataclass(frozen=True)
class Entry:
    """Auxiliary rows that enter above the others' layer. Below, nobody may see them.

    inputs: the states of all auxiliary rows there. rows_BP: bool [B,P], those that enter. layer:
    where.
    """

    inputs: Inputs
    rows_BP: Tensor
    layer: int

    def replaced(self, hidden_BPH: Tensor, others_BNH: Tensor) -> Tensor:
        """The auxiliary rows' states [B,P,H] as they go on from this layer."""
        return torch.where(self.rows_BP[..., None], _entering(self.inputs, others_BNH), hidden_BPH)


@dataclass(frozen=True)
class AuxiliaryRows:
    """Rows without a token: trained prompt embeddings, pseudo states. They run through the target
    with other rows, are never accepted and never committed.

    inputs: the states [B,P,H] at `layer`; or a function of the other rows' states there,
        [B,N,H] -> [B,P,H]. At layer 0 these are embeddings as `Target.embed` gives them.
    position_ids_BP: int64 [B,P].
    visible_BPX: bool [B,P,N+P], whether an auxiliary row attends to each of the other rows and to
        each auxiliary one, itself included.
    layer: where they enter; they attend to nothing below it. At the number of layers they enter
        after the last one.
    later: rows that enter at deeper layers, in ascending order.
    """

    inputs: Inputs
    position_ids_BP: Tensor
    visible_BPX: Tensor
    layer: int = 0
    later: tuple[Entry, ...] = ()

    def entering(self, hidden_BNH: Tensor) -> Tensor:
        """The states [B,P,H] that enter with those of the other rows `hidden_BNH`."""
        return _entering(self.inputs, hidden_BNH)


def causal_rows(start_B: Tensor, count: int) -> Rows:
    """`count` consecutive rows after `start_B` earlier ones, each seeing those before it."""
    order = torch.arange(count, device=start_B.device)
    visible = (order[:, None] >= order).expand(start_B.shape[0], -1, -1)
    return Rows(start_B[:, None] + order, visible)


def rows_at(rows_BNX: Tensor, index_BW: Tensor) -> Tensor:
    """Rows [B,N,X] at per-sequence indices [B,W,X]."""
    if rows_BNX.shape[1] == index_BW.shape[1] == 1:
        return rows_BNX
    return rows_BNX.gather(1, index_BW[..., None].expand(-1, -1, rows_BNX.shape[-1]))


def with_children(above_BRA: Tensor, parents_BW: Tensor) -> Tensor:
    """bool [B,R+W,A+W]: what R rows of a proposal see, followed by W new ones. Each of these sees
    the rows (of A) that its parent (of R) sees, and itself; earlier rows do not see them.

    `parents_BW` are not read where there are no rows yet (R = 0).
    """
    width = parents_BW.shape[1]
    itself = _identity(width, above_BRA.device).expand(len(above_BRA), -1, -1)
    if not above_BRA.shape[1]:
        return itself
    inherited = rows_at(above_BRA, parents_BW)
    new_BWX = torch.cat([inherited, itself], dim=2)
    return torch.cat([F.pad(above_BRA, (0, width)), new_BWX], dim=1)


@lru_cache(maxsize=64)
def _identity(width: int, device: torch.device) -> Tensor:
    """bool [W,W]: rows that see themselves."""
    return torch.eye(width, dtype=torch.bool, device=device)
