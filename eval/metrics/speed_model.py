"""A model of speed: what τ, the target's t(rows) and the drafting time promise, and where the rest
went.

A call over a tree of n rows costs t(n) and its drafting, and gives τ tokens; plain decoding gives
one per t(1). So

    predicted = τ t(1) / (mean over calls of t(rows) + drafting per call)

(Leviathan et al. 2023, arXiv 2211.17192, theorem 3.8, with measured costs in place of a constant
ratio; trees as in Chen et al. 2024, arXiv 2402.12374, section 4.2). t is measured apart from the
run. The measured speedup is exactly the prediction times `FACTORS`, each of which says where time
went that the model does not know.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

import numpy as np

from modules.contracts.target import Target
from modules.cost_model.latency_table import WIDTHS, LatencyTable, measure_latency

FACTORS = {
    "verification": "target calls against t(rows)",
    "bookkeeping": "accepting and committing",
    "unclaimed": "what no phase owns",
    "plain_decoding": "plain calls against t(1)",
}
"""What separates the measured from the predicted speedup, in the order in which the terms are
taken.
"""
REPEATS = 7


@dataclass(frozen=True)
class Calls:
    """The target calls of one row over all prompts.

    emitted: tokens kept of each call. rows: that each call computes, see `Trace` (none from an
    engine that does not report it). seconds: by phase, over all calls.
    """

    emitted: Sequence[int]
    rows: Sequence[int]
    seconds: Mapping[str, float]

    def per_call(self, *phases: str) -> float:
        """Mean seconds of a call's phases."""
        return sum(self.seconds.get(phase, 0.0) for phase in phases) / len(self.emitted)


def speed_model(calls: Calls, plain: Calls, table: LatencyTable) -> dict[str, Any] | None:
    """Prediction and factors of one row; None where its calls are not known.

    Args:
        calls: of the row.
        plain: of its autoregressive baseline.
        table: t(rows) per sequence, up to the widest call.
    """
    if not calls.emitted or len(calls.rows) != len(calls.emitted) or not plain.emitted:
        return None
    rows = expected_seconds(table, calls.rows)
    drafting = calls.per_call("draft")
    predicted = float(np.mean(calls.emitted)) * table.seconds[1] / (rows + drafting)
    return {
        "predicted": predicted,
        "context": table.context,
        "rows_per_call": float(np.mean(calls.rows)),
        "seconds_per_plain_call": table.seconds[1],
        "seconds_per_call": rows,
        "draft_seconds_per_call": drafting,
        "factors": _factors(calls, plain, rows, table.seconds[1]),
    }


def expected_seconds(table: LatencyTable, rows: Sequence[int]) -> float:
    """Mean of t(rows) over calls, between measured widths by linear interpolation."""
    return float(np.mean([table.at(count) for count in rows]))


def _factors(calls: Calls, plain: Calls, rows: float, one: float) -> dict[str, float]:
    """One ratio per entry of `FACTORS`; below 1 is time lost against the model."""
    reached = [
        calls.per_call(*phases)
        for phases in (
            ("draft", "verify"),
            ("draft", "verify", "accept", "commit"),
            ("draft", "verify", "accept", "commit", "other"),
        )
    ]
    whole_plain = plain.per_call("draft", "verify", "accept", "commit", "other")
    terms = (
        (rows + calls.per_call("draft"), reached[0]),
        (reached[0], reached[1]),
        (reached[1], reached[2]),
        (whole_plain, one),
    )
    return {name: _ratio(*term) for name, term in zip(FACTORS, terms, strict=True)}


def _ratio(above: float, below: float) -> float:
    return above / below if below else math.nan


def explain(method: Mapping[str, Any]) -> str | None:
    """One line: predicted, measured, and the factors between them; None without a model or a
    measurement.
    """
    model, measured = method.get("speed_model"), method["speedup"]["micro"]
    if model is None or measured is None:
        return None
    parts = ", ".join(
        f"{name.replace('_', ' ')} {factor:.2f}×" for name, factor in model["factors"].items()
    )
    return (
        f"{method['name']}: predicted {model['predicted']:.2f}×, measured {measured:.2f}×: {parts}"
    )


def explanations(methods: Iterable[Mapping[str, Any]]) -> list[str]:
    """How far predictions are off in all, then `explain` of every method that drafts; nothing
    without a prediction.
    """
    known = list(methods)
    lines = [
        line
        for method in known
        if not is_baseline(method) and (line := explain(method)) is not None
    ]
    return [prediction_line(known), *lines] if lines else []


def is_baseline(method: Mapping[str, Any]) -> bool:
    """Whether this is an autoregressive row (they run twice, and carry the noise)."""
    return "noise" in method["quality"]


def prediction_errors(methods: Iterable[Mapping[str, Any]]) -> list[float]:
    """|predicted - measured| / measured of each method that drafts and has both."""
    pairs = [
        (method["speed_model"]["predicted"], method["speedup"]["micro"])
        for method in methods
        if not is_baseline(method) and method["speed_model"] is not None
    ]
    return [abs(predicted - measured) / measured for predicted, measured in pairs if measured]


def prediction_line(methods: Sequence[Mapping[str, Any]]) -> str:
    """The median error over methods, and beside it how far plain decoding's second run was from its
    first.
    """
    errors = prediction_errors(methods)
    noises = [method["quality"]["noise"]["micro"] for method in methods if is_baseline(method)]
    repeats = [abs(noise - 1) for noise in noises if noise is not None]
    beside = f"{median(repeats):.1%}" if repeats else "not measured"
    middle = f"{median(errors):.1%}" if errors else "not measured"
    return (
        f"median over {len(errors)} methods of |predicted - measured| / measured: {middle}; "
        f"repeat noise of plain decoding: {beside}"
    )


def latency_per_sequence(target: Target, widest: int, context: int, batch: int = 1) -> LatencyTable:
    """t(rows) up to `widest` rows behind `context` tokens: seconds of a call over `batch`
    sequences, over `batch`. Of a target with compiled calls, at the widths that have a graph:
    others would be compiled for this alone."""
    known = (
        WIDTHS if target.compiled is None else tuple(width for width, *_ in target.compiled.graphs)
    )
    widths = sorted({1, widest, *(width for width in known if width < widest)})
    behind = max(1, min(context, target.max_positions - widest))
    table = measure_latency(target, widths, behind, REPEATS, batch)
    return LatencyTable(
        behind, {width: seconds / batch for width, seconds in table.seconds.items()}
    )
