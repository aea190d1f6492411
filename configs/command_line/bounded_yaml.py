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


def check_yaml(text: str) -> None:
    """Refuse a text that is too long, too deep or too large when its aliases are written out.

    Raises:
        ValueError: which bound.
        yaml.YAMLError: not YAML.
    """
    if len(text) > MOST_CHARACTERS:
        raise ValueError(f"the YAML has {len(text)} characters, more than {MOST_CHARACTERS}")
    sizes: dict[str, int] = {}
    open_sizes: list[int] = [0]
    anchors: list[str | None] = [None]
    for event in yaml.parse(text, Loader=_LOADER):
        if isinstance(event, yaml.CollectionStartEvent):
            open_sizes.append(1)
            anchors.append(event.anchor)
            if len(open_sizes) > MOST_LEVELS:
                raise ValueError(f"the YAML is nested deeper than {MOST_LEVELS} levels")
            continue
        if isinstance(event, yaml.CollectionEndEvent):
            size, anchor = open_sizes.pop(), anchors.pop()
        elif isinstance(event, yaml.AliasEvent):
            if event.anchor in anchors:
                raise ValueError(f"the YAML's alias *{event.anchor} stands inside of itself")
            size, anchor = sizes.get(event.anchor or "", 1), None
        elif isinstance(event, yaml.ScalarEvent):
            size, anchor = 1, event.anchor
        else:
            continue
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
        ValueError: not YAML or not text, or beyond a bound; the line names the file.
    """
    try:
        text = file.read_text(encoding="utf-8")
        check_yaml(text)
        return current_names(yaml.load(text, Loader=_LOADER))
    except (ValueError, yaml.YAMLError) as error:
        raise ValueError(f"{file}: {' '.join(str(error).split())}") from error


def check_file(file: Path) -> None:
    """Refuse a config file that `load_yaml` would refuse, without making its values."""
    try:
        if file.stat().st_size > 4 * MOST_CHARACTERS:
            raise ValueError(f"the YAML has more than {MOST_CHARACTERS} characters")
        check_yaml(file.read_text(encoding="utf-8"))
    except (ValueError, yaml.YAMLError) as error:
        raise ValueError(f"--config {file}: {' '.join(str(error).split())}") from error


def _bounded(text: str) -> Any:
    try:
        check_yaml(text)
    except ValueError as error:
        raise yaml.YAMLError(str(error)) from error
    return current_names(_unbounded(text))


_unbounded = get_loader("yaml")
set_loader("yaml", _bounded, (yaml.YAMLError,))
