"""Checks that a resumed run has not changed its config."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from configs.command_line.bounded_yaml import load_yaml


def _lasting(section: Any) -> Any:
    """A section without what may change: rows per process (the batches check their product with the
    number of processes), the feature cache, worker processes, and keys that are null (the run may
    predate them).
    """
    if not isinstance(section, Mapping) or "init_args" not in section:
        return section
    free = ("rows", "workers", "features", "features_dtype", "features_gib")
    arguments = section["init_args"].items()
    lasting = {key: value for key, value in arguments if key not in free and value is not None}
    return {**section, "init_args": lasting}


def same_run(file: Path, settings: Mapping[str, Any], keys: Sequence[str]) -> None:
    """Raise ValueError unless a run's saved config (`file`) agrees in all lasting keys."""
    if not file.is_file():
        raise ValueError(
            f"--resume: {file} does not exist, so the run cannot be continued: start a new one"
        )
    saved = load_yaml(file)
    if not isinstance(saved, Mapping):
        raise ValueError(f"--resume: {file} holds no keys: it is no run's config, start a new one")
    # The first difference is reported, with both values.
    for key in keys:
        changed = next(
            _differences(key, _lasting(saved.get(key)), _lasting(settings.get(key))), None
        )
        if changed is not None:
            name, before, now = changed
            raise ValueError(
                f"--resume: {name} is {now!r}, but the run was begun with {before!r}: restore it, "
                "or start a new run (--init_from takes the weights)"
            )


def _differences(name: str, before: Any, now: Any) -> Iterator[tuple[str, Any, Any]]:
    """The innermost keys that differ, with both values."""
    if not isinstance(before, Mapping) or not isinstance(now, Mapping):
        if before != now:
            yield name, before, now
        return
    for key in dict.fromkeys((*before, *now)):
        inner = name if key == "init_args" else f"{name}.{key}"
        yield from _differences(inner, before.get(key), now.get(key))
