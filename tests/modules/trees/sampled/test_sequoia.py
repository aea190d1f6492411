"""Sequoia's dynamic programme: golden values, brute force, and the choice of size and depth by
cost.
"""

from __future__ import annotations

import random

import pytest

from modules.contracts.token_tree import SiblingDraw
from modules.trees.expected_length import expected_length, optimised_tree
from modules.trees.sampled.sequoia import best_paths, best_shape, expected_tokens, sequoia_tree

GOLDEN = [[0.6, 0.2, 0.1]]


def test_golden_values():
    expected = [1, 1.6, 1.96, 2.176, 2.376, 2.5056, 2.6256, 2.7456]
    assert expected_tokens(GOLDEN, 7, 7) == pytest.approx(expected, abs=1e-9)
    assert expected_tokens(GOLDEN, 7, 2)[-1] == pytest.approx(2.56)
    assert expected_tokens(GOLDEN, 7, 3)[-1] == pytest.approx(2.716)


def grown(trees, siblings, depth):
    """Every tree with one more draw: after the last child of any of its nodes."""
    found = set()
    for tree in trees:
        for parent in (*tree, ()):
            index = sum(path[:-1] == parent and path != () for path in tree)
            if len(parent) < depth and index < siblings:
                found.add(tree | {(*parent, index)})
    return found


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("depth", [2, 3, 6])
def test_equals_brute_force_over_all_trees(seed, depth):
    """Tables whose later siblings may be the better ones, and whose levels differ."""
    rng = random.Random(seed)
    table = []
    for _ in range(3):
        row = [rng.random() for _ in range(3)]
        table.append([value / (sum(row) + rng.random()) for value in row])
    table[0][1] = 0.0
    rows = [table[min(level, 2)] for level in range(depth)]
    trees = {frozenset()}
    values = expected_tokens(table, 6, depth)
    for nodes in range(1, 7):
        trees = grown(trees, 3, depth)
        best = max(expected_length([list(path) for path in tree], rows) for tree in trees)
        assert values[nodes] >= best - 1e-12
        exact = max(best, values[nodes - 1])
        assert values[nodes] == pytest.approx(exact)
        paths = best_paths(table, nodes, depth)
        assert len(paths) <= nodes and expected_length(paths, rows) == pytest.approx(exact)


def test_paths_make_a_tree_of_draws_with_the_promised_value():
    tree = sequoia_tree([[0.5, 0.2, 0.1, 0.05], [0.4, 0.1]], 20, 5)
    rows = [[0.5, 0.2, 0.1, 0.05]] + [[0.4, 0.1]] * 4
    assert len(tree.paths) == 20 and tree.depth <= 5 and tree.exhausted == "uniform"
    assert tree.sibling_draw is SiblingDraw.WITHOUT_REPLACEMENT
    value = expected_length(tree.paths, rows)
    assert value == pytest.approx(expected_tokens([[0.5, 0.2, 0.1, 0.05], [0.4, 0.1]], 20, 5)[-1])
    assert value == pytest.approx(expected_length(optimised_tree(rows, 20), rows))
    values = [expected_length([path], rows) for path in tree.paths]
    assert values == sorted(values, reverse=True)


def test_values_rise_with_every_node():
    values = expected_tokens(GOLDEN, 30, 10)
    assert all(later > earlier for earlier, later in zip(values, values[1:]))


def test_the_shape_follows_the_cost():
    flat, steep = [1.0] * 16, [1.0 + 2 * n for n in range(16)]
    assert best_shape(GOLDEN, flat, 0.0, 4)[0] == 15
    assert best_shape(GOLDEN, steep, 0.0, 4) == (0, 0)
    assert best_shape(GOLDEN, flat, 10.0, 4) == (0, 0)
    draws, levels = best_shape(GOLDEN, flat, 0.3, 6)
    costs = {
        (n, d): tokens / (1 + 0.3 * d)
        for d in range(1, 7)
        for n, tokens in enumerate(expected_tokens(GOLDEN, 15, d))
        if n
    }
    assert costs[draws, levels] == pytest.approx(max(costs.values()))


def test_mistakes_are_named():
    for wrong in ([], [[]], [[0.7, 0.7]], [[-0.1]]):
        with pytest.raises(ValueError, match="acceptance"):
            best_paths(wrong, 3, 2)
    with pytest.raises(ValueError, match="at least 1"):
        best_paths(GOLDEN, 0, 2)
