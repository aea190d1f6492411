"""How many tokens of a block are verified, by the probability that each is accepted, and the
calibration of these probabilities (DSpark, 2026, arXiv 2607.05147).

Shape legend: B sequences, N nodes, M blocks, K slots.
"""

from __future__ import annotations

import torch
from torch import Tensor

from modules.contracts.token_tree import TokenTree

BINS = 10
"""Bins of a calibration error."""
LEAST, MOST, CHOICES = 0.2, 5.0, 41
"""Temperatures that are tried, evenly spaced by their logarithm."""


def worth_verifying(confidences_BN: Tensor, tree: TokenTree, row_cost: float) -> Tensor:
    """bool [B,N]: nodes up to which the throughput of a path rises; node 0 is one.

    A node is reached with probability a, the product of the confidences above it. With j drafted
    nodes a call is expected to give 1 + Σ_{i≤j} a_i tokens and costs 1 + row_cost · j calls of one
    row. A path ends at the first node with which the ratio of the two does not rise. Whether a
    node is verified depends on the tokens above it alone, never on itself: otherwise the text
    would not have the target's distribution.

    Args:
        confidences_BN: the probability that a token drafted under each node is accepted.
        tree: of drafted nodes.
        row_cost: what a further row costs, in calls of one row.
    """
    ancestors_BNN = tree.topology.ancestors.to(confidences_BN.dtype)
    depth_BN = tree.topology.depth
    # 1. Nodes are reached with the product of the confidences of the nodes above them.
    logs_BN1 = confidences_BN.clamp(min=1e-30).log()[..., None]
    itself = torch.eye(tree.size, device=logs_BN1.device, dtype=logs_BN1.dtype)
    reached_BN = ((ancestors_BNN - itself) @ logs_BN1)[..., 0].exp()
    # 2. Tokens and calls of the path to each node; node 0 gives one token in one call.
    tokens_BN = (ancestors_BNN @ reached_BN[..., None])[..., 0]
    ratio_BN = tokens_BN / (1 + row_cost * depth_BN)
    # 3. A path ends before the first fall.
    above_BN = tree.parents_BN.clamp(min=0).expand_as(ratio_BN)
    falls_BN = (ratio_BN <= ratio_BN.gather(1, above_BN)) & (depth_BN > 0)
    return ~(tree.topology.ancestors & falls_BN[:, None]).any(-1) & ~tree.topology.padding


def sequential_temperatures(logits_MK: Tensor, rates_MK: Tensor, valid_MK: Tensor) -> list[float]:
    """Sequential temperature scaling: slot by slot the temperature with the smallest calibration
    error of the product of confidences so far.

    Args:
        logits_MK: of the confidences.
        rates_MK: how often each slot is accepted, once it is reached.
        valid_MK: bool, slots that count; a block's first ones.
    """
    choices = torch.logspace(
        torch.tensor(LEAST).log10(), torch.tensor(MOST).log10(), CHOICES, dtype=logits_MK.dtype
    )
    before_M, outcome_MK, temperatures = torch.ones_like(logits_MK[:, 0]), rates_MK.cumprod(1), []
    for slot in range(logits_MK.shape[1]):
        counted = valid_MK[:, slot]
        products = [before_M * (logits_MK[:, slot] / float(heat)).sigmoid() for heat in choices]
        errors = [calibration_error(each[counted], outcome_MK[counted, slot]) for each in products]
        best = min(range(CHOICES), key=lambda i: (errors[i], abs(i - CHOICES // 2)))
        temperatures.append(float(choices[best]))
        before_M = products[best]
    return temperatures


def calibration_error(predicted_M: Tensor, outcome_M: Tensor) -> float:
    """Expected calibration error: mean over predictions of |their bin's mean - its outcomes'|."""
    if not len(predicted_M):
        return 0.0
    bins_M = (predicted_M * BINS).long().clamp(max=BINS - 1)
    gaps = torch.zeros(BINS, dtype=predicted_M.dtype, device=predicted_M.device)
    return float(gaps.index_add(0, bins_M, predicted_M - outcome_M).abs().sum() / len(predicted_M))
