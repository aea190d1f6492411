"""All candidate nodes of a growing tree, and the best of them as a tree.

Shape legend: B sequences, W frontier nodes, K children considered of each, C candidates, N nodes.
"""

from __future__ import annotations

import torch
from torch import Tensor

from modules.contracts.token_tree import Topology


def log_probs(logits: Tensor) -> Tensor:
    """Log-probabilities [..., D] in float32 at least, whatever the drafter computes in."""
    return logits.log_softmax(-1, dtype=torch.promote_types(logits.dtype, torch.float32))


class Candidates:
    """Candidates in the order of creation. Parents are candidate numbers, -1 for the root; a score
    of -inf is no candidate.
    """

    def __init__(self) -> None:
        self.tokens: list[Tensor] = []
        self.parents: list[Tensor] = []
        self.scores: list[Tensor] = []
        self.rows: list[Tensor] = []
        self.count = self.expanded = 0

    def add(self, tokens_BWK: Tensor, parents_BW: Tensor, scores_BWK: Tensor) -> None:
        """Append the children of a level's frontier, whose rows follow those of the levels
        before."""
        width = tokens_BWK.shape[1]
        rows = torch.arange(self.expanded, self.expanded + width, device=tokens_BWK.device)
        self.tokens.append(tokens_BWK.flatten(1))
        self.parents.append(parents_BW[..., None].expand_as(tokens_BWK).flatten(1))
        self.rows.append(rows[:, None].expand_as(tokens_BWK).flatten(1))
        self.scores.append(scores_BWK.flatten(1))
        self.count += self.tokens[-1].shape[1]
        self.expanded += width

    def leading(self, budget: int) -> Tensor:
        """bool [B,C]: the `budget` best so far, ties to the older."""
        scores_BC = torch.cat(self.scores, dim=1)
        best = scores_BC.argsort(dim=1, descending=True, stable=True)[:, :budget]
        return (
            torch.zeros_like(scores_BC, dtype=torch.bool).scatter(1, best, True)
            & scores_BC.isfinite()
        )

    def best(self, root_B1: Tensor, budget: int) -> tuple[Tensor, Topology, Tensor]:
        """Tokens [B,N], topology and parents' rows [B,N] (-1 for node 0) of the tree of the
        `budget` best.

        The set must hold the parent of each of its nodes, which is so if scores never rise along a
        path. Sequences with fewer nodes than others end in padding.
        """
        # 1. Chosen candidates first, in the order of creation.
        chosen_BC = self.leading(budget)
        width = int(chosen_BC.sum(1).max())
        order = (~chosen_BC).int().argsort(dim=1, stable=True)[:, :width]
        real = chosen_BC.gather(1, order)
        tokens, parents, rows = (
            torch.cat(part, dim=1).gather(1, order)
            for part in (self.tokens, self.parents, self.rows)
        )
        # 2. Renumber their parents; padding is its own parent.
        node_BC = chosen_BC.cumsum(1)
        above = torch.where(parents < 0, 0, node_BC.gather(1, parents.clamp(min=0)))
        above = torch.where(real, above, torch.arange(1, width + 1, device=above.device))
        # 3. Node 0 comes before them.
        outside = torch.full_like(root_B1, -1)
        topology = Topology(torch.cat([outside, above], dim=1))
        return torch.cat([root_B1, tokens], dim=1), topology, torch.cat([outside, rows], dim=1)
