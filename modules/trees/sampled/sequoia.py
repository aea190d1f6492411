"""Sequoia: the fixed tree with the most expected acceptance, by dynamic programming (Chen et al.
2024, 2402.12374).

`modules.trees.expected_length` solves the same problem greedily where acceptance falls from sibling
to sibling; this solution does not need that.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from modules.trees.expected_length import path_probability
from modules.trees.named_trees import Path
from modules.trees.sampled.branching import Draw, DrawnTree

Acceptance = Sequence[Sequence[float]]
"""`[depth][k]`: how often the k-th sibling is accepted if its parent is; the last row also holds
for greater depths."""


def sequoia_tree(
    acceptance: Acceptance,
    nodes: int,
    depth: int,
    draw: Draw = "without_replacement",
    temperature: float | None = None,
) -> DrawnTree:
    """The best tree of `nodes` draws and `depth` levels; when all tokens of a distribution are
    drawn, further ones are drawn uniformly (section 3.2).

    Args:
        acceptance: measured on other prompts at the same temperature, as `python -m eval.rules`
            prints it.
        nodes: drafted nodes.
        depth: levels at most.
        draw: how siblings are drawn.
        temperature: of the draft; None: the target's.
    """
    exhausted = "uniform" if draw == "without_replacement" else "stop"
    return DrawnTree(best_paths(acceptance, nodes, depth), draw, temperature, exhausted)


def best_paths(acceptance: Acceptance, nodes: int, depth: int) -> list[Path]:
    """Paths of the best tree of at most `nodes` draws and `depth` levels, the most valuable
    first.
    """
    # 1. Best subtrees of every size and level.
    check(acceptance, nodes, depth)
    rows = _rows(acceptance, depth)
    levels = _levels(rows, nodes)
    paths: list[Path] = []

    def unfold(path: Path, size: int) -> None:
        """Add the draws under a node whose subtree has `size` nodes, itself included."""
        if size == 1:
            return
        level = levels[len(path)]
        for index in range(int(level.children[size]), 0, -1):
            below = int(level.subtree[index, size])
            paths.append([*path, index - 1])
            unfold(paths[-1], below)
            size -= below

    # 2. Read the best tree from the root down.
    unfold([], int(levels[0].values.argmax()))
    return _by_value(paths, rows)


def expected_tokens(acceptance: Acceptance, nodes: int, depth: int) -> list[float]:
    """F of the best trees of 0, 1, ..., `nodes` draws: expected tokens per call, including the one
    after the drafts.
    """
    check(acceptance, nodes, depth)
    return np.maximum.accumulate(_levels(_rows(acceptance, depth), nodes)[0].values[1:]).tolist()


def best_shape(
    acceptance: Acceptance, verify_seconds: Sequence[float], level_seconds: float, depth: int
) -> tuple[int, int]:
    """Draws and levels with the best F(n, d) / (t(n + 1) + d c), of equals the smallest (section
    3.3).

    Args:
        acceptance: see `Acceptance`.
        verify_seconds: t of a call over 1, 2, ... rows (of `LatencyTable.at`); their number less
            one is the most draws considered.
        level_seconds: c, of drafting one level.
        depth: levels at most.
    """
    best, shape = 0.0, (0, 0)
    for levels in range(1, depth + 1):
        for draws, tokens in enumerate(
            expected_tokens(acceptance, len(verify_seconds) - 1, levels)
        ):
            speed = tokens / (verify_seconds[draws] + (levels * level_seconds if draws else 0.0))
            if speed > best * (1 + 1e-12):
                best, shape = speed, (draws, levels if draws else 0)
    return shape


def check(acceptance: Acceptance, nodes: int, depth: int) -> None:
    """ValueError for a table that holds no probabilities, and for sizes below 1."""
    if not acceptance or any(not row or min(row) < 0 or sum(row) > 1 + 1e-9 for row in acceptance):
        raise ValueError(
            f"acceptance {acceptance}: give rows of probabilities, one per sibling, that sum to at "
            "most 1"
        )
    if nodes < 1 or depth < 1:
        raise ValueError(f"tree nodes and depth must be at least 1, got {nodes} and {depth}")


def _rows(acceptance: Acceptance, depth: int) -> list[Sequence[float]]:
    return [acceptance[min(level, len(acceptance) - 1)] for level in range(depth)]


class _Level(NamedTuple):
    """Best subtrees with their root on this level, by their number of nodes (index 0 is unused;
    -inf: none).
    """

    values: NDArray[np.float64]
    """M[n]: expected tokens, the root's included."""
    children: NDArray[np.int64]
    """[n]: how many children the root has."""
    subtree: NDArray[np.int64]
    """[k, n]: nodes in the subtree of its k-th child, where the root and its first k children have
    n nodes.
    """


def _levels(rows: Acceptance, nodes: int) -> list[_Level]:
    """T[n, k] = max_m T[n-m, k-1] + P[k] M_below[m] and M[n] = max_k T[n, k], levels from the
    deepest up.
    """
    # 1. A leaf is one node and one token.
    below = np.full(nodes + 2, -np.inf)
    below[1] = 1.0
    levels: list[_Level] = []
    for row in reversed(rows):
        count = min(len(row), nodes)
        tables, subtree = (
            np.full((count + 1, nodes + 2), -np.inf),
            np.zeros((count + 1, nodes + 2), dtype=np.int64),
        )
        tables[0, 1] = 1.0
        for index in range(1, count + 1):
            # 2. Tokens by giving the next child m nodes.
            gained = np.where(
                np.isfinite(below), row[index - 1] * np.nan_to_num(below, neginf=0.0), -np.inf
            )
            for size in range(index + 1, nodes + 2):
                # 3. The best m for every size.
                sizes = np.arange(1, size)
                values = tables[index - 1, size - sizes] + gained[sizes]
                most = int(values.argmax())
                tables[index, size], subtree[index, size] = values[most], sizes[most]
        # 4. The best number of children for every size.
        below = tables.max(0)
        levels.append(_Level(below, tables.argmax(0), subtree))
    return levels[::-1]


def _by_value(paths: Sequence[Path], rows: Acceptance) -> list[Path]:
    """The most valuable first, after its prefix and its earlier siblings."""
    left = {tuple(path) for path in paths}
    waiting: list[tuple[float, int, Path]] = []

    def offer(path: Path) -> None:
        if tuple(path) in left:
            heapq.heappush(waiting, (-path_probability(path, rows), len(path), path))

    offer([0])
    ordered: list[Path] = []
    while waiting:
        path = heapq.heappop(waiting)[2]
        ordered.append(path)
        offer([*path[:-1], path[-1] + 1])
        offer([*path, 0])
    return ordered
