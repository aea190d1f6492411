"""Long work outside of a terminal prints a line at intervals."""

import time

import pytest

from configs.command_line.progress import progress_of


def test_outside_of_a_terminal_a_line_is_told_every_so_often_and_at_the_end(monkeypatch, capsys):
    clock = iter([0.0, 10.0, 31.0, 50.0, 62.0, 63.0])
    monkeypatch.setattr(time, "monotonic", lambda: next(clock))
    with progress_of("target states", "documents", 100, 200) as advance:
        for _ in range(5):
            advance(20)
    assert capsys.readouterr().out.splitlines() == [
        "target states: 140 of 200 documents, about 0:00:46 left",
        "target states: 180 of 200 documents, about 0:00:16 left",
        "target states: 200 of 200 documents",
    ]


@pytest.mark.parametrize("terminal", [False, True])
def test_nothing_is_told_where_nothing_is_to_be_seen(terminal, monkeypatch, capsys):
    monkeypatch.setattr("rich.console.Console.is_terminal", terminal)
    with progress_of("target states", "documents", 0, 2, visible=False) as advance:
        advance(2)
    assert capsys.readouterr().out.strip() == ""


def test_a_terminal_has_a_bar(monkeypatch, capsys):
    monkeypatch.setattr("rich.console.Console.is_terminal", True)
    with progress_of("target states", "documents", 1, 3) as advance:
        advance(2)
    assert "3/3" in capsys.readouterr().out
