"""The `quality` of lossy methods: scored beside plain decoding, and only when asked for others."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from eval.report.answer_quality import Scoring, _scored, constraint_lines, control_lines
from eval.run.journal import Record
from eval.tasks.answer_checks import Check
from modules.decoding.loop import Trace
from tests.eval.test_cli import FAKE, methods, run, tiny
from tests.fakes import tiny_target

__all__ = ["tiny"]


def gsm8k(path: Path) -> list[str]:
    rows = [{"question": f"What is {i} + {i}?", "answer": f"#### {2 * i}"} for i in range(3)]
    (path / "gsm8k.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    fakes = [{"decoder": {"class_path": FAKE + name}} for name in ("AlwaysRight", "HonestlyLossy")]
    (path / "config.yaml").write_text(
        json.dumps({"methods": fakes, "max_new_tokens": 12, "dtype": "float64"})
    )
    return [
        "--config",
        str(path / "config.yaml"),
        "--prompts",
        f"tasks/gsm8k={path / 'gsm8k.jsonl'}",
    ]


def test_lossy_rows_and_their_baseline_are_scored(tmp_path: Path) -> None:
    assert run(*gsm8k(tmp_path), "--output", "out") == 0
    rows = {name: row["quality"] for name, row in methods().items()}
    assert "target_log_likelihood" not in rows["alwaysright"]
    plain, lossy = rows["autoregressive"], rows["honestlylossy"]
    assert (
        plain["argmax_share"] == plain["common_prefix"] == 1.0 and plain["exact_match"]["tie"] == 3
    )
    assert lossy["argmax_share"] < 1.0 and lossy["common_prefix"] == pytest.approx(0.5, abs=0.1)
    assert lossy["target_log_likelihood"] < plain["target_log_likelihood"] < 0
    assert lossy["exact_match"]["prompts"] == 3 and "verdict" in lossy["exact_match"]
    paired = lossy["likelihood_against_plain"]
    assert (
        paired["loss"] == 3
        and paired["verdict"] == "loss"
        and paired["difference"] < paired["ci95"][1] < 0
    )
    assert (
        plain["likelihood_against_plain"]["difference"] == 0
        and plain["likelihood_against_plain"]["tie"] == 3
    )
    for name in ("report.md", "report.html"):
        text = (Path("out") / name).read_text()
        assert "exact match (win/tie/loss)" in text and ": loss (0/0/3)" in text


@pytest.mark.parametrize(
    ("fake", "words"), [("HonestlyLossy", "is found worse"), ("AlwaysRight", "is NOT found worse")]
)
def test_a_negative_control_is_found_worse_or_the_report_says_so(
    fake: str, words: str, tmp_path: Path, capsys
) -> None:
    arguments = gsm8k(tmp_path)
    rows = [{"name": "spoilt", "decoder": {"class_path": FAKE + fake}, "control": True}]
    (tmp_path / "config.yaml").write_text(
        json.dumps({"methods": rows, "max_new_tokens": 12, "dtype": "float64"})
    )
    assert run(*arguments, "--output", "out", "--quality", "all") == 0
    assert methods()["spoilt"]["quality"]["control"]
    (line,) = control_lines(list(methods().values()))
    assert line.startswith("control: spoilt " + words)
    assert ("do not rely on the quality figures" in line) == ("NOT" in words)
    assert words in capsys.readouterr().out
    for name in ("report.md", "report.html"):
        assert words in (Path("out") / name).read_text()


@pytest.mark.parametrize(("which", "count"), [("all", 3), ("none", 0)])
def test_all_or_none(tmp_path: Path, which: str, count: int) -> None:
    assert run(*gsm8k(tmp_path), "--output", "out", "--quality", which, "--limit", "1") == 0
    assert sum("argmax_share" in row["quality"] for row in methods().values()) == count


def test_programs_run_only_when_allowed() -> None:
    from eval.tasks.answer_checks import Check

    checks = {"a": Check("pass_at_1", "assert True"), "b": Check("rouge_l", "words")}
    assert list(Scoring(checks=checks).usable) == ["b"]
    assert list(Scoring(checks=checks, run_code=True).usable) == ["a", "b"]


def test_the_best_of_several_answers_is_scored_too() -> None:
    """A decoder's own best answer is wrong in the first prompt, and another one right."""
    target = tiny_target()
    encode = target.tokenizer.encode
    answered = [["it is 3", "it is 4"], ["it is 6", "it is 7"]]
    records = {
        str(number): Record(
            *("row", str(number), "task", 0, False, [1], Trace(1, encode(texts[0]))), 0
        )
        for number, texts in enumerate(answered)
    }
    for number, texts in enumerate(answered):
        records[str(number)].trace.answers = [encode(text) for text in texts]
    checks = {"0": Check("exact_match", "#### 4"), "1": Check("exact_match", "#### 6")}
    scores = _scored(target, records, records, checks)["exact_match"]
    assert scores["mean"] == 0.5 and scores["oracle"] == 1.0
    for record in records.values():
        record.trace.answers = []
    assert "oracle" not in _scored(target, records, records, checks)["exact_match"]


def test_ends_of_constrained_answers_are_stated_apart() -> None:
    ends = {"whole_share": 0.5, "cut_share": 0.3, "dead_share": 0.2}
    masks = {"forced_share": 0.1, "masks_per_token": 2.0, "mask_ms_per_token": 0.25}
    rows = [
        {"name": "free", "quality": {}},
        {"name": "drafts", "quality": {**ends, **masks}},
        {"name": "particles", "quality": ends},
    ]
    lines = constraint_lines(rows)
    for line, name in zip(lines[:2], ("drafts", "particles"), strict=True):
        assert line.startswith(f"{name}: 50% of the answers ended as") and "30% were cut" in line
        assert "20% ended where it allowed nothing" in line
    assert len(lines) == 3 and lines[2].startswith("drafts: 10% of the tokens were forced")
