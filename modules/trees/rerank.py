"""EAGLE-2's trees: expand the most probable nodes level by level, then keep the best of all that was seen.

Shape legend: B sequences, W frontier nodes, K children considered per node, C candidates, N nodes, D draft vocabulary.
"""

from __future__ import annotations

import torch
from torch import Tensor

from modules.core.drafter import Drafter, DraftState, Frontier
from modules.trees.tree import Law, TokenTree, Topology


class RerankedTree:
    """Expansion and reranking by the probability of whole paths (Li et al. 2024, arXiv 2406.16858, section 4).

    Each level expands the `width` candidates of the level before with the highest path probability, each into its
    `width` likeliest children; of all candidates the `budget` most probable are drafted. A path never gains
    probability, so the ancestors of what is kept are kept; ties go to the shallower node. Chosen by value,
    hence point masses.

    Args:
        depth: levels. width: nodes expanded per level, and children considered of each.
    """

    law = Law.POINT

    def __init__(self, depth: int = 6, width: int = 10) -> None:
        if depth < 1 or width < 1:
            raise ValueError(f"tree depth and width must be at least 1, got {depth} and {width}")
        self.depth, self.width = depth, width

    def build(self, drafter: Drafter, state: DraftState, budget: int) -> TokenTree:
        """The `budget` most probable candidates under the newest token."""
        root_B1 = state.newest_B[:, None]
        candidates = _Candidates()
        tokens, rows, chosen = root_B1, torch.full_like(root_B1, -1), torch.full_like(root_B1, -1)
        scores, expanded = torch.zeros(root_B1.shape, device=root_B1.device), 0
        for depth in range(min(self.depth, budget)):
            laws = drafter.expand(state, Frontier(tokens, rows, depth)).log_softmax(-1)
            log_BWK, best_BWK = laws.topk(min(self.width, laws.shape[-1]), dim=-1)
            children = best_BWK if drafter.vocabulary_D is None else drafter.vocabulary_D[best_BWK]
            first = candidates.count
            candidates.add(children, chosen, scores[..., None] + log_BWK)
            scores, picked = candidates.scores[-1].topk(min(self.width, candidates.scores[-1].shape[1]), dim=1)
            tokens, rows = candidates.tokens[-1].gather(1, picked), expanded + picked // log_BWK.shape[-1]
            chosen, expanded = first + picked, expanded + laws.shape[1]
        return candidates.best(root_B1, budget, drafter.vocabulary_D)


class _Candidates:
    """Every node seen so far, in the order of creation; parents are candidate numbers, -1 for the root."""

    def __init__(self) -> None:
        self.tokens: list[Tensor] = []
        self.parents: list[Tensor] = []
        self.scores: list[Tensor] = []
        self.count = 0

    def add(self, tokens_BWK: Tensor, parents_BW: Tensor, scores_BWK: Tensor) -> None:
        """The children of a level's frontier."""
        self.tokens.append(tokens_BWK.flatten(1))
        self.parents.append(parents_BW[..., None].expand_as(tokens_BWK).flatten(1))
        self.scores.append(scores_BWK.flatten(1))
        self.count += self.tokens[-1].shape[1]

    def best(self, root_B1: Tensor, budget: int, vocabulary_D: Tensor | None) -> TokenTree:
        """The tree of the `budget` candidates with the highest scores."""
        tokens, parents, scores = (torch.cat(part, dim=1) for part in (self.tokens, self.parents, self.scores))
        order = scores.argsort(dim=1, descending=True, stable=True)[:, :budget].sort(dim=1).values
        node = torch.zeros_like(tokens).scatter(1, order, torch.arange(1, order.shape[1] + 1, device=order.device)
                                                .expand_as(order))
        above = parents.gather(1, order)
        above = torch.where(above < 0, 0, node.gather(1, above.clamp(min=0)))
        topology = Topology(torch.cat([torch.full_like(root_B1, -1), above], dim=1))
        return TokenTree(torch.cat([root_B1, tokens.gather(1, order)], dim=1), topology, vocabulary_D=vocabulary_D)
