"""Preference losses as pure functions of per-token quantities: DPO, cDPO and SparsePO.

Per-token values are 0 where no token counts, so that a sum over a row is a sum over its response.
For a response y to a prompt x, r_t = log π_θ(y_t | x, y_<t) − log π_ref(y_t | x, y_<t) is its
log-ratio.

Shape legend: B pairs, T tokens of a row, R tokens of the longest response, L layers, M rows of
logits, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F


def dpo_loss(chosen_BT: Tensor, rejected_BT: Tensor, beta: float) -> Tensor:
    """−log σ(β (Σ_t r_t(y_w) − Σ_t r_t(y_l))) of log-ratios [B,T] -> [B] (Rafailov et al. 2023,
    equation 7).
    """
    return -F.logsigmoid(beta * (chosen_BT.sum(1) - rejected_BT.sum(1)))


# -- cDPO ------------------------------------------------------------------------------------------


def contrastive_probs(positive_MV: Tensor, negative_MV: Tensor, contrast: float) -> Tensor:
    """softmax_v((1 + β) log P_p(v) − β log P_n(v)) of two models' logits [M,V] -> probabilities
    [M,V].

    P_p has seen right trajectories and P_n wrong ones: a token of small probability here is typical
    of wrong ones (Lin et al. 2024, section 3.2). β = 0 gives P_p.
    """
    positive_MV, negative_MV = positive_MV.log_softmax(-1), negative_MV.log_softmax(-1)
    return ((1 + contrast) * positive_MV - contrast * negative_MV).softmax(-1)


def critical_dpo_loss(
    chosen_BT: Tensor, rejected_BT: Tensor, scores_BT: Tensor, gamma: float
) -> Tensor:
    """−log σ(γ (Σ_t r_t(y_w) − Σ_t (1 − s_t) r_t(y_l))) -> [B] (Lin et al. 2024, section 3.3).

    s_t is the contrastive probability of the rejected token: critical tokens (small s_t) have
    full weight.
    """
    return dpo_loss(chosen_BT, (1 - scores_BT) * rejected_BT, gamma)


def positionwise_dpo_loss(
    chosen_BT: Tensor,
    chosen_counted_BT: Tensor,
    rejected_BT: Tensor,
    rejected_counted_BT: Tensor,
    scores_BT: Tensor,
    gamma: float,
) -> Tensor:
    """The form of the paper's released code: token i of y_w against token i of y_l, averaged over
    positions -> [B].

    After the end of the shorter response its log-ratio is 0. (The released code's mean also runs
    over prompt and padding, where every term is log 2, so these reduce its gradient.)
    """
    chosen_BR = _responses(chosen_BT, chosen_counted_BT)
    rejected_BR = _responses((1 - scores_BT) * rejected_BT, rejected_counted_BT)
    # Pad both to the longer side; positions beyond both ends have no weight.
    length = max(chosen_BR.shape[1], rejected_BR.shape[1])
    difference_BR = F.pad(chosen_BR, (0, length - chosen_BR.shape[1])) - F.pad(
        rejected_BR, (0, length - rejected_BR.shape[1])
    )
    lengths_B = torch.maximum(chosen_counted_BT.sum(1), rejected_counted_BT.sum(1))
    real_BR = torch.arange(length, device=lengths_B.device) < lengths_B[:, None]
    return (-F.logsigmoid(gamma * difference_BR) * real_BR).sum(1) / lengths_B.clamp(min=1)


def _responses(values_BT: Tensor, counted_BT: Tensor) -> Tensor:
    """The counted values of each row, moved to its front in order [B,R]."""
    order_BT = counted_BT.long().argsort(dim=1, descending=True, stable=True)
    return (values_BT * counted_BT).gather(1, order_BT)[:, : int(counted_BT.sum(1).max())]


# -- SparsePO --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Side:
    """One response of each pair.

    ratio_BT: log-ratios r_t. divergence_BT: KL(π_ref ‖ π_θ) over the vocabulary at each token, at
    least 0. reward_mask_BT, divergence_mask_BT: the weights m^u and m^d of the two.
    """

    ratio_BT: Tensor
    divergence_BT: Tensor
    reward_mask_BT: Tensor
    divergence_mask_BT: Tensor

    @property
    def reward_B(self) -> Tensor:
        """u = Σ_t m^u_t r_t [B]."""
        return (self.reward_mask_BT * self.ratio_BT).sum(1)

    @property
    def divergence_B(self) -> Tensor:
        """d = −Σ_t m^d_t KL_t [B], at most 0."""
        return -(self.divergence_mask_BT * self.divergence_BT).sum(1)


def sparse_loss(chosen: Side, rejected: Side, beta: float, detach_chosen: bool = False) -> Tensor:
    """−log σ(β [(u_w − u_l) − (d_w − d_l)]) -> [B] (Christopoulou et al. 2024, section 3).

    `detach_chosen` stops the gradient through d_w, as TDPO's second form does.
    """
    divergence_B = chosen.divergence_B.detach() if detach_chosen else chosen.divergence_B
    return -F.logsigmoid(
        beta * (chosen.reward_B - rejected.reward_B - divergence_B + rejected.divergence_B)
    )


def activation_mask(groups: Sequence[Tensor], counted_BT: Tensor) -> Tensor:
    """A mask from activations: each is min-max scaled to [0, 1] over the response's tokens, then
    they are averaged.

    The average is over the activations of a group, then over groups. (The paper standardises before
    scaling, which has no effect.) An activation that does not vary over the response gives 0.

    Args:
        groups: mean activations [L,B,T] of one kind (residual stream, attention outputs, ...) each.
        counted_BT: bool, the response's tokens.

    Returns:
        [B,T] in [0, 1], 0 where no token counts (Christopoulou et al. 2024, section 3.2).
    """
    return torch.stack([_scaled(group, counted_BT).mean(0) for group in groups]).mean(0)


def _scaled(values_LBT: Tensor, counted_BT: Tensor) -> Tensor:
    low = values_LBT.masked_fill(~counted_BT, torch.inf).amin(2, keepdim=True)
    high = values_LBT.masked_fill(~counted_BT, -torch.inf).amax(2, keepdim=True)
    width = (high - low).clamp(min=torch.finfo(values_LBT.dtype).tiny)
    return torch.where(counted_BT, (values_LBT - low) / width, 0.0)
