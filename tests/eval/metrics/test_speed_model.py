"""The prediction by hand, factors that multiply to the measured speedup, tables per sequence."""

from __future__ import annotations

import math
from typing import Any

import pytest

from checkpoints.markdown import plain as escaped
from eval.metrics.acceptance import Speed, micro_speedup
from eval.metrics.speed_model import (
    FACTORS,
    Calls,
    expected_seconds,
    explain,
    explanations,
    latency_per_sequence,
    prediction_errors,
    speed_model,
)
from eval.report.html import page
from eval.report.markdown import markdown
from eval.report.summary import calls_of
from eval.run.journal import Record
from modules.cost_model.latency_table import LatencyTable, measure_latency
from modules.decoding.decoder import Trace
from modules.decoding.timing import PHASES
from tests.eval.report.test_pages import method as entry
from tests.eval.report.test_pages import report
from tests.fakes import tiny_target

TABLE = LatencyTable(64, {1: 0.05, 5: 0.09, 9: 0.10})
DRAFTING = Calls(
    [3, 2, 1, 4] * 3,
    [5, 5, 1, 9] * 3,
    {"prefill": 9.0, "draft": 0.12, "verify": 1.2, "accept": 0.1, "commit": 0.05, "other": 0.03},
)
PLAIN = Calls([1] * 30, [1] * 30, {"prefill": 9.0, "verify": 1.4, "accept": 0.05, "other": 0.1})


def test_prediction_by_hand() -> None:
    model = speed_model(DRAFTING, PLAIN, TABLE)
    assert model is not None and model["rows_per_call"] == 5.0
    mean = (0.09 + 0.09 + 0.05 + 0.10) / 4
    assert model["predicted"] == pytest.approx(2.5 * 0.05 / (mean + 0.01))


def test_factors_lead_from_the_prediction_to_the_measured_speedup() -> None:
    model = speed_model(DRAFTING, PLAIN, TABLE)
    assert model is not None and list(model["factors"]) == list(FACTORS)
    measured = micro_speedup([Speed(30, 1.5)], [Speed(30, 1.55)])
    assert model["predicted"] * math.prod(model["factors"].values()) == pytest.approx(measured)
    method = {"name": "x", "speed_model": model, "speedup": {"micro": measured}}
    assert "measured 1.03×: verification" in (explain(method) or "")


def test_plain_decoding_against_itself_predicts_one() -> None:
    model = speed_model(PLAIN, PLAIN, TABLE)
    assert model is not None and model["predicted"] == pytest.approx(1.0)
    assert math.prod(model["factors"].values()) == pytest.approx(1.0)


def test_engines_that_do_not_tell_their_calls_are_not_predicted() -> None:
    assert speed_model(Calls([2] * 13, [], {"other": 1.0}), PLAIN, TABLE) is None
    assert speed_model(Calls([], [], {"other": 1.0}), PLAIN, TABLE) is None
    assert explain({"name": "x", "speed_model": None, "speedup": {"micro": 1.0}}) is None


def test_widths_between_measured_ones_are_interpolated() -> None:
    assert (
        expected_seconds(TABLE, [3]) == pytest.approx(0.07)
        and expected_seconds(TABLE, [1, 9]) < 0.076
    )
    with pytest.raises(ValueError, match="ends at 9 rows"):
        expected_seconds(TABLE, [10])


def test_a_table_per_sequence_reaches_the_widest_call() -> None:
    table = latency_per_sequence(tiny_target(), widest=7, context=10_000, batch=2)
    assert set(table.seconds) == {1, 2, 3, 4, 5, 6, 7} and table.context == 512 - 7
    assert all(seconds > 0 for seconds in table.seconds.values())
    assert set(measure_latency(tiny_target(), (1, 2), 8, 1, batch=3).seconds) == {1, 2}


def predicting(name: str, predicted: float, measured: float) -> dict[str, Any]:
    return entry(
        name, measured, speed_model={"predicted": predicted, "factors": {"verification": 1.0}}
    )


def test_the_median_error_stands_beside_the_repeat_noise() -> None:
    plain = entry(
        "autoregressive",
        1.0,
        quality={"noise": {"micro": 0.97, "ci95": None}},
        speed_model={"predicted": 9.0, "factors": {}},
    )
    methods = [
        plain,
        predicting("a", 1.1, 1.0),
        predicting("b", 1.0, 2.0),
        predicting("c", 1.8, 1.5),
        entry("d"),
    ]
    assert prediction_errors(methods) == pytest.approx([0.1, 0.5, 0.2])
    line, *rest = explanations(methods)
    assert (
        "over 3 methods of |predicted - measured| / measured: 20.0%; repeat" in line
        and line.endswith(": 3.0%")
    )
    assert (
        len(rest) == 3
        and f"- {escaped(line)}" in markdown(report(*methods))
        and line in page(report(*methods), None)
    )


def test_nothing_is_said_without_a_prediction_and_unmeasured_noise_is_called_so() -> None:
    assert explanations([entry("d")]) == []
    assert explanations([predicting("a", 1.1, 1.0)])[0].endswith("plain decoding: not measured")


def test_the_model_reads_the_rows_that_calls_compute() -> None:
    """Lookahead's window is computed and never accepted."""
    seconds = dict.fromkeys(PHASES, 0.1)
    trace = Trace(3, [5] * 5, [False] * 5, [2, 2], [1, 1], [3, 3], seconds, 0.1, [16, 16])
    answers = {"x": Record("x", "x", "t", 0, False, [1, 2, 3], trace, 0)}
    assert calls_of(answers).rows == [16, 16]
