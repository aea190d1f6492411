"""Output folders: one run writes there at a time, and a report's files are whole or as they were.

A run holds a `flock` on `.output.lock` in its output. The system drops it when the process ends,
however it ends; the file stays and means nothing by itself. A run that is refused leaves nothing
behind: neither the file, if it made it, nor folders that it made and did not fill.
"""

from __future__ import annotations

import errno
import fcntl
import logging
import os
import re
import socket
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import IO

from configs.command_line.endings import about
from modules.runtime.files import PARTIAL, whole_file

logger = logging.getLogger(__name__)

LOCK = ".output.lock"
_NO_LOCKS = (errno.ENOTSUP, errno.ENOSYS, errno.ENOLCK, errno.EINVAL)
_held: dict[Path, IO[str]] = {}
"""Locks of this process by the folder they are of."""


def _close_in_child() -> None:
    """A forked child (a worker that prepares batches) must not outlive its parent with the lock."""
    while _held:
        _held.popitem()[1].close()


os.register_at_fork(after_in_child=_close_in_child)


@contextmanager
def claimed(output: Path) -> Iterator[None]:
    """Keep other runs out of an output folder while the block lasts; the folder is made.

    Outputs inside of it count: a training into `X` and an evaluation into `X/eval` keep each other
    out, because a report there is taken for one on `X`'s drafter; evaluations into `X/a` and `X/b`
    do not. Of several processes of one run, one calls this. Files that earlier runs were writing
    when they ended are removed.

    Raises:
        ValueError: another run is writing there, or nothing can be written there.
    """
    fresh = [place for place in (output, *output.parents) if not place.exists()]
    first = not (output / LOCK).exists()
    try:
        output.mkdir(parents=True, exist_ok=True)
        lock = open(output / LOCK, "a+", encoding="utf-8")  # noqa: SIM115
    except OSError as error:
        _remove_empty(fresh)
        raise _unwritable(output, error) from error
    with lock:
        # First its own flag, then a look at the others': of two runs that begin at once, at least
        # one is refused.
        if not _locks(lock, fcntl.LOCK_EX) or not _is_at(lock, output / LOCK):
            raise ValueError(
                f"output {str(output)!r}: another run is writing there{_owner(output)}: wait, or "
                "give another --output"
            )
        place = output.resolve()
        _held[place] = lock
        try:
            _refuse_neighbours(output, place)
            _sign(lock, output)
            for partial in output.glob(f"*{PARTIAL}"):
                partial.unlink()
            yield
        except BaseException:
            if first:
                (output / LOCK).unlink(missing_ok=True)
                _remove_empty(fresh)
            raise
        finally:
            _held.pop(place, None)


@contextmanager
def claimed_file(output: Path) -> Iterator[None]:
    """Keep other runs from making the same file while the block lasts. The lock stands beside it
    and is removed in the end.

    Raises:
        ValueError: another run is making it, or nothing can be written there.
    """
    place = output.with_name(f".{output.name}.lock")
    while True:
        try:
            lock = open(place, "a+", encoding="utf-8")  # noqa: SIM115
        except OSError as error:
            raise _unwritable(output, error) from error
        with lock:
            if not _locks(lock, fcntl.LOCK_EX):
                raise ValueError(
                    f"output {str(output)!r}: another run is making it: wait, or give another "
                    "--output"
                )
            # A run that ended in the meantime may have removed the file that was opened.
            if not _is_at(lock, place):
                continue
            try:
                yield
            finally:
                place.unlink(missing_ok=True)
            return


def _remove_empty(folders: Sequence[Path]) -> None:
    """Remove folders, inner ones first, as far as they are empty."""
    for folder in folders:
        try:
            folder.rmdir()
        except OSError:
            return


def _is_at(lock: IO[str], place: Path) -> bool:
    """Whether the open file is still the one of that path: a refused run removes its own."""
    try:
        return os.path.samestat(os.fstat(lock.fileno()), place.stat())
    except FileNotFoundError:
        return False


def _refuse_neighbours(output: Path, place: Path) -> None:
    """ValueError where another run is writing to a folder around this one, or to one inside."""
    around = [(other, "around") for other in place.parents if (other / LOCK).is_file()]
    inside = [(lock.parent, "inside") for lock in place.rglob(f"*/{LOCK}")]
    for other, where in (
        (other, where) for other, where in (*around, *inside) if other not in _held
    ):
        try:
            with open(other / LOCK, encoding="utf-8") as lock:
                free = _locks(lock, fcntl.LOCK_SH)
        except OSError:
            continue
        if not free:
            raise ValueError(
                f"output {str(output)!r}: another run is writing to {str(other)!r} {where} it"
                f"{_owner(other)}: wait for it, or give another --output"
            )


def _locks(lock: IO[str], kind: int) -> bool:
    """Whether the lock could be taken; it is released when the file is closed."""
    try:
        fcntl.flock(lock, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise
        logger.warning(
            "%s: this file system has no flock, so a second run in one output is not noticed",
            lock.name,
        )
    return True


def _sign(lock: IO[str], output: Path) -> None:
    """Write who holds it: a disk that takes no more bytes is found here."""
    try:
        lock.truncate(0)
        lock.write(f"process {os.getpid()} on {socket.gethostname()}\n")
        lock.flush()
        os.fsync(lock.fileno())
    except OSError as error:
        raise _unwritable(output, error) from error


def _owner(output: Path) -> str:
    """What the holder wrote, in brackets; nothing if it has not yet."""
    try:
        holder = (output / LOCK).read_text(encoding="utf-8", errors="replace").strip()
    except OSError:
        return ""
    return f" ({holder})" if re.fullmatch(r"process \d+ on [\w.-]+", holder) else ""


def _unwritable(output: Path, error: OSError) -> ValueError:
    return ValueError(
        f"output {str(output)!r} cannot be written ({error.strerror}): give another --output or "
        "make room there"
    )


def append_lines(file: Path, lines: Iterable[str]) -> None:
    """Append lines to a file and wait until they are on the disk."""
    with about(file), file.open("a", encoding="utf-8") as stream:
        stream.writelines(line + "\n" for line in lines)
        stream.flush()
        os.fsync(stream.fileno())


def write_whole(files: Mapping[Path, str]) -> None:
    """Write some texts, all or none: each beside its place first, then all renamed.

    Raises:
        OSError: the disk took none of them; what was there before still is.
    """
    with ExitStack() as stack:
        for place, text in files.items():
            partial = stack.enter_context(whole_file(place))
            with about(place), partial.open("wb") as file:
                file.write(text.encode())
                file.flush()
                os.fsync(file.fileno())
