"""The distribution that tokens are drawn from, and drawing them."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from math import inf

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import (
    LogitsProcessorList,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

_SEARCHED_WHOLE, _BLOCK = 1 << 13, 128
"""Rows of fewer logits are searched at once; the others in blocks of so many."""


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen: temperature, then top-k, then top-p, as in `generate`.

    `temperature` 0 is greedy; the warpers then have no effect. Drafts that are drawn from a
    drafter's distribution are drawn under the same settings.

    Raises:
        ValueError: a value that no warper accepts.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        """Refuse bad values; whole numbers are taken for the floats that the warpers ask for."""
        # 1. Check the ranges.
        if not 0 <= self.temperature < inf:
            raise ValueError(
                f"temperature must be 0 (greedy) or a finite number above, got {self.temperature}"
            )
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p must lie in (0, 1], got {self.top_p}")
        if not 0 <= self.top_k < inf or self.top_k != int(self.top_k):
            raise ValueError(f"top_k must be 0 (off) or a whole number above, got {self.top_k}")
        # 2. A YAML `1` is an integer, but the warpers ask for floats.
        for name, kind in (("temperature", float), ("top_p", float), ("top_k", int)):
            object.__setattr__(self, name, kind(getattr(self, name)))


def warped_probs(logits: Tensor, sampling: Sampling, temperature: float | None = None) -> Tensor:
    """The distribution [..., V] in float64 that `generate` draws from: temperature, then top-k,
    then top-p.

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
    warpers = LogitsProcessorList()
    if temperature != 1:
        warpers.append(TemperatureLogitsWarper(temperature))
    if top_k:
        warpers.append(TopKLogitsWarper(top_k))
    if top_p < 1:
        warpers.append(TopPLogitsWarper(top_p))
    return warpers


def likeliest(logits: Tensor) -> Tensor:
    """`argmax` over the last dimension: [..., V] -> int64 [...], the first of equals.

    On a CPU a row of a whole vocabulary is searched in blocks: maxima are vectorised, torch's
    search for their place is not (in bfloat16 least of all).
    """
    size = logits.shape[-1]
    if logits.device.type != "cpu" or size < _SEARCHED_WHOLE:
        return logits.argmax(-1)
    # 1. The first block that has the maximum.
    wide = logits.float() if logits.dtype.itemsize < 4 else logits
    if size % _BLOCK:
        wide = F.pad(wide, (0, -size % _BLOCK), value=-inf)
    blocks = wide.unflatten(-1, (-1, _BLOCK))
    block = blocks.amax(-1).argmax(-1, keepdim=True)
    # 2. Its place there.
    inside = blocks.gather(-2, block[..., None].expand(*block.shape, _BLOCK))
    return (block * _BLOCK + inside.argmax(-1))[..., 0]


def sample_probs(probs: Tensor, uniform: Tensor) -> Tensor:
    """Inverse-CDF draw: distribution [..., V] (need not sum to 1), uniform [...] -> int64 [...].
    Never a token of probability 0.
    """
    cumulative = probs.cumsum(-1)
    drawn = torch.searchsorted(cumulative, (uniform * cumulative[..., -1])[..., None], right=True)[
        ..., 0
    ]
    return drawn.clamp(max=probs.shape[-1] - 1)
