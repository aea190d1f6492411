"""Which rows of a proposal see which, as it grows level by level."""

from __future__ import annotations

import torch

from modules.contracts.drafter import Frontier, ProposalRows
from modules.contracts.rows import with_children


def test_rows_see_their_ancestors_and_themselves_and_nothing_added_later() -> None:
    """Root, two children, and a child of each: by following the parents one at a time."""
    parents = torch.tensor([[-1, 0, 0, 1, 2], [-1, 0, 0, 2, 2]])
    above = torch.zeros(2, 0, 0, dtype=torch.bool)
    rows = ProposalRows.none(torch.tensor([4, 5]))
    for depth, level in enumerate((slice(0, 1), slice(1, 3), slice(3, 5))):
        above = with_children(above, parents[:, level])
        rows = rows.add(Frontier(parents[:, level] + 10, parents[:, level], depth))
    expected = torch.zeros(2, 5, 5, dtype=torch.bool)
    for sequence, chain in enumerate(parents.tolist()):
        for row in range(5):
            node = row
            while node >= 0:
                expected[sequence, row, node] = True
                node = chain[node]
    assert torch.equal(above, expected) and torch.equal(rows.above_BMM, expected)
    assert torch.equal(rows.parents_BM, parents) and torch.equal(rows.tokens_BM, parents + 10)
    last = rows.newest(Frontier(parents[:, 3:], parents[:, 3:], 2), torch.tensor([7, 9]))
    assert last.position_ids_BN.tolist() == [[9, 9], [11, 11]]
    assert torch.equal(last.visible_BNJ, expected[:, 3:])
    again = rows.add(Frontier(torch.tensor([[1], [2]]), torch.tensor([[-1], [-1]]), 0))
    assert again.above_BMM.tolist() == [[[True]], [[True]]]
