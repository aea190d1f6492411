"""Sampled decoding through the whole loop, counted and compared with plain decoding."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from scipy import stats

from modules.core.drafter import Sampling
from modules.core.target import Target
from modules.decoding.decoder import SpeculativeDecoder
from tests.fakes import tiny_target

Counts = Mapping[tuple[int, ...], int]


def small_target() -> Target:
    """Six tokens, so that pairs of them can be counted."""
    return tiny_target(vocab=6, seed=2)


def first_two_tokens(decoder: SpeculativeDecoder, runs: int, batch: int = 250) -> Counts:
    """How often each pair follows the first emitted token, in `runs` answers of temperature 1, so many at a time."""
    counts: dict[tuple[int, ...], int] = {}
    for seed in range(runs // batch):
        for trace in decoder.decode([[3, 1]] * batch, Sampling(temperature=1.0, seed=seed * 1000), 3):
            key = tuple(trace.ids[1:3])
            counts[key] = counts.get(key, 0) + 1
    return counts


def homogeneous(one: Counts, other: Counts) -> float:
    """Two-sample chi-square p-value, rare cells pooled."""
    keys = sorted(set(one) | set(other))
    table = np.array([[counts.get(key, 0) for key in keys] for counts in (one, other)], dtype=float)
    rare = table.sum(0) < 20
    pooled = np.concatenate([table[:, ~rare], table[:, rare].sum(1, keepdims=True)], axis=1)
    return float(stats.chi2_contingency(pooled[:, pooled.sum(0) > 0]).pvalue)
