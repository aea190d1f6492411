"""Atomic replacement of files and folders, file modes from the umask, and reading JSON."""

from __future__ import annotations

import ctypes
import errno
import fcntl
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

PARTIAL = ".partial"
"""Ending of files that are being written."""
_ENDING = ".scratch"
_FRESH, _OLD = "new", "old"
_EXCHANGE, _HERE = 2, -100
"""`RENAME_EXCHANGE` and `AT_FDCWD` of Linux' `renameat2`."""
_NO_EXCHANGE = (errno.ENOSYS, errno.EINVAL, errno.ENOTSUP)


@contextmanager
def whole_file(place: Path) -> Iterator[Path]:
    """A path beside `place`, whose file takes its place when the block has ended well.

    Otherwise `place` stays as it was, and the other file is removed.
    """
    partial = place.with_name(f".{place.name}.{os.getpid()}{PARTIAL}")
    try:
        yield partial
        os.replace(partial, place)
    finally:
        partial.unlink(missing_ok=True)


@contextmanager
def whole_folder(folder: Path) -> Iterator[Path]:
    """A fresh folder that takes the place of `folder` when the block has ended well.

    Otherwise `folder` stays as it was. Where the file system can, both are exchanged atomically,
    and readers always find one of them.
    """
    with scratch_beside(folder) as scratch:
        fresh = scratch / _FRESH
        fresh.mkdir()
        yield fresh
        _replace(folder, fresh, scratch / _OLD)


@contextmanager
def scratch_beside(folder: Path) -> Iterator[Path]:
    """A hidden folder beside `folder`, removed at the end. Such folders of killed processes are
    removed first."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    clear_scratch(folder)
    scratch, lock = _locked_scratch(folder)
    try:
        yield scratch
    finally:
        _discard(folder, scratch)
        os.close(lock)


def clear_scratch(folder: Path) -> None:
    """Remove what killed processes left beside a folder; a folder that was being replaced is
    restored."""
    for scratch in folder.parent.glob(f".{folder.name}-*{_ENDING}"):
        try:
            lock = os.open(scratch, os.O_RDONLY)
        except OSError:
            continue
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            _discard(folder, scratch)
        except OSError:
            # Its process lives, or the file system has no locks: it may still be in use.
            continue
        finally:
            os.close(lock)


def _locked_scratch(folder: Path) -> tuple[Path, int]:
    while True:
        # The lock marks the folder as in use.
        scratch = Path(tempfile.mkdtemp(_ENDING, f".{folder.name}-", folder.parent))
        try:
            lock = os.open(scratch, os.O_RDONLY)
        except FileNotFoundError:
            continue
        try:
            fcntl.flock(lock, fcntl.LOCK_EX)
        except OSError:
            return scratch, lock
        # Another process may have removed it before it was locked.
        if scratch.exists():
            return scratch, lock
        os.close(lock)


def _discard(folder: Path, scratch: Path) -> None:
    old = scratch / _OLD
    if old.exists() and not folder.exists():
        old.rename(folder)
    shutil.rmtree(scratch, ignore_errors=True)


def _replace(folder: Path, fresh: Path, old: Path) -> None:
    # 1. Nothing to replace.
    if not folder.exists():
        fresh.rename(folder)
        return
    # 2. In one step, where the file system can.
    if _exchanged(fresh, folder):
        return
    try:
        folder.rename(old)
        fresh.rename(folder)
    finally:
        if old.exists() and not folder.exists():
            old.rename(folder)


def _exchanged(first: Path, second: Path) -> bool:
    """Whether two paths were exchanged; False where the system has no such call."""
    # 1. An atomic exchange, if the C library has the call.
    exchange = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if exchange is None:
        return False
    if exchange(_HERE, os.fsencode(first), _HERE, os.fsencode(second), _EXCHANGE) == 0:
        return True
    # 2. Not every file system implements it.
    number = ctypes.get_errno()
    if number in _NO_EXCHANGE:
        return False
    raise OSError(number, os.strerror(number), str(second))


def as_umask_says(*files: Path) -> None:
    """Give files the mode that `open` would: safetensors makes them unreadable for others."""
    # The umask can only be read by setting it.
    mask = os.umask(0)
    os.umask(mask)
    for file in files:
        file.chmod(0o666 & ~mask)


MOST_JSON = 1 << 26
"""The largest JSON file that is read, in bytes."""


def read_text(file: Path, key: str) -> str:
    """A whole text file, which the setting `key` names.

    Raises:
        ValueError: it cannot be read, or is not UTF-8.
    """
    try:
        return file.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{key}: {file} is not UTF-8 ({error}): save it as UTF-8") from error
    except OSError as error:
        raise ValueError(f"{key}: {file} cannot be read ({error.strerror}): name a file") from error


def read_object(file: Path) -> dict[str, Any]:
    """A JSON object from a file.

    Raises:
        ValueError: not JSON, not an object, nested too deeply, too large, or nothing that can be
            read; the line names the file.
    """
    try:
        if file.stat().st_size > MOST_JSON:
            raise ValueError(f"it has more than {MOST_JSON} bytes")
        value = json.loads(file.read_text(encoding="utf-8"))
    except RecursionError:
        raise ValueError(f"{file} is not JSON that can be read: it is nested too deeply") from None
    except ValueError as error:
        raise ValueError(f"{file} is not JSON: {error}") from error
    except OSError as error:
        raise ValueError(f"{file} cannot be read: {error.strerror}") from error
    if not isinstance(value, dict):
        kind = type(value).__name__
        raise ValueError(f"{file} holds {kind}, not an object with keys: it is no component's")
    return value
