"""Rows of a call that guess the tokens after each node: their positions and what they see.

Prompt tokens and pseudo states are such rows. Guess row i = 1 … of a node is i positions after it
and gives the logits of the token after that position.

Shape legend: B sequences, N rows or nodes, J rows since the last commit, P guess rows, E guess rows
of a node.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from modules.contracts.rows import AuxiliaryRows, Entry, Inputs, Rows


class HostCounts(list[int]):
    """A number for each sequence, on the host."""

    def select(self, sequences_S: Tensor) -> HostCounts:
        """The numbers of these sequences."""
        return HostCounts(self[i] for i in sequences_S.tolist())


@dataclass(frozen=True)
class GuessRows(AuxiliaryRows):
    """Guess rows of nodes; those of a node are contiguous.

    first_BN: int64 [B,N], the first guess row of each node.
    counts: guesses of each node by sequence, on the host; empty if the host has none.
    """

    first_BN: Tensor | None = None
    counts: tuple[tuple[int, ...], ...] = ()


Sees = Literal["chain", "all", "itself"]
"""Which guess rows of its node a row sees, see `guess_rows`."""
Entering = Callable[[Tensor, Tensor], Inputs]
"""The node that each guess row follows, and which of the node's rows it is, int64 [B,P] each ->
what enters."""


def guess_rows(
    entering: Entering,
    guesses: int,
    members: int,
    rows: Rows,
    counts_BN: Tensor,
    width: int,
    sees: Sees = "chain",
    layers: Sequence[int] = (0,),
) -> GuessRows:
    """The first `counts_BN` guesses of each row.

    Guess i = 1 … of a row is i positions after it, and sees the row and what that sees. Sequences
    with fewer guess rows are padded with rows that see only themselves.

    Args:
        entering: what enters.
        guesses: guesses of a row at most.
        members: rows of a guess (its ensemble), next to each other.
        rows: the rows that are followed.
        counts_BN: int64 [B,N], guesses of each row.
        width: P, as many as a sequence needs at most.
        sees: which guess rows of its node member j of guess i sees: member j of the guesses 1 … i
            (`chain`), all members of these guesses (`all`), or `itself` alone.
        layers: where guess 1, 2, … enter, ascending; one for all of them.
    """
    batch, entries, columns = len(counts_BN), guesses * members, rows.visible_BNJ.shape[2]
    # 1. The real rows, in the order of the rows that they follow.
    device = counts_BN.device
    wanted_BNE = torch.arange(entries, device=device) // members < counts_BN[..., None]
    real_BX = wanted_BNE.flatten(1)
    order = real_BX.int().argsort(dim=1, descending=True, stable=True)[:, :width]
    real_BP, owner_BP, entry_BP = real_BX.gather(1, order), order // entries, order % entries
    guess_BP, member_BP = entry_BP // members, entry_BP % members
    # 2. They see what their row sees, and earlier guess rows of their chain.
    index = owner_BP[..., None].expand(-1, -1, columns)
    above_BPJ = rows.visible_BNJ.expand(batch, -1, -1).gather(1, index) & real_BP[..., None]
    chain = {"chain": owner_BP * members + member_BP, "all": owner_BP, "itself": order}[sees]
    chain = torch.where(real_BP, chain, -1 - torch.arange(order.shape[1], device=device))
    same_BPP = chain[:, :, None] == chain[:, None]
    same_BPP = same_BPP & (guess_BP[:, :, None] >= guess_BP[:, None])
    # 3. What enters, where.
    inputs, first, later = entering(owner_BP, entry_BP), min(layers), ()
    if len(set(layers)) > 1:
        layer_BP = torch.tensor(layers, device=device)[guess_BP]
        deeper = sorted(set(layers) - {first})
        later = tuple(Entry(inputs, layer_BP == layer, layer) for layer in deeper)
    positions_BN = rows.position_ids_BN.expand(batch, -1)
    return GuessRows(
        inputs,
        positions_BN.gather(1, owner_BP) + 1 + guess_BP,
        torch.cat([above_BPJ, same_BPP], dim=2),
        first,
        later,
        first_BN=members * (counts_BN.cumsum(1) - counts_BN),
    )
