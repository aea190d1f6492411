"""The curve over requests: figures by hand, TensorBoard, and the page."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from train.online.report import PAGE, Curve, acceptance, summary, table, tokens_per_call
from train.online.update import Update


def line(request: int, accepted: float, name: str = "a", topic: str = "x") -> dict[str, Any]:
    """A request of two tested positions, two calls and five tokens."""
    return {
        "request": request,
        "drafter": name,
        "labels": {"topic": topic},
        "updates": request // 2,
        "tested": 2,
        "accepted": accepted,
        "calls": 2,
        "tokens": 5,
    }


LINES = [line(i, 0.1 * i, "ab"[i % 2], "xy"[i // 10]) for i in range(20)]


def test_figures_of_the_first_and_the_last_requests() -> None:
    figures = summary(LINES)
    assert figures["window"] == 2 and figures["requests"] == 20
    assert figures["drafters"]["b"]["requests"] == 10 and figures["drafters"]["b"]["updates"] == 9
    assert figures["drafters"]["b"]["acceptance"] == pytest.approx(
        {"first": (0.1 + 0.3) / 4, "last": (1.7 + 1.9) / 4}
    )
    assert figures["drafters"]["a"]["tokens_per_call"] == {"first": 2.0, "last": 2.0}
    assert acceptance([]) is None and tokens_per_call([]) is None
    assert len(table(figures).splitlines()) == 4


def test_it_is_logged_while_requests_come(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """TensorBoard has every request and update; a page appears with an update, and at the end."""
    curve = Curve(tmp_path, "Acceptance <over> requests")
    curve.resumed(LINES[:4])
    for each in LINES[4:]:
        curve.answered(each)
    curve.updated("a", Update(1, 0.5, 2.0))
    assert not (tmp_path / PAGE).exists()
    monkeypatch.setattr("train.online.report.SECONDS", 0.0)
    curve.updated("a", Update(2, 0.25, 1.0))
    page = (tmp_path / PAGE).read_text()
    assert "&lt;over&gt;" in page and page.count("<svg") == 1
    assert json.loads((tmp_path / "report.json").read_text()) == summary(LINES)
    logs = EventAccumulator(str(tmp_path / "online" / "tensorboard")).Reload()
    assert [event.step for event in logs.Scalars("a/acceptance")] == list(range(4, 20, 2))
    assert [event.value for event in logs.Scalars("a/loss")] == [0.5, 0.25]
    mean = logs.Scalars("b/acceptance_mean")[-1].value
    assert mean == pytest.approx(sum(each["accepted"] for each in LINES[1::2]) / 20)


def test_a_run_without_requests_has_a_page(tmp_path: Path) -> None:
    Curve(tmp_path, "empty").write()
    assert json.loads((tmp_path / "report.json").read_text())["requests"] == 0
