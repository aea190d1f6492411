"""Bars of other libraries in a log: their last state, once."""

import io
import sys

import pytest
from tqdm import tqdm

from modules.runtime.progress_bars import LastStates, one_line_each


def test_a_bar_is_one_line_and_other_lines_stay(monkeypatch):
    log = io.StringIO()
    monkeypatch.setattr(sys, "stderr", log)
    with one_line_each():
        print("before", file=sys.stderr)
        for _ in tqdm(range(50), desc="converting", mininterval=0):
            pass
        print("a warning", file=sys.stderr)
    lines = log.getvalue().splitlines()
    assert len(lines) == 3 and lines[0] == "before" and lines[2] == "a warning"
    assert lines[1].startswith("converting: 100%|") and "50/50" in lines[1]
    assert sys.stderr is log


def test_several_bars_at_once_do_not_become_a_wall():
    log = io.StringIO()
    bars = [
        tqdm(total=20, desc=name, position=place, file=LastStates(log), mininterval=0)
        for place, name in enumerate(("first", "second"))
    ]
    for _ in range(20):
        for bar in bars:
            bar.update()
    for bar in bars:
        bar.close()
    assert "first: 100%|" in log.getvalue() and log.getvalue().count("\n") <= 4


def test_a_terminal_shows_them_as_they_are(monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    monkeypatch.setattr(sys, "stderr", Terminal())
    with one_line_each():
        assert isinstance(sys.stderr, Terminal)


def test_what_was_begun_is_shown_when_loading_fails(monkeypatch):
    log = io.StringIO()
    monkeypatch.setattr(sys, "stderr", log)
    with pytest.raises(KeyError), one_line_each():
        sys.stderr.write("no newline behind this")
        raise KeyError
    assert log.getvalue() == "no newline behind this\n"
