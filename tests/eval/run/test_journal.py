"""Damaged journals: what a line was about is measured again, and the line named."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from eval import evaluation
from eval.methods.rows import Method, build_rows
from eval.run.harness import Harness
from eval.run.journal import Journal, Record
from eval.tasks.tasks import load_tasks
from modules.contracts.sampling import Sampling
from modules.decoding.decoder import Trace
from tests.eval.run.test_identity import JOURNAL, evaluated, refused
from tests.eval.test_cli import report, run, tiny
from tests.fakes import tiny_target

__all__ = ["tiny"]


def test_a_journal_of_an_earlier_version_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = evaluated(tmp_path, "--limit", "1")
    header, *units = JOURNAL.read_text().splitlines(keepends=True)
    older = {
        key: value for key, value in json.loads(header).items() if key not in ("format", "prompt")
    }
    JOURNAL.write_text(json.dumps(older) + "\n" + "".join(units))
    said = refused(capsys, "--config", path, "--output", "out", "--resume", "--limit", "1")
    assert "out/journal.jsonl is of another version (format null, now 2)" in said


def unit_with(**changes: Any) -> bytes:
    """The third line of the journal, with something else in it."""
    unit = json.loads(JOURNAL.read_bytes().splitlines()[2])
    record = unit["records"][0]
    for key, value in changes.items():
        (record["trace"] if key in record["trace"] else record if key in record else unit)[key] = (
            value
        )
    return json.dumps(unit).encode()


DAMAGES = {
    "no records": lambda: unit_with(records=[]),
    "fewer records": lambda: unit_with(
        records=json.loads(JOURNAL.read_bytes().splitlines()[2])["records"][:1]
    ),
    "list": lambda: b"[]",
    "object": lambda: b"{}",
    "text": lambda: b'"unit"',
    "cut": lambda: unit_with()[:50],
    "nothing": lambda: b"",
    "NUL": lambda: b"\0" * 4096,
    "no UTF-8": lambda: b"\xff\xfe" + unit_with(),
    "depth": lambda: b"[" * 100_000,
    "foreign": lambda: unit_with(of="0123456789abcdef"),
    "ids are text": lambda: unit_with(ids="abc"),
    "seconds are null": lambda: unit_with(seconds=None),
    "no such key": lambda: unit_with(records=[{"row": "autoregressive"}]),
    "another row": lambda: unit_with(row="liar"),
    "another key": lambda: unit_with(unit=5),
}


@pytest.mark.parametrize("kind", DAMAGES)
def test_damaged_lines_are_named_and_measured_again(
    tmp_path: Path, kind: str, caplog: pytest.LogCaptureFixture
) -> None:
    path = evaluated(tmp_path)
    full, lines = report(), JOURNAL.read_bytes().splitlines()
    key = json.loads(lines[2])["unit"]
    lines[2] = DAMAGES[kind]()
    JOURNAL.write_bytes(b"\n".join(lines) + b"\n")
    assert run("--config", path, "--output", "out", "--resume") == 0
    where = (
        f"out/journal.jsonl: {key} lacks answers"
        if kind in ("fewer records", "another row")
        else ("out/journal.jsonl line 3 does not count (")
    )
    assert where in caplog.text and "measured again" in caplog.text
    again = report()
    assert [one["new_tokens"] for one in again["methods"]] == [
        one["new_tokens"] for one in full["methods"]
    ]
    found = [json.loads(line) for line in JOURNAL.read_text().splitlines()]
    assert found[-1]["unit"] == key and len(found[-1]["records"]) == 3


@pytest.mark.parametrize("header", [b"[]", b"nonsense", b"\0\0\0", b"null"])
def test_a_damaged_header_is_refused(
    tmp_path: Path, header: bytes, capsys: pytest.CaptureFixture[str]
) -> None:
    path = evaluated(tmp_path, "--limit", "1")
    _, *units = JOURNAL.read_bytes().splitlines(keepends=True)
    JOURNAL.write_bytes(header + b"\n" + b"".join(units))
    said = refused(capsys, "--config", path, "--output", "out", "--resume", "--limit", "1")
    assert "out/journal.jsonl line 1 is no header of an evaluation: add --overwrite" in said


def test_units_of_another_header_do_not_count(tmp_path: Path) -> None:
    """A line that a second evaluation, begun since, would have written."""
    path = tmp_path / "j.jsonl"
    first = Journal(path, {"budget": 5}, False)
    Journal(tmp_path / "other.jsonl", {"budget": 1}, False)
    path.unlink()
    second = Journal(path, {"budget": 1}, False)
    records = [Record("a", "x", "t", 0, False, [7], Trace(1, [5], [False]), 0)]
    first.add("0:x", records)
    second.add("0:y", records)
    second.add("0:z", [])
    assert Journal(path, {"budget": 1}, True).done == {"0:y": records}


def test_an_interrupted_unit_is_whole_only_with_all_turns_and_second_runs() -> None:
    scripted = {"class_path": "tests.fakes.ScriptedDrafter"}
    rows = build_rows([Method("a", scripted)], tiny_target(), Sampling())
    tasks = load_tasks(["embedded"], 1)
    harness = Harness(rows, 4)
    unit = evaluation.units(tasks[:1], 1, 1)[0]
    records = list(harness.measure(unit))
    assert harness.whole(unit, records) and len(records) == 3
    assert not harness.whole(unit, records[:-1]) and not harness.whole(unit, [*records, records[0]])
