"""Glancing: during training, a decreasing share of the labels that the drafter predicts wrongly is
revealed in its inputs. Falcon's Coupled Sequential Glancing Distillation (Gao et al. 2025, arXiv
2412.12639), and the Glancing Transformer's own (Qian et al. 2021, arXiv 2008.07905), which GAD has.

Shape legend: P flat positions, M blocks, K rows of a block, H hidden size.
"""

from __future__ import annotations

import torch
from torch import Tensor


def random_positions(wrong_MK: Tensor, valid_MK: Tensor, rate: float) -> Tensor:
    """bool [M,K]: rows whose labels are revealed, at random: in each block floor(rate · wrong rows)
    of those that count, right ones among them (Glancing Transformer, section 3.2).

    Args:
        wrong_MK, valid_MK: bool [M,K], the drafter's mistakes, and the rows that count.
        rate: ρ.
    """
    counts_M = (rate * (wrong_MK & valid_MK).sum(1)).long()
    # The rows that count stand first in a random order.
    noise_MK = torch.rand(valid_MK.shape, device=valid_MK.device).masked_fill(~valid_MK, 2)
    return noise_MK.argsort(1).argsort(1) < counts_M[:, None]


def revealed_positions(
    wrong_MK: Tensor, valid_MK: Tensor, sequences_M: Tensor, rate: float
) -> Tensor:
    """bool [M,K]: the rows whose labels are revealed.

    Per sequence floor(rate · wrong rows) rows, in runs from the beginning of a block: single rows
    for k = 2; for k > 2 a k-th as many runs of 1 to k - 1 rows. A block is never revealed as a
    whole, so nothing is revealed for k = 1.

    Args:
        wrong_MK, valid_MK: bool [M,K], the drafter's mistakes, and the rows that count.
        sequences_M: int64 [M], which sequence a block belongs to.
        rate: λ.
    """
    blocks, size = valid_MK.shape
    if size == 1 or blocks == 0:
        return torch.zeros_like(valid_MK)
    starts = torch.zeros(blocks, dtype=torch.bool, device=valid_MK.device)
    for sequence in sequences_M.unique():
        # The number of mistakes of a sequence decides how many of its blocks are revealed.
        selected_M = sequences_M == sequence
        count = int(rate * int((wrong_MK & valid_MK)[selected_M].sum())) // (
            1 if size == 2 else size
        )
        candidates = (selected_M & valid_MK[:, 0]).nonzero()[:, 0]
        starts[candidates[torch.randperm(len(candidates), device=starts.device)[:count]]] = True
    # Each chosen block reveals a run of random length from its first row on.
    runs_M = torch.randint(1, size, (blocks,), device=starts.device)
    within_MK = torch.arange(size, device=starts.device) < runs_M[:, None]
    return starts[:, None] & within_MK & valid_MK.cumprod(1).bool()


def reveal(
    features_PH: Tensor, following_P: Tensor, positions: Tensor, size: int
) -> tuple[Tensor, Tensor]:
    """Inputs with revealed labels: f_p ← f_{p+k} and x_{p+1} ← x_{p+1+k} at flat positions p, both
    together.

    Args:
        features_PH: f of every position.
        following_P: x_{p+1} of every position p.
        positions: p, none closer than k to the end of its document.
        size: k.
    """
    features, following = features_PH.clone(), following_P.clone()
    features[positions], following[positions] = (
        features_PH[positions + size],
        following_P[positions + size],
    )
    return features, following
