"""EAGLE-2's trees against a search through every tree they could have been."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from modules.contracts.sampling import Sampling
from modules.decoding.decoder import SpeculativeDecoder
from modules.trees.reranked import RerankedTree
from tests.fakes import ScriptedDrafter, tiny_target
from tests.modules.trees.test_builders import SHAPE, Table, state


def candidates(
    table: torch.Tensor, root: int, depth: int, width: int
) -> dict[tuple[int, ...], float]:
    """Every path that expansion sees, with its log-probability."""
    seen: dict[tuple[int, ...], float] = {}
    frontier: list[tuple[tuple[int, ...], float]] = [((), 0.0)]
    for _ in range(depth):
        level = {}
        for path, score in frontier:
            probs = table[path[-1] if path else root].log_softmax(-1)
            for token in probs.topk(width).indices.tolist():
                level[(*path, token)] = score + float(probs[token])
        seen |= level
        frontier = sorted(level.items(), key=lambda item: -item[1])[:width]
    return seen


def paths_by_node(tree, b: int) -> dict[int, tuple[int, ...]]:
    paths: dict[int, tuple[int, ...]] = {0: ()}
    for node in range(1, tree.size):
        above = int(tree.parents_BN[b, node])
        paths[node] = (*paths.get(above, ()), int(tree.tokens_BN[b, node]))
    return paths


def paths_of(tree, b: int) -> set[tuple[int, ...]]:
    return set(paths_by_node(tree, b).values()) - {()}


@pytest.mark.parametrize("budget", [1, 3, 5])
def test_no_tree_of_that_size_is_more_probable(budget: int) -> None:
    drafter = Table(SHAPE)
    tree = RerankedTree(depth=3, width=2).build(drafter, state(), budget)
    for b in range(2):
        seen = candidates(drafter.table, b + 1, min(3, budget), 2)
        found = paths_of(tree, b)
        assert len(found) == budget and found <= set(seen)
        assert all(path[:-1] in found for path in found if len(path) > 1)
        mass = sum(torch.tensor(seen[path]).exp() for path in found)
        closed = (
            tree
            for tree in itertools.combinations(seen, budget)
            if all(path[:-1] in tree for path in tree if len(path) > 1)
        )
        assert (
            mass
            >= max(sum(torch.tensor(seen[path]).exp() for path in tree) for tree in closed) - 1e-6
        )


@pytest.mark.parametrize("least", [0.02, 0.1, 0.3, 0.9])
def test_improbable_paths_are_neither_drafted_nor_expanded(least: float) -> None:
    drafter = Table(SHAPE)
    tree = RerankedTree(depth=3, width=3, least=least).build(drafter, state(), 8)
    expanded = sum(frontier.tokens_BW.shape[1] for frontier in drafter.seen)
    every = [candidates(drafter.table, b + 1, 3, 3) for b in range(2)]
    assert expanded <= 1 + max(
        sum(math.exp(score) >= least for score in seen.values()) for seen in every
    )
    for b, seen in enumerate(every):
        probable = sorted(
            (path for path in seen if math.exp(seen[path]) >= least), key=lambda path: -seen[path]
        )
        real = tree.acceptable_BN[b].nonzero()[:, 0].tolist()
        found = {paths_by_node(tree, b)[node] for node in real} - {()}
        assert found == set(probable[:8])


@pytest.mark.parametrize("budget", [3, 5, 8])
def test_what_the_vocabulary_misses_counts_at_each_level(budget: int) -> None:
    """A path of d tokens is worth its probability times covered to the power of d."""
    drafter, covered, changed = Table(SHAPE), 0.3, 0
    tree = RerankedTree(3, 3, covered=covered).build(drafter, state(batch=6), budget)
    for b in range(6):
        seen = candidates(drafter.table, b + 1, min(3, budget), 3)
        worth = {path: math.exp(score) * covered ** len(path) for path, score in seen.items()}
        best = set(sorted(seen, key=lambda path: -worth[path])[:budget])
        assert paths_of(tree, b) == best
        changed += best != set(sorted(seen, key=lambda path: -seen[path])[:budget])
    assert changed, "the discount must change some tree"


def test_what_the_vocabulary_misses_makes_paths_improbable() -> None:
    drafter = Table(SHAPE)
    tree = RerankedTree(3, 3, least=0.1, covered=0.5).build(drafter, state(), 8)
    for b in range(2):
        seen = candidates(drafter.table, b + 1, 3, 3)
        probable = {path for path in seen if math.exp(seen[path]) * 0.5 ** len(path) >= 0.1}
        real = tree.acceptable_BN[b].nonzero()[:, 0].tolist()
        assert {paths_by_node(tree, b)[node] for node in real} - {()} == probable


def test_nothing_probable_is_a_tree_of_one_node() -> None:
    drafter = Table(SHAPE)
    drafter.table = torch.zeros(10, 10)
    tree = RerankedTree(depth=3, width=3, least=0.5).build(drafter, state(), 8)
    assert tree.size == 1 and len(drafter.seen) == 1


def test_ties_keep_ancestors() -> None:
    drafter = Table(SHAPE)
    drafter.table = torch.full((10, 10), -1e9)
    drafter.table[:, 3] = 0.0
    tree = RerankedTree(depth=4, width=3).build(drafter, state(), 4)
    assert tree.tokens_BN[0].tolist() == [1, 3, 3, 3, 3] and tree.parents_BN[0].tolist() == [
        -1,
        0,
        1,
        2,
        3,
    ]


def test_a_trimmed_vocabulary_is_mapped_back() -> None:
    vocabulary = torch.tensor([1, 4, 7, 9])
    tree = RerankedTree(depth=2, width=2).build(Table(SHAPE, vocabulary), state(), 4)
    assert set(tree.tokens_BN[:, 1:].flatten().tolist()) <= set(vocabulary.tolist())


def test_every_expanded_row_names_its_parent() -> None:
    drafter = Table(SHAPE)
    RerankedTree(depth=3, width=2).build(drafter, state(), 6)
    tokens = torch.cat([frontier.tokens_BW for frontier in drafter.seen], dim=1)
    for frontier in drafter.seen[1:]:
        parents = tokens.gather(1, frontier.parents_BW)
        for b, w in itertools.product(range(2), range(frontier.tokens_BW.shape[1])):
            likely = drafter.table[parents[b, w]].topk(2).indices.tolist()
            assert int(frontier.tokens_BW[b, w]) in likely


def test_wrong_sizes_are_refused() -> None:
    with pytest.raises(ValueError, match="at least 1"):
        RerankedTree(0)
    with pytest.raises(ValueError, match="least must lie"):
        RerankedTree(3, 3, least=1.0)
    for covered in (0.0, 1.1, math.nan):
        with pytest.raises(ValueError, match="covered must lie"):
            RerankedTree(3, 3, covered=covered)


def test_one_level_is_the_likeliest_tokens_in_order() -> None:
    drafter = Table(SHAPE)
    tree = RerankedTree(depth=1, width=4).build(drafter, state(), 4)
    assert tree.tokens_BN[:, 1:].tolist() == drafter.table[[1, 2]].topk(4).indices.tolist()
    assert torch.equal(tree.topology.ancestors.sum(-1), tree.topology.depth + 1)


class Exact(ScriptedDrafter):
    """Drafts from the target's own distributions."""

    rows: list[list[int]]

    def expand(self, state, frontier):
        """Distributions by the stock model, without a cache; for one sequence."""
        tokens, parents = frontier.tokens_BW[0].tolist(), frontier.parents_BW[0].tolist()
        before = list(state.text[0])
        if frontier.depth == 0:
            self.rows = []
        new = [
            [*(self.rows[parent] if frontier.depth else []), token]
            for parent, token in zip(parents, tokens, strict=True)
        ]
        self.rows += new
        with torch.no_grad():
            return state.context.target.model(
                input_ids=torch.tensor([before + row for row in new])
            ).logits[None, :, -1]


def test_the_target_as_its_own_drafter_is_accepted_to_the_bottom() -> None:
    target = tiny_target(seed=3)
    decoder = SpeculativeDecoder(
        target, Exact(target.shape), builder=RerankedTree(3, 3), budget=3 + 2 * 9
    )
    trace = decoder.decode([[7, 9]], Sampling(), 13)[0]
    assert trace.accepted == [4, 4, 4] and trace.offered == [3, 3, 3]
