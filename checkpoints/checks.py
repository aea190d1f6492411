"""Checks of a component's folder before anything is built or allocated from it.

Folders may be untrusted. Values must have the types that the constructor declares and sizes that a
drafter can have. Tensors must have the names, shapes and dtypes of the component, which is built on
the meta device without memory. Weights must be finite, and draft vocabularies within the target's.
"""

from __future__ import annotations

import math
import types
import typing
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import fields
from typing import Any, Literal, Union, get_args, get_origin

import torch
from torch import Tensor, nn
from transformers.activations import ACT2FN

from configs.command_line.shapes import Each, Maybe, mismatch
from modules.contracts.shapes import TargetShape
from modules.contracts.trainable import Trainable

CONFIG_SHAPE = {
    "drafter_type": str,
    "class": str,
    "format_version": int,
    "arguments": Each(object),
    "target": {
        "name": Maybe(str),
        "fingerprint": Maybe(str),
        "dtype?": Maybe(str),
        "shape": Each(object),
        "chat_template?": Maybe(Each(object)),
    },
}
PROVENANCE_SHAPE = {
    "target": {
        "name": str,
        "fingerprint": Maybe(str),
        "dtype?": Maybe(str),
        "chat_template?": Each(object),
    },
    "data?": Each(object),
    "measured?": Each(float),
    "settings?": Each(object),
    "command?": str,
    "git_revision?": Maybe(str),
    "packages?": Each(str),
    "created?": str,
}
_LARGEST = {
    "hidden_size": 1 << 17,
    "vocab_size": 1 << 23,
    "num_layers": 1 << 10,
    "num_heads": 1 << 12,
    "num_kv_heads": 1 << 12,
    "head_dim": 1 << 14,
    "intermediate_size": 1 << 20,
    "max_positions": 1 << 27,
}
MOST_VALUES, MOST_LEVELS, MOST_TEXT = 1 << 16, 8, 1 << 16
"""Limits on a component's arguments: numbers and texts in all, nesting, characters of a text."""
_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


@contextmanager
def strange_values(where: str, refusals: bool = True) -> Iterator[None]:
    """Turn every error that untrusted values cause in the block into a ValueError of one line that
    begins with `where`.

    Args:
        where: the file, and what is wrong with it.
        refusals: whether a ValueError of the block is passed on unchanged.
    """
    try:
        yield
    except Exception as error:
        if refusals and isinstance(error, ValueError):
            raise
        reason = f"{type(error).__name__} {' '.join(str(error).split())[:200]}"
        raise ValueError(f"{where}: {reason}") from error


def target_shape(values: Mapping[str, Any], where: str) -> TargetShape:
    """The target's dimensions in a config.

    Raises:
        ValueError: one is missing, unknown, of another type, or out of range.
    """
    check_dimensions(values, where)
    try:
        return TargetShape(**values)
    except TypeError as error:
        raise ValueError(f"{where}: target.shape: {error}") from error


def check_dimensions(values: Mapping[str, Any], where: str) -> None:
    """Check dimensions of a target, of which some may be missing.

    Raises:
        ValueError: one is unknown, of another type, or out of range.
    """
    # 1. Names, types and sizes.
    names = {field.name for field in fields(TargetShape)}
    strange = sorted(set(values) - names)
    if strange:
        raise ValueError(f"{where}: target.shape.{strange[0]} is unknown")
    hints = typing.get_type_hints(TargetShape)
    for name, value in values.items():
        if not _fits(value, hints[name]):
            raise ValueError(
                f"{where}: target.shape.{name} is {_short(value)}: "
                f"{_type_name(hints[name])} is expected"
            )
        if name in _LARGEST and not 1 <= value <= _LARGEST[name]:
            raise ValueError(
                f"{where}: target.shape.{name} is {value}, expected 1 to {_LARGEST[name]}"
            )
    # 2. Values that a size limit cannot check.
    if not values.get("norm_eps", 1e-5) > 0:
        raise ValueError(
            f"{where}: target.shape.norm_eps is {values['norm_eps']}, expected above 0"
        )
    _check_plain(values, f"{where}: target.shape")
    if values.get("activation", "silu") not in ACT2FN:
        raise ValueError(
            f"{where}: target.shape.activation {_short(values['activation'])} is unknown"
        )


def check_arguments(kind: type[Trainable], arguments: Mapping[str, Any], where: str) -> None:
    """Check arguments against the constructor's types and limits, and refuse paths to read from.

    Raises:
        ValueError: the argument, its value, and the type that is expected.
    """
    hints = typing.get_type_hints(kind.__init__)
    for name, value in arguments.items():
        if name in hints and not _fits(value, hints[name]):
            raise ValueError(
                f"{where}: arguments.{name} is {_short(value)}: "
                f"{_type_name(hints[name])} is expected"
            )
    # A saved component must not decide what is read or downloaded.
    for name in kind.names_places:
        if isinstance(arguments.get(name), str):
            raise ValueError(
                f"{where}: arguments.{name} names {_short(arguments[name])}: a saved component "
                "cannot say what is read or downloaded here"
            )
    _check_plain(arguments, f"{where}: arguments")


def check_tensors(outline: nn.Module, tensors: Mapping[str, Tensor], source: str) -> None:
    """Check that tensors are those of a component, which may be on the meta device.

    Raises:
        ValueError: missing or unexpected tensors, or other shapes or dtypes.
    """
    # All differences are reported at once; floating-point dtypes may differ.
    expected = outline.state_dict(keep_vars=True)
    both = [name for name in tensors if name in expected]
    wrong = {
        "missing": set(expected) - set(tensors),
        "unexpected": set(tensors) - set(expected),
        "reshaped": {
            f"{name} {tuple(tensors[name].shape)} instead of {tuple(expected[name].shape)}"
            for name in both
            if tensors[name].shape != expected[name].shape
        },
        "of another kind": {
            f"{name} {_kind(tensors[name])} instead of {_kind(expected[name])}"
            for name in both
            if not _same_kind(tensors[name], expected[name])
        },
    }
    if any(wrong.values()):
        raise ValueError(
            f"{source} does not fit {type(outline).__name__}: "
            + "; ".join(f"{kind}: {some(names)}" for kind, names in wrong.items() if names)
        )


def check_values(trainable: nn.Module, source: str) -> None:
    """Check the values of weights and buffers.

    Raises:
        ValueError: NaN or infinity, or a draft vocabulary outside of the target's.
    """
    for name, tensor in (*trainable.named_parameters(), *trainable.named_buffers()):
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            raise ValueError(f"{source}: {name} holds NaN or infinity: it cannot draft")
    # Ids of a draft vocabulary index the target's LM head.
    ids, shape = getattr(trainable, "vocabulary", None), getattr(trainable, "shape", None)
    if isinstance(ids, Tensor) and isinstance(shape, TargetShape) and len(ids):
        ascending = bool((ids[1:] > ids[:-1]).all())
        if not ascending or int(ids[0]) < 0 or int(ids[-1]) >= shape.vocab_size:
            raise ValueError(
                f"{source}: vocabulary does not hold ascending ids from 0 to {shape.vocab_size - 1}"
            )


def check_shape(value: Any, shape: Any, where: str) -> None:
    """Raise ValueError for the first value that does not match a shape of
    `configs.command_line.shapes`.
    """
    wrong = mismatch(value, shape)
    if wrong is not None:
        raise ValueError(f"{where}: {wrong}")


def some(names: set[str], shown: int = 4) -> str:
    """The first few of many names."""
    more = f" and {len(names) - shown} more" if len(names) > shown else ""
    return ", ".join(sorted(names)[:shown]) + more


def _kind(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def _same_kind(tensor: Tensor, other: Tensor) -> bool:
    return tensor.dtype == other.dtype or (tensor.dtype in _FLOATS and other.dtype in _FLOATS)


def _fits(value: Any, hint: Any) -> bool:
    """Whether a JSON value has a declared type; classes that JSON cannot hold accept anything."""
    # 1. Composed types, by their parts.
    origin, parts = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        return any(_fits(value, part) for part in parts)
    if origin is Literal:
        return any(value == part and type(value) is type(part) for part in parts)
    if origin in (list, tuple) or hint in (list, tuple):
        inner = parts[0] if parts else Any
        return isinstance(value, (list, tuple)) and all(_fits(each, inner) for each in value)
    if origin is dict or hint is dict:
        return isinstance(value, Mapping) and all(isinstance(key, str) for key in value)
    # 2. Plain types; a bool is not a number.
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    plain = {
        bool: isinstance(value, bool),
        int: number and isinstance(value, int),
        float: number,
        str: isinstance(value, str),
        type(None): value is None,
    }
    return plain.get(hint, True)


def _check_plain(value: Any, where: str) -> None:
    """Raise ValueError for too many, too deep, too long or non-finite values."""
    # Level by level, so that nesting cannot exhaust the stack.
    left, level = [value], 0
    count = 0
    while left:
        count, level = count + len(left), level + 1
        if count > MOST_VALUES or level > MOST_LEVELS:
            raise ValueError(f"{where}: more than {MOST_VALUES} values or {MOST_LEVELS} levels")
        for each in left:
            if isinstance(each, str) and len(each) > MOST_TEXT:
                raise ValueError(
                    f"{where}: a text of {len(each)} characters, at most {MOST_TEXT} are read"
                )
            if isinstance(each, float) and not math.isfinite(each):
                raise ValueError(f"{where}: a number that is not finite")
        left = [
            inner
            for each in left
            for inner in (
                each.values()
                if isinstance(each, Mapping)
                else each
                if isinstance(each, (list, tuple))
                else ()
            )
        ]


def _type_name(hint: Any) -> str:
    return hint.__name__ if isinstance(hint, type) else str(hint).replace("typing.", "")


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
