"""Siblings' rounds return exactly the target's distribution: enumeration of every draw and toss,
golden numbers, controls.
"""

from __future__ import annotations

from dataclasses import replace
from itertools import permutations, product

import numpy as np
import pytest
import torch
from scipy.optimize import linprog

from modules.acceptance.rejection import (
    k_sequential_rounds,
    k_sequential_threshold,
    node_chances,
    recursive_rounds,
)
from modules.acceptance.rules import RULES, WRONG, Draws, PointRule, check_pairing, rule_named
from modules.contracts.sampling import Sampling
from modules.contracts.token_tree import SiblingDraw, TokenTree, Topology
from modules.contracts.verification import Verified

P = torch.tensor([0.5, 0.3, 0.15, 0.05], dtype=torch.float64)
Q = torch.tensor([0.1, 0.2, 0.3, 0.4], dtype=torch.float64)
HALVES = torch.tensor([0, 0.5, 0.5, 0], dtype=torch.float64)


def one_hot(size, token):
    draw = torch.zeros(size, dtype=torch.float64)
    draw[token] = 1
    return draw


def random_probs(size, seed):
    weights = torch.rand(
        size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64
    ).pow(3)
    return weights / weights.sum()


def adversarial():
    """(name, p, q) on vocabularies of 3 to 6."""
    cases = [
        ("golden", P, Q),
        ("equal", P, P),
        ("halves", P, HALVES),
        ("one-hot p", one_hot(4, 2), Q),
    ]
    for size in (3, 4, 5, 6):
        p, q = random_probs(size, size), random_probs(size, 10 + size)
        half = torch.cat([torch.ones(size // 2), torch.zeros(size - size // 2)]).double()
        tied = torch.full((size,), 1 / size, dtype=torch.float64)
        cases += [
            (f"random {size}", p, q),
            (f"disjoint {size}", half / half.sum(), (1 - half) / (1 - half).sum()),
            (f"one-hot q {size}", p, one_hot(size, 1)),
            (f"both one-hot {size}", one_hot(size, 0), one_hot(size, 1)),
            (f"ties {size}", tied, torch.flip(p, (0,))),
            (f"tied draft {size}", p, tied),
            (f"zero q {size}", p, half / half.sum()),
        ]
    return cases


CASES = adversarial()
KINDS = {
    "independent": (SiblingDraw.INDEPENDENT, "stop", recursive_rounds),
    "k_seq": (SiblingDraw.INDEPENDENT, "stop", k_sequential_rounds),
    "swor": (SiblingDraw.WITHOUT_REPLACEMENT, "stop", recursive_rounds),
    "sequoia": (SiblingDraw.WITHOUT_REPLACEMENT, "uniform", recursive_rounds),
}
CHOICES = {
    "likeliest": lambda q: q.argsort(descending=True, stable=True),
    "unlikeliest": lambda q: q.argsort(stable=True),
    "by token": lambda q: torch.arange(len(q)),
}
"""Orders in which a tree may choose by value, whatever the draft's distribution says."""


def siblings(tokens, draw, q, vocabulary=None):
    """A tree of one level, drawn from q."""
    count = len(tokens)
    rows = torch.tensor([[-1] + [0] * count])
    return TokenTree(
        torch.tensor([[0, *tokens]]),
        Topology(rows),
        draw_BN=torch.full((1, count + 1), int(draw)),
        probs_BRD=q[None, None],
        prob_rows_BN=rows,
        vocabulary_D=vocabulary,
    )


def drafts(q, draw, count, exhausted="stop"):
    """Every ordered tuple of siblings with its probability."""
    tuples = [((), 1.0)]
    for _ in range(count):
        longer = []
        for tokens, chance in tuples:
            left = q.clone()
            if draw is SiblingDraw.WITHOUT_REPLACEMENT:
                left[list(tokens)] = 0
                if not left.any() and exhausted == "uniform":
                    left = torch.tensor(
                        [float(token not in tokens) for token in range(len(q))]
                    ).double()
            if not left.any():
                longer.append((tokens, chance))
            longer += [
                ((*tokens, token), chance * float(share / left.sum()))
                for token, share in enumerate(left)
                if share
            ]
        tuples = longer
    return tuples


def emitted(p, tree, rounds, children=None):
    """The distribution of the token that follows node 0 of a given tree, and how likely it is a
    draft.
    """
    out, left, last = torch.zeros_like(p), 1.0, p
    children = list(range(1, tree.size)) if children is None else children
    for node, chance, residual in rounds(tree, 0, children, p):
        out[int(tree.tokens_BN[0, node])] += left * chance
        left, last = left * (1 - chance), residual
    return out + left * last, 1 - left


def output_probs(
    p, q, count, draw=SiblingDraw.INDEPENDENT, exhausted="stop", rounds=recursive_rounds
):
    """The exact distribution of the next token, and the acceptance probability."""
    out, accepted = torch.zeros_like(p), 0.0
    for tokens, chance in drafts(q, draw, count, exhausted):
        probs_V, share = emitted(p, siblings(tokens, draw, q), rounds)
        out, accepted = out + chance * probs_V, accepted + chance * share
    return out, accepted


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name,p,q", CASES, ids=[case[0] for case in CASES])
def test_the_output_is_exactly_the_targets_distribution(name, p, q, kind):
    draw, exhausted, rounds = KINDS[kind]
    shares = []
    for count in (1, 2, 3):
        out, accepted = output_probs(p, q, count, draw, exhausted, rounds)
        torch.testing.assert_close(out, p, rtol=0, atol=1e-12)
        shares.append(accepted)
    assert shares[0] == pytest.approx(float(torch.minimum(p, q).sum()), abs=1e-12), (
        "one draft: 1 - TV, the optimum"
    )
    assert all(later >= earlier - 1e-12 for earlier, later in zip(shares, shares[1:]))


def tossed(tree, rows, draw):
    """What `PointRule` emits behind node 0 in `rows` sequences, if every draw of the target there
    is `draw`.
    """
    wide = replace(
        tree,
        tokens_BN=tree.tokens_BN.expand(rows, -1),
        topology=tree.topology.expand(rows),
        draw_BN=None,
    )
    logits = one_hot(6, draw).log().expand(rows, tree.size, 6)
    draws = Draws(Sampling(temperature=1.0), [torch.Generator() for _ in range(rows)])
    return PointRule()(wide, Verified(wide, logits), draws).emitted(wide)[:, 0].tolist()


@pytest.mark.parametrize("choice", CHOICES)
@pytest.mark.parametrize("name,p,q", CASES, ids=[case[0] for case in CASES])
def test_point_masses_leave_exactly_the_targets_distribution(name, p, q, choice):
    """Children chosen by value: the target's draw as it is, accepted with the mass of the children,
    tie or zero.
    """
    for count in range(1, len(p) + 1):
        tree = siblings(CHOICES[choice](q)[:count].tolist(), SiblingDraw.BY_VALUE, q)
        out, accepted = emitted(p, tree, recursive_rounds)
        torch.testing.assert_close(out, p, rtol=0, atol=1e-12)
        assert accepted == pytest.approx(float(p[CHOICES[choice](q)[:count]].sum()), abs=1e-12)


def test_the_point_rule_emits_the_targets_draw_whatever_is_drafted():
    """Enumerated over the draws and the children: so its distribution is the target's, for every
    distribution.
    """
    for draw in range(6):
        for children in ((0,), (draw,), (5, draw), (1, 2, 3), tuple(range(6))):
            assert (
                tossed(siblings(children, SiblingDraw.BY_VALUE, random_probs(6, 0)), 2, draw)
                == [draw] * 2
            )


@pytest.mark.parametrize(
    "kind,golden",
    [
        ("independent", [0.5, 0.65, 0.685, 0.7165]),
        ("swor", [0.5, 0.679762, 0.780905, 1.0]),
        ("k_seq", [0.5, 0.658443, 0.710003, 0.754746]),
    ],
)
def test_golden_acceptance_probabilities(kind, golden):
    draw, exhausted, rounds = KINDS[kind]
    for count, expected in enumerate(golden, 1):
        assert output_probs(P, Q, count, draw, exhausted, rounds)[1] == pytest.approx(
            expected, abs=5e-5
        )


def test_golden_thresholds_of_k_sequential_selection():
    for count, expected, beta in (
        (1, 1.0, 0.5),
        (2, 1.584429, 0.415571),
        (3, 2.100031, None),
        (4, 2.547464, None),
    ):
        threshold = k_sequential_threshold(P, Q, count)
        assert threshold == pytest.approx(expected, abs=1e-6)
        found = float(torch.minimum(Q, P / threshold).sum())
        assert beta is None or found == pytest.approx(beta, abs=1e-6)
        assert 1 - (1 - found) ** count == pytest.approx(threshold * found, abs=1e-9)


def test_a_used_up_distribution_stops_or_goes_on_uniformly():
    for count, stopped, uniform in (
        (1, 0.45, 0.45),
        (2, 0.45, 0.45),
        (3, 0.45, 0.775),
        (4, 0.45, 1.0),
    ):
        for exhausted, expected in (("stop", stopped), ("uniform", uniform)):
            out, accepted = output_probs(
                P, HALVES, count, SiblingDraw.WITHOUT_REPLACEMENT, exhausted
            )
            assert accepted == pytest.approx(expected, abs=1e-12)
            torch.testing.assert_close(out, P, rtol=0, atol=1e-12)


def optimum(draw, count):
    """The linear programme: the most probable "the target's token is among the drafts" over all
    couplings.
    """
    tuples, size = drafts(Q, draw, count), len(P)
    cost = [-float(token in tokens) for tokens, _ in tuples for token in range(size)]
    equal, wanted = [], []
    for i, (_, chance) in enumerate(tuples):
        equal.append(np.kron(np.eye(len(tuples))[i], np.ones(size)))
        wanted.append(chance)
    for token in range(size):
        equal.append(np.tile(np.eye(size)[token], len(tuples)))
        wanted.append(float(P[token]))
    return -linprog(cost, A_eq=np.array(equal), b_eq=wanted, bounds=(0, 1)).fun


@pytest.mark.parametrize(
    "draw,golden",
    [
        (SiblingDraw.INDEPENDENT, [0.5, 0.69, 0.771]),
        (SiblingDraw.WITHOUT_REPLACEMENT, [0.5, 0.734524, 0.94881, 1.0]),
    ],
)
def test_no_rule_accepts_more_than_the_optimal_transport(draw, golden):
    for count, expected in enumerate(golden, 1):
        best = optimum(draw, count)
        assert best == pytest.approx(expected, abs=1e-5)
        for kind, exhausted, rounds in KINDS.values():
            if kind is draw:
                assert output_probs(P, Q, count, draw, exhausted, rounds)[1] <= best + 1e-9


def test_equal_distributions_accept_the_first_draft():
    for draw, exhausted, rounds in KINDS.values():
        for tokens, _ in drafts(P, draw, 2, exhausted):
            assert next(rounds(siblings(tokens, draw, P), 0, [1, 2], P)).chance == pytest.approx(
                1.0 if rounds is recursive_rounds else min(1, 1 / k_sequential_threshold(P, P, 2))
            )
        assert output_probs(P, P, 1, draw, exhausted, rounds)[1] == pytest.approx(1)


def test_siblings_cover_a_target_whose_support_the_draft_knows():
    """With the draft's k tokens as k siblings without replacement, one is always accepted
    (Sequoia's cover).
    """
    p, q = torch.tensor([0.7, 0.3, 0, 0]).double(), torch.tensor([0.1, 0.3, 0.6, 0]).double()
    assert output_probs(p, q, 3, SiblingDraw.WITHOUT_REPLACEMENT)[1] == pytest.approx(1)


def test_a_trimmed_draft_vocabulary_keeps_the_distribution():
    vocabulary, q = torch.tensor([3, 0]), torch.tensor([0.8, 0.2]).double()
    for draw, _, rounds in KINDS.values():
        out = torch.zeros_like(P)
        for tokens, chance in drafts(q, draw, 2):
            tree = siblings([int(vocabulary[token]) for token in tokens], draw, q, vocabulary)
            out += chance * emitted(P, tree, rounds)[0]
        torch.testing.assert_close(out, P, rtol=0, atol=1e-12)


def test_point_masses_are_accepted_with_the_targets_mass():
    """The golden row of deterministic siblings, through the same rounds."""
    for count, expected in enumerate((0.05, 0.2, 0.5, 1.0), 1):
        tree = siblings((3, 2, 1, 0)[:count], SiblingDraw.BY_VALUE, Q)
        assert emitted(P, tree, recursive_rounds)[1] == pytest.approx(expected)
        chances = node_chances(tree, 0, P.expand(count + 1, -1), recursive_rounds)
        torch.testing.assert_close(torch.tensor(chances[1:]), P[[3, 2, 1, 0][:count]].float())


def test_node_chances_pool_the_children_of_twins():
    """Two chains that draw the same first token go on as one: its children are two independent
    siblings.
    """
    tree = TokenTree(
        torch.tensor([[0, 1, 1, 2, 3]]),
        Topology(torch.tensor([[-1, 0, 0, 1, 2]])),
        draw_BN=torch.full((1, 5), int(SiblingDraw.INDEPENDENT)),
        probs_BRD=Q[None, None],
        prob_rows_BN=torch.zeros(1, 5, dtype=torch.long),
    )
    for rounds in (recursive_rounds, k_sequential_rounds):
        chances = node_chances(tree, 0, P.expand(5, -1), rounds)
        first = emitted(P, siblings((1, 1), SiblingDraw.INDEPENDENT, Q), rounds)
        below = [
            left.chance
            for left in rounds(siblings((2, 3), SiblingDraw.INDEPENDENT, Q), 0, [1, 2], P)
        ]
        assert chances[2] == 0 and chances[1] == pytest.approx(first[1])
        assert chances[3] == pytest.approx(chances[1] * below[0])
        assert chances[4] == pytest.approx(chances[1] * (1 - below[0]) * below[1])


# -- wrong ways, which the same enumeration must find ----------------------------------------------


def unnormalised(count=2):
    """Siblings without replacement judged by the distribution of the first."""
    return sum(
        chance * emitted(P, siblings(tokens, SiblingDraw.INDEPENDENT, Q), recursive_rounds)[0]
        for tokens, chance in drafts(Q, SiblingDraw.WITHOUT_REPLACEMENT, count)
    )


def skip_duplicates(count):
    """Independent siblings, each token tried once."""
    out = torch.zeros_like(P)
    for tokens, chance in drafts(Q, SiblingDraw.INDEPENDENT, count):
        fresh = [node for node in range(1, count + 1) if tokens[node - 1] not in tokens[: node - 1]]
        out += (
            chance
            * emitted(P, siblings(tokens, SiblingDraw.INDEPENDENT, Q), recursive_rounds, fresh)[0]
        )
    return out


def value_ratio(draw):
    """The two likeliest tokens, judged as if they had been drawn."""
    return emitted(P, siblings((3, 2), draw, Q), recursive_rounds)[0]


def per_row(rows):
    """A draw for each of the rows that hold child 0, and a fresh one where none matches."""
    accepted = 1 - (1 - float(P[0])) ** rows
    return accepted * one_hot(4, 0) + (1 - accepted) * P


def unordered():
    """Siblings without replacement, tried in the order of their probability."""
    draw = SiblingDraw.WITHOUT_REPLACEMENT
    return sum(
        chance * emitted(P, siblings(sorted(tokens, reverse=True), draw, Q), recursive_rounds)[0]
        for tokens, chance in drafts(Q, draw, 2)
    )


def raw_bonus(temperature=0.5):
    """The warped target drafts for itself, so that every draft is accepted; the bonus token comes
    from raw logits.
    """
    warped = P ** (1 / temperature) / (P ** (1 / temperature)).sum()
    accepted = emitted(warped, siblings((0,), SiblingDraw.INDEPENDENT, warped), recursive_rounds)[1]
    assert accepted == pytest.approx(1) and float((warped - P).abs().max()) > 0.02
    return accepted * P + (1 - accepted) * warped, warped


CONTROLS = {
    "unnormalised": [(unnormalised(), [0.4405, 0.3595, 0.15, 0.05])],
    "skip_duplicates": [
        (skip_duplicates(2), [0.463, 0.337, 0.15, 0.05]),
        (skip_duplicates(3), [0.4491, 0.3509, 0.15, 0.05]),
    ],
    "value_ratio": [
        (value_ratio(SiblingDraw.INDEPENDENT), [0.875, 0, 0, 0.125]),
        (value_ratio(SiblingDraw.WITHOUT_REPLACEMENT), [0.875, 0, 0, 0.125]),
    ],
    "per_row": [
        (per_row(1), [0.75, 0.15, 0.075, 0.025]),
        (per_row(3), [0.9375, 0.0375, 0.01875, 0.00625]),
    ],
    "unordered": [(unordered(), None)],
    "raw_bonus": [(raw_bonus()[0], None, raw_bonus()[1])],
}


@pytest.mark.parametrize("name", CONTROLS)
def test_wrong_ways_change_the_distribution_and_are_refused_by_name(name):
    for out, golden, *wanted in CONTROLS[name]:
        assert float(out.sum()) == pytest.approx(1)
        assert float((out - (wanted[0] if wanted else P)).abs().max()) > 0.02
        if golden is not None:
            torch.testing.assert_close(out, torch.tensor(golden).double(), rtol=0, atol=5e-5)
    with pytest.raises(ValueError, match=f"rule '{name}' is refused, it is not lossless"):
        rule_named(name)


def test_every_refused_way_has_its_control():
    assert set(CONTROLS) == set(WRONG) and not set(WRONG) & set(RULES)


def test_order_is_part_of_the_draw():
    """Both orders of a pair are drawn, with probabilities of their own."""
    chances = dict(drafts(Q, SiblingDraw.WITHOUT_REPLACEMENT, 2))
    assert all(chances[pair] != chances[pair[::-1]] for pair in permutations(range(4), 2))
    assert sum(chances.values()) == pytest.approx(1)
    assert set(dict(drafts(Q, SiblingDraw.INDEPENDENT, 2))) == set(product(range(4), repeat=2))


@pytest.mark.parametrize(
    "rule,draw",
    [
        ("ratio", SiblingDraw.BY_VALUE),
        ("multi_round", SiblingDraw.WITHOUT_REPLACEMENT),
        ("multi_round", SiblingDraw.BY_VALUE),
        ("recursive", SiblingDraw.INDEPENDENT),
        ("recursive", SiblingDraw.BY_VALUE),
        ("k_seq", SiblingDraw.WITHOUT_REPLACEMENT),
        ("k_seq", SiblingDraw.BY_VALUE),
        ("point", SiblingDraw.INDEPENDENT),
        ("point", SiblingDraw.WITHOUT_REPLACEMENT),
    ],
)
def test_rules_refuse_trees_of_another_distribution(rule, draw):
    fitting = "point" if draw is SiblingDraw.BY_VALUE else "ratio"
    refusal = (
        f"rule '{rule}' cannot verify {draw.name.lower()} trees .*use one of greedy.*{fitting}"
    )
    with pytest.raises(ValueError, match=refusal):
        check_pairing(rule_named(rule), draw)


@pytest.mark.parametrize(
    "rule,draw",
    [
        ("ratio", SiblingDraw.INDEPENDENT),
        ("ratio", SiblingDraw.WITHOUT_REPLACEMENT),
        ("multi_round", SiblingDraw.INDEPENDENT),
        ("recursive", SiblingDraw.WITHOUT_REPLACEMENT),
        ("k_seq", SiblingDraw.INDEPENDENT),
        ("point", SiblingDraw.BY_VALUE),
        ("greedy", SiblingDraw.BY_VALUE),
    ],
)
def test_rules_take_trees_of_their_distribution(rule, draw):
    check_pairing(rule_named(rule), draw)
    assert rule_named(rule).lossless


@pytest.mark.parametrize("rounds", [recursive_rounds, k_sequential_rounds])
def test_a_draft_of_probability_zero_has_no_chance(rounds):
    """A token of probability 0 was never drawn: 0 / 0 is no certainty, nor is p / 0."""
    tree = siblings((0,), SiblingDraw.INDEPENDENT, HALVES)
    for p in (P, one_hot(4, 1)):
        assert emitted(p, tree, rounds)[1] == 0


def test_a_point_mass_is_not_drawn_again_behind_itself():
    """Token 3 as a point mass, then as a draw without replacement, from whose distribution it is
    removed.
    """
    tree = siblings((3, 3), SiblingDraw.WITHOUT_REPLACEMENT, one_hot(4, 3) * 0.5 + Q * 0.5)
    tree = replace(
        tree,
        draw_BN=torch.tensor(
            [[0, int(SiblingDraw.BY_VALUE), int(SiblingDraw.WITHOUT_REPLACEMENT)]]
        ),
    )
    first, second = recursive_rounds(tree, 0, [1, 2], P)
    assert first.chance == pytest.approx(0.05) and second.chance == 0


def test_the_distributions_that_a_tree_carries_are_compared_when_it_is_verified():
    """Whatever its builder promised; a tree without drafts carries none."""
    draws = Draws(Sampling(temperature=1.0), [torch.Generator()])
    mixed = replace(
        siblings((3, 2), SiblingDraw.WITHOUT_REPLACEMENT, Q), draw_BN=torch.tensor([[0, 0, 1]])
    )
    for tree in (
        mixed,
        siblings((3, 2), SiblingDraw.BY_VALUE, Q),
        replace(siblings((3,), SiblingDraw.BY_VALUE, Q), draw_BN=None),
    ):
        with pytest.raises(ValueError, match="rule 'ratio' cannot verify by_value trees"):
            rule_named("ratio")(tree, Verified(tree, P.log().expand(1, tree.size, 4)), draws)
    with pytest.raises(ValueError, match="rule 'k_seq' cannot verify without_replacement trees"):
        tree = siblings((3, 2), SiblingDraw.WITHOUT_REPLACEMENT, Q)
        rule_named("k_seq")(tree, Verified(tree, P.log().expand(1, 3, 4)), draws)
    for empty in (
        TokenTree.root(torch.tensor([0])),
        replace(
            siblings((3,), SiblingDraw.INDEPENDENT, Q), candidate_BN=torch.tensor([[True, False]])
        ),
    ):
        assert (
            rule_named("k_seq")(
                empty, Verified(empty, P.log().expand(1, empty.size, 4)), draws
            ).lengths_B
            == 1
        )
