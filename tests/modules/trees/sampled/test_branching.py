"""Drawn trees: the distribution that travels is the one drawn from, siblings follow Plackett-Luce,
DySpec takes the best.
"""

from __future__ import annotations

import heapq
from dataclasses import replace
from itertools import permutations, product

import pytest
import torch
from scipy import stats

from modules.acceptance.rules import Draws, rule_named
from modules.contracts.drafter import Frontier
from modules.contracts.sampling import Sampling
from modules.contracts.token_tree import SiblingDraw
from modules.contracts.verification import Verified
from modules.decoding.decoder import SpeculativeDecoder
from modules.trees.sampled import dyspec
from modules.trees.sampled.branching import DrawnTree, branching_tree, chains
from modules.trees.sampled.chain import SampledChain
from modules.trees.sampled.dyspec import DySpecTree
from modules.trees.sampled.sequoia import sequoia_tree
from modules.trees.sampled.stochastic_beam import StochasticBeamTree, conditioned
from modules.trees.static import StaticTree
from tests.fakes import tiny_target
from tests.modules import families
from tests.modules.families import built
from tests.modules.sampling import goodness, small_target
from tests.modules.trees.test_builders import SHAPE, Table, state

BUILDERS = {
    "rsd_c": branching_tree([3, 2, 1]),
    "multi_round": branching_tree([3, 2, 1], "independent"),
    "chains": chains(4, 3),
    "rsd_s": StochasticBeamTree(5, 3),
    "sequoia": sequoia_tree([[0.5, 0.2, 0.1]], 12, 3),
    "dyspec": DySpecTree(3),
    "threshold": DySpecTree(3, threshold=0.1),
}


def sharp(prob_rows):
    """A drafter over as many tokens with exactly these distributions."""
    drafter = Table(replace(SHAPE, vocab_size=len(prob_rows)))
    drafter.table = torch.tensor(prob_rows, dtype=torch.float64).log()
    return drafter


def wide_state(batch, seed=0):
    """Many sequences with the same newest token."""
    found = state(batch=1, temperature=1.0)
    generators = tuple(torch.Generator().manual_seed(seed * batch + i) for i in range(batch))
    context = replace(found.context, generators=generators)
    return replace(
        found,
        context=context,
        newest_B=torch.zeros(batch, dtype=torch.long),
        lengths_B=torch.ones(batch, dtype=torch.long),
    )


@pytest.mark.parametrize("name", BUILDERS)
@pytest.mark.parametrize("vocabulary", [None, torch.tensor([1, 4, 7, 9])])
@pytest.mark.parametrize("budget", [0, 1, 4, 12])
def test_every_node_travels_with_the_distribution_it_was_drawn_from(name, vocabulary, budget):
    drafter, builder = Table(SHAPE, vocabulary), BUILDERS[name]
    tree = builder.build(drafter, state(batch=3, temperature=0.7), budget)
    assert tree.size <= budget + 1 and int(tree.topology.depth.max()) <= builder.depth
    assert budget == 0 or tree.draws_used == {builder.sibling_draw}
    for b, node in tree.acceptable_BN.nonzero().tolist():
        if node:
            parent = int(tree.parents_BN[b, node])
            assert parent < node and bool(tree.acceptable_BN[b, parent])
            probs = (drafter.table[tree.tokens_BN[b, parent]].double() / 0.7).softmax(-1)
            torch.testing.assert_close(tree.probs_BRD[b, tree.prob_rows_BN[b, node]], probs)
            siblings = [
                int(tree.tokens_BN[b, n])
                for n in range(1, node)
                if tree.acceptable_BN[b, n] and int(tree.parents_BN[b, n]) == parent
            ]
            assert (
                builder.sibling_draw is SiblingDraw.INDEPENDENT
                or int(tree.tokens_BN[b, node]) not in siblings
            )
            assert vocabulary is None or int(tree.tokens_BN[b, node]) in vocabulary.tolist()


@pytest.mark.parametrize("name", BUILDERS)
def test_rows_are_handed_out_in_the_order_of_the_frontiers(name):
    """The distribution of a node is found again from the frontier row that its tree names."""
    drafter = Table(SHAPE)
    tree = BUILDERS[name].build(drafter, state(temperature=1.0), 12)
    seen = [frontier.tokens_BW.shape[1] for frontier in drafter.seen]
    assert [frontier.depth for frontier in drafter.seen] == list(range(len(seen)))
    for frontier, handed in zip(drafter.seen[1:], torch.tensor(seen).cumsum(0)):
        assert int(frontier.parents_BW.max()) < int(handed) and int(frontier.parents_BW.min()) >= 0
    assert tree.size > 1


def chi_square(counts, probs):
    kept = probs * counts.sum() >= 5
    seen = [*counts[kept].tolist(), float(counts[~kept].sum())]
    wanted = [*(probs[kept] * counts.sum()).tolist(), float(probs[~kept].sum() * counts.sum())]
    return stats.chisquare(
        *((seen, wanted) if wanted[-1] > 0 else (seen[:-1], wanted[:-1])), sum_check=False
    ).pvalue


PROBS = [0.5, 0.3, 0.15, 0.05]


@pytest.mark.parametrize(
    "builder", [branching_tree([2]), StochasticBeamTree(2, 1), sequoia_tree([[0.4, 0.3]], 2, 1)]
)
def test_siblings_follow_plackett_luce_in_their_order(builder):
    tree = builder.build(sharp([PROBS] * 4), wide_state(6000), 2)
    counts = torch.bincount(tree.tokens_BN[:, 1] * 4 + tree.tokens_BN[:, 2], minlength=16).double()
    probs = torch.zeros(16, dtype=torch.float64)
    for first, second in permutations(range(4), 2):
        probs[first * 4 + second] = PROBS[first] * PROBS[second] / (1 - PROBS[first])
    assert chi_square(counts, probs) > 1e-4
    swapped = torch.bincount(tree.tokens_BN[:, 2] * 4 + tree.tokens_BN[:, 1], minlength=16).double()
    assert chi_square(swapped, probs) < 1e-4


def test_independent_siblings_are_independent():
    tree = chains(2, 1).build(sharp([PROBS] * 4), wide_state(6000), 2)
    counts = torch.bincount(tree.tokens_BN[:, 1] * 4 + tree.tokens_BN[:, 2], minlength=16).double()
    assert (
        chi_square(counts, torch.outer(torch.tensor(PROBS), torch.tensor(PROBS)).double().flatten())
        > 1e-4
    )


def test_the_beam_is_a_sample_of_prefixes_without_replacement():
    """The two best prefixes of two tokens, in order, are Plackett-Luce draws from the distribution
    of prefixes.
    """
    rows = [[0.6, 0.3, 0.1], [0.2, 0.2, 0.6], [0.1, 0.8, 0.1]]
    tree = StochasticBeamTree(2, 2).build(sharp(rows), wide_state(8000), 4)
    above = tree.tokens_BN.gather(1, tree.parents_BN[:, 3:])
    first, second = (above * 3 + tree.tokens_BN[:, 3:]).T
    prefixes = torch.tensor(
        [rows[0][a] * rows[a][b] for a, b in product(range(3), repeat=2)]
    ).double()
    probs = prefixes[:, None] * prefixes / (1 - prefixes[:, None])
    probs.fill_diagonal_(0)
    assert (
        chi_square(torch.bincount(first * 9 + second, minlength=81).double(), probs.flatten())
        > 1e-4
    )


def test_conditioned_keys_have_the_parents_maximum():
    keys = torch.tensor([[[3.0, 1.0, -4.0, -torch.inf]]]).double()
    moved = conditioned(keys, torch.tensor([[[-0.5]]]).double())
    expected = -(torch.tensor(0.5).double().exp() - (-keys[..., :1]).exp() + (-keys).exp()).log()
    torch.testing.assert_close(moved[..., :3], expected[..., :3])
    assert moved[0, 0, 0] == -0.5 and moved[0, 0, 3] == -torch.inf
    assert bool((conditioned(keys, torch.tensor([[[-torch.inf]]]).double()) == -torch.inf).all())
    huge = conditioned(
        torch.tensor([[[900.0, -900.0]]]).double(), torch.tensor([[[-900.0]]]).double()
    )
    assert huge[0, 0].isfinite().all() and huge[0, 0, 0] == -900


def test_a_used_up_distribution_ends_the_siblings_or_goes_on_uniformly():
    drafter = sharp([[0, 0.5, 0.5, 0]] * 4)
    paths = [(0,), (1,), (2,), (2, 0)]
    stopped = DrawnTree(paths).build(drafter, wide_state(50), 4)
    assert stopped.acceptable_BN[0].tolist() == [True, True, True, False, False]
    going = DrawnTree(paths, exhausted="uniform").build(drafter, wide_state(400), 4)
    assert bool(going.acceptable_BN.all()) and set(going.tokens_BN[:, 3].tolist()) == {0, 3}
    assert set(going.tokens_BN[:, 1].tolist()) == {1, 2} == set(going.tokens_BN[:, 2].tolist())
    beam = StochasticBeamTree(4, 1).build(drafter, wide_state(5), 4)
    assert beam.acceptable_BN[0].tolist() == [True, True, True, False, False]
    grown = DySpecTree(1).build(drafter, wide_state(5), 4)
    assert grown.size == 3


def test_mistakes_are_named():
    for wrong, message in (
        (lambda: DrawnTree([(1,)]), "earlier sibling"),
        (lambda: DrawnTree([(0, 0)]), "prefix"),
        (lambda: DrawnTree([(0,)], draw="sorted"), "without_replacement"),
        (lambda: branching_tree([]), "branching"),
        (lambda: branching_tree([2], temperature=0.0), "above 0"),
        (lambda: StochasticBeamTree(0, 1), "at least 1"),
        (lambda: DySpecTree(0), "at least 1"),
        (lambda: DySpecTree(2, threshold=1.5), "threshold"),
    ):
        with pytest.raises(ValueError, match=message):
            wrong()
    with pytest.raises(ValueError, match="draft vocabulary has 4 tokens"):
        branching_tree([5]).build(Table(SHAPE, torch.tensor([1, 4, 7, 9])), state(), 5)


# -- DySpec ----------------------------------------------------------------------------------------


def fixed_race(probs_BWD, context, exhausted="stop"):
    """Noise that depends on the distribution alone, so that any order of expansion draws the same
    siblings.
    """
    noise = [
        torch.rand(
            probs_BWD.shape[-1], generator=torch.Generator().manual_seed(int(row[0] * 1e9))
        ).double()
        for row in probs_BWD.flatten(0, 1)
    ]
    return probs_BWD.log() - (-torch.stack(noise).log()).log().reshape(probs_BWD.shape)


def sequential(drafter, root, size):
    """DySpec's algorithm A as printed: a heap of draws, one draft call per token. Paths, and the
    values popped.
    """

    def probs_of(token):
        return (drafter.table[token].double()).softmax(-1)

    def order(token):
        return fixed_race(probs_of(token)[None, None], None)[0, 0].argsort(descending=True).tolist()

    heap, counter, paths, popped = [(-1.0, 0, (root,), 0, probs_of(root))], 1, [], []
    while len(paths) < size:
        value, _, path, index, residual = heapq.heappop(heap)
        drawn = order(path[-1])[index]
        paths.append((*path, drawn))
        popped.append(-value)
        share = float(residual[drawn])
        left = residual.clone()
        left[drawn] = 0
        if left.any():
            heapq.heappush(heap, (value * (1 - share), counter, path, index + 1, left / left.sum()))
        heapq.heappush(heap, (value * share, counter + 1, (*path, drawn), 0, probs_of(drawn)))
        counter += 2
    return paths, popped


def paths_of(tree, b):
    paths = {0: (int(tree.tokens_BN[b, 0]),)}
    for node in range(1, tree.size):
        if tree.acceptable_BN[b, node]:
            paths[node] = (*paths[int(tree.parents_BN[b, node])], int(tree.tokens_BN[b, node]))
    return [paths[node] for node in sorted(paths) if node]


@pytest.mark.parametrize("size", [1, 2, 5, 9, 20])
def test_dyspec_equals_the_sequential_algorithm_and_its_threshold_form(monkeypatch, size):
    monkeypatch.setattr(dyspec, "race", fixed_race)
    drafter = Table(SHAPE)
    tree = DySpecTree(size).build(drafter, state(batch=4, temperature=1.0), size)
    for b in range(4):
        paths, popped = sequential(drafter, b + 1, size)
        assert popped == sorted(popped, reverse=True)
        assert sorted(paths_of(tree, b)) == sorted(paths)
        by_threshold = DySpecTree(size, threshold=popped[-1] * (1 - 1e-12)).build(
            drafter, state(batch=4, temperature=1.0), 60
        )
        assert sorted(paths_of(by_threshold, b)) == sorted(paths)


def test_dyspec_follows_the_sharpness_of_the_distribution():
    chain = DySpecTree(9).build(sharp([[0, 1.0, 0], [0, 0, 1.0], [1.0, 0, 0]]), wide_state(2), 6)
    assert chain.parents_BN.tolist() == [[-1, 0, 1, 2, 3, 4, 5]] * 2
    flat = DySpecTree(9).build(sharp([[1 / 40] * 40] * 40), wide_state(2), 12)
    assert flat.parents_BN.tolist() == [[-1] + [0] * 12] * 2
    assert DySpecTree(9).build(sharp([PROBS] * 4), wide_state(2), 1).size == 2


# -- builder and rule together, over random tables -------------------------------------------------


class Prefixes(Table):
    """A distribution of its own for every prefix of up to two tokens (a prefix is its frontier
    row's path).
    """

    def __init__(self, seed, vocab=3):
        super().__init__(replace(SHAPE, vocab_size=vocab))
        seeded = torch.Generator().manual_seed(seed)
        self.distributions = torch.rand(
            2, 1 + vocab, vocab, generator=seeded, dtype=torch.float64
        ).pow(2)
        self.distributions /= self.distributions.sum(-1, keepdim=True)

    def expand(self, state, frontier: Frontier):
        place = (
            torch.zeros_like(frontier.tokens_BW) if frontier.depth == 0 else 1 + frontier.tokens_BW
        )
        if frontier.depth > 1:
            place = place * 0
        return self.distributions[0][place].log()


@pytest.mark.parametrize(
    "rule,builder,budget",
    [
        ("recursive", DySpecTree(2), 3),
        ("recursive", DySpecTree(2), 4),
        ("recursive", DySpecTree(2), 5),
        ("recursive", StochasticBeamTree(2, 2), 4),
        ("recursive", branching_tree([2, 2]), 6),
        ("k_seq", chains(3, 2), 6),
    ],
)
def test_the_first_two_tokens_have_the_targets_distribution(rule, builder, budget):
    assert first_two_tokens(Prefixes(budget), rule, builder, budget) > 1e-4


def first_two_tokens(drafter, rule, builder, budget, runs=1500):
    """Chi-square p-value over random distributions of draft and target; shorter outputs are
    completed from the target."""
    p = drafter.distributions[1]
    counts = torch.zeros(9, dtype=torch.float64)
    for seed in range(2):
        found = wide_state(runs, seed)
        tree = builder.build(drafter, found, budget)
        place = torch.where(tree.topology.depth == 1, 1 + tree.tokens_BN, 0)
        draws = Draws(Sampling(temperature=1.0), list(found.context.generators))
        accepted = rule_named(rule)(tree, Verified(tree, p[place].log()), draws)
        emitted = accepted.emitted(tree)
        second = torch.multinomial(
            p[1 + emitted[:, 0]], 1, generator=torch.Generator().manual_seed(seed)
        )[:, 0]
        if emitted.shape[1] > 1:
            second = torch.where(accepted.lengths_B > 1, emitted[:, 1], second)
        counts += torch.bincount(emitted[:, 0] * 3 + second, minlength=9)
    return chi_square(counts, (p[0][:, None] * p[1:]).flatten())


class RowDependent(Prefixes):
    """Rows of one prefix differ, as rounding makes them, but by far more."""

    def expand(self, state, frontier):
        rows = torch.arange(frontier.tokens_BW.shape[1])[:, None]
        return super().expand(state, frontier) + rows * torch.tensor([-2.0, 2.0, 0.0])


@pytest.mark.parametrize("builder", [chains(3, 2), branching_tree([3, 2], "independent")])
def test_children_of_twins_are_draws_from_one_distribution(builder):
    drafter = RowDependent(6)
    assert first_two_tokens(drafter, "k_seq", builder, 9) > 1e-4
    tree = builder.build(drafter, wide_state(200), 9)
    assert tree.probs_BRD is not None and tree.prob_rows_BN is not None
    probs_BND = tree.probs_BRD.gather(
        1, tree.prob_rows_BN.clamp(min=0)[..., None].expand(-1, -1, 3)
    )
    above_BN = tree.first_BN.gather(1, tree.parents_BN.clamp(min=0))
    same = above_BN[:, 1:, None] == above_BN[:, None, 1:]
    assert bool((probs_BND[:, 1:, None] == probs_BND[:, None, 1:]).all(-1)[same].all())
    assert int((tree.first_BN != torch.arange(tree.size)).sum()) > 50


# -- every drafter with probabilities --------------------------------------------------------------


@pytest.mark.parametrize("family", ["medusa", "clover", "hydra", "eagle", "eagle3", "falcon"])
def test_learned_drafters_draw_every_tree_and_stay_lossless(family):
    target = tiny_target()
    drafter = built(family, target, shake=0.05)
    prompts = [[7, 8, 9], [20, 21]]
    plain = SpeculativeDecoder(target).decode(prompts, Sampling(), 10)
    for builder in (*BUILDERS.values(), StaticTree([(0,), (1,)])):
        found = SpeculativeDecoder(target, drafter, builder=builder, budget=8).decode(
            prompts, Sampling(), 10
        )
        assert [trace.ids for trace in found] == [trace.ids for trace in plain]


LEARNED = {
    "medusa": branching_tree([2, 2]),
    "clover": DySpecTree(3),
    "hydra": StochasticBeamTree(3, 2),
    "eagle": chains(3, 2),
    "eagle3": sequoia_tree([[0.5, 0.2, 0.1]], 6, 2),
    "falcon": DySpecTree(3, 0.05),
    "fspad": SampledChain(3),
    "clover2": branching_tree([2, 2], "independent"),
}
WARPED = {"medusa": Sampling(0.8, top_p=0.9), "eagle3": Sampling(1.2, top_k=3)}


@pytest.mark.parametrize("family", LEARNED)
def test_learned_drafters_keep_the_distribution_with_draws(family, monkeypatch):
    """Four of six tokens can be drafted; chi-square of the second and third token."""
    monkeypatch.setattr(families, "DRAFTED", 4)
    target = small_target()
    drafter = families.built(family, target, shake=0.3)
    assert drafter.vocabulary_D is not None and len(drafter.vocabulary_D) == 4
    decoder = SpeculativeDecoder(
        target, drafter, builder=LEARNED[family], budget=6, stop_ids=frozenset({-1})
    )
    assert goodness(decoder, [3, 1], WARPED.get(family, Sampling(1.0)), 1000) > 1e-4
