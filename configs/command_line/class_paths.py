"""Which code a config may name: classes of a few packages that are what their key holds.

A config that somebody sends must not run what it likes. A name in another package is refused before
that package is imported, and a name in these is refused before it is called, unless it is a class
of the key's kind, or a function that declares to return one
(`modules.trees.sampled.branching.chains`). Users allow packages of their own on the command line
(`--allow_package`), never in a config.
"""

from __future__ import annotations

import importlib
import inspect
import typing
from collections.abc import Callable, Iterable
from enum import Enum
from typing import Any

from jsonargparse import set_parsing_settings

from modules.contracts.drafter import Drafter, TreeBuilder
from modules.contracts.trainable import Trainable

PACKAGES = (
    "modules",
    "data.datamodule",
    "data.labelled.labelled",
    "data.preferences",
    "eval.methods.huggingface",
    "lightning.pytorch.loggers",
)
_PARTS = ("eval.methods.rows.Method",)
"""Dataclasses of settings in lists, which `jsonargparse` looks up by their paths."""
_allowed: list[str] = list(PACKAGES)


class Kind(Enum):
    """What a key holds: the class it must inherit from, or the members of its protocol."""

    TRAINABLE = (Trainable,)
    DRAFTER = (Drafter,)
    BUILDER = ("build",)
    RULE = ("lossless", "sibling_draws", "__call__")
    DECODER = ("name", "decode")


def allow(packages: Iterable[str] = ()) -> None:
    """Let configs name classes of these packages too, here and in `jsonargparse`.

    Raises:
        ValueError: not the name of a package.
    """
    _allowed.extend(packages)
    set_parsing_settings(
        import_path_denylist=["*"],
        import_path_allowlist=[*_allowed, *_PARTS],
        instantiate_subclass_spec_in_any=False,
    )


allow()


def allowed(path: str) -> bool:
    """Whether a dotted path lies in a package that configs may name."""
    return any(path == package or path.startswith(f"{package}.") for package in _allowed)


def refused(path: str) -> str:
    """What to say of a path that configs may not name."""
    return (
        f"class_path {path!r} is in no package that a config may name ({', '.join(_allowed)}): "
        f"if you trust it, add --allow_package {path.partition('.')[0]} to the command line"
    )


def named_class(path: str, kind: Kind, where: str) -> Callable[..., Any]:
    """The class at `package.module.Class`, or a function that declares to return such a class.

    Raises:
        ValueError: not in an allowed package (which is then not imported), not there, or another
            kind of thing than the key holds; `where` is what the line speaks of.
    """
    if not allowed(path):
        raise ValueError(f"{where}: {refused(path)}")
    module, _, name = path.rpartition(".")
    try:
        found = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise ValueError(f"{where}: class_path {path!r} cannot be found: {error}") from error
    made = _made_by(found)
    if made is None or not allowed(found.__module__) or not _fits(made, kind):
        raise ValueError(f"{where}: class_path {path!r} is no {kind.name.lower()}: name one")
    return found


def part_kinds(made: Callable[..., Any], where: str) -> dict[str, Kind]:
    """The arguments of a class that are drafters or builders themselves, by the types that its
    constructor declares.

    Raises:
        ValueError: a type that is not there at run time.
    """
    try:
        hints = typing.get_type_hints(made.__init__ if inspect.isclass(made) else made)
    except NameError as error:
        raise ValueError(
            f"{where}: types of {made.__qualname__}'s arguments cannot be read ({error}): import "
            "them outside of TYPE_CHECKING"
        ) from None
    kinds = {Drafter: Kind.DRAFTER, TreeBuilder: Kind.BUILDER}
    return {
        name: kinds[part]
        for name, hint in hints.items()
        for part in (hint, *typing.get_args(hint))
        if name != "return" and part in kinds
    }


def found_class(path: str) -> Callable[..., Any] | None:
    """The class or function at an allowed path; None where there is none."""
    module, _, name = path.rpartition(".")
    try:
        return getattr(importlib.import_module(module), name) if allowed(path) else None
    except (ImportError, AttributeError, ValueError):
        return None


def _made_by(found: Any) -> type | None:
    """The class itself, or the one that a function declares to return."""
    if inspect.isfunction(found):
        found = typing.get_type_hints(found).get("return")
    return found if inspect.isclass(found) else None


def _fits(made: type, kind: Kind) -> bool:
    known = {
        *dir(made),
        *(name for one in made.__mro__ for name in vars(one).get("__annotations__", ())),
    }
    return all(
        part in known if isinstance(part, str) else issubclass(made, part) for part in kind.value
    )
