"""Metrics of how well scores separate two classes of tokens.

Shape legend: M tokens.
"""

from __future__ import annotations

from torch import Tensor


def area_under_curve(scores_M: Tensor, right_M: Tensor) -> float:
    """Area under the ROC curve: how often a right token scores above a wrong one, ties counting
    half; 0.5 if a class is missing.
    """
    right, wrong = int(right_M.sum()), int((~right_M).sum())
    if not right or not wrong:
        return 0.5
    _, order_M, counts = scores_M.unique(return_inverse=True, return_counts=True)
    # Mean ranks of equal scores (Mann-Whitney U).
    ends = counts.cumsum(0)
    ranks_M = (ends - (counts - 1) / 2)[order_M]
    return float((ranks_M[right_M].sum() - right * (right + 1) / 2) / (right * wrong))
