"""Documents of a packed batch and the blocks of k positions inside them.

Shape legend: B sequences, T tokens of a packed row, P = B·T flat positions, S documents, L tokens
of the longest one.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from modules.contracts.batches import PADDING_DOCUMENT


@dataclass(frozen=True)
class Documents:
    """The documents of a packed batch, in order; each run of padding counts as a document.

    starts_S, lengths_S: int64 [S], flat positions. real_S: bool [S], not padding.
    """

    starts_S: Tensor
    lengths_S: Tensor
    real_S: Tensor

    @staticmethod
    def of(document_ids_BT: Tensor) -> Documents:
        """The documents of packed rows."""
        begins = torch.ones_like(document_ids_BT, dtype=torch.bool)
        begins[:, 1:] = document_ids_BT[:, 1:] != document_ids_BT[:, :-1]
        starts = begins.flatten().nonzero()[:, 0]
        lengths = torch.diff(starts, append=starts.new_tensor([begins.numel()]))
        return Documents(starts, lengths, document_ids_BT.flatten()[starts] != PADDING_DOCUMENT)

    def groups(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Groups of documents that a recurrence reads in parallel: as few groups as the padding
        limit allows, because the steps within a group are sequential.

        Yields flat positions [S,L], the last one repeated after a document's end, and whether each
        is inside its document (bool [S,L]). Groups go from the longest document to the shortest,
        and hold together at most twice as many positions as there are tokens. Padding is left out
        unless the batch has nothing else.
        """
        # Documents by descending length, so that documents of a group have similar lengths.
        wanted = (self.real_S | ~self.real_S.any()).nonzero()[:, 0]
        order_S = wanted[self.lengths_S[wanted].argsort(descending=True, stable=True)]
        for part in side_by_side(self.lengths_S[order_S].tolist()):
            starts, lengths = (
                self.starts_S[order_S[part], None],
                self.lengths_S[order_S[part], None],
            )
            ahead = torch.arange(int(lengths[0]), device=starts.device)
            yield starts + torch.minimum(ahead, lengths - 1), ahead < lengths


def side_by_side(lengths: Sequence[int]) -> Iterator[slice]:
    """Cut descending lengths into groups: slices, each as long as the padded total stays within
    twice the sum of the lengths.
    """
    left, room, first = sum(lengths), 2 * sum(lengths), 0
    while first < len(lengths):
        # A document joins while the group, padded, and all later documents unpadded fit.
        count, rest = 1, left - lengths[first]
        for length in lengths[first + 1 :]:
            if (count + 1) * lengths[first] + rest - length > room:
                break
            count, rest = count + 1, rest - length
        yield slice(first, first + count)
        left, room, first = rest, room - count * lengths[first], first + count


def block_ends(position_ids_BT: Tensor, size: int, phase_BT: Tensor | int = 0) -> Tensor:
    """bool [B,T]: the last rows of whole blocks; the first block begins at position `phase` (0 …
    k-1).
    """
    return (position_ids_BT >= size - 1) & ((position_ids_BT + 1 - phase_BT) % size == 0)


def random_phases(documents: Documents, size: int) -> Tensor:
    """int64 [P]: the position where the first block begins, drawn for each document."""
    phases = torch.randint(size, documents.lengths_S.shape, device=documents.lengths_S.device)
    return phases.repeat_interleave(documents.lengths_S)
