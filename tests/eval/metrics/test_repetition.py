"""The half of the prompts on which lookup has the least to copy, and what is measured there."""

from __future__ import annotations

from pathlib import Path

import pytest

from eval.metrics.repetition import less_repetitive, repetition
from tests.eval.test_cli import config, methods, run, tiny

__all__ = ["tiny"]


def test_repetition_is_the_share_of_runs_that_stood_there_before() -> None:
    assert repetition([1, 2, 3]) == repetition([]) == repetition(range(9)) == 0.0
    assert repetition([1, 2, 3, 4, 1, 2, 3, 4]) == pytest.approx(1 / 5)
    assert repetition([7] * 10) == pytest.approx(6 / 7)


def test_the_half_is_rounded_down_and_ties_keep_their_order() -> None:
    loop, plain = [1] * 12, list(range(12))
    assert less_repetitive({"a": loop, "b": plain, "c": loop, "d": plain}) == {"b", "d"}
    assert less_repetitive({"a": plain, "b": plain, "c": loop}) == {"a"}
    assert less_repetitive({"a": plain}) == set()


def test_an_evaluation_measures_every_method_on_the_same_half(tmp_path: Path) -> None:
    assert (
        run(
            "--config",
            config(tmp_path, ["AlwaysRight", "NeverRight"]),
            "--output",
            "out",
            "--limit",
            "2",
        )
        == 0
    )
    halves = {name: row["less_repetitive_half"] for name, row in methods().items()}
    assert {half["prompts"] for half in halves.values()} == {2}
    assert (
        halves["alwaysright"]["mean_accepted_tokens"] == 4.0
        and halves["neverright"]["mean_accepted_tokens"] == 1.0
    )
    assert halves["autoregressive"]["speedup"] == 1.0 and halves["autoregressive"]["ci95"] == [
        1.0,
        1.0,
    ]
    assert "less repetitive half" in (Path("out") / "report.md").read_text()
