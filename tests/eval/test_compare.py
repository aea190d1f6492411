"""Two reports beside each other: ties, noise, broken promises, reports that cannot be read."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from eval import cli
from eval.compare import comparison_lines, comparison_table, noise_margin, overlap_line, verdict
from eval.report import load_report, noise_lines
from tests.eval.test_pages import method, report


def baseline(noise: tuple[float, float] | None = (0.98, 1.02)) -> dict[str, Any]:
    return method("autoregressive", 1.0, quality={"noise": {"micro": 1.01, "ci95": noise}}, target="tiny", batch_size=1)


def drafting(micro: float, **other: Any) -> dict[str, Any]:
    return method("clover", micro, **{"target": "tiny", "batch_size": 1, **other})


def printed(left: dict[str, Any], right: dict[str, Any]) -> str:
    console = Console(width=160, record=True)
    console.print(comparison_table(left, right))
    for line in comparison_lines(left, right):
        console.print(line, markup=False)
    return console.export_text()


@pytest.mark.parametrize(("one", "two", "expected"), [(1.5, 1.55, "tie"), (1.5, 1.8, "faster"), (1.5, 1.2, "slower")])
def test_differences_inside_an_interval_are_ties(one: float, two: float, expected: str) -> None:
    assert verdict(drafting(one)["speedup"], drafting(two)["speedup"]) == expected


def test_differences_within_the_noise_of_both_runs_are_ties() -> None:
    steady, restless = report(baseline(), drafting(1.5)), report(baseline((0.7, 1.1)), drafting(1.8))
    assert noise_margin(restless, restless["methods"][1]) == pytest.approx(0.3567, abs=1e-3)
    assert "tie (noise)" in printed(steady, restless).split("\n")[5]
    assert "faster" in printed(steady, report(baseline(), drafting(1.8)))


def test_noise_of_another_batch_size_does_not_count() -> None:
    found = report({**baseline(), "batch_size": 4}, drafting(1.5))
    assert noise_margin(found, found["methods"][1]) == 0.0


def test_tau_changes_only_outside_its_interval() -> None:
    def at(tau: float, low: float, high: float) -> dict[str, Any]:
        return report(drafting(1.5, mean_accepted_tokens=tau, mean_accepted_tokens_ci95=[low, high]))

    assert "more" in printed(at(2.0, 1.9, 2.1), at(2.5, 2.4, 2.6))
    assert "fewer" in printed(at(2.5, 2.4, 2.6), at(2.0, 1.9, 2.1))
    assert "same" in printed(at(2.0, 1.9, 2.1), at(2.0, 1.9, 2.1))
    assert "?" in printed(at(2.0, 1.9, 2.1), report(drafting(1.5, mean_accepted_tokens=2.4)))


def test_what_the_table_cannot_show() -> None:
    left, right = report(baseline(), drafting(1.5)), report(baseline((1.01, 1.05)), method("eagle"), drafting(1.5))
    right["settings"]["max_new_tokens"] = 16
    text = printed(left, right)
    assert "not the same max_new_tokens: 8, then 16" in text and "only in the second report: eagle" in text
    assert text.count("noise: autoregressive against itself") == 2 and text.count("does not hold 1") == 1
    assert noise_lines(left)[0].endswith("(95% interval 0.98–1.02)")


def test_the_share_of_overlapping_intervals_leaves_methods_without_one_out() -> None:
    unknown = method("short", speedup={"micro": 1.0, "macro": 1.0, "ci95": None})
    left = report(baseline(), drafting(1.5), method("eagle", 1.2), unknown)
    right = report(baseline(), drafting(1.6), method("eagle", 1.8), method("short", 1.0))
    assert overlap_line(left, right).startswith("speedup intervals overlap for 2 of 3 methods")
    assert overlap_line(left, right).endswith("(67%)") and overlap_line(left, right) in comparison_lines(left, right)
    assert overlap_line(report(unknown), report(unknown)).endswith("0 of 0 methods that have them in both reports")


def test_no_common_method() -> None:
    with pytest.raises(ValueError, match="no method in common"):
        comparison_table(report(method("one")), report(method("two")))


def test_a_method_that_lost_its_tokens_fails(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name, entry in (("a", drafting(1.5)), ("b", drafting(1.5, lossless=False))):
        (tmp_path / f"{name}.json").write_text(json.dumps(report(baseline(), entry)))
    for order, status in (("ab", 1), ("ba", 0)):
        with pytest.raises(SystemExit) as caught:
            cli.main(["--compare", *(str(tmp_path / f"{name}.json") for name in order)])
        assert caught.value.code == status
    assert "yes → NO" in capsys.readouterr().out.replace("\n", "")


@pytest.mark.parametrize(("text", "words"), [
    ("{", "is not JSON"), ("[]", "has schema None"), ('{"schema": 2}', "has schema 2, only 1 can be read"),
    ('{"schema": 1}', "has no `environment`"),
    ('{"schema": 1, "environment": {}, "targets": [], "settings": {}, "methods": []}', "has no `methods`"),
    ('{"schema": 1, "environment": {}, "targets": [], "settings": {}, "methods": [{"name": "x"}]}',
     r"has no `methods\[1\].target`")])
def test_reports_that_cannot_be_read(tmp_path: Path, text: str, words: str) -> None:
    (tmp_path / "report.json").write_text(text)
    with pytest.raises(ValueError, match=words):
        load_report(tmp_path)
