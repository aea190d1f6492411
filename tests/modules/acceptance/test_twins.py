"""Siblings that hold the same token stand for one prefix: one draw for all of them.

Exact: every combination of the target's draws at the nodes of a small tree is enumerated.
"""

from __future__ import annotations

from itertools import product
from math import prod

import pytest
import torch
from torch import Tensor

from modules.acceptance.rejection import node_chances, recursive_rounds
from modules.acceptance.relaxed import RelaxedRule, TopKRule
from modules.acceptance.rules import AcceptanceRule, Draws, PointRule, RatioRule, TypicalRule
from modules.contracts.sampling import Sampling
from modules.contracts.token_tree import SiblingDraw, TokenTree, Topology
from modules.contracts.verification import Accepted, Verified

VOCAB, LONGEST = 3, 3
SAMPLED = Sampling(temperature=1.0)


class Nothing(RelaxedRule):
    def good(self, tree: TokenTree, verified: Verified, draws: Draws) -> Tensor:
        return torch.zeros_like(tree.acceptable_BN)


class Enumerated(Draws):
    """The target's draws are given instead of drawn."""

    def __init__(self, choice_BN: Tensor) -> None:
        super().__init__(SAMPLED, [torch.Generator() for _ in choice_BN])
        self.choice_BN = choice_BN

    def choose(self, logits_BNV: Tensor) -> Tensor:
        return self.choice_BN


def distributions(seed: int) -> dict[tuple[int, ...], Tensor]:
    """A distribution of the next token behind every prefix of fewer than `LONGEST` tokens."""
    random = torch.Generator().manual_seed(seed)
    prefixes = [one for size in range(LONGEST + 1) for one in product(range(VOCAB), repeat=size)]
    weights = torch.rand(len(prefixes), VOCAB, generator=random, dtype=torch.float64) ** 2
    return dict(zip(prefixes, weights / weights.sum(-1, keepdim=True), strict=True))


def tree_of(
    tokens: list[int], parents: list[int], candidates: list[bool] | None = None
) -> TokenTree:
    return TokenTree(
        torch.tensor([tokens]),
        Topology(torch.tensor([parents])),
        None if candidates is None else torch.tensor([candidates]),
    )


def prefix_of(tree: TokenTree, node: int) -> tuple[int, ...]:
    above = int(tree.parents_BN[0, node])
    if node == 0 or above == node:
        return ()
    return (*prefix_of(tree, above), int(tree.tokens_BN[0, node]))


def verified(tree: TokenTree, known: dict[tuple[int, ...], Tensor]) -> Verified:
    probs_NV = torch.stack([known[prefix_of(tree, node)] for node in range(tree.size)])
    return Verified(tree, probs_NV.log()[None])


def repeated(tree: TokenTree, count: int) -> TokenTree:
    candidates = None if tree.candidate_BN is None else tree.candidate_BN.expand(count, -1)
    return TokenTree(tree.tokens_BN.expand(count, -1), tree.topology.expand(count), candidates)


def text_probs(
    rule: AcceptanceRule, tree: TokenTree, known: dict[tuple[int, ...], Tensor]
) -> tuple[dict[tuple[int, ...], float], float]:
    """The exact distribution of the next `LONGEST` tokens, what a call does not emit completed from
    the target; and the expected number of accepted drafts."""
    choice_BN = torch.tensor(list(product(range(VOCAB), repeat=tree.size)))
    logits = verified(tree, known).logits_BNV
    weights = [
        prod(float(logits[0, node, token].exp()) for node, token in enumerate(row))
        for row in choice_BN.tolist()
    ]
    wide = repeated(tree, len(choice_BN))
    logits_BNV = logits.expand(len(choice_BN), -1, -1)
    accepted = rule(wide, Verified(wide, logits_BNV), Enumerated(choice_BN))
    out, drafts = dict.fromkeys(product(range(VOCAB), repeat=LONGEST), 0.0), 0.0
    emitted = accepted.emitted(wide).tolist()
    for weight, tokens, count in zip(weights, emitted, accepted.lengths, strict=True):
        text = tuple(tokens[:count][:LONGEST])
        drafts += weight * (count - 1)
        for rest in product(range(VOCAB), repeat=LONGEST - len(text)):
            whole = (*text, *rest)
            out[whole] += weight * chance_of(whole, known, len(text))
    return out, drafts


def chance_of(text: tuple[int, ...], known: dict[tuple[int, ...], Tensor], start: int = 0) -> float:
    """The target's probability of the tokens from `start` on, given those before."""
    return prod(float(known[text[:i]][text[i]]) for i in range(start, len(text)))


TREES = {
    "twins, one child each": tree_of([0, 0, 0, 0, 0], [-1, 0, 0, 1, 2]),
    "twins, other children": tree_of([0, 1, 1, 0, 2], [-1, 0, 0, 1, 2]),
    "twins below twins": tree_of([2, 1, 1, 0, 0, 0, 2], [-1, 0, 0, 1, 2, 2, 4]),
    "triplets, children of the last": tree_of([0, 2, 2, 2, 1, 0], [-1, 0, 0, 0, 3, 4]),
    "a twin that only computes": tree_of(
        [0, 1, 1, 0, 2], [-1, 0, 0, 1, 2], [True, False, True, True, True]
    ),
    "twins and padding": tree_of([0, 1, 1, 2, 0, 0], [-1, 0, 0, 2, 1, 5]),
    "no twins": tree_of([0, 0, 1, 0, 1], [-1, 0, 0, 1, 1]),
}


def random_tree(seed: int) -> TokenTree:
    """Seven nodes, most of one token, so that siblings often repeat it."""
    random = torch.Generator().manual_seed(seed)
    depths, parents = [0], [-1]
    while len(parents) < 7:
        parent = int(torch.randint(len(parents), (), generator=random))
        if depths[parent] < LONGEST:
            parents.append(parent)
            depths.append(depths[parent] + 1)
    return tree_of((torch.rand(7, generator=random) < 0.25).long().tolist(), parents)


@pytest.mark.parametrize("rule", [PointRule(), Nothing()], ids=["point", "relaxed"])
@pytest.mark.parametrize("name", [*TREES, *range(6)])
def test_the_text_has_exactly_the_targets_distribution(
    name: str | int, rule: AcceptanceRule
) -> None:
    tree = TREES[name] if isinstance(name, str) else random_tree(name)
    known = distributions(3)
    out, drafts = text_probs(rule, tree, known)
    for text, chance in out.items():
        assert chance == pytest.approx(chance_of(text, known), abs=1e-12)
    # What is accepted is the mass of all prefixes that the tree holds, whichever twin holds them.
    usable = [
        node
        for node in range(1, tree.size)
        if not bool((tree.topology.ancestors[0, node] & ~tree.acceptable_BN[0]).any())
    ]
    prefixes = {prefix_of(tree, node) for node in usable}
    assert drafts == pytest.approx(sum(chance_of(prefix, known) for prefix in prefixes), abs=1e-12)
    chances = node_chances(tree, 0, verified(tree, known).logits_BNV[0].exp(), recursive_rounds)
    assert sum(chances) - 1 == pytest.approx(drafts, abs=1e-6)


def accepted_by(rule: AcceptanceRule, tree: TokenTree, seed: int) -> Accepted:
    draws = Draws(SAMPLED, [torch.Generator().manual_seed(seed)])
    return rule(tree, verified(tree, distributions(seed)), draws)


def test_without_a_good_token_a_relaxed_rule_is_the_point_rule_draw_for_draw() -> None:
    for seed in range(40):
        tree = TREES["twins below twins"]
        one, other = (accepted_by(rule, tree, seed) for rule in (Nothing(), PointRule()))
        assert (one.paths, one.next_B.tolist()) == (other.paths, other.next_B.tolist())


def test_without_a_good_token_a_relaxed_rule_is_the_ratio_rule_draw_for_draw() -> None:
    """Children of all independent twins go on as siblings."""
    draft_V = torch.tensor([0.2, 0.5, 0.3], dtype=torch.float64)
    tokens, parents = torch.tensor([[0, 1, 1, 0, 2]]), torch.tensor([[-1, 0, 0, 1, 2]])
    tree = TokenTree(
        tokens,
        Topology(parents),
        draw_BN=torch.full_like(tokens, SiblingDraw.INDEPENDENT),
        probs_BRD=draft_V[None, None],
        prob_rows_BN=torch.zeros_like(tokens),
    )
    followed = set()
    for seed in range(60):
        one, other = (accepted_by(rule, tree, seed) for rule in (Nothing(), RatioRule()))
        assert (one.paths, one.next_B.tolist()) == (other.paths, other.next_B.tolist())
        followed.add(tuple(one.paths[0]))
    assert {(0, 1, 3), (0, 2, 4)} <= followed


@pytest.mark.parametrize("rule", [TypicalRule(), TopKRule(2), TopKRule(1)], ids=lambda it: it.name)
def test_lossy_rules_judge_twins_as_the_same_tree_without_them(rule: AcceptanceRule) -> None:
    """The tree whose twins are one node, in every outcome of the target's draws."""
    twins, merged = TREES["twins, other children"], tree_of([0, 1, 0, 2], [-1, 0, 1, 1])
    for seed in range(12):
        known = distributions(seed)
        (one, length), (other, expected) = (
            text_probs(rule, tree, known) for tree in (twins, merged)
        )
        assert length == pytest.approx(expected, abs=1e-12)
        assert all(one[text] == pytest.approx(other[text], abs=1e-12) for text in one)


def test_the_first_node_of_a_prefix_stands_for_all() -> None:
    assert TREES["twins below twins"].first_BN.tolist() == [[0, 1, 1, 3, 3, 3, 6]]
    assert TREES["a twin that only computes"].first_BN.tolist() == [[0, 1, 2, 3, 4]]
    assert TREES["twins and padding"].first_BN.tolist() == [[0, 1, 1, 3, 4, 5]]
    same_ends = tree_of([0, 1, 2, 0, 0, 1, 1], [-1, 0, 0, 1, 2, 3, 4])
    assert same_ends.first_BN.tolist() == [[0, 1, 2, 3, 4, 5, 6]]
    chain = TokenTree.chain(torch.tensor([[5, 5, 5, 5], [5, 6, 5, 6]]))
    assert chain.first_BN.tolist() == [[0, 1, 2, 3]] * 2
