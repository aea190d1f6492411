"""Divergences between a drafter's distribution q and the target's distribution p: losses of
drafters that learn p, per row.

Cross-entropy, the five of online speculative distillation (Liu et al. 2023, arXiv 2310.07177) and
DistillSpec (Zhou et al. 2023, arXiv 2310.08461), and those that aim at acceptance (LK losses, 2026,
arXiv 2602.23881). Each takes draft logits [M,D] (full precision) and target probabilities [M,D];
all but cross-entropy are 0 where they agree. The probabilities sum to 1, or for `UNNORMALISED`
divergences to what p has inside the draft vocabulary.

Shape legend: M rows, D draft vocabulary.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from modules.losses.chunked import Divergence, soft_cross_entropy

LEAST_ACCEPTANCE = 1e-5
"""Acceptances below it have a constant `lk`, without gradient (as published)."""
HYBRID_RATE = 3.0
"""η of `lk_hybrid` in the paper."""


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
    (Losses called L1 elsewhere are Σ_v |p − q|, twice as much.)

    Also for the part of p inside the draft vocabulary, not renormalised: q is 0 outside, so that
    all of p's mass there adds to the distance.
    """
    outside_M = 1 - probs_MD.sum(-1)
    return 0.5 * ((probs_MD - logits_MD.softmax(-1)).abs().sum(-1) + outside_M)


def acceptance(logits_MD: Tensor, probs_MD: Tensor) -> Tensor:
    """α = Σ_v min(p, q) [M], in [0, 1]: how often the ratio rule accepts a token drawn from q."""
    return torch.minimum(probs_MD, logits_MD.softmax(-1)).sum(-1)


def lk(logits_MD: Tensor, probs_MD: Tensor) -> Tensor:
    """−log α [M], α at least `LEAST_ACCEPTANCE`: cross-entropy where p is certain. Its gradient is
    that of the total variation, divided by α.
    """
    return -acceptance(logits_MD, probs_MD).clamp(min=LEAST_ACCEPTANCE).log()


def lk_hybrid(logits_MD: Tensor, probs_MD: Tensor, rate: float = HYBRID_RATE) -> Tensor:
    """λ KL(p‖q) + (1 − λ) ½ Σ_v |p − q| [M] with λ = exp(−rate · α), row by row and without
    gradient: first KL, where drafts are accepted total variation. KL is of p renormalised.
    """
    share_M = (-rate * acceptance(logits_MD, probs_MD).detach()).exp()
    inside_MD = probs_MD / probs_MD.sum(-1, keepdim=True).clamp(
        min=torch.finfo(probs_MD.dtype).tiny
    )
    return share_M * forward_kl(logits_MD, inside_MD) + (1 - share_M) * total_variation(
        logits_MD, probs_MD
    )


def ended(before_M: Tensor, rejected_M: Tensor) -> Tensor:
    """How often a drafted chain has ended [M], given how often before this token, and how often the
    rule rejects it: from 0 on, 1 − Π_{j≤k} α_j. Over K tokens these sum to K + 1 − E[τ], with E[τ]
    = 1 + Σ_k Π_{j≤k} α_j the expected number of tokens per target call.
    """
    return 1 - (1 - before_M) * (1 - rejected_M)


DIVERGENCES: dict[str, Divergence] = {
    "cross_entropy": soft_cross_entropy,
    "forward_kl": forward_kl,
    "reverse_kl": reverse_kl,
    "kl_mixture": kl_mixture,
    "jensen_shannon": jensen_shannon,
    "total_variation": total_variation,
    "lk": lk,
    "lk_hybrid": lk_hybrid,
    "expected_length": total_variation,
}
"""Divergences by their name in a config. `expected_length` is total variation, which drafters of
several steps combine (`ended`)."""
UNNORMALISED = frozenset({"total_variation", "lk", "lk_hybrid", "expected_length"})
"""Those of p as it is on the draft vocabulary: what it has outside is rejected."""
EVERY_LABEL = frozenset({"total_variation", "expected_length"})
"""Those that also count rows whose token cannot be drafted. The others would weigh rows where p has
little on the draft vocabulary as much as any; leaving out such tokens weighs rows by what p has
there (`modules.drafters.trained.TrainedDrafter.labels`)."""


def checked_divergence(name: str) -> str:
    """The name; ValueError unless it is one of `DIVERGENCES`."""
    if name not in DIVERGENCES:
        raise ValueError(f"divergence {name!r} is unknown: use one of {', '.join(DIVERGENCES)}")
    return name


def _log(probs_MD: Tensor) -> Tensor:
    return probs_MD.clamp(min=torch.finfo(probs_MD.dtype).tiny).log()
