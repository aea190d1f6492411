"""Which code a config may name: classes of a few packages, of the kind that the key requires.

A config from somebody else must not run arbitrary code. A name in another package is refused before
that package is imported. A name in an allowed package is refused before it is called, unless it is
a class of the key's kind or a function annotated to return one
(`modules.trees.sampled.branching.chains`). Users allow their own packages on the command line
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
from modules.sparse_kv.policy import Policy
from modules.tokenization.contract import LanguageModel

PACKAGES = (
    "modules",
    "data.datamodule",
    "data.labelled.labelled",
    "data.preferences",
    "eval.methods.huggingface",
    "lightning.pytorch.loggers",
    "train.lightning.trackio_logger",
)
_PARTS = ("eval.methods.rows.Method",)
"""Dataclasses of settings in lists, which `jsonargparse` imports by path."""
_allowed: list[str] = list(PACKAGES)


class Kind(Enum):
    """The kind of a key's value: the class to inherit from, or the members of its protocol."""

    TRAINABLE = (Trainable,)
    DRAFTER = (Drafter,)
    BUILDER = ("build",)
    POLICY = (Policy,)
    RULE = ("name", "lossless", "sibling_draws", "states", "__call__")
    DECODER = ("name", "decode")
    LANGUAGE_MODEL = (LanguageModel,)


def allow(packages: Iterable[str] = ()) -> None:
    """Allow classes of further packages in configs, here and in `jsonargparse`.

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
    """Whether a dotted path is in an allowed package."""
    return any(path == package or path.startswith(f"{package}.") for package in _allowed)


def refused(path: str) -> str:
    """The error message for a path outside of the allowed packages."""
    return (
        f"class_path {path!r} is in no package that a config may name ({', '.join(_allowed)}): "
        f"if you trust it, add --allow_package {path.partition('.')[0]} to the command line"
    )


def named_class(path: str, kind: Kind, where: str) -> Callable[..., Any]:
    """The class at `package.module.Class`, or a function annotated to return such a class.

    Raises:
        ValueError: not in an allowed package (which is then not imported), missing, or of another
            kind than the key requires; `where` is the prefix of the message.
    """
    # 1. Before any import.
    if not allowed(path):
        raise ValueError(f"{where}: {refused(path)}")
    # 2. Import the module.
    module, _, name = path.rpartition(".")
    try:
        member = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise ValueError(f"{where}: class_path {path!r} cannot be found: {error}") from error
    # 3. Before any call: re-exports of other packages and other kinds are refused.
    made = _made_by(member)
    if made is None or not allowed(member.__module__) or not _fits(made, kind):
        raise ValueError(f"{where}: class_path {path!r} is no {kind.name.lower()}: name one")
    return member


def part_kinds(made: Callable[..., Any], where: str) -> dict[str, Kind]:
    """The arguments of a class that are drafters, builders or policies, by the types in its
    constructor's annotations.

    Raises:
        ValueError: an annotation that cannot be resolved at run time.
    """
    try:
        hints = typing.get_type_hints(made.__init__ if inspect.isclass(made) else made)
    except NameError as error:
        raise ValueError(
            f"{where}: types of {made.__qualname__}'s arguments cannot be read ({error}): import "
            "them outside of TYPE_CHECKING"
        ) from None
    # Optional and union types count by their members.
    kinds = {Drafter: Kind.DRAFTER, TreeBuilder: Kind.BUILDER, Policy: Kind.POLICY}
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


def _made_by(member: Any) -> type | None:
    """The class itself, or the return annotation of a function."""
    if inspect.isfunction(member):
        member = typing.get_type_hints(member).get("return")
    return member if inspect.isclass(member) else None


def _fits(made: type, kind: Kind) -> bool:
    members = {
        *dir(made),
        *(name for base in made.__mro__ for name in vars(base).get("__annotations__", ())),
    }
    return all(
        part in members if isinstance(part, str) else issubclass(made, part) for part in kind.value
    )
