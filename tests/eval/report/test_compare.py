"""Two reports beside each other: ties, noise, broken promises, reports that cannot be read."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from checkpoints.reports import load_report
from eval import cli
from eval.report.compare import (
    comparison_lines,
    comparison_table,
    noise_margin,
    overlap_line,
    verdict,
)
from eval.report.markdown import noise_lines
from tests.eval.report.test_pages import method, report


def baseline(noise: tuple[float, float] | None = (0.98, 1.02)) -> dict[str, Any]:
    return method(
        "autoregressive",
        1.0,
        quality={"noise": {"micro": 1.01, "ci95": noise}},
        target="tiny",
        batch_size=1,
    )


def drafting(micro: float, **other: Any) -> dict[str, Any]:
    return method("clover", micro, **{"target": "tiny", "batch_size": 1, **other})


def printed(left: dict[str, Any], right: dict[str, Any]) -> str:
    console = Console(width=160, record=True)
    console.print(comparison_table(left, right))
    for line in comparison_lines(left, right):
        console.print(line, markup=False)
    return console.export_text()


@pytest.mark.parametrize(
    ("one", "two", "expected"), [(1.5, 1.55, "tie"), (1.5, 1.8, "faster"), (1.5, 1.2, "slower")]
)
def test_differences_inside_an_interval_are_ties(one: float, two: float, expected: str) -> None:
    assert verdict(drafting(one)["speedup"], drafting(two)["speedup"]) == expected


def test_differences_within_the_noise_of_both_runs_are_ties() -> None:
    steady, restless = (
        report(baseline(), drafting(1.5)),
        report(baseline((0.7, 1.1)), drafting(1.8)),
    )
    assert noise_margin(restless, restless["methods"][1]) == pytest.approx(0.3567, abs=1e-3)
    assert "tie (noise)" in printed(steady, restless).split("\n")[5]
    assert "faster" in printed(steady, report(baseline(), drafting(1.8)))


def test_noise_of_another_batch_size_does_not_count() -> None:
    found = report({**baseline(), "batch_size": 4}, drafting(1.5))
    assert noise_margin(found, found["methods"][1]) == 0.0


def test_tau_changes_only_outside_its_interval() -> None:
    def at(tau: float, low: float, high: float) -> dict[str, Any]:
        return report(
            drafting(1.5, mean_accepted_tokens=tau, mean_accepted_tokens_ci95=[low, high])
        )

    assert "more" in printed(at(2.0, 1.9, 2.1), at(2.5, 2.4, 2.6))
    assert "fewer" in printed(at(2.5, 2.4, 2.6), at(2.0, 1.9, 2.1))
    assert "same" in printed(at(2.0, 1.9, 2.1), at(2.0, 1.9, 2.1))
    assert "?" in printed(at(2.0, 1.9, 2.1), report(drafting(1.5, mean_accepted_tokens=2.4)))


def test_what_the_table_cannot_show() -> None:
    left, right = (
        report(baseline(), drafting(1.5)),
        report(baseline((1.01, 1.05)), method("eagle"), drafting(1.5)),
    )
    right["settings"]["max_new_tokens"] = 16
    text = printed(left, right)
    assert (
        "not the same max_new_tokens: 8, then 16" in text
        and "only in the second report: eagle" in text
    )
    assert (
        text.count("noise: autoregressive against itself") == 2
        and text.count("which excludes 1") == 1
    )
    assert noise_lines(left)[0].endswith("(95% interval 0.98–1.02)")


def test_the_share_of_overlapping_intervals_leaves_methods_without_one_out() -> None:
    unknown = method("short", speedup={"micro": 1.0, "macro": 1.0, "ci95": None})
    left = report(baseline(), drafting(1.5), method("eagle", 1.2), unknown)
    right = report(baseline(), drafting(1.6), method("eagle", 1.8), method("short", 1.0))
    assert overlap_line(left, right).startswith("speedup intervals overlap for 2 of 3 methods")
    assert overlap_line(left, right).endswith("(67%)") and overlap_line(
        left, right
    ) in comparison_lines(left, right)
    assert overlap_line(report(unknown), report(unknown)).endswith(
        "0 of 0 methods that have them in both reports"
    )


def test_no_common_method() -> None:
    with pytest.raises(ValueError, match="no method in common"):
        comparison_table(report(method("one")), report(method("two")))


def test_a_method_that_lost_its_tokens_fails(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, entry in (("a", drafting(1.5)), ("b", drafting(1.5, lossless=False))):
        (tmp_path / f"{name}.json").write_text(json.dumps(report(baseline(), entry)))
    for order, status in (("ab", 1), ("ba", 0)):
        with pytest.raises(SystemExit) as caught:
            cli.main(["--compare", *(str(tmp_path / f"{name}.json") for name in order)])
        assert caught.value.code == status
    assert "yes → NO" in capsys.readouterr().out.replace("\n", "")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("{", "is not JSON"),
        ("[]", "has schema None"),
        ('{"schema": 2}', "has schema 2, only 1 can be read"),
        ('{"schema": 1}', "has no `environment`"),
        (
            '{"schema": 1, "environment": {}, "targets": [], "settings": {}, "methods": []}',
            "has no `methods`",
        ),
        (
            '{"schema": 1, "environment": {}, "targets": [], "settings": {}, "methods": [{"name": '
            '"x"}]}',
            r"has no `methods\[1\].target`",
        ),
    ],
)
def test_reports_that_cannot_be_read(tmp_path: Path, text: str, words: str) -> None:
    (tmp_path / "report.json").write_text(text)
    with pytest.raises(ValueError, match=words):
        load_report(tmp_path)


def test_every_shipped_report_can_be_read() -> None:
    shipped = sorted((Path(__file__).resolve().parents[3] / "docs").rglob("report.json"))
    assert len(shipped) > 10
    for file in shipped:
        found = load_report(file)
        assert printed(found, found)


FORGED: list[tuple[str, Any, str]] = [
    ("methods", {"a": 1}, "methods is an object, expected a list"),
    ("methods.1", [], r"methods\[2\] is a list, expected an object"),
    ("methods.1.name", None, r"methods\[2\].name is null, expected text"),
    ("methods.1.name", "\ud83d", r"methods\[2\].name holds half a surrogate pair"),
    ("methods.1.name", "autoregressive", "two methods are named 'autoregressive'"),
    ("methods.1.speedup", 1.5, r"methods\[2\].speedup is a number, expected an object"),
    ("methods.1.speedup.micro", "fast", r"methods\[2\].speedup.micro is text, expected a number"),
    ("methods.1.speedup.micro", -1.0, "speedup.micro is -1.0, expected 0 or above"),
    ("methods.1.speedup.micro", float("inf"), "speedup.micro is no number that can be measured"),
    ("methods.1.speedup.micro", 10**400, "speedup.micro is no number that can be measured"),
    ("methods.1.speedup.ci95", [1.0], "speedup.ci95 has 1 entries, expected 2"),
    ("methods.1.speedup.ci95", ["a", "b"], r"speedup.ci95\[1\] is text, expected a number"),
    ("methods.1.speedup.ci95", {}, "speedup.ci95 is an object, expected a list"),
    ("methods.1.speedup", {"micro": 1.5}, "speedup.ci95 is missing"),
    ("methods.1.mean_accepted_tokens", "2.2", "mean_accepted_tokens is text, expected a number"),
    ("methods.1.mean_accepted_tokens_ci95", 3, "tokens_ci95 is a whole number, expected a list"),
    ("methods.1.tokens_per_second", None, "tokens_per_second is null, expected a number"),
    ("methods.1.lossless", "yes", "lossless is text, expected true or false"),
    ("methods.1.claims_lossless", 1, "claims_lossless is a whole number, expected true or false"),
    ("methods.1.prompts", 1.5, "prompts is a number, expected a whole number"),
    ("methods.1.prompts", True, "prompts is true or false, expected a whole number"),
    ("methods.1.batch_size", [1, 4], "batch_size is a list, expected a whole number"),
    ("methods.1.quality", None, "quality is null, expected an object"),
    ("methods.0.quality.noise", [1.0], r"methods\[1\].quality.noise is a list, expected an object"),
    ("methods.0.quality.noise", None, r"methods\[1\].quality.noise is null, expected an object"),
    ("methods.0.quality.noise.ci95", [-1.0, 1.0], r"noise.ci95\[1\] is -1.0, expected 0 or above"),
    ("methods.0.quality.noise.ci95", [1.0, None], r"noise.ci95\[2\] is null, expected a number"),
    ("settings", [], "settings is a list, expected an object"),
    ("environment", "here", "environment is text, expected an object"),
    ("environment.device", 5, "environment.device is a whole number, expected text"),
    ("targets", {}, "targets is an object, expected a list"),
    ("targets.0", "tiny", r"targets\[1\] is text, expected an object"),
    ("targets.0.fingerprint", 7, r"targets\[1\].fingerprint is a whole number, expected text"),
]


@pytest.mark.parametrize(
    ("place", "value", "words"),
    FORGED,
    ids=[f"{place}={str(value)[:12]}" for place, value, _ in FORGED],
)
def test_values_that_no_evaluation_writes_are_one_line_with_file_and_key(
    tmp_path: Path, place: str, value: Any, words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    honest = report(baseline(), drafting(1.5))
    forged: Any = json.loads(json.dumps(honest))
    *path, last = [int(key) if key.isdigit() else key for key in place.split(".")]
    inner = forged
    for key in path:
        inner = inner[key]
    inner[last] = value
    for name, content in (("honest", honest), ("forged", forged)):
        (tmp_path / f"{name}.json").write_text(json.dumps(content))
    with pytest.raises(SystemExit) as caught:
        cli.main(["--compare", str(tmp_path / "honest.json"), str(tmp_path / "forged.json")])
    said = capsys.readouterr().err
    assert caught.value.code == 2 and said.count("\n") == 1
    with pytest.raises(ValueError, match=f"report '.*forged.json': .*{words}"):
        raise ValueError(said)


@pytest.mark.parametrize(
    ("place", "value"),
    [
        ("time_to_first_token", []),
        ("predicted_speedup", "fast"),
        ("speed_model", {"rows_per_call": 1.0}),
        ("less_repetitive_half", True),
        ("accepted_length_histogram", 5),
        ("by_task", None),
        ("quality", {"training_overlap": {}}),
        ("quality", {"draft_seconds_per_node": 1.0}),
    ],
)
def test_a_page_that_a_report_has_not_the_values_for_is_refused(
    tmp_path: Path, place: str, value: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    forged = report(baseline(), drafting(1.5, **{place: value}))
    (tmp_path / "report.json").write_text(json.dumps(forged))
    with pytest.raises(SystemExit) as caught:
        cli.main(["--render", str(tmp_path)])
    said = capsys.readouterr().err
    assert caught.value.code == 2 and said.count("\n") == 1
    assert f"report '{tmp_path}' does not hold what its page shows" in said
    assert [file.name for file in tmp_path.iterdir()] == ["report.json"]


@pytest.mark.parametrize("content", [b"\xff\xfe", b"[" * 100_000, b""])
def test_what_is_no_json_at_all_is_named(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "report.json").write_bytes(content)
    with pytest.raises(ValueError, match="report '.*report.json' is not JSON"):
        load_report(tmp_path)


def test_a_method_that_decoded_nothing_is_neither_faster_nor_slower() -> None:
    nothing = drafting(1.5, speedup={"micro": 0.0, "macro": None, "ci95": [0.0, 0.0]})
    assert verdict(nothing["speedup"], drafting(1.5)["speedup"]) == "unknown"
