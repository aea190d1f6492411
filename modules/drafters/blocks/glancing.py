"""What Coupled Sequential Glancing Distillation reveals inside blocks (Falcon, Gao et al. 2025,
arXiv 2412.12639): a share of the answers that the drafter still gets wrong is put into its inputs,
and fades out.

Shape legend: P flat positions, M blocks, K rows of a block, H hidden size.
"""

from __future__ import annotations

import torch
from torch import Tensor


def revealed_positions(
    wrong_MK: Tensor, valid_MK: Tensor, sequences_M: Tensor, rate: float
) -> Tensor:
    """bool [M,K]: the rows whose answers are revealed.

    Of each sequence floor(rate · wrong rows) rows, as runs that begin with their block: single rows
    for k = 2; for k > 2 a k-th as many runs, each of 1 to k - 1 rows. Never the whole block, hence
    nothing for k = 1.

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
        own = sequences_M == sequence
        count = int(rate * int((wrong_MK & valid_MK)[own].sum())) // (1 if size == 2 else size)
        candidates = (own & valid_MK[:, 0]).nonzero()[:, 0]
        starts[candidates[torch.randperm(len(candidates), device=starts.device)[:count]]] = True
    runs_M = torch.randint(1, size, (blocks,), device=starts.device)
    within_MK = torch.arange(size, device=starts.device) < runs_M[:, None]
    return starts[:, None] & within_MK & valid_MK.cumprod(1).bool()


def reveal(
    features_PH: Tensor, following_P: Tensor, positions: Tensor, size: int
) -> tuple[Tensor, Tensor]:
    """Inputs with the answers in place: f_p ← f_{p+k} and x_{p+1} ← x_{p+1+k} at flat positions p,
    both together.

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
