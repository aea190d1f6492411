"""Builders fill the nodes they promise, in a parents-first order, within the budget."""

from __future__ import annotations

import pytest
import torch

from modules.contracts.drafter import Context, Drafter, DraftState
from modules.contracts.losses import Losses
from modules.contracts.sampling import Sampling
from modules.contracts.shapes import TargetShape
from modules.trees.confident import ConfidentChain
from modules.trees.reranked import RerankedTree
from modules.trees.sampled.chain import SampledChain
from modules.trees.static import StaticTree
from modules.trees.threshold import ThresholdTree
from tests.fakes import tiny_target

SHAPE = TargetShape(32, 10, 2, 4, 2, 8, 64)


class Table(Drafter):
    """Logits are a table over (parent's token, token), so any node's distribution can be
    recomputed.
    """

    def __init__(self, shape, vocabulary=None):
        super().__init__()
        self.vocabulary = vocabulary
        size = shape.vocab_size if vocabulary is None else len(vocabulary)
        self.table = (
            torch.randn(shape.vocab_size, size, generator=torch.Generator().manual_seed(0)) * 2
        )
        self.seen = []

    @property
    def vocabulary_D(self):
        return self.vocabulary

    def loss(self, batch, target, progress):
        return Losses(torch.zeros(()))

    def start(self, context):
        return DraftState(context, context.newest_B, context.lengths_B)

    def expand(self, state, frontier):
        self.seen.append(frontier)
        return self.table[frontier.tokens_BW]


def state(batch=2, temperature=0.0):
    newest = torch.arange(1, batch + 1)
    context = Context(
        tiny_target(vocab=10),
        newest[:, None],
        torch.ones_like(newest),
        newest,
        sampling=Sampling(temperature),
        generators=tuple(torch.Generator().manual_seed(b) for b in range(batch)),
    )
    return DraftState(context, newest, torch.ones_like(newest))


PATHS = [(0,), (1,), (0, 0), (0, 2), (1, 0), (0, 0, 1)]


@pytest.mark.parametrize("vocabulary", [None, torch.tensor([1, 4, 7, 9])])
def test_static_tree_holds_the_ranked_tokens_of_each_path(vocabulary):
    drafter = Table(SHAPE, vocabulary)
    tree = StaticTree(PATHS).build(drafter, state(), 6)
    assert tree.parents_BN.tolist() == [[-1, 0, 0, 1, 1, 2, 3]] * 2
    ranked = drafter.table.argsort(-1, descending=True)
    for b in range(2):
        tokens = tree.tokens_BN[b].tolist()
        for node, (parent, rank) in enumerate([(0, 0), (0, 1), (1, 0), (1, 2), (2, 0), (3, 1)], 1):
            choice = int(ranked[tokens[parent], rank])
            assert tokens[node] == (choice if vocabulary is None else int(vocabulary[choice]))
    assert [frontier.parents_BW.tolist()[0] for frontier in drafter.seen] == [[-1], [0, 0], [1]]


def test_static_tree_takes_the_first_paths_of_a_smaller_budget():
    assert StaticTree(PATHS).build(Table(SHAPE), state(), 3).parents_BN[0].tolist() == [-1, 0, 0, 1]
    assert StaticTree(PATHS).build(Table(SHAPE), state(), 0).size == 1


def test_static_tree_refuses_orphans():
    with pytest.raises(ValueError, match="prefix"):
        StaticTree([(0, 0), (0,)])


def brute_force(table, root, depth, width, budget, top_p, ratio):
    """Clover's sampler, node by node."""
    level, kept = [((), root, 0.0)], []
    for _ in range(depth):
        candidates = []
        for path, token, score in level:
            probs = table[token].softmax(-1)
            order = probs.argsort(descending=True).tolist()
            mass = 0.0
            for child in order[: min(width, budget - len(kept))]:
                if mass < top_p and probs[child] >= ratio * probs[order[0]]:
                    candidates.append(((*path, child), child, score + float(probs[child].log())))
                mass += float(probs[child])
        level = sorted(candidates, key=lambda c: -c[2])[: min(width, budget - len(kept))]
        kept += [path for path, _, _ in level]
    return set(kept)


@pytest.mark.parametrize("budget", [1, 3, 6, 12])
def test_threshold_tree_equals_the_node_by_node_algorithm(budget):
    drafter = Table(SHAPE)
    tree = ThresholdTree(depth=3, width=3, top_p=0.9, ratio=0.2).build(drafter, state(), budget)
    for b in range(2):
        expected = brute_force(drafter.table, b + 1, 3, 3, budget, 0.9, 0.2)
        assert len(expected) <= budget
        paths, tokens, parents = {}, tree.tokens_BN[b].tolist(), tree.parents_BN[b].tolist()
        for node in range(1, tree.size):
            if parents[node] != node:
                paths[node] = (*paths.get(parents[node], ()), tokens[node])
        assert set(paths.values()) == expected


def test_sampled_chain_carries_the_distribution_it_was_drawn_from():
    drafter = Table(SHAPE)
    tree = SampledChain(3).build(drafter, state(temperature=0.7), 8)
    assert tree.parents_BN[0].tolist() == [-1, 0, 1, 2]
    for b in range(2):
        for node in range(1, 4):
            probs = (drafter.table[tree.tokens_BN[b, node - 1]].double() / 0.7).softmax(-1)
            torch.testing.assert_close(tree.probs_BRD[b, tree.prob_rows_BN[b, node]], probs)
    greedy = SampledChain(2).build(drafter, state(), 8)
    assert greedy.tokens_BN[0, 1] == drafter.table[1].argmax()


def test_wrong_sizes_are_refused():
    for wrong in (lambda: ThresholdTree(0), lambda: SampledChain(0)):
        with pytest.raises(ValueError, match="at least 1"):
            wrong()


@pytest.mark.parametrize("budget", [2, 3, 5])
def test_a_batch_of_dynamic_trees_is_no_wider_than_its_budget(budget):
    """Sequences keep different nodes, and one column for each would overflow the cache that the
    budget promised.
    """
    drafter = Table(SHAPE)
    builder = ThresholdTree(depth=4, width=3, top_p=0.95, ratio=0.01)
    tree = builder.build(drafter, state(batch=6), budget)
    assert tree.size <= budget + 1
    for b in range(6):
        alone = state(batch=6)
        for name in ("newest_B", "lengths_B"):
            setattr(alone, name, getattr(alone, name)[b : b + 1])
        one = builder.build(drafter, alone, budget)
        real = tree.acceptable_BN[b]
        assert tree.tokens_BN[b][real].tolist() == one.tokens_BN[0].tolist()
        assert tree.parents_BN[b][real].tolist() == one.parents_BN[0].tolist()


@pytest.mark.parametrize(
    "builder",
    [
        StaticTree(PATHS),
        ThresholdTree(3, width=4, top_p=0.99, ratio=0.01),
        RerankedTree(3, width=4),
    ],
)
@pytest.mark.parametrize("vocabulary", [None, torch.tensor([1, 4, 7, 9])])
def test_trees_chosen_by_value_hold_no_prefix_twice(builder, vocabulary):
    tree = builder.build(Table(SHAPE, vocabulary), state(batch=5), 12)
    assert tree.size > 5 and tree.first_BN.tolist() == [list(range(tree.size))] * 5


@pytest.mark.parametrize("vocabulary", [None, torch.tensor([0, 2, 3, 5, 7, 8])])
def test_a_confident_chain_ends_at_the_first_unlikely_token(vocabulary) -> None:
    drafter, batch, lengths = Table(SHAPE, vocabulary), 8, set()
    for confidence in (0.0, 0.3, 0.45, 1.1):
        tree = ConfidentChain(3, confidence).build(drafter, state(batch), 5)
        for b in range(batch):
            expected = [b + 1]
            while len(expected) < 4:
                probs = drafter.table[expected[-1]].softmax(-1)
                if float(probs.max()) < confidence:
                    break
                best = int(probs.argmax())
                expected.append(best if vocabulary is None else int(vocabulary[best]))
            real = tree.acceptable_BN[b]
            assert tree.tokens_BN[b, real].tolist() == expected
            assert tree.parents_BN[b, real].tolist() == list(range(-1, len(expected) - 1))
            lengths.add(len(expected))
        assert ConfidentChain(3, confidence).build(drafter, state(batch), 0).size == 1
    assert {1, 2, 4} <= lengths
