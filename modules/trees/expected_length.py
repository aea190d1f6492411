"""The static tree with the most expected acceptance for a number of nodes (Medusa, Cai et al. 2024,
section 2.3.3).
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from math import prod

from modules.trees.named_trees import Path


def path_probability(path: Sequence[int], accuracies: Sequence[Sequence[float]]) -> float:
    """Π_k a[k][i_k]: how often all of a path is right, if the heads err independently."""
    return prod(accuracies[depth][rank] for depth, rank in enumerate(path))


def expected_length(paths: Sequence[Sequence[int]], accuracies: Sequence[Sequence[float]]) -> float:
    """Expected tokens per target call: 1 + Σ over nodes of their path's probability."""
    return 1 + sum(path_probability(path, accuracies) for path in paths)


def optimised_tree(accuracies: Sequence[Sequence[float]], nodes: int) -> list[Path]:
    """Paths of the best tree of `nodes` drafted nodes, the most likely first.

    The tree grows by the likeliest next sibling or first child of a node. A path's probability
    falls with its ranks and its depth (each head's ranks are ordered), so that the greedy tree is
    the best one under independence.

    Args:
        accuracies: a[k][i], how often the rank-i draft of head k is right; each row is put in
            descending order.
        nodes: how many nodes to draft (fewer when the table has fewer paths).
    """
    # A heap of nodes whose prefix and earlier siblings are chosen.
    table = [sorted(row, reverse=True) for row in accuracies]
    waiting: list[tuple[float, int, Path]] = []
    chosen: list[Path] = []

    def offer(path: Path) -> None:
        if len(path) <= len(table) and path[-1] < len(table[len(path) - 1]):
            heapq.heappush(waiting, (-path_probability(path, table), len(path), path))

    offer([0])
    while waiting and len(chosen) < nodes:
        path = heapq.heappop(waiting)[2]
        chosen.append(path)
        offer([*path[:-1], path[-1] + 1])
        offer([*path, 0])
    return chosen
