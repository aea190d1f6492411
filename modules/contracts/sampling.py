"""The law that tokens are drawn from, and drawing them."""

from __future__ import annotations

from functools import lru_cache
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from transformers import (
    LogitsProcessorList,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

if TYPE_CHECKING:
    from modules.contracts.drafter import Sampling


def warped_law(logits: Tensor, sampling: Sampling, temperature: float | None = None) -> Tensor:
    """The law [..., V] in float64 that `generate` draws from: temperature, then top-k, then top-p.

    Drafter and target are warped alike. Were only the target's, a drafter that agrees with it would
    still draft tokens that the warpers rule out: with top-p 0.8 up to a fifth of its draws.

    Args:
        logits: [..., V], of the whole vocabulary or of a draft vocabulary.
        sampling: of a temperature above 0.
        temperature: instead of the sampling's.
    """
    heat = sampling.temperature if temperature is None else temperature
    warpers = _warpers(heat, sampling.top_k, sampling.top_p)
    flat = logits.reshape(-1, logits.shape[-1]).double()
    warped = warpers(torch.empty(0, dtype=torch.long), flat)  # type: ignore[arg-type]
    return torch.as_tensor(warped).softmax(-1).reshape(logits.shape)


@lru_cache(maxsize=64)
def _warpers(temperature: float, top_k: int, top_p: float) -> LogitsProcessorList:
    found = LogitsProcessorList()
    if temperature != 1:
        found.append(TemperatureLogitsWarper(temperature))
    if top_k:
        found.append(TopKLogitsWarper(top_k))
    if top_p < 1:
        found.append(TopPLogitsWarper(top_p))
    return found


def sample_law(law: Tensor, uniform: Tensor) -> Tensor:
    """Inverse-CDF draw: law [..., V] (need not sum to 1), uniform [...] -> int64 [...]. Never a
    token of law 0.
    """
    cumulative = law.cumsum(-1)
    drawn = torch.searchsorted(cumulative, (uniform * cumulative[..., -1])[..., None], right=True)[
        ..., 0
    ]
    return drawn.clamp(max=law.shape[-1] - 1)
