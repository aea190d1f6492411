"""The command that times calls, and the one that compares re-selection layers: their mistakes."""

from __future__ import annotations

from typing import Any

import pytest

import eval.latency
import eval.methods.reselection
from configs.command_line.loading import run
from tests.fakes import tiny_target


@pytest.mark.parametrize(
    ("module", "flags", "line"),
    [
        (eval.latency, ["--contxt", "16"], "--context"),
        (eval.latency, ["--repeats", "two"], "repeats: expected int. Got value: two"),
        (eval.latency, ["--repeats", "0"], "repeats must be at least 1, got 0"),
        (eval.latency, ["--context", "0"], "context must be at least 1, got 0"),
        (eval.latency, ["--context", "9999"], "context 9999 and 64 rows exceed the target's"),
        (eval.methods.reselection, ["--toknes", "16"], "--tokens"),
        (eval.methods.reselection, ["--count", "0"], "count must be at least 1, got 0"),
        (eval.methods.reselection, ["--tokens", "-4"], "tokens must be at least 1, got -4"),
        (eval.methods.reselection, ["--first", "99"], "first 99 leaves none of the target's"),
        (
            eval.methods.reselection,
            ["--tokens", "9999", "--first", "0"],
            "exceeds the target's context",
        ),
    ],
)
def test_a_mistake_is_one_line_before_anything_is_timed(
    module: Any,
    flags: list[str],
    line: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    target = tiny_target()
    monkeypatch.setattr(module, "load_target", lambda *_, **__: target)
    assert run(module.command, flags) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err.count("\n") == 1 and line in captured.err


def test_the_table_is_printed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    target = tiny_target()
    monkeypatch.setattr(eval.latency, "load_target", lambda *_, **__: target)
    assert eval.latency.command(["--context", "8", "--repeats", "1"]) == 0
    assert "| rows | ms | limit, ms |" in capsys.readouterr().out
