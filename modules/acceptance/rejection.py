"""Acceptance of siblings that were drawn from the drafter's distribution: pure functions of one
node's distributions.

Each of the siblings at a node gets a round: a chance of being accepted, and the distribution that
the next token has if this round fails too. The chances are numbers, so that a rule can sample them
and a test or a comparison can sum them.

Shape legend: V target vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from modules.contracts.token_tree import SiblingDraw, TokenTree

_STEPS, _EXACT = 100, 1e-14


class Round(NamedTuple):
    """The turn of one sibling.

    node: its row of the tree. chance: of being accepted, once its turn has come. residual_V:
    distribution of the token emitted in its place if it is rejected and no sibling is left.
    """

    node: int
    chance: float
    residual_V: Tensor


class Rounds(Protocol):
    """The rounds of siblings, in draw order, under the target's probabilities [V] above them."""

    def __call__(
        self, tree: TokenTree, sequence: int, children: list[int], probs_V: Tensor, /
    ) -> Iterator[Round]:
        """One round per child, each computed when the one before has failed."""
        ...


def recursive_rounds(
    tree: TokenTree, sequence: int, children: list[int], probs_V: Tensor
) -> Iterator[Round]:
    """Recursive rejection: accept x drawn from q with probability min(1, R(x) / q(x)), else R <-
    norm([R - q]+); at first R = p.

    The token emitted by rounds that start with R has distribution R, for every q, also one that
    depends on the siblings rejected before. One sibling: speculative sampling (Leviathan et al.
    2023; Chen et al. 2023). Independent ones: SpecInfer's multi-round rule (Miao et al. 2023).
    Without replacement: RSD (Jeon et al. 2024), DySpec, Sequoia. Duplicates get a round too:
    whether a sibling was drawn must not depend on its value.
    """
    residual_V, tried = probs_V, []
    for node in children:
        token = int(tree.tokens_BN[sequence, node])
        # 1. q, given the siblings that were rejected before.
        draft_V = sibling_probs(tree, sequence, node, tried, residual_V)
        chance = ratio(residual_V[token], draft_V[token])
        # 2. What the next token's distribution is if this sibling is rejected too.
        residual_V = normalised((residual_V - draft_V).clamp(min=0), residual_V)
        yield Round(node, chance, residual_V)
        tried.append(token)


def k_sequential_rounds(
    tree: TokenTree, sequence: int, children: list[int], probs_V: Tensor
) -> Iterator[Round]:
    """SpecTr's K-SEQ (Sun et al. 2023, arXiv 2310.15141): each of K independent x with chance
    min(1, p(x) / (ρ q(x))).

    With m = min(q, p / ρ), β = Σ m and A = 1 - (1 - β)^K an accepted token has distribution m A /
    β; the rest of p is residual. All siblings are draws from the first one's distribution;
    `DrawnTree` ensures that for children of twins.
    """
    if not children:
        return
    count = len(children)
    # 1. m and β of the docstring; `share` is A / β.
    draft_V = sibling_probs(tree, sequence, children[0], [], probs_V)
    threshold = k_sequential_threshold(probs_V, draft_V, count)
    accepted_V = torch.minimum(draft_V, probs_V / threshold)
    beta = float(accepted_V.sum())
    share = (1 - (1 - beta) ** count) / beta if beta > 0 else 0.0
    # 2. The residual is the same for every sibling.
    residual_V = normalised((probs_V - accepted_V * share).clamp(min=0), probs_V)
    for node in children:
        token = int(tree.tokens_BN[sequence, node])
        yield Round(node, ratio(probs_V[token], threshold * draft_V[token]), residual_V)


def ratio(target: Tensor, draft: Tensor) -> float:
    """min(1, target / draft). A draft of probability 0 was never drawn and is never accepted: 0 / 0
    counts as 0.
    """
    return float((target / draft).nan_to_num(nan=0.0, posinf=0.0).clamp(max=1))


def k_sequential_threshold(probs_V: Tensor, draft_V: Tensor, count: int) -> float:
    """ρ: the smallest in [1, K] with 1 - (1 - β(ρ))^K <= ρ β(ρ), β(ρ) = Σ min(q, p / ρ), so that
    the residual is a distribution.

    The difference of the two sides rises with ρ; its root is found by regula falsi (the Illinois
    variant).
    """

    def surplus(threshold: float) -> float:
        beta = float(torch.minimum(draft_V, probs_V / threshold).sum())
        return threshold * beta - 1 + (1 - beta) ** count

    # 1. Bracket the root; either end may be one.
    low, high = 1.0, float(count)
    below, above = surplus(low), surplus(high)
    middle, side = (low if below > -_EXACT else high), 0.0
    # 2. Regula falsi; an end that stays twice has its value halved.
    for _ in range(_STEPS):
        if below > -_EXACT or above < _EXACT:
            break
        middle = high - above * (high - low) / (above - below)
        excess = surplus(middle)
        if abs(excess) < _EXACT:
            break
        if excess < 0:
            low, below, above = middle, excess, above / (2 if side < 0 else 1)
        else:
            high, above, below = middle, excess, below / (2 if side > 0 else 1)
        side = excess
    return middle


def sibling_probs(
    tree: TokenTree, sequence: int, node: int, tried: list[int], like_V: Tensor
) -> Tensor:
    """The distribution [V] that a node was drawn from, given the siblings tried before it; over the
    target's vocabulary.

    When all tokens of a distribution without replacement have been drawn, the uniform one over the
    draft tokens not yet tried follows (Sequoia, Chen et al. 2024, section 3.2); a builder that
    stops there never needs it.
    """
    # 1. Nodes chosen by value: a point mass.
    draw = (
        SiblingDraw.BY_VALUE
        if tree.draw_BN is None
        else SiblingDraw(int(tree.draw_BN[sequence, node]))
    )
    probs_V = torch.zeros_like(like_V)
    if draw is SiblingDraw.BY_VALUE:
        probs_V[tree.tokens_BN[sequence, node]] = 1
        return probs_V
    # 2. The distribution that the node was drawn from, over the whole vocabulary.
    assert tree.probs_BRD is not None and tree.prob_rows_BN is not None, (
        "a sampled node travels with its distribution"
    )
    everywhere = slice(None) if tree.vocabulary_D is None else tree.vocabulary_D
    probs_V[everywhere] = tree.probs_BRD[sequence, tree.prob_rows_BN[sequence, node]].to(
        like_V.dtype
    )
    # 3. Without the tokens of earlier siblings.
    if draw is SiblingDraw.WITHOUT_REPLACEMENT and tried:
        probs_V[tried] = 0
        if not probs_V.any():
            probs_V[everywhere] = 1
            probs_V[tried] = 0
    return probs_V / probs_V.sum()


def normalised(left_V: Tensor, otherwise_V: Tensor) -> Tensor:
    """`left_V` as a distribution [V]; `otherwise_V` where it has no mass."""
    total = left_V.sum()
    return left_V / total if total > 0 else otherwise_V


def families(tree: TokenTree, sequence: int) -> list[list[int]]:
    """The acceptable children of every node, in draw order."""
    children: list[list[int]] = [[] for _ in range(tree.size)]
    usable = tree.acceptable_BN[sequence].tolist()
    for node, parent in enumerate(tree.parents_BN[sequence].tolist()):
        if parent >= 0 and usable[node]:
            children[parent].append(node)
    return children


def children_of(family: list[list[int]], nodes: list[int]) -> list[int]:
    """Children of nodes with the same prefix, in draw order."""
    return sorted(child for node in nodes for child in family[node])


def twins_of(tree: TokenTree, sequence: int, chosen: int, children: list[int]) -> list[int]:
    """The siblings with the same prefix as an accepted one: all that hold its token.

    Their children are treated as siblings: point masses, or independent draws from one
    distribution. Draws without replacement never hold a token twice, and their order is their
    parent's alone.
    """
    if SiblingDraw.WITHOUT_REPLACEMENT in tree.draws_used:
        return [chosen]
    tokens_N = tree.tokens_BN[sequence]
    return [node for node in children if tokens_N[node] == tokens_N[chosen]]


def node_chances(tree: TokenTree, sequence: int, probs_NV: Tensor, rounds: Rounds) -> list[float]:
    """How likely each drafted node of a given tree is accepted [N]: 1 for node 0. The first of
    several twins has the probability of all.

    The sum over the other nodes is the expected number of accepted drafts, computed without
    sampling.

    Args:
        tree: as drawn.
        sequence: of the batch.
        probs_NV: the target's distributions at its nodes.
        rounds: of the rule.
    """
    chances, waiting, family = [1.0] + [0.0] * (tree.size - 1), [[0]], families(tree, sequence)
    while waiting:
        nodes = waiting.pop()
        children, left = children_of(family, nodes), chances[nodes[0]]
        # 1. Siblings of one token are one prefix: the first of them has their probability.
        groups: dict[int, list[int]] = {}
        for node, chance, _ in rounds(tree, sequence, children, probs_NV[nodes[0]]):
            group = groups.setdefault(node, twins_of(tree, sequence, node, children))
            chances[group[0]] += left * chance
            left *= 1 - chance
        # 2. Go on below every prefix that can be reached.
        waiting += [
            group for node, group in groups.items() if group[0] == node and chances[node] > 0
        ]
    return chances
