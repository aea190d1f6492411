"""The dynamic sparse tree: which tokens are drafted, and how many prompt tokens follow each
(Chen et al. 2024, arXiv 2405.18628, section 4).

State s is how many prompt tokens the last accepted node carried, so that s levels can be drafted.
The tree of a state decides with which probability the next state is which: a Markov chain.

Everything here is arithmetic on a table a[l][r]: how often the rank-r token of prompt token l + 1
is right, whatever the tokens before it are.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import repeat

import numpy as np
import torch

from modules.trees.expected_length import optimised_tree, path_probability

Path = tuple[int, ...]
Accuracies = tuple[tuple[float, ...], ...]

RELEASED = (0.483, 0.143, 0.074, 0.045, 0.031, 0.022, 0.017, 0.013, 0.009, 0.008)
"""a[0] of the released prompt tokens of Vicuna-7B."""
SIZES = (6, 8, 12, 16, 24, 32, 48, 64, 96)
"""Rows of a call that the page of a trained drafter lists."""


def assumed(prompts: int) -> Accuracies:
    """A table for prompt tokens that were not measured: the released first row, and in every
    further one half of the row before.
    """
    return tuple(tuple(right / 2**level for right in RELEASED) for level in range(prompts))


@dataclass(frozen=True)
class SparseTree:
    """The tree of a state.

    paths: ranks of each node by depth, () first. prompts: guesses (of PPD prompt tokens) after each
    node. reached: probability that a node and all above it are right.
    """

    paths: tuple[Path, ...]
    prompts: tuple[int, ...]
    reached: tuple[float, ...]

    @property
    def stops(self) -> tuple[float, ...]:
        """Probability that each node is the last accepted one."""
        left = dict(zip(self.paths, self.reached, strict=True))
        for path, probability in zip(self.paths[1:], self.reached[1:], strict=True):
            left[path[:-1]] -= probability
        return tuple(left.values())

    @property
    def tokens(self) -> float:
        """Expected tokens of a call: the accepted drafts and the bonus token."""
        return sum(self.reached)

    def rows(self, ensemble: int = 1) -> int:
        """Rows of the call: the nodes and their prompt tokens."""
        return len(self.paths) + ensemble * sum(self.prompts)


@dataclass(frozen=True)
class SparseTrees:
    """The trees of the states 0 … m."""

    trees: tuple[SparseTree, ...]

    @functools.cached_property
    def states(self) -> tuple[float, ...]:
        """The stationary distribution of the states 0 … m."""
        size = len(self.trees)
        moves = np.zeros((size, size))
        for state, tree in enumerate(self.trees):
            np.add.at(moves[state], list(tree.prompts), tree.stops)
        # π M = π and Σ π = 1, by least squares.
        equations = np.vstack([moves.T - np.eye(size), np.ones(size)])
        wanted = np.append(np.zeros(size), 1.0)
        return tuple(np.linalg.lstsq(equations, wanted, rcond=None)[0].tolist())

    @property
    def tokens(self) -> float:
        """Expected tokens of a call, over the stationary distribution of the states."""
        return sum(pi * tree.tokens for pi, tree in zip(self.states, self.trees, strict=True))

    @functools.cached_property
    def ranks(self) -> int:
        """Number of ranks that the trees draft from."""
        return 1 + max(path[-1] for tree in self.trees for path in tree.paths[1:])

    def rows(self, ensemble: int = 1) -> int:
        """Rows of the widest call."""
        return max(tree.rows(ensemble) for tree in self.trees)


def grown(accuracies: Accuracies, state: int, nodes: int) -> SparseTree:
    """The tree of a state with the most expected tokens for so many drafted nodes, each with all
    prompt tokens."""
    paths = optimised_tree(accuracies[:state], nodes) if state and nodes else []
    ordered = sorted((tuple(path) for path in paths), key=lambda path: (len(path), path))
    reached = (1.0, *(path_probability(path, accuracies) for path in ordered))
    return SparseTree(((), *ordered), (len(accuracies),) * (1 + len(ordered)), reached)


def pruned(tree: SparseTree, gains: Sequence[float], prompts: int) -> SparseTree:
    """The tree with so many prompt tokens in all, removed where the loss is least.

    A node that loses one of its c prompt tokens leads to state c - 1: `gains[c] - gains[c - 1]`
    tokens less, as often as the node is the last one. Every node keeps one, the root all.

    Args:
        tree: with all prompt tokens.
        gains: expected tokens of every state's tree.
        prompts: at least those that stay.
    """
    counts, stops = list(tree.prompts), tree.stops
    while sum(counts) > prompts:
        losses = [
            stops[node] * (gains[counts[node]] - gains[counts[node] - 1])
            if node and counts[node] > 1
            else float("inf")
            for node in range(len(counts))
        ]
        # Of equal losses the deepest node's, which comes last.
        node = min(range(len(counts)), key=lambda index: (losses[index], -index))
        counts[node] -= 1
    return SparseTree(tree.paths, tuple(counts), tree.reached)


def most_nodes(rows: int, prompts: int, ensemble: int) -> int:
    """Drafted nodes of a call of so many rows where each has one prompt token, the root all."""
    return (rows - 1 - ensemble * prompts) // (1 + ensemble)


@functools.lru_cache(maxsize=256)
def sparse_trees(accuracies: Accuracies, rows: int, ensemble: int = 1) -> SparseTrees:
    """The trees with the most expected tokens, for calls of at most `rows` rows.

    Every state's number of drafted nodes is searched, the others fixed, until none is better.

    Args:
        accuracies: a[l][r], each row in descending order.
        rows: N, of the widest call.
        ensemble: rows of a prompt token.

    Raises:
        ValueError: fewer rows than one drafted node needs.
    """
    prompts = len(accuracies)
    most = most_nodes(rows, prompts, ensemble)
    if most < 1:
        least = 2 + ensemble * (1 + prompts)
        raise ValueError(f"a call of {rows} rows has no room for a draft: it takes {least} rows")

    def trees(nodes: Sequence[int]) -> SparseTrees:
        # Prompt tokens are removed by what every state's tree gives.
        whole = [grown(accuracies, state, count) for state, count in enumerate(nodes)]
        gains = [tree.tokens for tree in whole]
        room = ((rows - len(tree.paths)) // ensemble for tree in whole)
        return SparseTrees(tuple(pruned(*pair) for pair in zip(whole, repeat(gains), room)))

    # 1. As many nodes in every state.
    starts = [[0, *[count] * prompts] for count in range(1, most + 1)]
    nodes = max(starts, key=lambda start: trees(start).tokens)
    best = trees(nodes)
    # 2. Each state by itself.
    improved = True
    while improved:
        improved = False
        for state in range(1, prompts + 1):
            for count in range(1, most + 1):
                tried = [*nodes[:state], count, *nodes[state + 1 :]]
                if (other := trees(tried)).tokens > best.tokens + 1e-9:
                    nodes, best, improved = tried, other, True
    return best


@functools.lru_cache(maxsize=256)
def owned_trees(
    accuracies: Accuracies,
    rows: int,
    owners: int | None = None,
    least: float = 0.0,
    pattern: tuple[Path, ...] | None = None,
) -> SparseTrees:
    """The trees for calls of at most `rows` rows where a node has all guess rows or none. After a
    node without any, only the newest token is verified in the next call.

    The root owns guess rows, and the drafted nodes that are reached most often: as many as give the
    most expected tokens.

    Args:
        accuracies: a[l][r], each row in descending order.
        rows: of a call, guess rows included.
        owners: nodes with guess rows at most, the root included; None: any number.
        least: probability of being reached below which a drafted node owns none.
        pattern: paths, of which the first ones are drafted; None: those with the most expected
            tokens.

    Raises:
        ValueError: fewer rows than one drafted node needs.
    """
    guesses = len(accuracies)
    if rows < 2 + guesses:
        raise ValueError(
            f"a call of {rows} rows has no room for a draft: it takes {2 + guesses} rows"
        )
    root = SparseTree(((),), (guesses,), (1.0,))

    def trees(count: int) -> SparseTrees:
        # 1. Nodes that fit beside the guess rows of so many owners.
        nodes = rows - 1 - guesses * count
        paths = optimised_tree(accuracies, nodes) if pattern is None else pattern[:nodes]
        ordered = sorted((tuple(path) for path in paths), key=lambda path: (len(path), path))
        reached = tuple(_reached(path, accuracies) for path in ((), *ordered))
        # 2. The owners; sorting leaves the root first.
        likely = [node for node, chance in enumerate(reached) if not node or chance >= least]
        chosen = set(sorted(likely, key=lambda node: -reached[node])[:count])
        held = tuple(guesses if node in chosen else 0 for node in range(len(reached)))
        return SparseTrees((*[root] * guesses, SparseTree(((), *ordered), held, reached)))

    most = min((rows - 2) // guesses, owners or rows)
    return max((trees(count) for count in range(1, most + 1)), key=lambda tried: tried.tokens)


def _reached(path: Path, accuracies: Accuracies) -> float:
    """How often a path is right; ranks that were not measured never are."""
    if any(rank >= len(accuracies[depth]) for depth, rank in enumerate(path)):
        return 0.0
    return path_probability(path, accuracies)


@functools.lru_cache(maxsize=256)
def whole_trees(accuracies: Accuracies, rows: int, ensemble: int = 1) -> SparseTrees:
    """The best trees with all prompt tokens after every node, for comparison."""
    prompts = len(accuracies)
    nodes = (rows - 1 - ensemble * prompts) // (1 + ensemble * prompts)
    return SparseTrees(tuple(grown(accuracies, state, nodes) for state in range(prompts + 1)))


@functools.lru_cache(maxsize=256)
def random_trees(accuracies: Accuracies, rows: int, ensemble: int = 1) -> SparseTrees:
    """Trees of random nodes with random numbers of prompt tokens, for comparison: in every state as
    many nodes, and rows, as `sparse_trees` has, by torch's generator with seed 0.
    """
    generator = torch.Generator().manual_seed(0)

    def drawn(below: int) -> int:
        return int(torch.randint(below, (), generator=generator))

    trees = []
    for state, best in enumerate(sparse_trees(accuracies, rows, ensemble).trees):
        paths: list[Path] = [()]
        # 1. Children of random nodes, at the next rank of each.
        while len(paths) < len(best.paths):
            parent = paths[drawn(len(paths))]
            children = sum(path[:-1] == parent for path in paths[1:])
            if len(parent) < state and children < len(accuracies[len(parent)]):
                paths.append((*parent, children))
        ordered = ((), *sorted(paths[1:], key=lambda path: (len(path), path)))
        # 2. One prompt token each, the root all, and the others at random.
        counts = [len(accuracies), *[1] * (len(paths) - 1)]
        while sum(counts) < sum(best.prompts):
            node = drawn(len(counts))
            counts[node] += counts[node] < len(accuracies)
        reached = tuple(path_probability(path, accuracies) for path in ordered)
        trees.append(SparseTree(ordered, tuple(counts), reached))
    return SparseTrees(tuple(trees))


def descending(table: Sequence[Sequence[float]]) -> Accuracies:
    """A table of accuracies with every row in descending order."""
    return tuple(tuple(sorted(row, reverse=True)) for row in table)


def predicted_page(accuracies: Accuracies, ensemble: int) -> str:
    """Expected tokens per call by rows of a call, as Markdown: of the dynamic trees, and of trees
    with all prompt tokens after every node.
    """
    least = 2 + ensemble * (1 + len(accuracies))
    lines = ["| rows | tokens per call | all prompt tokens everywhere |", "|---:|---:|---:|"]
    for rows in (size for size in SIZES if size >= least):
        trees, whole = (make(accuracies, rows, ensemble) for make in (sparse_trees, whole_trees))
        lines.append(f"| {rows} | {trees.tokens:.3f} | {whole.tokens:.3f} |")
    return "\n".join(["# Dynamic sparse trees, predicted", "", *lines, ""])
