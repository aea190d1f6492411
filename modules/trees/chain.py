"""A chain sampled from the drafter's law, to be verified with the ratio rule.

Shape legend: B sequences, R steps, D draft vocabulary.
"""

from __future__ import annotations

import torch
from torch import Tensor

from modules.core.drafter import Drafter, DraftState, Frontier
from modules.trees.tree import Law, TokenTree


class SampledChain:
    """Draws `depth` tokens one after another from the drafter's law at the target's temperature.

    At temperature 0 the draws are the most likely tokens, and the law a point mass on them. The law that travels with
    the tree is exactly the one drawn from (Leviathan et al. 2023, section 2.3).
    """

    law = Law.INDEPENDENT

    def __init__(self, depth: int) -> None:
        if depth < 1:
            raise ValueError(f"chain depth must be at least 1, got {depth}")
        self.depth = depth

    def build(self, drafter: Drafter, state: DraftState, budget: int) -> TokenTree:
        """A chain of `min(depth, budget)` drafted tokens."""
        columns, laws = [state.newest_B], []
        for depth in range(min(self.depth, budget)):
            parents = torch.full_like(columns[-1][:, None], depth - 1)
            logits_BD = drafter.expand(state, Frontier(columns[-1][:, None], parents, depth))[:, 0]
            law_BD, drawn_B = _draw(logits_BD, state.context.sampling.temperature, state.context.generator)
            laws.append(law_BD)
            columns.append(drawn_B if drafter.vocabulary_D is None else drafter.vocabulary_D[drawn_B])
        rows = torch.arange(-1, len(laws), device=columns[0].device).expand(len(columns[0]), -1)
        return TokenTree.chain(torch.stack(columns, 1), law_BN=torch.full_like(rows, Law.INDEPENDENT),
                               laws_BRD=torch.stack(laws, 1), law_rows_BN=rows, vocabulary_D=drafter.vocabulary_D)


def _draw(logits_BD: Tensor, temperature: float, generator: torch.Generator | None) -> tuple[Tensor, Tensor]:
    if temperature == 0:
        drawn = logits_BD.argmax(-1)
        return torch.nn.functional.one_hot(drawn, logits_BD.shape[-1]).to(logits_BD.dtype), drawn
    law = (logits_BD / temperature).softmax(-1)
    return law, torch.multinomial(law, 1, generator=generator)[:, 0]
