"""How commands end from outside: SIGTERM, Ctrl-C, a full disk. One line, and an exit status."""

from __future__ import annotations

import _thread
import errno
import os
import re
import select
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

GRACE = 120.0
"""Seconds without a sign of life behind a signal, after which a process is ended from outside."""
ONE_SIGNAL = 1.0
"""Seconds within which signals count as one: torchrun passes on what its processes got from the
terminal already."""
_PULSE = 1.0
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
"""How libraries written in Rust (safetensors) tell the system's error."""


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
    """SIGTERM and Ctrl-C raise `Stopped` where the program stands; a second one ends it at once.

    Python raises nothing inside a call that waits for other processes, which may be gone: a watch
    ends the process `GRACE` seconds after a signal if no line of Python was run since.
    """
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
        with _watched():
            yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class _Watch:
    """A thread that hears of signals while the main thread waits in a call that none interrupts.

    Python's own handler in C writes a signal's number to a pipe at once. From then on the thread
    asks the main thread for a sign of life (a handler of SIGURG) every second.
    """

    def __init__(self) -> None:
        self.reader, self.writer = os.pipe()
        os.set_blocking(self.writer, False)
        self.alive = 0.0

    def live(self, *_: Any) -> None:
        """Run by the main thread, between two instructions of Python."""
        self.alive = time.monotonic()

    def run(self) -> None:
        """Until the pipe is closed, or the process is ended."""
        first, since = 0, 0.0
        while True:
            ready, _, _ = select.select([self.reader], [], [], _PULSE if first else None)
            numbers = os.read(self.reader, 64) if ready else b""
            if ready and not numbers:
                os.close(self.reader)
                return
            for number in set(numbers) & {signal.SIGTERM, signal.SIGINT}:
                if not first:
                    first, since = number, time.monotonic()
                    self.alive = since
                elif time.monotonic() - since > ONE_SIGNAL:
                    _end(number, "a second signal")
            if first and not ready:
                if time.monotonic() - self.alive > GRACE:
                    _end(first, f"no sign of life for {GRACE:g} s")
                _thread.interrupt_main(signal.SIGURG)


def _end(number: int, why: str) -> None:
    os.write(2, f"\nstopped by {signal_name(number)} in the middle: {why}\n".encode())
    os._exit(128 + number)


@contextmanager
def _watched() -> Iterator[None]:
    watch = _Watch()
    pulse = signal.signal(signal.SIGURG, watch.live)
    earlier = signal.set_wakeup_fd(watch.writer, warn_on_full_buffer=False)
    threading.Thread(target=watch.run, daemon=True).start()
    try:
        yield
    finally:
        signal.set_wakeup_fd(earlier)
        signal.signal(signal.SIGURG, signal.SIG_DFL if pulse is None else pulse)
        os.close(watch.writer)


def _deaf() -> None:
    """A forked process (a data loader's worker) must not write to its parent's pipe."""
    if threading.current_thread() is threading.main_thread():
        signal.set_wakeup_fd(-1)


os.register_at_fork(after_in_child=_deaf)


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
