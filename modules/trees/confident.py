"""A chain that ends where the drafter is unsure.

Shape legend: B sequences, N nodes, D draft vocabulary.
"""

from __future__ import annotations

import torch

from modules.contracts.drafter import Drafter, DraftState, Frontier
from modules.contracts.token_tree import SiblingDraw, TokenTree, packed


class ConfidentChain:
    """The likeliest token of each step, as long as the drafter gives it `confidence` or more; LUD's
    adaptive span (Sun et al. 2024, arXiv 2405.15208).

    Chosen by value, hence point masses. A batch drafts until all of its sequences are unsure.

    Args:
        depth: tokens at most.
        confidence: β, the least probability of a drafted token; above 1 nothing is drafted.
    """

    sibling_draw = SiblingDraw.BY_VALUE

    def __init__(self, depth: int, confidence: float = 0.9) -> None:
        if depth < 1 or confidence < 0:
            raise ValueError(
                f"chain depth must be at least 1 and confidence 0 or above, got {depth} and "
                f"{confidence}"
            )
        self.depth, self.confidence = depth, confidence

    def build(self, drafter: Drafter, state: DraftState, budget: int) -> TokenTree:
        """A chain of at most `budget` drafted nodes."""
        root = state.newest_B[:, None]
        tokens, real = [root], [torch.ones_like(root, dtype=torch.bool)]
        for depth in range(min(self.depth, budget)):
            # 1. The likeliest token, where the chain goes on.
            parents_B1 = torch.full_like(root, depth - 1)
            logits_B1D = drafter.expand(state, Frontier(tokens[-1], parents_B1, depth))
            probability_B1, best_B1 = logits_B1D.softmax(-1).max(-1)
            sure_B1 = real[-1] & (probability_B1 >= self.confidence)
            if not bool(sure_B1.any()):
                break
            # 2. Append it.
            vocabulary = drafter.vocabulary_D
            tokens.append(best_B1 if vocabulary is None else vocabulary[best_B1])
            real.append(sure_B1)
        # 3. Sequences may have fewer nodes than others.
        tokens_BN, real_BN = torch.cat(tokens, 1), torch.cat(real, 1)
        parents = torch.arange(-1, tokens_BN.shape[1] - 1, device=root.device)
        return packed(tokens_BN, parents.expand_as(tokens_BN), real_BN, drafter.vocabulary_D)
