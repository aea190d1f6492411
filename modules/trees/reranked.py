"""EAGLE-2's trees: expand the most probable nodes level by level, then take the best of all
candidates.

Shape legend: B sequences, W frontier nodes, K children considered per node, D draft vocabulary.
"""

from __future__ import annotations

from math import log

import torch
from torch import Tensor

from modules.contracts.drafter import Drafter, DraftState, Frontier
from modules.contracts.token_tree import SiblingDraw, TokenTree
from modules.trees.candidates import Candidates, log_probs


class RerankedTree:
    """Expansion and reranking by the probability of whole paths (Li et al. 2024, arXiv 2406.16858,
    section 4).

    Each level expands the `width` candidates of the level before with the highest path probability,
    each into its `width` likeliest children; of all candidates the `budget` most probable are
    drafted. A path never gains probability, so the ancestors of a drafted node are drafted; ties go
    to the shallower node. Chosen by value, hence point masses.

    With `least`, paths that the drafter finds less probable than that are neither expanded nor
    drafted: where it is unsure it drafts few tokens and stops early, where it is sure many. A node
    pays off when its probability exceeds what a further row costs, in calls of one row
    (`python -m eval.latency`), times the speedup reached.

    The probabilities of a drafter with a trimmed vocabulary are conditional: they sum to 1 over the
    tokens that it can draft, and a path's is too high by the target's mass on these at each of its
    levels. The drafter cannot know that mass. `covered` assumes one share for all nodes, which
    ranks shallow nodes above deep ones. With 8,192 of SmolLM2's 49,152 tokens it was 0.86 on
    average; 15 nodes then had 0.98 instead of 0.95 drafts accepted at temperature 1 (paired
    difference 0.030, standard error 0.014, 36 contexts), as many as with each node's true mass, and
    no more at temperature 0.

    Args:
        depth: levels. width: nodes expanded per level, and children considered of each.
        least: smallest probability of a path; 0 drafts `budget` nodes always, as published.
        covered: the target's mass on the draft vocabulary; 1 leaves the drafter's probabilities as
        they are.
    """

    sibling_draw = SiblingDraw.BY_VALUE

    def __init__(
        self, depth: int = 6, width: int = 10, least: float = 0.0, covered: float = 1.0
    ) -> None:
        if depth < 1 or width < 1:
            raise ValueError(f"tree depth and width must be at least 1, got {depth} and {width}")
        if not 0 <= least < 1:
            raise ValueError(f"least must lie in [0, 1), got {least}")
        if not 0 < covered <= 1:
            raise ValueError(f"covered must lie in (0, 1], got {covered}")
        self.depth, self.width, self.least, self.covered = depth, width, least, covered

    def build(self, drafter: Drafter, state: DraftState, budget: int) -> TokenTree:
        """The `budget` most probable candidates under the newest token."""
        root_B1 = state.newest_B[:, None]
        candidates = Candidates()
        tokens, rows, chosen = root_B1, torch.full_like(root_B1, -1), torch.full_like(root_B1, -1)
        scores = torch.zeros(root_B1.shape, device=root_B1.device)
        for depth in range(min(self.depth, budget)):
            # 1. The likeliest children of every expanded node, scored by their paths.
            probs = log_probs(drafter.expand(state, Frontier(tokens, rows, depth)))
            log_BWK, best_BWK = probs.topk(min(self.width, probs.shape[-1]), dim=-1)
            children = best_BWK if drafter.vocabulary_D is None else drafter.vocabulary_D[best_BWK]
            first, row = candidates.count, candidates.expanded
            paths_BWK = scores[..., None] + log_BWK + log(self.covered)
            candidates.add(children, chosen, self._probable(paths_BWK))
            # 2. The most probable ones are expanded next.
            if depth + 1 == min(self.depth, budget):
                break
            scores, picked = candidates.scores[-1].topk(
                self._promising(candidates.scores[-1]), dim=1
            )
            if not picked.shape[1]:
                break
            tokens, rows = (
                candidates.tokens[-1].gather(1, picked),
                row + picked // log_BWK.shape[-1],
            )
            chosen = first + picked
        if not candidates.count:
            return TokenTree.root(state.newest_B)
        # 3. Of all candidates the most probable are drafted.
        drafted, topology, _ = candidates.best(root_B1, budget)
        return TokenTree(drafted, topology, vocabulary_D=drafter.vocabulary_D)

    def _probable(self, scores_BWK: Tensor) -> Tensor:
        """Scores, -inf where the path is less probable than `least`."""
        return (
            scores_BWK.masked_fill(scores_BWK < log(self.least), -torch.inf)
            if self.least
            else scores_BWK
        )

    def _promising(self, scores_BC: Tensor) -> int:
        """How many nodes of a level are expanded: with `least`, the largest number of candidates
        that a sequence has.
        """
        width = min(self.width, scores_BC.shape[1])
        return min(width, int(scores_BC.isfinite().sum(1).max())) if self.least else width
