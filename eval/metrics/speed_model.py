"""A speed model: the speedup predicted from τ, the target's latency t(rows) and the drafting time,
and factors that explain the difference to the measured one.

A call over a tree of n rows costs t(n) plus its drafting and emits τ tokens; plain decoding emits
one per t(1). So

    predicted = τ t(1) / (mean over calls of t(rows) + drafting per call)

(Leviathan et al. 2023, arXiv 2211.17192, theorem 3.8, with measured costs in place of a constant
ratio; trees as in Chen et al. 2024, arXiv 2402.12374, section 4.2). t is measured separately from
the run. The measured speedup is exactly the prediction times `FACTORS`, each of which accounts for
time that the model leaves out.
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
    "unclaimed": "time outside of all phases",
    "plain_decoding": "plain calls against t(1)",
}
"""Factors between the predicted and the measured speedup, in order."""
REPEATS = 7


@dataclass(frozen=True)
class Calls:
    """The target calls of one row over all prompts.

    emitted: tokens of each call. rows: computed by each call, see `Trace` (empty for an engine that
    does not report them). seconds: by phase, over all calls.
    """

    emitted: Sequence[int]
    rows: Sequence[int]
    seconds: Mapping[str, float]

    def per_call(self, *phases: str) -> float:
        """Mean seconds per call, summed over the phases."""
        return sum(self.seconds.get(phase, 0.0) for phase in phases) / len(self.emitted)


def speed_model(calls: Calls, plain: Calls, table: LatencyTable) -> dict[str, Any] | None:
    """Prediction and factors of one row; None without recorded calls.

    Args:
        calls: of the row.
        plain: of its autoregressive baseline.
        table: t(rows) per sequence, up to the widest call.
    """
    if not calls.emitted or len(calls.rows) != len(calls.emitted) or not plain.emitted:
        return None
    # The mean call of this row, from the table and the measured drafting.
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


def _factors(calls: Calls, plain: Calls, rows: float, plain_seconds: float) -> dict[str, float]:
    """One ratio per entry of `FACTORS`; below 1 is time lost against the model."""
    # Seconds per call, phase by phase.
    reached = [
        calls.per_call(*phases)
        for phases in (
            ("draft", "verify"),
            ("draft", "verify", "accept", "commit"),
            ("draft", "verify", "accept", "commit", "other"),
        )
    ]
    # Each factor is the expected over the actual time; their product is exact.
    whole_plain = plain.per_call("draft", "verify", "accept", "commit", "other")
    terms = (
        (rows + calls.per_call("draft"), reached[0]),
        (reached[0], reached[1]),
        (reached[1], reached[2]),
        (whole_plain, plain_seconds),
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
    """The median prediction error, then `explain` of every drafting method; empty without a
    prediction.
    """
    entries = list(methods)
    lines = [
        line
        for method in entries
        if not is_baseline(method) and (line := explain(method)) is not None
    ]
    return [prediction_line(entries), *lines] if lines else []


def is_baseline(method: Mapping[str, Any]) -> bool:
    """Whether this is an autoregressive row, which runs twice and has a `noise` entry."""
    return "noise" in method["quality"]


def prediction_errors(methods: Iterable[Mapping[str, Any]]) -> list[float]:
    """|predicted - measured| / measured of each drafting method that has both."""
    pairs = [
        (method["speed_model"]["predicted"], method["speedup"]["micro"])
        for method in methods
        if not is_baseline(method) and method["speed_model"] is not None
    ]
    return [abs(predicted - measured) / measured for predicted, measured in pairs if measured]


def prediction_line(methods: Sequence[Mapping[str, Any]]) -> str:
    """The median prediction error over methods, and the noise of plain decoding's second run."""
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
    """Latency t(rows) up to `widest` rows after `context` tokens: seconds of a call with `batch`
    sequences, divided by `batch`. A target with compiled calls is timed at the widths that already
    have a graph."""
    timed = (
        WIDTHS if target.compiled is None else tuple(width for width, *_ in target.compiled.graphs)
    )
    widths = sorted({1, widest, *(width for width in timed if width < widest)})
    before = max(1, min(context, target.max_positions - widest))
    table = measure_latency(target, widths, before, REPEATS, batch)
    return LatencyTable(
        before, {width: seconds / batch for width, seconds in table.seconds.items()}
    )
