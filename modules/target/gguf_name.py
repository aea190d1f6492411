"""The name of a GGUF target in reports and cards: the name stored in the file, not its path.

The first keys of a file are parsed here, because the `gguf` package takes seconds to read all of
them, vocabulary included (the format: github.com/ggml-org/ggml, docs/gguf.md).
"""

from __future__ import annotations

import functools
import re
import struct
from pathlib import Path
from typing import BinaryIO

_NAMED = re.compile(r"(.*\.gguf)(\+.*)?", re.DOTALL)
"""A file, and perhaps the adapters on it."""
_SIZES = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}
"""Bytes of a value by the number of its type."""
_STRING, _LIST = 8, 9
_LONGEST = 1 << 16


def title(name: str) -> str:
    """A target's display name: `general.name` of a GGUF file, or the file name if it has none or
    does not exist; other names are unchanged."""
    match = _NAMED.fullmatch(name)
    if match is None:
        return name
    return (_general_name(match[1]) or Path(match[1]).stem) + (match[2] or "")


@functools.cache
def _general_name(path: str) -> str | None:
    try:
        with open(path, "rb") as file:
            # Header, then keys; those of `general.` come first.
            magic, _, _, count = struct.unpack("<4sIQQ", file.read(24))
            for _ in range(count if magic == b"GGUF" else 0):
                key = _string(file)
                (kind,) = struct.unpack("<I", file.read(4))
                if key == "general.name" and kind == _STRING:
                    return _string(file).strip() or None
                if not key.startswith("general."):
                    return None
                _skip(file, kind)
    except (OSError, struct.error, ValueError, KeyError):
        return None
    return None


def _string(file: BinaryIO) -> str:
    (length,) = struct.unpack("<Q", file.read(8))
    if length > _LONGEST:
        raise ValueError(f"a name of {length} bytes")
    return file.read(length).decode()


def _skip(file: BinaryIO, kind: int) -> None:
    if kind == _STRING:
        _string(file)
    elif kind == _LIST:
        inner, length = struct.unpack("<IQ", file.read(12))
        for _ in range(min(length, _LONGEST)):
            _skip(file, inner)
    else:
        file.seek(_SIZES[kind], 1)
