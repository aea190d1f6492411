"""Tables of a comparison in Markdown, and the sentence on the fastest tree."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from eval.metrics.bootstrap import mean_interval
from eval.rule_comparison.trials import ORDERS
from modules.cost_model.latency_table import LatencyTable
from modules.trees.sampled.sequoia import best_shape, expected_tokens

SAMPLES = 4000
"""Samples of the bootstrap."""
DEEPEST_SHAPE = 16
"""Largest depth tried for the fastest tree."""


def fastest_shape(acceptance: list[float], latency: LatencyTable, level_seconds: float) -> str:
    """A sentence with the size and depth of Sequoia's tree of the highest predicted speedup on this
    device (Chen et al. 2024, section 3.3).

    Args:
        acceptance: acceptance rate by sibling.
        latency: of the target's calls.
        level_seconds: time of drafting one level.
    """
    seconds = [latency.at(rows) for rows in range(1, max(latency.seconds) + 1)]
    draws, levels = best_shape([acceptance], seconds, level_seconds, DEEPEST_SHAPE)
    if not draws:
        return "On this device no tree of Sequoia's is predicted to beat plain decoding."
    tokens = expected_tokens([acceptance], draws, levels)[-1]
    speedup = tokens * seconds[0] / (seconds[draws] + levels * level_seconds)
    return (
        f"On this device Sequoia's tree is predicted to be fastest with `nodes: {draws}, depth: "
        f"{levels}`: {tokens:.2f} tokens a call, {speedup:.2f}x plain decoding (a level takes "
        f"{1000 * level_seconds:.1f} ms, a call {1000 * seconds[0]:.1f} ms, of this tree "
        f"{1000 * seconds[draws]:.1f} ms)."
    )


def verdict(low: float, high: float) -> str:
    """Whether an interval of a difference confirms a claimed order."""
    return "holds" if low > 0 else "reversed" if high < 0 else "tie"


def tables(values: Mapping[str, Sequence[float]]) -> list[str]:
    """Two Markdown tables: every trial, and every pair that a paper orders."""
    # 1. Expected accepted drafts by trial.
    lines = ["| trial | expected accepted drafts | 95 % interval |", "|---|---:|---:|"]
    for name, per_prompt in values.items():
        low, high = mean_interval(per_prompt, SAMPLES)
        lines.append(f"| {name} | {np.mean(per_prompt):.3f} | {low:.3f} to {high:.3f} |")
    # 2. Paired differences in the order that papers claim.
    lines += [
        "",
        "| claimed to accept more | than | difference | 95 % interval, paired | |",
        "|---|---|---:|---:|---|",
    ]
    for better, worse in (
        (first, second) for first, second in ORDERS if {first, second} <= set(values)
    ):
        difference = [
            left - right for left, right in zip(values[better], values[worse], strict=True)
        ]
        low, high = mean_interval(difference, SAMPLES)
        lines.append(
            f"| {better} | {worse} | {np.mean(difference):+.4f} | {low:+.4f} to {high:+.4f} | "
            f"{verdict(low, high)} |"
        )
    return lines
