"""Rules through the whole loop: the sampled text has the target's distribution, and wrong pairings
are found out or refused.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from scipy import stats

from modules.acceptance.rules import (
    Draws,
    PointRule,
    RatioRule,
    TypicalRule,
    rule_named,
    sample_probs,
)
from modules.contracts.drafter import Drafter, DraftState
from modules.contracts.losses import Losses
from modules.contracts.sampling import Sampling
from modules.contracts.token_tree import SiblingDraw, TokenTree, Topology
from modules.contracts.verification import Accepted, Verified
from modules.decoding.decoder import SpeculativeDecoder
from modules.trees.reranked import RerankedTree
from modules.trees.sampled.branching import DrawnTree, branching_tree, chains
from modules.trees.sampled.chain import SampledChain
from modules.trees.sampled.dyspec import DySpecTree
from modules.trees.sampled.sequoia import sequoia_tree
from modules.trees.sampled.stochastic_beam import StochasticBeamTree
from modules.trees.static import StaticTree
from tests.fakes import tiny_target
from tests.modules import sampling as sampling_of_text
from tests.modules.acceptance.test_rejection import P, Q, siblings


def test_point_rule_accepts_the_mass_of_the_children():
    one, many = siblings((3, 2), SiblingDraw.BY_VALUE, Q), 20000
    tree = TokenTree(one.tokens_BN.expand(many, -1), one.topology.expand(many))
    draws = Draws(
        Sampling(temperature=1.0), [torch.Generator().manual_seed(seed) for seed in range(many)]
    )
    result = PointRule()(tree, Verified(tree, P.log().expand(many, 3, 4)), draws)
    counts = result.emitted(tree)[:, 0].bincount(minlength=4)
    assert stats.chisquare(counts.numpy(), many * P.numpy()).pvalue > 1e-4
    assert (result.lengths_B == 2).double().mean() == pytest.approx(0.2, abs=0.015)


def test_inverse_cdf_never_draws_a_token_of_probability_zero():
    probs = torch.tensor([0.0, 0.5, 0.0, 0.5, 0.0])
    assert sample_probs(probs.expand(3, -1), torch.tensor([0.0, 0.5, 0.999999])).tolist() == [
        1,
        3,
        3,
    ]


def test_typical_threshold_reproduces_the_worked_example():
    flat = torch.full((4,), 0.25)
    draws = Draws(Sampling(temperature=1.0), [torch.Generator()])
    for probs, kept in ((P.float(), {0, 1, 2}), (flat, {0, 1, 2, 3})):
        found = set()
        for token in range(4):
            tree = siblings((token,), SiblingDraw.BY_VALUE, Q)
            result = TypicalRule()(tree, Verified(tree, probs.log().expand(1, 2, 4)), draws)
            found |= {token} if int(result.lengths_B[0]) == 2 else set()
        assert found == kept


def test_typical_acceptance_relaxes_greedy_decoding_when_its_distribution_stays_soft():
    draws, found = Draws(Sampling(), [torch.Generator()]), {False: set(), True: set()}
    for soft in found:
        for token in range(4):
            tree = siblings((token,), SiblingDraw.BY_VALUE, Q)
            result = TypicalRule(soft=soft)(
                tree, Verified(tree, P.float().log().expand(1, 2, 4)), draws
            )
            found[soft] |= {token} if int(result.lengths_B[0]) == 2 else set()
            assert int(result.next_B[0]) == int(P.argmax())
    assert found == {False: {int(P.argmax())}, True: {0, 1, 2}}


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_of_the_longest_typical_paths_the_likeliest_is_taken(temperature):
    """Three paths of two tokens, of probability 0.09, 0.25 and 0.075; a likelier one is shorter."""
    tokens, parents = torch.tensor([[3, 1, 0, 0, 1, 0, 2]]), torch.tensor([[-1, 0, 0, 0, 1, 2, 3]])
    tree = TokenTree(tokens, Topology(parents))
    draws = Draws(Sampling(temperature), [torch.Generator()])
    rule, verified = TypicalRule(soft=True), Verified(tree, P.log().expand(1, 7, 4))
    assert rule(tree, verified, draws).paths == [[0, 2, 5]]
    worse = replace(tree, candidate_BN=torch.tensor([[True] * 5 + [False, True]]))
    assert rule(worse, replace(verified, tree=worse), draws).paths == [[0, 1, 4]]


def test_unknown_rules_and_sampled_greed_are_refused():
    with pytest.raises(ValueError, match="unknown"):
        rule_named("lucky")
    tree = siblings((1,), SiblingDraw.BY_VALUE, Q)
    with pytest.raises(ValueError, match="temperature 0"):
        rule_named("greedy")(
            tree,
            Verified(tree, P.log().expand(1, 2, 4)),
            Draws(Sampling(temperature=1.0), [torch.Generator()]),
        )


class NoisyDrafter(Drafter):
    """Drafts from an arbitrary table over the newest token: nothing like the target."""

    def __init__(self, shape, builder):
        super().__init__()
        self.tree = builder
        seeded = torch.Generator().manual_seed(5)
        self.table = torch.randn(shape.vocab_size, shape.vocab_size, generator=seeded).double()

    @property
    def builder(self):
        return self.tree

    def loss(self, batch, target, progress):
        return Losses(torch.zeros(()))

    def start(self, context):
        return DraftState(context, context.newest_B, context.lengths_B)

    def expand(self, state, frontier):
        return self.table[frontier.tokens_BW]


VOCAB, PROMPT, PLAIN = 5, [3, 1], Sampling(temperature=1.0)


@pytest.fixture(scope="module")
def target():
    found = tiny_target(vocab=VOCAB, seed=6)
    found.model.generation_config.eos_token_id = None
    return found


def goodness(target, rule, builder, sampling=PLAIN, runs=1000, start=1, sharpness=1.0):
    """Chi-square p-value of two tokens of the text that decoding from a noisy drafter gives."""
    drafter = NoisyDrafter(target.shape, builder)
    drafter.table *= sharpness
    decoder = SpeculativeDecoder(target, drafter, rule, stop_ids=frozenset({-1}))
    return sampling_of_text.goodness(decoder, PROMPT, sampling, runs, start)


TEMPLATE = [(0,), (1,), (0, 0), (2,), (0, 1), (1, 0)]
PAIRINGS = {
    "chain": ("ratio", SampledChain(2)),
    "top-k": ("point", StaticTree([(0,), (1,), (0, 0), (0, 1)])),
    "reranked": ("point", RerankedTree(2, 2)),
    "multi-round": ("multi_round", DrawnTree(TEMPLATE, "independent")),
    "multi-round chains": ("multi_round", chains(3, 2)),
    "k-seq chains": ("k_seq", chains(3, 2)),
    "k-seq tree": ("k_seq", branching_tree([2, 2], "independent")),
    "rsd-c": ("recursive", branching_tree([2, 2])),
    "rsd-s": ("recursive", StochasticBeamTree(3, 2)),
    "sequoia": ("recursive", sequoia_tree([[0.5, 0.2, 0.1]], 6, 2)),
    "dyspec": ("recursive", DySpecTree(2)),
    "dyspec threshold": ("ratio", DySpecTree(3, threshold=0.2)),
    "cold draft": ("ratio", branching_tree([2, 2], temperature=0.5)),
}


@pytest.mark.parametrize("name", PAIRINGS)
def test_sampled_decoding_keeps_the_distribution_through_the_whole_loop(target, name):
    rule, builder = PAIRINGS[name]
    assert goodness(target, rule_named(rule), builder) > 1e-4


@pytest.mark.parametrize("name", ["chain", "top-k", "k-seq chains", "rsd-s"])
def test_warped_targets_keep_their_distribution_too(target, name):
    rule, builder = PAIRINGS[name]
    for sampling in (Sampling(0.7, top_p=0.8), Sampling(1.3, top_k=3), Sampling(2, 4, 0.75)):
        assert goodness(target, rule_named(rule), builder, sampling, runs=500) > 1e-4


# -- controls: the same test finds what is wrong ---------------------------------------------------


class Altered:
    """Another builder's trees, changed."""

    def __init__(self, builder, change, probs):
        self.builder, self.change, self.sibling_draw, self.depth = (
            builder,
            change,
            probs,
            builder.depth,
        )

    def build(self, drafter, state, budget):
        return self.change(self.builder.build(drafter, state, budget))


def relabelled(probs):
    return lambda tree: replace(tree, draw_BN=torch.full_like(tree.tokens_BN, int(probs)))


def without_duplicates(tree):
    """Only the first of equal siblings is tried."""
    same = torch.ones(1, dtype=torch.bool)
    for each_BN in (tree.tokens_BN, tree.parents_BN):
        same = same & (each_BN[:, :, None] == each_BN[:, None])
    return replace(tree, candidate_BN=~torch.tril(same, -1).any(-1))


def by_token(tree):
    """Siblings of a one-level tree in the order of their tokens."""
    tokens = tree.tokens_BN.clone()
    tokens[:, 1:] = tokens[:, 1:].sort(dim=1).values
    return replace(tree, tokens_BN=tokens)


class TopKWithProbs(StaticTree):
    """Children chosen by value that claim to be draws from the distribution that chose them."""

    sibling_draw = SiblingDraw.WITHOUT_REPLACEMENT

    def build(self, drafter, state, budget):
        tree = super().build(drafter, state, budget)
        probs_BND = drafter.table[tree.tokens_BN].softmax(-1)
        return replace(
            tree,
            draw_BN=torch.full_like(tree.tokens_BN, int(self.sibling_draw)),
            probs_BRD=probs_BND,
            prob_rows_BN=tree.parents_BN,
        )


class PerRowRule(PointRule):
    """A draw for every candidate row, and a fresh one where no row matches."""

    def __call__(self, tree: TokenTree, verified: Verified, draws: Draws) -> Accepted:
        first, second = (
            super().__call__(tree, verified, draws),
            super().__call__(tree, verified, draws),
        )
        longer_B = second.lengths_B > first.lengths_B
        width = max(first.path_BA.shape[1], second.path_BA.shape[1])
        paths = [
            torch.nn.functional.pad(one.path_BA, (0, width - one.path_BA.shape[1]))
            for one in (first, second)
        ]
        return Accepted(
            torch.where(longer_B[:, None], paths[1], paths[0]),
            torch.where(longer_B, second.lengths_B, first.lengths_B),
            torch.where(longer_B, second.next_B, first.next_B),
        )


WRONG_PAIRINGS = {
    "unnormalised": (
        "multi_round",
        Altered(branching_tree([3]), relabelled(SiblingDraw.INDEPENDENT), SiblingDraw.INDEPENDENT),
    ),
    "skip_duplicates": (
        "multi_round",
        Altered(chains(4, 1), without_duplicates, SiblingDraw.INDEPENDENT),
    ),
    "value_ratio": ("recursive", TopKWithProbs([(0,), (1,)])),
    "unordered": (
        "recursive",
        Altered(branching_tree([3]), by_token, SiblingDraw.WITHOUT_REPLACEMENT),
    ),
    "per_row": (PerRowRule(), StaticTree([(0,), (1,)])),
}


@pytest.mark.parametrize("name", WRONG_PAIRINGS)
def test_every_refused_way_fails_the_same_test(target, name):
    rule, builder = WRONG_PAIRINGS[name]
    rule = rule_named(rule) if isinstance(rule, str) else rule
    assert goodness(target, rule, builder, start=0, sharpness=2.5) < 1e-4


class RawBonusRule(RatioRule):
    """The token behind the last accepted draft is drawn from the raw logits."""

    def __call__(self, tree, verified, draws):
        raw = Draws(Sampling(temperature=1.0), draws.generators)
        accepted = super().__call__(tree, verified, draws)
        whole = accepted.lengths_B == tree.topology.depth.amax(1) + 1
        sequences = torch.arange(len(accepted.last_B))
        last_B1V = verified.logits_BNV[sequences, accepted.last_B][:, None]
        bonus_B = raw.choose(last_B1V)[:, 0]
        return replace(accepted, next_B=torch.where(whole, bonus_B, accepted.next_B))


def test_a_bonus_token_from_raw_logits_fails_the_same_test(target):
    cold = Sampling(temperature=0.5)
    assert goodness(target, RatioRule(), SampledChain(1), cold, start=1) > 1e-4
    assert goodness(target, RawBonusRule(), SampledChain(1), cold, start=1) < 1e-4
    with pytest.raises(
        ValueError, match="rule 'raw_bonus' is refused, it is not lossless: .* use 'ratio'"
    ):
        rule_named("raw_bonus")


class AlwaysAccept(RatioRule):
    """Deliberately wrong: every draft is kept."""

    def __call__(self, tree, verified, draws):
        return super().__call__(tree, verified, _Zero(draws))


class _Zero:
    def __init__(self, draws):
        self.draws = draws

    def probs(self, logits):
        return self.draws.probs(logits) + 1e-3

    def uniform(self, sequence, count=1):
        return self.draws.uniform(sequence, count) * 1e-6


def test_a_deliberately_wrong_rule_fails_the_same_test(target):
    assert goodness(target, AlwaysAccept(), SampledChain(2), runs=1000) < 1e-4


@pytest.mark.parametrize(
    "rule,builder",
    [
        ("ratio", StaticTree(TEMPLATE)),
        ("multi_round", branching_tree([2, 2])),
        ("k_seq", DySpecTree(2)),
        ("recursive", chains(3, 2)),
        ("point", StochasticBeamTree(3, 2)),
    ],
)
def test_a_decoder_refuses_wrong_pairings_before_it_decodes(target, rule, builder):
    with pytest.raises(ValueError, match=f"rule '{rule}' cannot verify"):
        SpeculativeDecoder(target, NoisyDrafter(target.shape, builder), rule_named(rule))
    with pytest.raises(ValueError, match=f"rule '{rule}' cannot verify"):
        SpeculativeDecoder(
            target, NoisyDrafter(target.shape, SampledChain(1)), rule_named(rule), builder
        )


@pytest.mark.parametrize("name", PAIRINGS)
def test_greedy_decoding_is_plain_decoding_with_every_tree(target, name):
    plain = SpeculativeDecoder(target, stop_ids=frozenset({-1})).decode(
        [PROMPT, [2]], Sampling(), 20
    )
    fast = SpeculativeDecoder(
        target, NoisyDrafter(target.shape, PAIRINGS[name][1]), stop_ids=frozenset({-1})
    )
    traces = fast.decode([PROMPT, [2]], Sampling(), 20)
    assert [trace.ids for trace in traces] == [trace.ids for trace in plain]
    assert all(
        count <= depth + 1
        for trace in traces
        for count, depth in zip(trace.accepted, trace.offered)
    )
