"""Relaxed acceptance, declared lossy: tokens that the standard rule accepts, or that a criterion
calls good.

Without a good token every rule here is the standard rule for its trees, draw for draw: greedy at
temperature 0, the point rule for trees chosen by value, the ratio rule for sampled ones.

Shape legend: B sequences, N nodes, R rows of draft distributions, V vocabulary, D draft vocabulary.
"""

from __future__ import annotations

from abc import abstractmethod
from math import inf

import torch
from torch import Tensor

from modules.acceptance.rejection import recursive_rounds
from modules.acceptance.rules import EVERY_DRAW, Draws, accepted_paths, choices, longest_path, walk
from modules.contracts.shapes import StateName
from modules.contracts.token_tree import SiblingDraw, TokenTree
from modules.contracts.verification import Accepted, Verified


class RelaxedRule:
    """Accepts a token if the standard rule does or if it is `good`; a path ends at its first token
    that is neither.

    Of the longest paths the one with most standard tokens wins. Where a path ends at a rejection,
    the next token is the standard rule's: the argmax, or a draw from the residual distribution.
    Where the ratio rule rejects all siblings, the first good one is accepted.
    """

    name: str = "relaxed"
    lossless = False
    sibling_draws: frozenset[SiblingDraw] = EVERY_DRAW
    states: tuple[StateName, ...] = ()

    @abstractmethod
    def good(self, tree: TokenTree, verified: Verified, draws: Draws) -> Tensor:
        """bool [B,N]: tokens that may stay although the standard rule rejects them."""

    def __call__(self, tree: TokenTree, verified: Verified, draws: Draws) -> Accepted:
        """The accepted path of each sequence and the token after it."""
        # 1. Sampled trees: rejection, sibling by sibling.
        good_BN = self.good(tree, verified, draws) & tree.acceptable_BN & possible(tree, verified)
        if draws.sampling.temperature > 0 and tree.draws_used != {SiblingDraw.BY_VALUE}:
            return accepted_paths(
                [
                    walk(tree, verified, draws, b, recursive_rounds, good_N)
                    for b, good_N in enumerate(good_BN.tolist())
                ],
                good_BN.device,
            )
        # 2. Other trees: match the target's choice after each node.
        choice_BN = choices(tree, verified, draws)
        standard_BN = tree.tokens_BN == choice_BN.gather(1, tree.parents_BN.clamp(min=0))
        # 3. Of the longest paths, the one with most standard tokens.
        score_BN = (tree.topology.ancestors & standard_BN[:, None]).sum(-1).double()
        return longest_path(tree, standard_BN | good_BN, choice_BN, score_BN)


def possible(tree: TokenTree, verified: Verified) -> Tensor:
    """bool [B,N]: tokens that the target may choose at all; suppressed and forbidden ones are never
    good."""
    rows = torch.arange(len(tree.tokens_BN), device=tree.tokens_BN.device)[:, None]
    logits_BN = verified.logits_BNV[rows, tree.parents_BN.clamp(min=0), tree.tokens_BN]
    return logits_BN > -torch.inf


def parent_logits(tree: TokenTree, verified: Verified) -> Tensor:
    """The target's logits [B,N,V] at each node's parent: its distribution of the node's token (node
    0: its own row).
    """
    rows = torch.arange(len(tree.tokens_BN), device=tree.tokens_BN.device)[:, None]
    return verified.logits_BNV[rows, tree.parents_BN.clamp(min=0)]


class TopKRule(RelaxedRule):
    """A token is good while it is among the target's `k` most likely ones. k = 1 is the standard
    rule when greedy.
    """

    name = "top_k"

    def __init__(self, k: int = 3) -> None:
        if k < 1:
            raise ValueError(f"rule top_k: k must be at least 1, got {k}")
        self.k, self.name = k, f"top_k {k}"

    def good(self, tree: TokenTree, verified: Verified, draws: Draws) -> Tensor:
        """Rank below k under the parent's logits (unwarped)."""
        logits_BNV = parent_logits(tree, verified)
        token_BN1 = logits_BNV.gather(2, tree.tokens_BN[..., None])
        return (logits_BNV > token_BN1).sum(-1) < self.k


class ToleranceRule(RelaxedRule):
    """A token is good while it is among the target's `best` most likely ones and its logit is at
    most `gap` below the best one's: GAD++ (Xia et al. 2022, arXiv 2203.16487). Logits differ as
    log-probabilities do.

    `best` = 1 or `gap` = 0 is the standard rule when greedy, except where two logits are equal.

    Args:
        best: β (5 in the paper's English-German).
        gap: τ in nats (3 there).
    """

    name = "tolerance"

    def __init__(self, best: int = 5, gap: float = 3.0) -> None:
        if best < 1:
            raise ValueError(f"rule tolerance: best must be at least 1, got {best}")
        if not 0 <= gap < inf:
            raise ValueError(f"rule tolerance: gap must be 0 or a finite number above, got {gap}")
        self.best, self.gap, self.name = best, gap, f"tolerance {best} {gap:g}"

    def good(self, tree: TokenTree, verified: Verified, draws: Draws) -> Tensor:
        """Rank below `best`, and close to the best, under the parent's logits (unwarped)."""
        logits_BNV = parent_logits(tree, verified)
        token_BN1 = logits_BNV.gather(2, tree.tokens_BN[..., None])
        near_BN = logits_BNV.amax(-1) - token_BN1[..., 0] <= self.gap
        return near_BN & ((logits_BNV > token_BN1).sum(-1) < self.best)


class UnverifiedRule(RelaxedRule):
    """Every token is good: drafts are never rejected (lexical unit decoding, Sun et al. 2024, arXiv
    2405.15208). Of several longest paths the standard rule's is preferred.
    """

    name = "unverified"

    def good(self, tree: TokenTree, verified: Verified, draws: Draws) -> Tensor:
        """Every node of the tree."""
        return torch.ones_like(tree.acceptable_BN)


class DivergenceRule(RelaxedRule):
    """A token is good while KL(target ‖ draft) of the distributions it was drawn under is at most
    `threshold` (in nats).

    The free baseline for a trained judge (Revisiting Judge Decoding 2026, arXiv 2601.04766). It
    needs trees that carry the draft's distribution: a `SampledChain`, at temperature 0 with `soft:
    true`. At temperature 0 both distributions are the unwarped ones; above it both are warped, and
    nothing is good where top-k or top-p leave the target a token that they take from the draft.

    A trimmed draft vocabulary gives no probability to the tokens outside, so that the KL would be
    infinite as soon as the target has any mass there. That mass is counted by its logarithm
    (`draft_divergence`), and no token is good while the target's likeliest one is outside.
    """

    name = "divergence"
    sibling_draws: frozenset[SiblingDraw] = frozenset(
        {SiblingDraw.WITHOUT_REPLACEMENT, SiblingDraw.INDEPENDENT}
    )

    def __init__(self, threshold: float = 0.5) -> None:
        if threshold < 0:
            raise ValueError(f"rule divergence: threshold must be 0 or above, got {threshold}")
        self.threshold, self.name = threshold, f"divergence {threshold:g}"

    def good(self, tree: TokenTree, verified: Verified, draws: Draws) -> Tensor:
        """Divergence at the node's parent within the threshold; nodes without a distribution are
        never good.
        """
        # 1. The trees must carry the draft's distribution.
        if tree.probs_BRD is None or tree.prob_rows_BN is None:
            return torch.zeros_like(tree.acceptable_BN)
        greedy = draws.sampling.temperature == 0
        if greedy and bool((tree.probs_BRD.max(-1).values == 1).all()):
            raise ValueError(
                "rule divergence: the trees carry a point mass, not the draft's distribution: use "
                "the builder modules.trees.sampled.chain.SampledChain with `soft: true` at "
                "temperature 0"
            )
        # 2. Both distributions at the parent, unwarped or both warped.
        logits_BNV = parent_logits(tree, verified)
        target_BNV = logits_BNV.double().softmax(-1) if greedy else draws.probs(logits_BNV)
        rows = torch.arange(len(logits_BNV), device=logits_BNV.device)[:, None]
        draft_BND = tree.probs_BRD[rows, tree.prob_rows_BN.clamp(min=0)]
        # 3. Close enough, and the target's likeliest token can be drafted.
        divergence_BN = draft_divergence(target_BNV, draft_BND.double(), tree.vocabulary_D)
        good_BN = (divergence_BN <= self.threshold) & (tree.prob_rows_BN >= 0)
        if tree.vocabulary_D is None:
            return good_BN
        return good_BN & torch.isin(target_BNV.argmax(-1), tree.vocabulary_D)


def draft_divergence(target_NV: Tensor, draft_ND: Tensor, vocabulary_D: Tensor | None) -> Tensor:
    """Divergence of the draft's distribution from the target's, in nats [...]; infinite where it
    has no mass and the target has.

    KL(p ‖ q) without a trimmed vocabulary. With one: KL(p_D ‖ q) - log p(D), with p_D the target's
    distribution renormalised over it and p(D) the mass that it covers. 0 only where q is p, and at
    least -log p(D), which grows without bound as the mass moves outside.
    """
    outside = torch.zeros((), dtype=target_NV.dtype, device=target_NV.device)
    if vocabulary_D is not None:
        covered_NV = target_NV[..., vocabulary_D]
        mass_N = covered_NV.sum(-1)
        # Without mass inside the distance is infinite, whatever the distribution there.
        target_NV = (covered_NV / mass_N[..., None]).where(mass_N[..., None] > 0, draft_ND)
        outside = -mass_N.log()
    return (torch.xlogy(target_NV, target_NV) - torch.xlogy(target_NV, draft_ND)).sum(-1) + outside
