"""Percentile bootstrap over prompts (Efron 1979).

Shape legend: P prompts, S bootstrap samples.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray

Floats = NDArray[np.float64]


def draws(prompts: int, samples: int, seed: int) -> NDArray[np.int64]:
    """Prompts drawn with replacement, as many as there are in each sample [S,P]."""
    return np.random.default_rng(seed).integers(prompts, size=(samples, prompts))


def quantiles(values_S: Floats, level: float) -> tuple[float, float]:
    """The interval that holds `level` of the values."""
    low, high = np.quantile(values_S, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def mean_interval(
    values_P: ArrayLike, samples: int = 2000, seed: int = 0, level: float = 0.95
) -> tuple[float, float]:
    """Interval of the mean over prompts, one value each."""
    values = np.asarray(values_P, dtype=np.float64)
    return quantiles(values[draws(len(values), samples, seed)].mean(1), level)


def finite_interval(values_S: Floats, level: float) -> tuple[float, float] | None:
    """Interval of the finite values, such as ratios; None without any."""
    finite_S = values_S[np.isfinite(values_S)]
    return quantiles(finite_S, level) if len(finite_S) else None
