"""A chain sampled from the drafter's distribution, to be verified with the ratio rule.

Shape legend: B sequences, R steps, D draft vocabulary.
"""

from __future__ import annotations

import torch
from torch import Tensor

from modules.contracts.drafter import Context, Drafter, DraftState, Frontier
from modules.contracts.sampling import sample_probs, warped_probs
from modules.contracts.token_tree import SiblingDraw, TokenTree


class SampledChain:
    """Draws `depth` tokens one after another from the drafter's distribution, warped as the
    target's is.

    At temperature 0 the draws are the most likely tokens, and the distribution a point mass on
    them. The distribution in the tree is exactly the one drawn from (Leviathan et al. 2023, section
    2.3).

    Args:
        depth: drafted tokens at most.
        soft: at temperature 0 the tree carries the drafter's own distribution instead of the point
            mass, for rules that compare distributions (no lossless rule accepts anything else for
            it: a greedy target's distribution is a point mass itself).
    """

    sibling_draw = SiblingDraw.INDEPENDENT

    def __init__(self, depth: int, soft: bool = False) -> None:
        if depth < 1:
            raise ValueError(f"chain depth must be at least 1, got {depth}")
        self.depth, self.soft = depth, soft

    def build(self, drafter: Drafter, state: DraftState, budget: int) -> TokenTree:
        """A chain of `min(depth, budget)` drafted tokens, one at least."""
        columns, probs = [state.newest_B], []
        for depth in range(max(1, min(self.depth, budget))):
            parents = torch.full_like(columns[-1][:, None], depth - 1)
            # 1. One draft step.
            logits_BD = drafter.expand(state, Frontier(columns[-1][:, None], parents, depth))[:, 0]
            probs_BD, drawn_B = _draw(logits_BD, state.context, self.soft)
            probs.append(probs_BD)
            columns.append(
                drawn_B if drafter.vocabulary_D is None else drafter.vocabulary_D[drawn_B]
            )
        # 2. Step d is drawn from row d.
        rows = torch.arange(-1, len(probs), device=columns[0].device).expand(len(columns[0]), -1)
        return TokenTree.chain(
            torch.stack(columns, 1),
            draw_BN=torch.full_like(rows, SiblingDraw.INDEPENDENT),
            probs_BRD=torch.stack(probs, 1),
            prob_rows_BN=rows,
            vocabulary_D=drafter.vocabulary_D,
        )


def _draw(logits_BD: Tensor, context: Context, soft: bool) -> tuple[Tensor, Tensor]:
    """Distributions [B,D] in float64 and one token from each [B], every sequence by its own
    generator.
    """
    # 1. Greedy: no draw.
    if context.sampling.temperature == 0:
        drawn_B = logits_BD.argmax(-1)
        if soft:
            return logits_BD.double().softmax(-1), drawn_B
        return torch.nn.functional.one_hot(drawn_B, logits_BD.shape[-1]).double(), drawn_B
    # 2. One uniform number per sequence.
    probs_BD = warped_probs(logits_BD, context.sampling)
    uniforms = [
        torch.rand((), generator=generator, dtype=torch.float64, device=generator.device)
        for generator in context.generators
    ]
    return probs_BD, sample_probs(probs_BD, torch.stack(uniforms).to(probs_BD.device))
