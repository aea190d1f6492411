"""Every format of others: what it can hold, and which one a folder is in."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

from checkpoints.checks import check_arguments, check_dimensions, check_shape, strange_values
from checkpoints.folders import CONFIG
from checkpoints.formats import (
    eagle,
    eagle_sglang,
    hf,
    medusa,
    medusa_reference,
    sglang,
    speculators,
)
from configs.command_line.shapes import Each, Maybe

FORMATS: dict[str, ModuleType] = {
    "speculators": speculators,
    "sglang": sglang,
    "eagle": eagle,
    "eagle_sglang": eagle_sglang,
    "medusa": medusa,
    "medusa_reference": medusa_reference,
    "hf": hf,
}
"""By name. Of formats that could be meant by the same config.json the first one is."""
_COMPONENT = {"arguments": Each(object), "shape": Each(object), "target": Maybe(str)}
_ARCHITECTURES = {"architectures?": Maybe([str])}


def formats_of(kind: type) -> list[str]:
    """Names of the formats that hold drafters of exactly this class (a subclass computes something
    else).
    """
    return [name for name, module in FORMATS.items() if module.DRAFTER is kind]


def format_of(
    config: Mapping[str, Any], tensors: Collection[str] = (), where: str = CONFIG
) -> str | None:
    """The format of a folder with this config.json and these names of tensors, if it is one of
    these.

    A plain model of one layer has the config of an EAGLE drafter; its final norm distinguishes it:
    EAGLE has none.

    Raises:
        ValueError: `architectures` is no list of names; the line begins with `where`.
    """
    check_shape(config, _ARCHITECTURES, where)
    found = [name for name, module in FORMATS.items() if module.recognises(config)]
    plain = found[:1] == ["eagle"] and "hf" in found and hf.FINAL_NORM in tensors
    return "hf" if plain else next(iter(found), None)


def foreign_component(config: Mapping[str, Any], name: str, folder: Path) -> dict[str, Any]:
    """What this project's config.json would say of a drafter in the format `name`. Of the target's
    dimensions it has those that the format states; the target's fingerprint is never known.

    Raises:
        ValueError: a key is missing, asks for what is not supported here, or has a value of a wrong
            type or an absurd size.
    """
    module, where = FORMATS[name], str(folder / CONFIG)
    try:
        with strange_values(f"{where} is not a whole {name} config"):
            found = module.component(config)
    except ValueError as error:
        raise ValueError(f"{folder}: {error}") from error
    kind = module.DRAFTER
    check_shape(found, _COMPONENT, where)
    check_dimensions(found["shape"], where)
    check_arguments(kind, found["arguments"], where)
    return {
        "drafter_type": kind.__module__.rsplit(".", 1)[-1],
        "class": kind.__name__,
        "format": name,
        "arguments": found["arguments"],
        "original": dict(config),
        "target": {"name": found["target"], "fingerprint": None, "shape": found["shape"]},
    }
