"""Unknown keys of configs and command lines: their location, and the probable name."""

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
    """Refuse a config with a key that the parser does not have, or a single value in place of a
    list or a section.

    Keys inside of a class (`init_args`) are checked by the parser.

    Raises:
        ValueError: the file, the key, and the nearest name.
    """
    actions = _known(parser)
    # A section with a value, an unknown key, or one value for a list.
    for path, value in _paths(config.values, actions):
        if any(name.startswith(f"{path}.") for name in actions):
            raise ValueError(
                f"--config {config.file}: {path} is a section, got {value!r}: give keys with values"
            )
        if path not in actions:
            near = meant(path, list(actions))
            raise ValueError(f"--config {config.file}: the key {path!r} is unknown{near}")
        if actions[path].nargs == "+" and not isinstance(value, list):
            raise ValueError(
                f"--config {config.file}: {path} must be a list, got {value!r}: add brackets"
            )


def check_nulls(parser: ArgumentParser, settings: Namespace) -> None:
    """Refuse null for keys that do not accept it, which the parser does not check.

    Raises:
        ValueError: names the key.
    """
    for key, action in _known(parser).items():
        hint = vars(action).get("_typehint", action.type)
        takes_null = hint in (None, Any) or type(None) in get_args(hint)
        if not takes_null and action.default is not None and settings.get(key) is None:
            raise ValueError(f"{key} must not be null: give a value, or leave it out")


def _known(parser: ArgumentParser) -> dict[str, Action]:
    """The parser's actions, by key."""
    return {action.dest: action for action in parser._actions if not action.dest.endswith("help")}


def _paths(
    values: Mapping[str, Any], actions: Mapping[str, Action], prefix: str = ""
) -> Iterator[tuple[str, Any]]:
    """Full paths of keys, as deep as the parser has sections, with their values."""
    for key, value in values.items():
        path = f"{prefix}{key}"
        section = any(name.startswith(f"{path}.") for name in actions)
        if section and isinstance(value, Mapping):
            yield from _paths(value, actions, f"{path}.")
        elif section or not _in_class(path, actions):
            yield path, value


def _in_class(path: str, actions: Mapping[str, Action]) -> bool:
    """Whether a key with dots is inside of a class, as `data.train` is."""
    parts = path.split(".")
    around = [".".join(parts[:count]) for count in range(1, len(parts))]
    return any(
        outer in actions and not any(name.startswith(f"{outer}.") for name in actions)
        for outer in around
    )


def explained(message: str, parser: ArgumentParser, configs: Sequence[Config]) -> str:
    """A parser's message about an unknown option, with the file and the probable name; other
    messages are unchanged."""
    # A flag of the command line: keys, and arguments of the classes that they name.
    flag = _UNRECOGNISED.match(message)
    if flag is not None:
        actions = _known(parser)
        inner = [
            f"{name}.{key}"
            for name in ("drafter", "data")
            if name in actions
            for key in _arguments(actions[name], configs)
        ]
        near = meant(flag[1].removeprefix("--"), [*actions, *inner], "--")
        return f"{flag[1]} is unknown{near}"
    # A key of a class: its other arguments.
    option = _NOT_ACCEPTED.match(message)
    if option is None:
        return message
    section, name = option[1] or option[2] or "", option[3]
    place = next(
        (
            f"--config {config.file}: "
            for config in reversed(configs)
            if _holds(config.values, name)
        ),
        "",
    )
    path = f"{section}.{name}" if section else name
    action = _known(parser).get(section)
    near = "" if action is None else meant(name, _arguments(action, configs))
    return f"{place}the key {path!r} is unknown{near}"


def meant(name: str, names: Sequence[str], dashes: str = "") -> str:
    """`: did you mean …?`, or the existing names; empty where there are too many."""
    near = _nearest(name, names)
    if near:
        return f": did you mean {dashes}{near}?"
    return f": use one of {', '.join(names)}" if 0 < len(names) <= _SHOWN else ""


def _nearest(name: str, candidates: Sequence[str]) -> str:
    """The most similar name: of a section if the section is unknown, else within the section, else
    with the same last part."""
    # 1. A misspelt section.
    section, dot, rest = name.partition(".")
    sections = list(dict.fromkeys(candidate.partition(".")[0] for candidate in candidates))
    if section not in sections:
        near = difflib.get_close_matches(section, sections, 1, _LIKENESS)
        if near:
            return f"{near[0]}{dot}{rest}"
    # 2. A misspelt key in the section, or the right key without its section.
    inside = [candidate for candidate in candidates if dot and candidate.startswith(f"{section}.")]
    last = name.rpartition(".")[2]
    for names in (inside, [candidate for candidate in candidates if "." in candidate]):
        ends = {candidate.rpartition(".")[2]: candidate for candidate in reversed(names)}
        near = difflib.get_close_matches(last, ends, 1, _LIKENESS)
        if near:
            return ends[near[0]]
    return ""


def _holds(value: Any, name: str) -> bool:
    """Whether a key of that name occurs anywhere in a value."""
    if isinstance(value, Mapping):
        return any(
            str(key).rpartition(".")[2] == name or _holds(inner, name)
            for key, inner in value.items()
        )
    return isinstance(value, list) and any(_holds(inner, name) for inner in value)


def _arguments(action: Action, configs: Sequence[Config]) -> list[str]:
    """Argument names of a key's class: of the last config that names one, of the default, or of the
    dataclass of a list's items."""
    default = action.default.as_dict() if isinstance(action.default, Namespace) else action.default
    # Later configs override earlier ones.
    for value in (*(config.values.get(action.dest) for config in reversed(configs)), default):
        path = value.get("class_path") if isinstance(value, Mapping) else None
        cls = found_class(path) if isinstance(path, str) else None
        if cls is not None:
            return [name for name in inspect.signature(cls).parameters if name != "shape"]
    items = get_args(vars(action).get("_typehint"))
    return [field.name for kind in items if is_dataclass(kind) for field in fields(kind)]
