"""Drawing tokens from laws."""

from __future__ import annotations

import torch
from torch import Tensor


def sample_law(law: Tensor, uniform: Tensor) -> Tensor:
    """Inverse-CDF draw: law [..., V] (need not sum to 1), uniform [...] -> int64 [...]. Never a token of law 0."""
    cumulative = law.cumsum(-1)
    drawn = torch.searchsorted(cumulative, (uniform * cumulative[..., -1])[..., None], right=True)[..., 0]
    return drawn.clamp(max=law.shape[-1] - 1)
