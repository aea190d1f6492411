"""Whether arguments from a file have the types that a constructor's annotations give."""

from __future__ import annotations

import inspect
import types
import typing
from collections.abc import Callable, Mapping
from typing import Any

_SCALARS = {
    int: "a whole number",
    float: "a number",
    str: "text",
    bool: "true or false",
    type(None): "null",
}
"""Types of arguments that are compared with their values, in the words of messages."""


def check_scalars(made: Callable[..., Any], arguments: Mapping[str, Any], where: str) -> None:
    """Refuse numbers and texts of another type than the constructor's annotations give. Arguments
    that may be anything else are left to the constructor.

    Raises:
        ValueError: such a value; the message names the argument.
    """
    try:
        hints = typing.get_type_hints(made.__init__ if inspect.isclass(made) else made)
    except (NameError, TypeError):
        return
    for name, value in arguments.items():
        wanted = _alternatives(hints.get(name, Any))
        if all(each in _SCALARS for each in wanted) and not any(
            _is_a(value, each) for each in wanted
        ):
            words = " or ".join(_SCALARS[each] for each in wanted)
            raise ValueError(f"{where}: {name} must be {words}, got {value!r}")


def _alternatives(hint: Any) -> list[Any]:
    """The members of a union, and the types of a literal's values."""
    origin = typing.get_origin(hint)
    if origin is typing.Literal:
        return list(dict.fromkeys(type(value) for value in typing.get_args(hint)))
    if origin in (typing.Union, types.UnionType):
        return [each for part in typing.get_args(hint) for each in _alternatives(part)]
    return [hint]


def _is_a(value: Any, kind: type) -> bool:
    if isinstance(value, bool) and kind is not bool:
        return False
    return isinstance(value, (int, float) if kind is float else kind)
