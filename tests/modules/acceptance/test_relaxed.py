"""Relaxed rules: without a good token they are the standard rule, with good tokens never
shorter.
"""

from __future__ import annotations

from math import log

import pytest
import torch
from torch import Tensor

from modules.acceptance.relaxed import (
    DivergenceRule,
    RelaxedRule,
    ToleranceRule,
    TopKRule,
    draft_divergence,
)
from modules.acceptance.rules import AcceptanceRule, Draws, GreedyRule, default_rule
from modules.contracts.drafter import Drafter, TreeBuilder
from modules.contracts.sampling import Sampling
from modules.contracts.token_tree import SiblingDraw, TokenTree, Topology
from modules.contracts.verification import Verified
from modules.decoding.decoder import SpeculativeDecoder
from modules.drafters.heads.medusa import Medusa
from modules.target.target import Target
from modules.trees.sampled.chain import SampledChain
from modules.trees.static import StaticTree
from tests.fakes import ScriptedDrafter, tiny_target

PROMPTS = [[7, 8, 9, 10, 11], [20, 21], [30, 31, 32]]
VOCAB = 7


class Everything(RelaxedRule):
    def good(self, tree: TokenTree, verified: Verified, draws: Draws) -> Tensor:
        return torch.ones_like(tree.acceptable_BN)


class Nothing(RelaxedRule):
    def good(self, tree: TokenTree, verified: Verified, draws: Draws) -> Tensor:
        return torch.zeros_like(tree.acceptable_BN)


@pytest.fixture(scope="module")
def target() -> Target:
    return tiny_target()


@pytest.fixture(scope="module")
def medusa(target) -> Drafter:
    torch.manual_seed(0)
    drafter = Medusa(target.shape, heads=3, draft_vocabulary=None).double()
    drafter.initialise(target)
    return drafter.eval()


def decoded(
    target: Target,
    drafter: Drafter,
    rule: AcceptanceRule | None,
    sampling: Sampling,
    builder: TreeBuilder | None = None,
) -> list[tuple[list[int], list[int]]]:
    traces = SpeculativeDecoder(target, drafter, rule, builder, 8).decode(PROMPTS, sampling, 13)
    return [(trace.ids, trace.accepted) for trace in traces]


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize(
    "builder",
    [StaticTree([(0,), (1,), (0, 0), (0, 1), (1, 0)]), SampledChain(3)],
    ids=["tree", "chain"],
)
def test_with_nothing_good_it_is_the_standard_rule_draw_for_draw(
    target, medusa, builder, temperature
):
    sampling = Sampling(temperature, seed=3)
    assert decoded(target, medusa, Nothing(), sampling, builder) == decoded(
        target, medusa, None, sampling, builder
    )


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_with_everything_good_whole_chains_are_accepted(target, medusa, temperature):
    found = decoded(target, medusa, Everything(), Sampling(temperature), SampledChain(3))
    assert all(set(accepted) == {4} for _, accepted in found)
    found = decoded(
        target,
        ScriptedDrafter(target.shape, right=0.0, depth=2),
        Everything(),
        Sampling(temperature),
    )
    assert all(set(accepted) == {3} for _, accepted in found)


def test_top_1_is_greedy_and_top_everything_accepts_the_first_deepest_path(target):
    drafter = ScriptedDrafter(target.shape, right=0.5, decoys=1)
    plain = decoded(target, drafter, GreedyRule(), Sampling())
    drafter = ScriptedDrafter(target.shape, right=0.5, decoys=1)
    assert decoded(target, drafter, TopKRule(1), Sampling()) == plain
    drafter = ScriptedDrafter(target.shape, right=0.5, decoys=1)
    assert all(
        set(accepted) == {4} for _, accepted in decoded(target, drafter, TopKRule(128), Sampling())
    )


def verified_tree(seed: int, distributions: Tensor | None = None) -> tuple[TokenTree, Verified]:
    """A random tree of eight nodes over a tiny vocabulary, and random logits."""
    generator = torch.Generator().manual_seed(seed)
    parents = torch.tensor([[-1, 0, 0, 1, 1, 2, 3, 5]])
    tokens = torch.randint(VOCAB, (1, 8), generator=generator)
    extra = (
        {}
        if distributions is None
        else {
            "draw_BN": torch.full((1, 8), SiblingDraw.INDEPENDENT),
            "probs_BRD": distributions,
            "prob_rows_BN": torch.arange(-1, 7)[None],
        }
    )
    logits = 2 * torch.randn(1, 8, VOCAB, generator=generator, dtype=torch.float64)
    tree = TokenTree(tokens, Topology(parents), **extra)
    return tree, Verified(tree, logits)


def test_tolerance_wants_rank_and_closeness_to_the_best():
    for seed in range(20):
        tree, verified = verified_tree(seed)
        found = ToleranceRule(3, 1.5).good(tree, verified, draws())[0]
        for node in range(1, 8):
            row = verified.logits_BNV[0, int(tree.parents_BN[0, node])]
            token = int(tree.tokens_BN[0, node])
            near = float(row.log_softmax(-1).max() - row.log_softmax(-1)[token]) <= 1.5
            assert bool(found[node]) == (near and token in row.topk(3).indices.tolist())


def test_without_tolerance_it_is_the_greedy_rule_and_more_never_accepts_less():
    lengths = {}
    for seed in range(60):
        tree, verified = verified_tree(seed)
        plain = GreedyRule()(tree, verified, draws())
        for rule in (ToleranceRule(1, 9.0), ToleranceRule(5, 0.0)):
            strict = rule(tree, verified, draws())
            assert strict.paths == plain.paths and strict.next_B.tolist() == plain.next_B.tolist()
        for best in (1, 2, 3, 7):
            for gap in (0.0, 0.5, 1.0, 3.0, 99.0):
                accepted = ToleranceRule(best, gap)(tree, verified, draws())
                lengths[seed, best, gap] = accepted.lengths[0]
                # What follows the accepted path is the target's own token.
                row = verified.logits_BNV[0, accepted.paths[0][-1]]
                assert int(accepted.next_B[0]) == int(row.argmax())
    for (seed, best, gap), length in lengths.items():
        for (other, more, wider), longer in lengths.items():
            if seed == other and more >= best and wider >= gap:
                assert longer >= length
    assert len({length for length in lengths.values()}) > 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [((0, 1.0), "best must be at least 1, got 0"), ((2, -0.5), "gap must be 0 or a finite number")],
)
def test_tolerances_out_of_range_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        ToleranceRule(*arguments)


def draws(temperature: float = 0.0) -> Draws:
    return Draws(Sampling(temperature), [torch.Generator().manual_seed(0)])


def test_goodness_against_slow_references():
    distributions = torch.rand(
        1, 7, VOCAB, generator=torch.Generator().manual_seed(9), dtype=torch.float64
    )
    distributions = distributions / distributions.sum(-1, keepdim=True)
    for seed in range(5):
        tree, verified = verified_tree(seed, distributions)
        for temperature in (0.0, 1.0):
            ranked = TopKRule(2).good(tree, verified, draws(temperature))[0]
            close = DivergenceRule(0.6).good(tree, verified, draws(temperature))[0]
            for node in range(1, 8):
                row = verified.logits_BNV[0, int(tree.parents_BN[0, node])]
                token = int(tree.tokens_BN[0, node])
                assert bool(ranked[node]) == (token in row.topk(2).indices.tolist())
                probs = row.softmax(-1).tolist()
                divergence = sum(
                    p * log(p / float(q)) for p, q in zip(probs, distributions[0, node - 1])
                )
                assert bool(close[node]) == (divergence <= 0.6)


def test_relaxation_is_monotone_on_the_same_drafts():
    for seed in range(20):
        tree, verified = verified_tree(seed)
        lengths = [
            int(rule(tree, verified, draws()).lengths_B)
            for rule in (
                default_rule(SiblingDraw.BY_VALUE, Sampling()),
                TopKRule(1),
                TopKRule(2),
                TopKRule(4),
                Everything(),
            )
        ]
        assert lengths == sorted(lengths) and lengths[0] == lengths[1] and lengths[-1] == 4


def test_a_path_ends_at_its_first_bad_token():
    tree, verified = verified_tree(0)

    class Deep(RelaxedRule):
        def good(self, tree: TokenTree, verified: Verified, draws: Draws) -> Tensor:
            return torch.tensor([[True, False, False, True, True, True, True, True]])

    verified.logits_BNV[..., 0] = 50
    tree = TokenTree(torch.full((1, 8), 3), tree.topology)
    accepted = Deep()(tree, Verified(tree, verified.logits_BNV), draws())
    assert int(accepted.lengths_B) == 1 and int(accepted.next_B) == 0


def test_the_longest_path_with_most_standard_tokens_wins():
    tree, verified = verified_tree(0)
    tokens = torch.tensor([[6, 1, 2, 1, 2, 1, 1, 1]])
    logits = torch.zeros_like(verified.logits_BNV)
    logits[..., 2] = 5
    tree = TokenTree(tokens, tree.topology)
    accepted = Everything()(tree, Verified(tree, logits), draws())
    assert accepted.paths[0] == [0, 2, 5, 7]


def test_the_divergence_rule_needs_the_drafters_distribution(target, medusa):
    with pytest.raises(ValueError, match="rule 'divergence 0.5' cannot verify by_value trees"):
        SpeculativeDecoder(target, medusa, DivergenceRule())
    with pytest.raises(ValueError, match="soft: true"):
        decoded(target, medusa, DivergenceRule(), Sampling(), SampledChain(3))
    chain = SampledChain(3, soft=True)
    plain = decoded(target, medusa, None, Sampling(), SampledChain(3))
    assert decoded(target, medusa, None, Sampling(), chain) == plain
    assert decoded(target, medusa, DivergenceRule(0.0), Sampling(), chain) == plain
    assert all(
        set(accepted) == {4}
        for _, accepted in decoded(target, medusa, DivergenceRule(1e6), Sampling(), chain)
    )


def test_divergence_over_a_trimmed_vocabulary_and_without_support():
    probs = torch.tensor([0.5, 0.25, 0.25, 0.0], dtype=torch.float64)
    assert float(draft_divergence(probs, probs, None)) == pytest.approx(0)
    trimmed = torch.tensor([0.5, 0.5], dtype=torch.float64)
    assert float(draft_divergence(probs, trimmed, torch.tensor([1, 2]))) == pytest.approx(log(2))
    unlike = torch.tensor([0.25, 0.75], dtype=torch.float64)
    assert float(draft_divergence(probs, unlike, torch.tensor([1, 2]))) == pytest.approx(
        0.5 * log(0.5 / 0.25) + 0.5 * log(0.5 / 0.75) + log(2)
    )
    assert float(draft_divergence(probs, trimmed, torch.tensor([0, 1]))) == pytest.approx(
        2 / 3 * log(2 / 3 / 0.5) + 1 / 3 * log(1 / 3 / 0.5) - log(0.75)
    )
    assert float(draft_divergence(probs, torch.ones(1).double(), torch.tensor([3]))) == torch.inf
    assert float(draft_divergence(probs, torch.tensor([1.0, 0, 0, 0]).double(), None)) == torch.inf


def judged_over_two_tokens(probs: list[float], threshold: float, temperature: float) -> bool:
    """Whether token 2 is good, from a drafter of tokens 1 and 2 alone whose distribution agrees
    there.
    """
    target_V = torch.tensor(probs, dtype=torch.float64)
    draft_D = target_V[1:3] / target_V[1:3].sum()
    parents = torch.tensor([[-1, 0]])
    tree = TokenTree(
        torch.tensor([[0, 2]]),
        Topology(parents),
        probs_BRD=draft_D[None, None],
        draw_BN=torch.full((1, 2), SiblingDraw.INDEPENDENT),
        prob_rows_BN=parents,
        vocabulary_D=torch.tensor([1, 2]),
    )
    verified = Verified(tree, target_V.log().expand(1, 2, -1))
    return bool(DivergenceRule(threshold).good(tree, verified, draws(temperature))[0, 1])


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_what_the_target_wants_outside_the_draft_vocabulary_counts(temperature):
    """A drafter that is right about its tokens is not good where the target does not want them."""
    assert not judged_over_two_tokens([0.98, 0.01, 0.01, 0.0], 0.5, temperature)
    assert judged_over_two_tokens([0.2, 0.4, 0.4, 0.0], 0.5, temperature)
    assert not judged_over_two_tokens([0.2, 0.4, 0.4, 0.0], 0.2, temperature)
    # Its first choice is outside.
    assert not judged_over_two_tokens([0.4, 0.3, 0.3, 0.0], 0.6, temperature)
    assert not judged_over_two_tokens([0.5, 0.25, 0.25, 0.0], 1e6, temperature)


def test_wrong_settings_are_named():
    with pytest.raises(ValueError, match="k must be at least 1"):
        TopKRule(0)
    with pytest.raises(ValueError, match="threshold must be 0 or above"):
        DivergenceRule(-1.0)
