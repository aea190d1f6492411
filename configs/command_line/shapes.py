"""Shapes of JSON from elsewhere: the first value that does not match is named.

A shape is `str`, `bool`, `int`, `float` (any finite number), `object` (anything), a list of one
shape (`[int]`), a tuple of shapes for a list of that length (`(float, float)`), a dict of shapes by
key (`"key?"` is optional, further keys are allowed), or one of the classes here.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import chain
from typing import Any

Shape = Any
_WORDS = {
    str: "text",
    bool: "true or false",
    int: "a whole number",
    float: "a number",
    type(None): "null",
    list: "a list",
    dict: "an object",
}
_MOST = 2**63


@dataclass(frozen=True)
class Maybe:
    """A shape that also accepts null."""

    shape: Shape


@dataclass(frozen=True)
class Each:
    """An object with keys of any name, whose values have one shape."""

    shape: Shape


@dataclass(frozen=True)
class AtLeast:
    """A number (of `kind`, int or float) that is not below `least`."""

    kind: type
    least: float


def mismatch(value: Any, shape: Shape, where: str = "") -> str | None:
    """The problem with the first value that does not match; None if all match.

    For example `speedup.micro is text, expected a number`.

    Args:
        value: as returned by `json.loads`.
        shape: see above.
        where: name of the value in messages.
    """
    return next(_mismatches(value, shape, where), None)


def _mismatches(value: Any, shape: Shape, where: str) -> Iterator[str]:
    if isinstance(shape, Maybe):
        wrong = iter(()) if value is None else _mismatches(value, shape.shape, where)
    elif isinstance(shape, AtLeast):
        wrong = chain(_plain(value, shape.kind, where), _below(value, shape, where))
    elif isinstance(shape, (dict, Each)):
        wrong = _of_object(value, shape, where)
    elif isinstance(shape, (list, tuple)):
        wrong = _of_list(value, shape, where)
    else:
        wrong = _plain(value, shape, where)
    yield from wrong


def _plain(value: Any, kind: type, where: str) -> Iterator[str]:
    # Whole numbers are numbers, true and false are not.
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    fits = {object: True, float: number, int: number and isinstance(value, int)}.get(
        kind, isinstance(value, kind)
    )
    if not fits:
        yield f"{where} is {_kind(value)}, expected {_WORDS[kind]}"
    elif number and not (abs(value) < _MOST and math.isfinite(value)):
        yield f"{where} is no number that can be measured"
    elif isinstance(value, str) and any("\ud800" <= sign <= "\udfff" for sign in value):
        yield f"{where} holds half a surrogate pair, which is no text"


def _below(value: Any, shape: AtLeast, where: str) -> Iterator[str]:
    if isinstance(value, (int, float)) and value < shape.least:
        yield f"{where} is {value}, expected {shape.least:g} or above"


def _of_object(value: Any, shape: Mapping[str, Shape] | Each, where: str) -> Iterator[str]:
    if not isinstance(value, dict):
        yield f"{where or 'it'} is {_kind(value)}, expected an object"
        return
    inner = dict.fromkeys(value, shape.shape) if isinstance(shape, Each) else shape
    for key, each in inner.items():
        name = key if isinstance(shape, Each) else key.removesuffix("?")
        place = f"{where}.{name}" if where else name
        if name in value:
            yield from _mismatches(value[name], each, place)
        elif not key.endswith("?"):
            yield f"{place} is missing"


def _of_list(value: Any, shape: list[Shape] | tuple[Shape, ...], where: str) -> Iterator[str]:
    if not isinstance(value, list):
        yield f"{where} is {_kind(value)}, expected a list"
    elif isinstance(shape, tuple) and len(value) != len(shape):
        yield f"{where} has {len(value)} entries, expected {len(shape)}"
    elif not _tokens(value, shape):
        shapes = shape if isinstance(shape, tuple) else shape * len(value)
        for number, (each, inner) in enumerate(zip(value, shapes, strict=True), 1):
            yield from _mismatches(each, inner, f"{where}[{number}]")


def _tokens(value: list[Any], shape: Any) -> bool:
    """Whether a list holds the expected whole numbers: a fast path for a journal's long lists."""
    if shape != [int] or not value or not all(type(each) is int for each in value):
        return False
    return min(value) > -_MOST and max(value) < _MOST


def _kind(value: Any) -> str:
    return _WORDS.get(type(value), type(value).__name__)
