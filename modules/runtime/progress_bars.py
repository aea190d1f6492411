"""Progress bars of other libraries: unchanged on a terminal, one line each elsewhere."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr
from typing import TextIO

_BAR = re.compile(r"\d+%\|")
_UP = "\x1b[A"


class LastStates:
    """A stream that reduces a bar, which is redrawn many times, to one line: its last state.

    Args:
        stream: where the lines go.
    """

    encoding = "utf-8"

    def __init__(self, stream: TextIO) -> None:
        self._stream, self._line = stream, ""

    def write(self, text: str) -> int:
        """Pass whole lines on, bars only when they are full."""
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
        """Flush the lines that were passed on."""
        self._stream.flush()

    def isatty(self) -> bool:
        """False: a log is not a terminal."""
        return False


@contextmanager
def one_line_each() -> Iterator[None]:
    """Reduce bars drawn in the block to a line each, unless stderr is a terminal."""
    if sys.stderr.isatty():
        yield
        return
    stream = LastStates(sys.stderr)
    with redirect_stderr(stream):  # type: ignore[type-var]
        try:
            yield
        finally:
            stream.end_line()
