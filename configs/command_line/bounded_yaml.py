"""YAML of bounded size, depth and aliases: a config must not take all memory or the stack."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml
from jsonargparse import get_loader, set_loader

from configs.command_line.renamed import current_names

MOST_CHARACTERS = 1 << 20
MOST_LEVELS = 64
MOST_NODES = 1 << 17
"""Scalars, lists and mappings, aliases written out (*billion laughs* has 10**9)."""
_LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


class _Keys:
    """The keys of all open mappings, by their full paths: none may occur twice.

    `a.b` in the outermost mapping is `b` inside of `a`, as `jsonargparse` reads it. Every item of a
    list has its own keys.
    """

    def __init__(self) -> None:
        # For each open mapping: the prefix of its paths, and the line of each path so far. A list
        # has None.
        self._open: list[tuple[str, dict[str, int] | None]] = []
        # For each: the key whose value is read next.
        self._key: list[str | None] = []

    def begin(self, event: yaml.Event) -> None:
        """Start a list or a mapping, which may be the value of a key."""
        prefix, lines = self._open[-1] if self._open else ("", None)
        key = self._key[-1] if self._key else None
        self._value()
        if not isinstance(event, yaml.MappingStartEvent):
            self._open.append(("", None))
        elif lines is None or key is None:
            self._open.append(("", {}))
        else:
            self._open.append((f"{prefix}{key}.", lines))
        self._key.append(None)

    def end(self) -> None:
        """End the innermost list or mapping."""
        self._open.pop()
        self._key.pop()

    def scalar(self, text: str, line: int) -> None:
        """Read a key, the value of a key, or an item of a list.

        Raises:
            ValueError: the key occurred before; the message names both lines.
        """
        prefix, lines = self._open[-1] if self._open else ("", None)
        if lines is None or self._key[-1] is not None:
            self._value()
            return
        path = f"{prefix}{text}"
        if path in lines:
            raise ValueError(f"the key {path!r} is given twice, in lines {lines[path]} and {line}")
        lines[path], self._key[-1] = line, text

    def _value(self) -> None:
        if self._key:
            self._key[-1] = None


def check_yaml(text: str) -> None:
    """Refuse a text that is too long, nested too deeply, too large with its aliases expanded, or
    that repeats a key.

    Raises:
        ValueError: the bound that is exceeded, or the key with its lines.
        yaml.YAMLError: not YAML.
    """
    if len(text) > MOST_CHARACTERS:
        raise ValueError(f"the YAML has {len(text)} characters, more than {MOST_CHARACTERS}")
    # Sizes of finished anchors, and of the collections that are still open.
    sizes: dict[str, int] = {}
    open_sizes: list[int] = [0]
    anchors: list[str | None] = [None]
    keys = _Keys()
    for event in yaml.parse(text, Loader=_LOADER):
        if isinstance(event, yaml.CollectionStartEvent):
            open_sizes.append(1)
            anchors.append(event.anchor)
            keys.begin(event)
            if len(open_sizes) > MOST_LEVELS:
                raise ValueError(f"the YAML is nested deeper than {MOST_LEVELS} levels")
            continue
        # The size of what ended here: a collection, an alias or a scalar.
        if isinstance(event, yaml.CollectionEndEvent):
            size, anchor = open_sizes.pop(), anchors.pop()
            keys.end()
        elif isinstance(event, yaml.AliasEvent):
            if event.anchor in anchors:
                raise ValueError(f"the YAML's alias *{event.anchor} is inside of itself")
            size, anchor = sizes.get(event.anchor or "", 1), None
            keys.scalar(f"*{event.anchor}", event.start_mark.line + 1)
        elif isinstance(event, yaml.ScalarEvent):
            size, anchor = 1, event.anchor
            keys.scalar(event.value, event.start_mark.line + 1)
        else:
            continue
        # It counts for its anchor, and for the collection around it.
        if anchor is not None:
            sizes[anchor] = size
        open_sizes[-1] += size
        if open_sizes[-1] > MOST_NODES:
            raise ValueError(
                f"the YAML has more than {MOST_NODES} values with its aliases written out"
            )


def load_yaml(file: Path) -> Any:
    """The values of a YAML file, within bounds.

    Raises:
        ValueError: not YAML, not text, or beyond a bound; the message names the file.
    """
    try:
        text = file.read_text(encoding="utf-8")
        check_yaml(text)
        return current_names(yaml.load(text, Loader=_LOADER))
    except (ValueError, yaml.YAMLError) as error:
        raise ValueError(f"{file}: {' '.join(str(error).split())}") from error


def read_config(file: Path) -> dict[str, Any]:
    """The values of a config file, by key.

    Raises:
        ValueError: as `load_yaml`, or the root is not one mapping.
    """
    try:
        if file.stat().st_size > 4 * MOST_CHARACTERS:
            raise ValueError(f"the YAML has more than {MOST_CHARACTERS} characters")
        text = file.read_text(encoding="utf-8")
        check_yaml(text)
        _check_root(text)
        return current_names(yaml.load(text, Loader=_LOADER))
    except (ValueError, yaml.YAMLError) as error:
        raise ValueError(f"--config {file}: {' '.join(str(error).split())}") from error


def _check_root(text: str) -> None:
    """Raise ValueError unless a YAML text is a single mapping."""
    # Several documents, then a root that is no mapping.
    events = list(yaml.parse(text, Loader=_LOADER))
    documents = sum(isinstance(event, yaml.DocumentStartEvent) for event in events)
    if documents > 1:
        raise ValueError(f"the YAML has {documents} documents: leave out the lines ---")
    root = next((event for event in events if isinstance(event, yaml.NodeEvent)), None)
    if isinstance(root, yaml.MappingStartEvent):
        return
    empty = root is None or (isinstance(root, yaml.ScalarEvent) and not root.value)
    listed = isinstance(root, yaml.SequenceStartEvent)
    held = "nothing" if empty else "a list" if listed else "a single value"
    raise ValueError(f"the YAML holds {held}: give keys with values, such as seed: 1")


def _bounded(text: str) -> Any:
    try:
        check_yaml(text)
    except ValueError as error:
        raise yaml.YAMLError(str(error)) from error
    return current_names(_unbounded(text))


_unbounded = get_loader("yaml")
set_loader("yaml", _bounded, (yaml.YAMLError,))
