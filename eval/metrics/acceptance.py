"""Definitions of the figures in a report: pure functions of traces, seconds and logits.

A *call* is one verification by the target. It emits the accepted drafts and one more token (the
bonus token); the token of the prefill belongs to no call. Tokens after an answer's end do not
count.

Shape legend: P prompts, S bootstrap samples, T tokens, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from enum import Enum
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from eval.metrics.bootstrap import Floats, draws, finite_interval

TIE_GAP = 1e-3
"""Largest difference of teacher-forced logits that the rounding of wider calls may invert."""


# -- acceptance ------------------------------------------------------------------------------------


def mean_accepted_tokens(emitted: Sequence[int]) -> float | None:
    """τ: emitted tokens per call, bonus tokens included; None without calls.

    In every row, tokens after an end of sequence or the limit do not count.
    """
    return float(np.mean(emitted)) if len(emitted) else None


def acceptance_by_depth(emitted: Sequence[int]) -> list[float]:
    """Share of all calls that accepted at least d drafts, for d = 1, 2, …, up to the deepest.

    A call without a draft of that depth counts as not accepting one, so τ = 1 + the sum of this
    list.
    """
    drafts = np.asarray(emitted, dtype=np.int64) - 1
    deepest = int(drafts.max(initial=0))
    return [float((drafts >= depth).mean()) for depth in range(1, deepest + 1)]


def conditional_acceptance_by_depth(emitted: Sequence[int], offered: Sequence[int]) -> list[float]:
    """P(at least d drafts accepted | at least d-1 accepted and a tree at least d deep), for d = 1,
    2, …

    `offered` is the depth of each call's tree; if an engine does not report it, the result is
    empty.
    """
    if not len(offered):
        return []
    drafts, depths = np.asarray(emitted, dtype=np.int64) - 1, np.asarray(offered, dtype=np.int64)
    shares: list[float] = []
    # Up to the first depth that no call reached.
    for depth in range(1, int(depths.max(initial=0)) + 1):
        tried = (drafts >= depth - 1) & (depths >= depth)
        if not tried.any():
            break
        shares.append(float((drafts[tried] >= depth).mean()))
    return shares


def accepted_length_histogram(emitted: Sequence[int]) -> list[int]:
    """How many calls accepted 0, 1, 2, … drafts."""
    drafts = np.asarray(emitted, dtype=np.int64) - 1
    return np.bincount(drafts).tolist() if len(drafts) else []


# -- speed -----------------------------------------------------------------------------------------


class Speed(NamedTuple):
    """One prompt's decoding: tokens after the first (the prefill's), and their seconds."""

    tokens: float
    seconds: float


def rate(speeds: Sequence[Speed]) -> float:
    """Tokens per second of all prompts together; 0 when nothing was decoded."""
    tokens, seconds = np.sum(np.asarray(speeds, dtype=np.float64).reshape(-1, 2), axis=0)
    return float(tokens / seconds) if seconds > 0 else 0.0


def micro_speedup(method: Sequence[Speed], baseline: Sequence[Speed]) -> float | None:
    """Ratio of pooled tokens per second, method over baseline; None when the baseline decoded
    nothing.
    """
    reference = rate(baseline)
    return rate(method) / reference if reference else None


def macro_speedup(tasks: Mapping[str, tuple[Sequence[Speed], Sequence[Speed]]]) -> float | None:
    """Mean over tasks of each task's micro speedup (`{task: (method, baseline)}`)."""
    speedups = [speedup for pair in tasks.values() if (speedup := micro_speedup(*pair)) is not None]
    return float(np.mean(speedups)) if speedups else None


def bootstrap_interval(
    method: Sequence[Speed],
    baseline: Sequence[Speed],
    samples: int = 2000,
    seed: int = 0,
    level: float = 0.95,
) -> tuple[float, float] | None:
    """Paired percentile bootstrap of the micro speedup over prompts (Efron 1979).

    Row i of both sequences is the same prompt. None below two prompts.
    """
    # Both rows are resampled with the same draws.
    assert len(method) == len(baseline), "paired bootstrap wants the same prompts in both rows"
    if len(method) < 2:
        return None
    method_P2, baseline_P2 = (
        np.asarray(method, dtype=np.float64),
        np.asarray(baseline, dtype=np.float64),
    )
    drawn_SP = draws(len(method), samples, seed)
    return finite_interval(_rates(method_P2, drawn_SP) / _rates(baseline_P2, drawn_SP), level)


def rate_interval(
    speeds: Sequence[Speed], samples: int = 2000, seed: int = 0, level: float = 0.95
) -> tuple[float, float] | None:
    """Percentile bootstrap of a pooled rate over prompts: of tokens per second, or of τ when
    `seconds` counts calls.
    """
    if len(speeds) < 2:
        return None
    return finite_interval(
        _rates(np.asarray(speeds, dtype=np.float64), draws(len(speeds), samples, seed)), level
    )


def _rates(speeds_P2: Floats, drawn_SP: NDArray[np.int64]) -> Floats:
    totals_S2 = speeds_P2[drawn_SP].sum(1)
    with np.errstate(divide="ignore", invalid="ignore"):
        return totals_S2[:, 0] / totals_S2[:, 1]


# -- losslessness ----------------------------------------------------------------------------------


class Identity(str, Enum):
    """How a method's token ids compare with the autoregressive row's."""

    IDENTICAL = "identical"
    TIE = "tie"
    """The first divergence is a true tie between two tokens."""
    DIFFERENT = "different"


def first_divergence(expected: Sequence[int], actual: Sequence[int]) -> int | None:
    """Index of the first differing token (the shorter length when one is a prefix of the other);
    None when equal.
    """
    for index, (left, right) in enumerate(zip(expected, actual, strict=False)):
        if left != right:
            return index
    return None if len(expected) == len(actual) else min(len(expected), len(actual))


def is_tie(
    logits_V: Sequence[float] | Floats, expected: int, actual: int, gap: float = TIE_GAP
) -> bool:
    """Whether the teacher-forced logits of two tokens after the common prefix differ by at most
    `gap`.
    """
    return abs(float(logits_V[expected]) - float(logits_V[actual])) <= gap


def argmax_gaps(logits_TV: Floats, ids_T: Sequence[int]) -> Floats:
    """Difference of the largest logit and each emitted token's [T]; 0 where it is the argmax."""
    chosen_T = np.take_along_axis(logits_TV, np.asarray(ids_T, dtype=np.int64)[:, None], axis=1)[
        :, 0
    ]
    return logits_TV.max(axis=1) - chosen_T
