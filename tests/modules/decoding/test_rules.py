"""Rules keep the target's law: exact enumeration with adversarial laws, golden numbers, and controls that must fail."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest
import torch
from scipy import stats

from modules.core.drafter import Drafter, DraftState, Sampling, Verified
from modules.core.trainable import Losses
from modules.decoding.decoder import SpeculativeDecoder
from modules.decoding.rules import (
    Draws,
    PointRule,
    RatioRule,
    TypicalRule,
    check_pairing,
    recursive_rejection,
    rule_named,
    sample_law,
)
from modules.trees.chain import SampledChain
from modules.trees.static import StaticTree
from modules.trees.tree import Law, TokenTree, Topology
from tests.fakes import tiny_target

P = torch.tensor([0.5, 0.3, 0.15, 0.05], dtype=torch.float64)
Q = torch.tensor([0.1, 0.2, 0.3, 0.4], dtype=torch.float64)
ADVERSARIAL = {
    "reversed": (P, Q), "equal": (P, P), "disjoint": (torch.tensor([1., 0, 0, 0]), torch.tensor([0, .5, .5, 0])),
    "one-hot": (P, torch.tensor([0, 0, 1., 0])), "zero-q": (P, torch.tensor([0, .5, .5, 0])),
    "ties": (torch.full((4,), 0.25), torch.tensor([.25, .25, .4, .1])),
}


class Coin:
    """Stands in for a uniform draw: decides by script and weighs the branch by its exact probability."""

    def __init__(self, script):
        self.script, self.weight = list(script), 1.0

    def uniform(self, sequence, count=1):
        return [self]

    def __mul__(self, law):
        self.law = law
        return self

    def __lt__(self, residual):
        chance = 1.0 if residual >= self.law else float(residual / self.law)
        outcome = self.script.pop(0)
        self.weight *= chance if outcome else 1 - chance
        return outcome


def siblings(tokens, law, q):
    count = len(tokens)
    rows = torch.tensor([[-1] + [0] * count])
    return TokenTree(torch.tensor([[0, *tokens]]), Topology(torch.tensor([[-1] + [0] * count])),
                     law_BN=torch.full((1, count + 1), int(law)), laws_BRD=q[None, None], law_rows_BN=rows)


def drafts(q, law, count):
    """Every ordered tuple of siblings with its probability."""
    for tokens in product(range(4), repeat=count):
        left, chance = q.clone(), 1.0
        for token in tokens:
            chance *= float(left[token] / left.sum()) if left.sum() > 0 else 0.0
            if law is Law.WITHOUT_REPLACEMENT:
                left[token] = 0
        if chance > 0:
            yield tokens, chance


def output_law(p, q, law, count):
    """The exact law of the token emitted at one node, and the acceptance probability."""
    out, accepted = torch.zeros(4, dtype=torch.float64), 0.0
    for tokens, chance in drafts(q, law, count):
        tree = siblings(tokens, law, q)
        for stop in range(count + 1):
            coin = Coin([False] * stop + [True])
            node, residual = recursive_rejection(tree, 0, list(range(1, count + 1)), p.clone(), coin)
            weight = chance * coin.weight
            if node is None:
                out += weight * residual
            else:
                out[tokens[node - 1]] += weight
                accepted += weight
    return out, accepted


@pytest.mark.parametrize("name", ADVERSARIAL)
@pytest.mark.parametrize("law", [Law.INDEPENDENT, Law.WITHOUT_REPLACEMENT])
@pytest.mark.parametrize("count", [1, 2, 3])
def test_recursive_rejection_returns_exactly_the_target_law(name, law, count):
    p, q = (x.double() for x in ADVERSARIAL[name])
    if law is Law.WITHOUT_REPLACEMENT:
        count = min(count, int((q > 0).sum()))
    out, _ = output_law(p, q, law, count)
    torch.testing.assert_close(out, p, rtol=0, atol=1e-12)


@pytest.mark.parametrize("law,golden", [
    (Law.INDEPENDENT, [0.5, 0.65, 0.685, 0.7165]), (Law.WITHOUT_REPLACEMENT, [0.5, 0.679762, 0.780905, 1.0])])
def test_golden_acceptance_probabilities(law, golden):
    for count, expected in enumerate(golden, 1):
        assert output_law(P, Q, law, count)[1] == pytest.approx(expected, abs=5e-5)


def test_wrong_law_fails_the_same_test():
    """Siblings without replacement verified as if they were independent: the sheet's negative control."""
    out = torch.zeros(4, dtype=torch.float64)
    for tokens, chance in drafts(Q, Law.WITHOUT_REPLACEMENT, 2):
        tree = siblings(tokens, Law.INDEPENDENT, Q)
        for stop in range(3):
            coin = Coin([False] * stop + [True])
            node, residual = recursive_rejection(tree, 0, [1, 2], P.clone(), coin)
            if node is None:
                out += chance * coin.weight * residual
            else:
                out[tokens[node - 1]] += chance * coin.weight
    assert (out - P).abs().max() > 0.01


def test_point_rule_accepts_the_mass_of_the_children():
    one, many = siblings((3, 2), Law.POINT, Q), 20000
    tree = TokenTree(one.tokens_BN.expand(many, -1), one.topology.expand(many))
    draws = Draws(Sampling(temperature=1.0), [torch.Generator().manual_seed(seed) for seed in range(many)])
    result = PointRule()(tree, Verified(tree, P.log().expand(many, 3, 4)), draws)
    counts = result.emitted(tree)[:, 0].bincount(minlength=4)
    assert stats.chisquare(counts.numpy(), many * P.numpy()).pvalue > 1e-4
    assert (result.lengths_B == 2).double().mean() == pytest.approx(0.2, abs=0.015)


def test_inverse_cdf_never_draws_a_token_of_probability_zero():
    law = torch.tensor([0.0, 0.5, 0.0, 0.5, 0.0])
    assert sample_law(law.expand(3, -1), torch.tensor([0.0, 0.5, 0.999999])).tolist() == [1, 3, 3]


def test_typical_threshold_reproduces_the_worked_example():
    flat = torch.full((4,), 0.25)
    draws = Draws(Sampling(temperature=1.0), [torch.Generator()])
    for law, kept in ((P.float(), {0, 1, 2}), (flat, {0, 1, 2, 3})):
        found = set()
        for token in range(4):
            tree = siblings((token,), Law.POINT, Q)
            result = TypicalRule()(tree, Verified(tree, law.log().expand(1, 2, 4)), draws)
            found |= {token} if int(result.lengths_B[0]) == 2 else set()
        assert found == kept


def test_wrong_pairings_are_refused_by_name():
    with pytest.raises(ValueError, match="'point' cannot verify independent trees"):
        check_pairing(rule_named("point"), Law.INDEPENDENT)
    with pytest.raises(ValueError, match="unknown"):
        rule_named("lucky")
    tree = siblings((1,), Law.POINT, Q)
    with pytest.raises(ValueError, match="temperature 0"):
        rule_named("greedy")(tree, Verified(tree, P.log().expand(1, 2, 4)),
                             Draws(Sampling(temperature=1.0), [torch.Generator()]))


class NoisyDrafter(Drafter):
    """Drafts from an arbitrary table over the newest token: nothing like the target."""

    binds_to = "nothing"

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


def first_two_tokens(decoder, runs, temperature=1.0, top_p=1.0):
    counts: dict[tuple[int, ...], int] = {}
    for seed in range(runs // 250):
        sampling = Sampling(temperature=temperature, top_p=top_p, seed=seed * 1000)
        for trace in decoder.decode([[3, 1]] * 250, sampling, 3):
            key = tuple(trace.ids[1:3])
            counts[key] = counts.get(key, 0) + 1
    return counts


def homogeneous(one, other):
    """Two-sample chi-square p-value, rare cells pooled."""
    keys = sorted(set(one) | set(other))
    table = np.array([[counts.get(key, 0) for key in keys] for counts in (one, other)], dtype=float)
    rare = table.sum(0) < 20
    pooled = np.concatenate([table[:, ~rare], table[:, rare].sum(1, keepdims=True)], axis=1)
    return stats.chi2_contingency(pooled[:, pooled.sum(0) > 0]).pvalue


def small_target():
    return tiny_target(vocab=6, seed=2)


@pytest.mark.parametrize("rule,builder", [
    ("ratio", SampledChain(2)), ("point", StaticTree([(0,), (1,), (0, 0), (0, 1)]))])
@pytest.mark.parametrize("top_p", [1.0, 0.8])
def test_sampled_decoding_keeps_the_law_through_the_whole_loop(rule, builder, top_p):
    target = small_target()
    target.model.generation_config.eos_token_id = None
    plain = SpeculativeDecoder(target, stop_ids=frozenset({-1}))
    fast = SpeculativeDecoder(target, NoisyDrafter(target.shape, builder), rule_named(rule), stop_ids=frozenset({-1}))
    assert homogeneous(first_two_tokens(plain, 4000, top_p=top_p), first_two_tokens(fast, 4000, top_p=top_p)) > 1e-4


class AlwaysAccept(RatioRule):
    """Deliberately wrong: every draft is kept."""

    def __call__(self, tree, verified, draws):
        return super().__call__(tree, verified, _Zero(draws))


class _Zero:
    def __init__(self, draws):
        self.draws = draws

    def law(self, logits):
        return self.draws.law(logits) + 1e-3

    def uniform(self, sequence, count=1):
        return self.draws.uniform(sequence, count) * 1e-6


def test_a_deliberately_wrong_rule_fails_the_same_test():
    target = small_target()
    plain = SpeculativeDecoder(target, stop_ids=frozenset({-1}))
    wrong = SpeculativeDecoder(target, NoisyDrafter(target.shape, SampledChain(2)), AlwaysAccept(),
                               stop_ids=frozenset({-1}))
    assert homogeneous(first_two_tokens(plain, 4000), first_two_tokens(wrong, 4000)) < 1e-4
