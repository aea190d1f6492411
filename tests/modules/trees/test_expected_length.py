"""The optimised static tree against all trees."""

from __future__ import annotations

from itertools import combinations, product

import pytest
import torch

from modules.trees.expected_length import expected_length, optimised_tree
from modules.trees.static import StaticTree


@pytest.mark.parametrize("seed", range(6))
def test_no_other_tree_of_the_size_is_better(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    table = (torch.rand(3, 2, generator=generator) / 2).sort(1, descending=True).values.tolist()
    nodes = 5
    every = [path for depth in (1, 2, 3) for path in product(range(2), repeat=depth)]
    best = max(
        expected_length(chosen, table)
        for chosen in combinations(every, nodes)
        if all(len(path) == 1 or path[:-1] in chosen for path in chosen)
    )
    tree = optimised_tree(table, nodes)
    assert len(tree) == nodes
    StaticTree(tree)
    assert expected_length(tree, table) == pytest.approx(best)


def test_paths_come_most_likely_first_and_end_with_the_table() -> None:
    assert optimised_tree([[0.5, 0.1], [0.3]], 3) == [[0], [0, 0], [1]]
    assert len(optimised_tree([[0.5, 0.1], [0.3]], 99)) == 4
    assert expected_length([[0], [0, 0]], [[0.5], [0.5]]) == 1.75
