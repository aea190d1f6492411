"""Weights of the slots of a drafted block.

Shape legend: M blocks, K slots.
"""

from __future__ import annotations

import torch
from torch import Tensor


def expected_length_weights(probs_MK: Tensor, valid_MK: Tensor, smoothing: float) -> Tensor:
    """D-PACE's weights [M,K] (2026, arXiv 2605.18810): w_j = Σ_{m≥j} Π_{i≤m} s_i with s = (1 - β)
    q(label) + β, the gradient of a smoothed expected accepted length by log s_j.

    Slots without a label have weight 0, and no other slot depends on them.

    Args:
        probs_MK: the drafter's probability of each label, without gradient; 0 where the label
            cannot be drafted.
        valid_MK: bool, slots with a label.
        smoothing: β, 0 to 1 (1: w_j is the number of slots from j on).
    """
    steps_MK = torch.where(valid_MK, (1 - smoothing) * probs_MK + smoothing, 1.0)
    reached_MK = steps_MK.cumprod(1) * valid_MK
    return reached_MK.flip(1).cumsum(1).flip(1) * valid_MK
