"""How commands end from outside: SIGTERM, Ctrl-C, a full disk. One line, and an exit status."""

from __future__ import annotations

import errno
import os
import re
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

_AGAIN = "run the same command again"
_OF_DISKS = (
    errno.ENOSPC,
    errno.EDQUOT,
    errno.EFBIG,
    errno.EROFS,
    errno.EIO,
    errno.EACCES,
    errno.EPERM,
)
_NUMBER_IN_TEXT = re.compile(r"\(os error (\d+)\)")
"""How libraries written in Rust (safetensors) report the system's error."""


class Stopped(BaseException):
    """SIGTERM or Ctrl-C ended a command.

    status: the exit status that shells expect, 128 and the signal's number. again: how to go on.

    Args:
        number: of the signal.
        message: what to say of it; by default its name.
    """

    def __init__(self, number: int, message: str = "") -> None:
        super().__init__(message or f"stopped by {signal_name(number)}")
        self.status, self.again = 128 + number, _AGAIN

    def __str__(self) -> str:
        return f"{super().__str__()}: {self.again}"


def signal_name(number: int) -> str:
    """What people call it."""
    return "Ctrl-C" if number == signal.SIGINT else signal.Signals(number).name


@contextmanager
def stoppable() -> Iterator[None]:
    """SIGTERM and Ctrl-C raise `Stopped` where the program stands; a second one ends it at once."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(number: int, _: Any) -> None:
        for each in before:
            signal.signal(each, signal.SIG_DFL)
        raise Stopped(number)

    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    # What is ignored stays so (nohup, background jobs of a script); a handler that Python did not
    # set is None.
    before = {
        number: handler or signal.SIG_DFL
        for number, handler in handlers.items()
        if handler != signal.SIG_IGN
    }
    for number in before:
        signal.signal(number, stop)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def resumable(again: Callable[[], str]) -> Iterator[None]:
    """Whatever ends the block from outside, a signal or the disk, says how to go on.

    Raises:
        ValueError: in place of an error of the disk (full, read-only).
    """
    try:
        yield
    except Stopped as stopped:
        stopped.again = again()
        raise
    except Exception as error:
        trouble = disk_trouble(error)
        if trouble is None:
            raise
        raise ValueError(disk_message(trouble, again())) from error


def disk_message(trouble: str, again: str = _AGAIN) -> str:
    """One line on what `disk_trouble` found."""
    return (
        f"{trouble}: what was written whole is kept; make room or give another place, then {again}"
    )


@contextmanager
def about(file: Path) -> Iterator[None]:
    """Errors of the disk in the block name the file, which those of writing and flushing do not."""
    try:
        yield
    except OSError as error:
        if error.errno is not None and error.filename is None:
            error.filename = str(file)
        raise


def disk_trouble(error: BaseException) -> str | None:
    """What a disk refused (full, read-only, too large a file, no permission), if that is what an
    error is, or was raised from; None for every other error."""
    cause: BaseException | None = error
    while cause is not None:
        text = _NUMBER_IN_TEXT.search(str(cause))
        number = cause.errno if isinstance(cause, OSError) else int(text[1]) if text else None
        if number in _OF_DISKS:
            file = getattr(cause, "filename", None)
            return os.strerror(number) + (f" ({file})" if file else "")
        cause = cause.__cause__
    return None
