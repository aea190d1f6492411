"""DySpec's trees: always the most valuable next draw.

Shape legend: B sequences, W frontier nodes, K draws considered of each, C candidates, N nodes, D
draft vocabulary.
"""

from __future__ import annotations

import torch
from torch import Tensor

from modules.contracts.drafter import Drafter, DraftState, Frontier
from modules.contracts.token_tree import SiblingDraw, TokenTree
from modules.trees.candidates import Candidates
from modules.trees.sampled.draws import check_temperature, draft_probs, race


class DySpecTree:
    """Greedy expansion by the value of a draw (Xiong et al. 2024, arXiv 2410.11744), and its
    threshold variant.

    If a token is accepted with its draft probability, verification reaches the j-th draw under a
    node of value v with probability v (1 - q(x_1) - ... - q(x_{j-1})), and the first draw under x_j
    with v q(x_j). The tree holds the `budget` draws of highest value. A draw's value is known
    before the draw, so that the tree may be verified with its distribution.

    The tree equals that of the sequential algorithm, but takes one draft call per level. Values
    fall with depth and from sibling to sibling, so that a draw among the best of the whole tree is
    also among the best of the levels down to its own; a level expands only these.

    Args:
        depth: levels at most.
        threshold: leave out draws of a lower value; 0 fills the budget.
        temperature: of the draft; None: the target's.
    """

    sibling_draw = SiblingDraw.WITHOUT_REPLACEMENT

    def __init__(
        self, depth: int = 8, threshold: float = 0.0, temperature: float | None = None
    ) -> None:
        if depth < 1 or not 0 <= threshold <= 1:
            raise ValueError(
                f"tree depth must be at least 1 and the threshold in [0, 1], got {depth} and "
                f"{threshold}"
            )
        check_temperature(temperature)
        self.depth, self.threshold, self.temperature = depth, threshold, temperature

    def build(self, drafter: Drafter, state: DraftState, budget: int) -> TokenTree:
        """The `budget` most valuable draws under the newest token."""
        root_B1 = state.newest_B[:, None]
        candidates, probs = Candidates(), []
        tokens, rows, numbers = root_B1, torch.full_like(root_B1, -1), torch.full_like(root_B1, -1)
        value_BW = torch.ones(root_B1.shape, dtype=torch.float64, device=root_B1.device)
        for depth in range(min(self.depth, budget)):
            # 1. Draw children of every expanded node.
            probs_BWD = draft_probs(
                drafter.expand(state, Frontier(tokens, rows, depth)),
                state.context,
                self.temperature,
            )
            probs.append(probs_BWD)
            drawn_BWK = (
                race(probs_BWD, state.context)
                .topk(min(budget, probs_BWD.shape[-1]), dim=-1)
                .indices
            )
            # 2. Their values, known before the draw.
            share_BWK = probs_BWD.gather(-1, drawn_BWK)
            worth_BWK = draw_values(value_BW, share_BWK)
            possible = (share_BWK > 0) & (value_BW[..., None] > 0) & (worth_BWK >= self.threshold)
            drawn = drawn_BWK if drafter.vocabulary_D is None else drafter.vocabulary_D[drawn_BWK]
            # 3. Those among the best so far are expanded next.
            first, first_row = candidates.count, candidates.expanded
            candidates.add(drawn, numbers, worth_BWK.masked_fill(~possible, -torch.inf))
            picked, real = front(candidates.leading(budget)[:, first:])
            if not picked.shape[1]:
                break
            tokens, numbers = candidates.tokens[-1].gather(1, picked), first + picked
            rows = first_row + picked // drawn_BWK.shape[-1]
            # 4. The value of a node's first child; rounding never raises it.
            below_BWK = torch.minimum(value_BW[..., None] * share_BWK, worth_BWK)
            value_BW = torch.where(real, below_BWK.flatten(1).gather(1, picked), 0)
        if not probs:
            return TokenTree.root(state.newest_B)
        return self._tree(
            candidates, root_B1, torch.cat(probs, dim=1), budget, drafter.vocabulary_D
        )

    def _tree(
        self,
        candidates: Candidates,
        root_B1: Tensor,
        probs_BRD: Tensor,
        budget: int,
        vocabulary_D: Tensor | None,
    ) -> TokenTree:
        """The best draws, with only the distributions that they were drawn from."""
        tokens, topology, rows = candidates.best(root_B1, budget)
        used, compact = rows.clamp(min=0).unique(return_inverse=True)
        return TokenTree(
            tokens,
            topology,
            draw_BN=torch.full_like(tokens, self.sibling_draw),
            probs_BRD=probs_BRD[:, used],
            prob_rows_BN=torch.where(rows < 0, -1, compact),
            vocabulary_D=vocabulary_D,
        )


def draw_values(value_BW: Tensor, share_BWK: Tensor) -> Tensor:
    """The value of each draw [B,W,K] under nodes of these values: v times the mass without the
    draws before it.

    Never rising along the draws, whatever the rounding.
    """
    left_BWK = torch.nn.functional.pad(1 - share_BWK.cumsum(-1)[..., :-1], (1, 0), value=1.0).clamp(
        min=0
    )
    return (value_BW[..., None] * left_BWK).cummin(-1).values


def front(chosen_BC: Tensor) -> tuple[Tensor, Tensor]:
    """Indices [B,W] of the chosen entries, in order, as wide as the widest sequence; and which of
    them are real.
    """
    width = int(chosen_BC.sum(1).max())
    order = (~chosen_BC).int().argsort(dim=1, stable=True)[:, :width]
    return order, chosen_BC.gather(1, order)
