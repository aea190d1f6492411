"""Interrupted commands: SIGTERM, Ctrl-C or a full disk end in one line and an exit status."""

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
"""Seconds after a signal without activity of the main thread, after which the process is killed."""
ONE_SIGNAL = 1.0
"""Seconds within which signals count as one: torchrun forwards signals that its processes already
got from the terminal."""
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
"""The system's error number in messages of libraries written in Rust (safetensors)."""


class Stopped(BaseException):
    """SIGTERM or Ctrl-C ended a command.

    status: the exit status that shells expect, 128 plus the signal's number. again: how to resume.

    Args:
        number: of the signal.
        message: text to print; by default the signal's name.
    """

    def __init__(self, number: int, message: str = "") -> None:
        super().__init__(message or f"stopped by {signal_name(number)}")
        self.status, self.again = 128 + number, _AGAIN

    def __str__(self) -> str:
        return f"{super().__str__()}: {self.again}"


def signal_name(number: int) -> str:
    """The common name of a signal."""
    return "Ctrl-C" if number == signal.SIGINT else signal.Signals(number).name


@contextmanager
def stoppable() -> Iterator[None]:
    """Let SIGTERM and Ctrl-C raise `Stopped` in the main thread; a second one kills the process.

    Python raises nothing inside a call that waits for other processes, which may be gone: a thread
    kills the process `GRACE` seconds after a signal if no Python code was run since.
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
    # Install our handlers, and restore the earlier ones in any case.
    try:
        with _watched():
            yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class _Watch:
    """A thread that receives signals while the main thread waits in an uninterruptible call.

    Python's handler in C writes a signal's number to a pipe at once. From then on the thread checks
    every second whether the main thread still runs a handler (of SIGURG).
    """

    def __init__(self) -> None:
        self.reader, self.writer = os.pipe()
        os.set_blocking(self.writer, False)
        self.alive = 0.0

    def live(self, *_: Any) -> None:
        """Record activity; the main thread runs this between two instructions of Python."""
        self.alive = time.monotonic()

    def run(self) -> None:
        """Loop until the pipe is closed, or the process is killed."""
        first, since = 0, 0.0
        # 1. Wait for a signal, or for the next check after the first one.
        while True:
            ready, _, _ = select.select([self.reader], [], [], _PULSE if first else None)
            numbers = os.read(self.reader, 64) if ready else b""
            if ready and not numbers:
                os.close(self.reader)
                return
            # 2. A second signal kills at once.
            for number in set(numbers) & {signal.SIGTERM, signal.SIGINT}:
                if not first:
                    first, since = number, time.monotonic()
                    self.alive = since
                elif time.monotonic() - since > ONE_SIGNAL:
                    _end(number, "a second signal")
            # 3. Without activity for `GRACE` seconds the process is killed.
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
    """Detach a forked process (a data loader's worker) from its parent's pipe."""
    if threading.current_thread() is threading.main_thread():
        signal.set_wakeup_fd(-1)


os.register_at_fork(after_in_child=_deaf)


@contextmanager
def resumable(again: Callable[[], str]) -> Iterator[None]:
    """Add how to resume to the message of a signal or a disk error inside of the block.

    Raises:
        ValueError: in place of a disk error (full, read-only).
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
    """One line for a result of `disk_trouble`."""
    return (
        f"{trouble}: what was written whole is kept; make room or give another place, then {again}"
    )


@contextmanager
def about(file: Path) -> Iterator[None]:
    """Add the file's name to disk errors in the block; errors of writing and flushing lack it."""
    try:
        yield
    except OSError as error:
        if error.errno is not None and error.filename is None:
            error.filename = str(file)
        raise


def disk_trouble(error: BaseException) -> str | None:
    """The description of a disk error (full, read-only, file too large, no permission) in an error
    or its causes; None for every other error."""
    # Follow the chain of causes.
    cause: BaseException | None = error
    while cause is not None:
        text = _NUMBER_IN_TEXT.search(str(cause))
        number = cause.errno if isinstance(cause, OSError) else int(text[1]) if text else None
        if number in _OF_DISKS:
            file = getattr(cause, "filename", None)
            return os.strerror(number) + (f" ({file})" if file else "")
        cause = cause.__cause__
    return None
