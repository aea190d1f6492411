"""Drawing siblings from a drafter's distributions, every sequence by its own generator.

Shape legend: B sequences, W frontier nodes, R siblings, D draft vocabulary.
"""

from __future__ import annotations

import torch
from torch import Tensor

from modules.contracts.drafter import Context
from modules.contracts.sampling import sample_probs, warped_probs

GREEDY_DRAFT_TEMPERATURE = 0.6
"""Draft temperature for a greedy target, whose own would leave one token and so no siblings
(DySpec, section 4).
"""
_USED_UP = -1e6
"""Below the logarithm of any float64 probability, so that tokens without probability come last in a
race.
"""


def draft_probs(logits_BWD: Tensor, context: Context, temperature: float | None) -> Tensor:
    """The distribution [B,W,D] in float64 that siblings are drawn from, warped as the target's is.

    Args:
        logits_BWD: of the drafter.
        context: whose sampling warps. The warpers of a greedy target have no effect, on drafts
        either.
        temperature: of the draft; None: the target's, or `GREEDY_DRAFT_TEMPERATURE`.
    """
    if context.sampling.temperature == 0:
        return (logits_BWD.double() / (temperature or GREEDY_DRAFT_TEMPERATURE)).softmax(-1)
    return warped_probs(logits_BWD, context.sampling, temperature)


def check_temperature(temperature: float | None) -> None:
    """ValueError for a draft temperature that leaves no distribution to draw from."""
    if temperature is not None and temperature <= 0:
        raise ValueError(
            f"draft temperature must be above 0, got {temperature}: a greedy draft is StaticTree's"
        )


def gumbel(context: Context, width: int, size: int) -> Tensor:
    """Standard Gumbel noise [B,W,D]."""
    noise = [
        torch.empty(width, size, dtype=torch.float64, device=generator.device).exponential_(
            generator=generator
        )
        for generator in context.generators
    ]
    return -torch.stack(noise).log_()


def race(probs_BWD: Tensor, context: Context, exhausted: str = "stop") -> Tensor:
    """Perturbed log-probabilities [B,W,D]: in decreasing order the tokens are draws without
    replacement.

    Args:
        probs_BWD: what is drawn from.
        context: whose generators draw.
        exhausted: what follows when all tokens of the distribution are drawn: `"stop"` (-inf) or
            `"uniform"`, the others.
    """
    logs = probs_BWD.log()
    if exhausted == "uniform":
        logs = logs.clamp(min=_USED_UP)
    return logs + gumbel(context, *probs_BWD.shape[1:])


def independent(probs_BWD: Tensor, context: Context, count: int) -> Tensor:
    """`count` independent draws from every distribution, int64 [B,W,R]."""
    shape = (probs_BWD.shape[1], count)
    uniform_BWR = torch.stack(
        [
            torch.rand(shape, generator=generator, dtype=torch.float64, device=generator.device)
            for generator in context.generators
        ]
    ).to(probs_BWD.device)
    return torch.stack([sample_probs(probs_BWD, uniform_BWR[..., i]) for i in range(count)], dim=-1)
