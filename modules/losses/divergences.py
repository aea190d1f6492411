"""Divergences between a drafter's distribution q and the target's distribution p: distillation
losses, per row.

The five of online speculative distillation (Liu et al. 2023, arXiv 2310.07177) and DistillSpec
(Zhou et al. 2023, arXiv 2310.08461). Each takes draft logits [M,D] (full precision) and target
probabilities [M,D], and is 0 where they agree. For all but `total_variation` the probabilities sum
to 1.

Shape legend: M rows, D draft vocabulary.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from modules.losses.chunked import Divergence


def forward_kl(logits_MD: Tensor, probs_MD: Tensor) -> Tensor:
    """KL(p‖q) = Σ_v p (log p − log q) [M]; its gradient in the logits is q − p."""
    return -torch.special.entr(probs_MD).sum(-1) - (probs_MD * logits_MD.log_softmax(-1)).sum(-1)


def reverse_kl(logits_MD: Tensor, probs_MD: Tensor) -> Tensor:
    """KL(q‖p) = Σ_v q (log q − log p) [M]. A p of 0 counts as the smallest positive number."""
    log_q = logits_MD.log_softmax(-1)
    return (log_q.exp() * (log_q - _log(probs_MD))).sum(-1)


def kl_mixture(logits_MD: Tensor, probs_MD: Tensor, forward: float = 0.9) -> Tensor:
    """`forward` · KL(p‖q) + (1 − `forward`) · KL(q‖p) [M] (what the authors' code calls JSD)."""
    return forward * forward_kl(logits_MD, probs_MD) + (1 - forward) * reverse_kl(
        logits_MD, probs_MD
    )


def jensen_shannon(logits_MD: Tensor, probs_MD: Tensor, beta: float = 0.5) -> Tensor:
    """β KL(p‖m) + (1 − β) KL(q‖m) with m = β p + (1 − β) q [M]; at β = ½ symmetric and at most log
    2.
    """
    log_p, log_q = _log(probs_MD), logits_MD.log_softmax(-1)
    log_m = torch.logaddexp(log_p + math.log(beta), log_q + math.log1p(-beta))
    return beta * (probs_MD * (log_p - log_m)).sum(-1) + (1 - beta) * (
        log_q.exp() * (log_q - log_m)
    ).sum(-1)


def total_variation(logits_MD: Tensor, probs_MD: Tensor) -> Tensor:
    """½ Σ_v |p − q| [M] = 1 − Σ_v min(p, q): how often the ratio rule rejects a token drawn from q.

    Also for the part of p inside the draft vocabulary, not renormalised: q is 0 outside, so that
    all of p's mass there adds to the distance.
    """
    outside_M = 1 - probs_MD.sum(-1)
    return 0.5 * ((probs_MD - logits_MD.softmax(-1)).abs().sum(-1) + outside_M)


DIVERGENCES: dict[str, Divergence] = {
    "forward_kl": forward_kl,
    "reverse_kl": reverse_kl,
    "kl_mixture": kl_mixture,
    "jensen_shannon": jensen_shannon,
    "total_variation": total_variation,
}
"""Divergences by their name in a config."""


def _log(probs_MD: Tensor) -> Tensor:
    return probs_MD.clamp(min=torch.finfo(probs_MD.dtype).tiny).log()
