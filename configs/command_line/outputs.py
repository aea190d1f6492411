"""Output folders: only one run writes at a time, and files of a report are replaced atomically.

A run holds a `flock` on `.output.lock` in its output. The system releases it when the process ends,
in any way; the file stays and has no meaning by itself. A refused run removes what it created: the
lock file and empty folders.
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
"""Locks of this process, by folder."""


def _close_in_child() -> None:
    """Close the locks in a forked child (a data loader's worker), which may outlive its parent."""
    while _held:
        _held.popitem()[1].close()


os.register_at_fork(after_in_child=_close_in_child)


@contextmanager
def claimed(output: Path) -> Iterator[None]:
    """Create an output folder and lock it inside of the `with` block.

    Folders around and inside of it count: a training into `X` and an evaluation into `X/eval`
    exclude each other, because a report there is read as one on `X`'s drafter; evaluations into
    `X/a` and `X/b` do not. One process of a run calls this. Partial files of interrupted runs are
    removed.

    Raises:
        ValueError: another run is writing there, or the folder cannot be written.
    """
    # 1. Create the folder and the lock file, and remember what is new.
    fresh = [place for place in (output, *output.parents) if not place.exists()]
    first = not (output / LOCK).exists()
    try:
        output.mkdir(parents=True, exist_ok=True)
        lock = open(output / LOCK, "a+", encoding="utf-8")  # noqa: SIM115
    except OSError as error:
        _remove_empty(fresh)
        raise _unwritable(output, error) from error
    with lock:
        # 2. First take our lock, then look at the others: of two runs that start at once, at least
        # one is refused.
        if not _locks(lock, fcntl.LOCK_EX) or not _is_at(lock, output / LOCK):
            raise ValueError(
                f"output {str(output)!r}: another run is writing there{_owner(output)}: wait, or "
                "give another --output"
            )
        # 3. Hold it; a refusal from here on removes what is new.
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
    """Lock a file that is created inside of the `with` block. The lock file lies beside it and is
    removed at the end.

    Raises:
        ValueError: another run is creating it, or it or its folder cannot be written.
    """
    if output.is_dir():
        raise ValueError(f"output {str(output)!r} is a folder: name a file in it")
    if output.exists() and not os.access(output, os.W_OK):
        raise _unwritable(output, PermissionError(errno.EACCES, os.strerror(errno.EACCES)))
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


@contextmanager
def new_file(output: str | None) -> Iterator[None]:
    """Lock a file of results, if one was asked for, that does not exist before the `with` block.

    Raises:
        ValueError: it exists already, or as `claimed_file`.
    """
    if output is None:
        yield
        return
    with claimed_file(Path(output)):
        if Path(output).exists():
            raise ValueError(f"output {output!r} exists already: delete it or give another")
        yield


def _remove_empty(folders: Sequence[Path]) -> None:
    """Remove folders, inner ones first, up to the first that is not empty."""
    for folder in folders:
        try:
            folder.rmdir()
        except OSError:
            return


def _is_at(lock: IO[str], place: Path) -> bool:
    """Whether the open file is still at that path: a refused run removes its lock file."""
    try:
        return os.path.samestat(os.fstat(lock.fileno()), place.stat())
    except FileNotFoundError:
        return False


def _refuse_neighbours(output: Path, place: Path) -> None:
    """Raise ValueError if another run writes to a folder around or inside of this one."""
    # Every lock file around and inside; a lock that can be taken belongs to nobody.
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
    """Whether the lock could be taken; closing the file releases it."""
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
    """Write the owner into the lock file, which also detects a full disk."""
    try:
        lock.truncate(0)
        lock.write(f"process {os.getpid()} on {socket.gethostname()}\n")
        lock.flush()
        os.fsync(lock.fileno())
    except OSError as error:
        raise _unwritable(output, error) from error


def _owner(output: Path) -> str:
    """The owner of a lock in brackets, as written by `_sign`; empty if unknown."""
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
    """Append lines to a file and wait until they are on disk."""
    with about(file), file.open("a", encoding="utf-8") as stream:
        stream.writelines(line + "\n" for line in lines)
        stream.flush()
        os.fsync(stream.fileno())


def write_whole(files: Mapping[Path, str]) -> None:
    """Write some texts, all or none: each to a partial file first, then all are renamed.

    Raises:
        OSError: a text could not be written; all earlier files are unchanged.
    """
    with ExitStack() as stack:
        for place, text in files.items():
            partial = stack.enter_context(whole_file(place))
            with about(place), partial.open("wb") as file:
                file.write(text.encode())
                file.flush()
                os.fsync(file.fileno())
