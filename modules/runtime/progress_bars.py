"""Progress bars of other libraries: as they are on a terminal, one line each elsewhere."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr
from typing import TextIO

_BAR = re.compile(r"\d+%\|")
_UP = "\x1b[A"


class LastStates:
    """A stream in which a bar, which is drawn over itself many times, is a line: its last state.

    Args:
        stream: where the lines go.
    """

    encoding = "utf-8"

    def __init__(self, stream: TextIO) -> None:
        self._stream, self._line = stream, ""

    def write(self, text: str) -> int:
        """Take text; whole lines go on, bars only when they are full."""
        for piece in re.split(r"([\r\n])", text.replace(_UP, "")):
            if piece == "\r":
                self._line = ""
            elif piece == "\n":
                self.end_line()
            else:
                self._line += piece
        return len(text)

    def end_line(self) -> None:
        """Pass the line on, unless it is a bar that is not full."""
        unfinished = _BAR.search(self._line) and "100%|" not in self._line
        if self._line and not unfinished:
            self._stream.write(self._line + "\n")
        self._line = ""

    def flush(self) -> None:
        """Of what has been passed on."""
        self._stream.flush()

    def isatty(self) -> bool:
        """A log is none."""
        return False


@contextmanager
def one_line_each() -> Iterator[None]:
    """Bars that are drawn in the block are a line each, unless a terminal shows them."""
    if sys.stderr.isatty():
        yield
        return
    stream = LastStates(sys.stderr)
    with redirect_stderr(stream):  # type: ignore[type-var]
        try:
            yield
        finally:
            stream.end_line()
