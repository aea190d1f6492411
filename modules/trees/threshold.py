"""Trees whose shape follows the drafter's probabilities.

Shape legend: B sequences, W frontier nodes, K candidates per node, N nodes, D draft vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from modules.contracts.drafter import Drafter, DraftState, Frontier
from modules.contracts.token_tree import SiblingDraw, TokenTree, packed
from modules.trees.candidates import log_probs


@dataclass
class _Growth:
    """A tree under construction: every node was handed to `expand`, so its row number is its node
    index.
    """

    tokens: list[Tensor]
    parents: list[Tensor]
    real: list[Tensor]
    scores_BW: Tensor
    start: int = 0

    @property
    def size(self) -> int:
        """Nodes drafted so far, the root included."""
        return self.start + self.tokens[-1].shape[1]


class ThresholdTree:
    """Clover's sampler (Xiao et al. 2024, section 3.4): likely children only, level by level.

    Each node has the children inside the top-p mass that are at least `ratio` as likely as the best
    one; each level has the `width` best joint probabilities, as long as the budget lasts. Chosen by
    value, hence point masses.

    Args:
        depth: levels. width: nodes per level at most. top_p, ratio: the two thresholds.
    """

    sibling_draw = SiblingDraw.BY_VALUE

    def __init__(self, depth: int, width: int = 4, top_p: float = 0.8, ratio: float = 0.25) -> None:
        if depth < 1 or width < 1:
            raise ValueError(f"tree depth and width must be at least 1, got {depth} and {width}")
        self.depth, self.width, self.top_p, self.ratio = depth, width, top_p, ratio

    def build(self, drafter: Drafter, state: DraftState, budget: int) -> TokenTree:
        """A tree of at most `budget` drafted nodes."""
        root = state.newest_B[:, None]
        growth = _Growth(
            [root],
            [torch.full_like(root, -1)],
            [torch.ones_like(root, dtype=torch.bool)],
            torch.zeros(root.shape, device=root.device),
        )
        remaining_B = torch.full_like(state.newest_B, budget)
        for depth in range(self.depth):
            # 1. Read the remaining budget from the device only if it may not last for this level.
            most = max(budget - depth * self.width, 0)
            if most < self.width and depth:
                most = int(remaining_B.max())
            if most < 1:
                break
            # 2. Expand the level and append the best children.
            logits_BWD = drafter.expand(
                state, Frontier(growth.tokens[-1], growth.parents[-1], depth)
            )
            remaining_B = remaining_B - self._level(
                growth, logits_BWD, drafter.vocabulary_D, remaining_B, most
            )
        # 3. Sequences may have fewer nodes than others.
        parts = (growth.tokens, growth.parents, growth.real)
        tokens, parents, real = (torch.cat(part, dim=1) for part in parts)
        return packed(tokens, parents, real, drafter.vocabulary_D)

    def _level(
        self,
        growth: _Growth,
        logits_BWD: Tensor,
        vocabulary_D: Tensor | None,
        remaining_B: Tensor,
        most: int,
    ) -> Tensor:
        """Append the best children, `width` or the remaining budget (at most `most`); returns how
        many nodes each sequence got [B]."""
        # 1. Children by joint probability, the unlikely ones excluded.
        count = min(self.width, most)
        log_BWK, tokens_BWK = log_probs(logits_BWD).topk(min(count, logits_BWD.shape[-1]), dim=-1)
        allowed = self._likely(log_BWK.exp()) & growth.real[-1][..., None]
        joint = (growth.scores_BW[..., None] + log_BWK).masked_fill(~allowed, -torch.inf).flatten(1)
        # 2. The best of the level.
        scores, best = joint.topk(min(count, joint.shape[1]), dim=1)
        tokens = tokens_BWK.flatten(1).gather(1, best)
        parents = growth.start + best // log_BWK.shape[-1]
        # 3. Append them; those beyond the budget are not real.
        growth.start = growth.size
        growth.tokens.append(tokens if vocabulary_D is None else vocabulary_D[tokens])
        growth.parents.append(parents)
        affordable = torch.arange(scores.shape[1], device=scores.device) < remaining_B[:, None]
        growth.real.append(scores.isfinite() & affordable)
        growth.scores_BW = scores
        return growth.real[-1].sum(1)

    def _likely(self, probability_BWK: Tensor) -> Tensor:
        before = probability_BWK.cumsum(-1) - probability_BWK
        return (before < self.top_p) & (probability_BWK >= self.ratio * probability_BWK[..., :1])
