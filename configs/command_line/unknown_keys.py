"""Keys that nothing reads: where they stand, and the name that was probably meant."""

from __future__ import annotations

import difflib
import inspect
import re
from argparse import Action
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass
from pathlib import Path
from typing import Any, get_args

from jsonargparse import ArgumentParser, Namespace

from configs.command_line.class_paths import found_class

_NOT_ACCEPTED = re.compile(
    r"^(?:([\w.]+): )?(?:Option|Group '([^']+)' does not accept option) '([^']+)'"
    r"(?: is not accepted)?$"
)
_UNRECOGNISED = re.compile(r"^unrecognized arguments: (--[^\s=]+)")
_LIKENESS = 0.6
_SHOWN = 12


@dataclass(frozen=True)
class Config:
    """A config file and its values."""

    file: Path
    values: Mapping[str, Any]


def check_keys(parser: ArgumentParser, config: Config) -> None:
    """Refuse a config with a key that the parser does not have, or one value where a list or a
    section belongs.

    Keys inside of a class (`init_args`) are left to the parser.

    Raises:
        ValueError: the file, the key, and the nearest name.
    """
    known = _known(parser)
    for path, value in _paths(config.values, known):
        if any(name.startswith(f"{path}.") for name in known):
            raise ValueError(
                f"--config {config.file}: {path} is a section, got {value!r}: give keys with values"
            )
        if path not in known:
            near = meant(path, list(known))
            raise ValueError(f"--config {config.file}: the key {path!r} is unknown{near}")
        if known[path].nargs == "+" and not isinstance(value, list):
            raise ValueError(
                f"--config {config.file}: {path} must be a list, got {value!r}: add brackets"
            )


def check_nulls(parser: ArgumentParser, settings: Namespace) -> None:
    """Refuse null where a key does not take it, which the parser lets through.

    Raises:
        ValueError: the key.
    """
    for key, action in _known(parser).items():
        hint = vars(action).get("_typehint", action.type)
        takes_null = hint in (None, Any) or type(None) in get_args(hint)
        if not takes_null and action.default is not None and settings.get(key) is None:
            raise ValueError(f"{key} must not be null: give a value, or leave it out")


def _known(parser: ArgumentParser) -> dict[str, Action]:
    """What the parser reads, by key."""
    return {one.dest: one for one in parser._actions if not one.dest.endswith("help")}


def _paths(
    values: Mapping[str, Any], known: Mapping[str, Action], prefix: str = ""
) -> Iterator[tuple[str, Any]]:
    """Whole paths of keys, as deep as the parser has sections, with their values."""
    for key, value in values.items():
        path = f"{prefix}{key}"
        section = any(name.startswith(f"{path}.") for name in known)
        if section and isinstance(value, Mapping):
            yield from _paths(value, known, f"{path}.")
        elif section or not _in_class(path, known):
            yield path, value


def _in_class(path: str, known: Mapping[str, Action]) -> bool:
    """Whether a key with dots is inside of a class, as `data.train` is."""
    parts = path.split(".")
    around = [".".join(parts[:count]) for count in range(1, len(parts))]
    return any(
        outer in known and not any(name.startswith(f"{outer}.") for name in known)
        for outer in around
    )


def explained(message: str, parser: ArgumentParser, configs: Sequence[Config]) -> str:
    """A parser's message on an option that it does not have, with the file and the name that was
    probably meant; other messages stay as they are."""
    flag = _UNRECOGNISED.match(message)
    if flag is not None:
        known = _known(parser)
        inner = [
            f"{name}.{key}"
            for name in ("drafter", "data")
            if name in known
            for key in _arguments(known[name], configs)
        ]
        near = meant(flag[1].removeprefix("--"), [*known, *inner], "--")
        return f"{flag[1]} is unknown{near}"
    option = _NOT_ACCEPTED.match(message)
    if option is None:
        return message
    section, name = option[1] or option[2] or "", option[3]
    place = next(
        (f"--config {one.file}: " for one in reversed(configs) if _holds(one.values, name)), ""
    )
    path = f"{section}.{name}" if section else name
    action = _known(parser).get(section)
    near = "" if action is None else meant(name, _arguments(action, configs))
    return f"{place}the key {path!r} is unknown{near}"


def meant(name: str, known: Sequence[str], dashes: str = "") -> str:
    """`: did you mean …?`, or the names that there are; nothing where there are too many."""
    near = _nearest(name, known)
    if near:
        return f": did you mean {dashes}{near}?"
    return f": use one of {', '.join(known)}" if 0 < len(known) <= _SHOWN else ""


def _nearest(name: str, known: Sequence[str]) -> str:
    """The name most like it: a section's where that is unknown, else one in the section, else one
    that ends so."""
    section, dot, rest = name.partition(".")
    sections = list(dict.fromkeys(one.partition(".")[0] for one in known))
    if section not in sections:
        near = difflib.get_close_matches(section, sections, 1, _LIKENESS)
        if near:
            return f"{near[0]}{dot}{rest}"
    inside = [one for one in known if dot and one.startswith(f"{section}.")]
    last = name.rpartition(".")[2]
    for names in (inside, [one for one in known if "." in one]):
        ends = {one.rpartition(".")[2]: one for one in reversed(names)}
        near = difflib.get_close_matches(last, ends, 1, _LIKENESS)
        if near:
            return ends[near[0]]
    return ""


def _holds(value: Any, name: str) -> bool:
    """Whether a key of that name stands anywhere in a value."""
    if isinstance(value, Mapping):
        return any(
            str(key).rpartition(".")[2] == name or _holds(inner, name)
            for key, inner in value.items()
        )
    return isinstance(value, list) and any(_holds(inner, name) for inner in value)


def _arguments(action: Action, configs: Sequence[Config]) -> list[str]:
    """Names that a key's class takes: that of the last config that names one, the default, or the
    dataclass of a list's items."""
    default = action.default.as_dict() if isinstance(action.default, Namespace) else action.default
    for value in (*(one.values.get(action.dest) for one in reversed(configs)), default):
        path = value.get("class_path") if isinstance(value, Mapping) else None
        found = found_class(path) if isinstance(path, str) else None
        if found is not None:
            return [name for name in inspect.signature(found).parameters if name != "shape"]
    items = get_args(vars(action).get("_typehint"))
    return [field.name for kind in items if is_dataclass(kind) for field in fields(kind)]
