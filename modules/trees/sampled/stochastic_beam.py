"""RSD-S: trees grown by stochastic beam search.

Shape legend: B sequences, W beam nodes, K children considered of each, N nodes, D draft vocabulary.
"""

from __future__ import annotations

import torch
from torch import Tensor

from modules.contracts.drafter import Drafter, DraftState, Frontier
from modules.contracts.token_tree import SiblingDraw, TokenTree, Topology
from modules.trees.sampled.draws import check_temperature, draft_probs, race


class StochasticBeamTree:
    """RSD-S (Jeon et al. 2024, section 3.2.2): each level is a sample of whole prefixes without
    replacement.

    A child's log-probability from the root is perturbed by Gumbel noise whose maximum over the
    siblings is conditioned on its parent's (Kool et al. 2019); the `width` largest of a level stay.
    Siblings are in decreasing order, which is the order of drawing. Whether a draw stays says
    nothing about its value, given the earlier siblings.

    Args:
        width: nodes per level. depth: levels. temperature: of the draft; None: the target's.
    """

    sibling_draw = SiblingDraw.WITHOUT_REPLACEMENT

    def __init__(self, width: int, depth: int, temperature: float | None = None) -> None:
        if depth < 1 or width < 1:
            raise ValueError(f"tree depth and width must be at least 1, got {depth} and {width}")
        check_temperature(temperature)
        self.width, self.depth, self.temperature = width, depth, temperature

    def build(self, drafter: Drafter, state: DraftState, budget: int) -> TokenTree:
        """`width` nodes per level as long as the budget lasts; the last level may be smaller."""
        vocabulary_D = drafter.vocabulary_D
        tokens_BN, parents_BN = (
            state.newest_B[:, None],
            torch.full_like(state.newest_B[:, None], -1),
        )
        zeros = torch.zeros(tokens_BN.shape, dtype=torch.float64, device=tokens_BN.device)
        log_BW, key_BW, real_BN, probs, start = zeros, zeros, zeros == 0, [], 0
        for depth in range(self.depth):
            # 1. Expand the nodes of the last level.
            size = tokens_BN.shape[1]
            if size > budget:
                break
            frontier = Frontier(tokens_BN[:, start:], parents_BN[:, start:], depth)
            probs_BWD = draft_probs(
                drafter.expand(state, frontier), state.context, self.temperature
            )
            probs.append(probs_BWD)
            # 2. Perturbed log-probabilities of their children, given the parent's.
            count = min(self.width, budget + 1 - size)
            noisy_BWK, drawn_BWK = race(probs_BWD, state.context).topk(
                min(count, probs_BWD.shape[-1]), dim=-1
            )
            logs_BWK = log_BW[..., None] + probs_BWD.gather(-1, drawn_BWK).log()
            keys_BWK = conditioned(log_BW[..., None] + noisy_BWK, key_BW[..., None])
            # 3. The largest of the level.
            key_BW, best = keys_BWK.flatten(1).topk(min(count, keys_BWK[0].numel()), dim=1)
            drawn, log_BW = (
                drawn_BWK.flatten(1).gather(1, best),
                logs_BWK.flatten(1).gather(1, best),
            )
            # 4. Append them.
            parents_BN = torch.cat([parents_BN, start + best // keys_BWK.shape[-1]], dim=1)
            tokens_BN = torch.cat(
                [tokens_BN, drawn if vocabulary_D is None else vocabulary_D[drawn]], dim=1
            )
            real_BN, start = torch.cat([real_BN, key_BW.isfinite()], dim=1), size
        if not probs:
            return TokenTree.root(state.newest_B)
        draw_BN = torch.full_like(tokens_BN, self.sibling_draw)
        return TokenTree(
            tokens_BN,
            Topology(parents_BN),
            candidate_BN=real_BN,
            draw_BN=draw_BN,
            probs_BRD=torch.cat(probs, dim=1),
            prob_rows_BN=parents_BN,
            vocabulary_D=vocabulary_D,
        )


def conditioned(keys_BWK: Tensor, maximum_BW1: Tensor) -> Tensor:
    """Perturbed log-probabilities [B,W,K], largest first, given that their maximum is that of the
    parent [B,W,1].

    -log(exp(-G) - exp(-Z) + exp(-g)) with the parent's G and the largest Z of g, without overflow;
    -inf stays -inf.
    """
    largest = keys_BWK[..., :1]
    excess = maximum_BW1 - keys_BWK + torch.log1p(-(keys_BWK - largest).exp())
    moved = maximum_BW1 - excess.clamp(min=0) - torch.log1p((-excess.abs()).exp())
    return torch.where(keys_BWK.isfinite() & maximum_BW1.isfinite(), moved, -torch.inf)
