"""All formats of other projects: which drafters they hold, and the format of a folder."""

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
    mtp,
)
from checkpoints.formats.block_diffusion import (
    dflash,
    dflash_speculators,
    dspark,
    dspark_speculators,
)
from checkpoints.formats.eagle3 import peagle, peagle_speculators, sglang, speculators
from configs.command_line.shapes import Each, Maybe

FORMATS: dict[str, ModuleType] = {
    "dflash": dflash,
    "dflash_speculators": dflash_speculators,
    "dspark": dspark,
    "dspark_speculators": dspark_speculators,
    "peagle": peagle,
    "peagle_speculators": peagle_speculators,
    "speculators": speculators,
    "sglang": sglang,
    "eagle": eagle,
    "eagle_sglang": eagle_sglang,
    "medusa": medusa,
    "medusa_reference": medusa_reference,
    "hf": hf,
    "mtp": mtp,
}
"""Formats by name; if several match the same config.json, the first one is used."""
_UNSERVED = {
    "Domino": "neither vLLM nor SGLang loads Domino",
    "DFlash2": "vLLM and SGLang load DFlash2, but no export in their format is written here",
    "MTP": "vLLM reads an MTP head from its target's files (`checkpoints.export --format mtp`): "
    "serve these and give --engine openai",
    "LiLiCorr": "SGLang loads no LiLiCorr, and no export in vLLM's format is written here",
}
"""Why vLLM is not started with drafters that resemble served ones, by class."""
_COMPONENT = {"arguments": Each(object), "shape": Each(object), "target": Maybe(str)}
_ARCHITECTURES = {"architectures?": Maybe([str])}


def formats_of(kind: type) -> list[str]:
    """Names of the formats that hold drafters of exactly this class, not of subclasses."""
    return [name for name, module in FORMATS.items() if module.DRAFTER is kind]


def unserved(kind: type) -> str:
    """Why vLLM is not started with drafters of this class, where there is something to say."""
    return _UNSERVED.get(kind.__name__, "")


def format_of(
    config: Mapping[str, Any], tensors: Collection[str] = (), where: str = CONFIG
) -> str | None:
    """The format of a folder with this config.json and these names of tensors; None: unknown.

    A plain model of one layer has the config of an EAGLE drafter; its final norm distinguishes it:
    EAGLE has none.

    Raises:
        ValueError: `architectures` is no list of names; the line begins with `where`.
    """
    check_shape(config, _ARCHITECTURES, where)
    matches = [name for name, module in FORMATS.items() if module.recognises(config)]
    plain = matches[:1] == ["eagle"] and "hf" in matches and hf.FINAL_NORM in tensors
    return "hf" if plain else next(iter(matches), None)


def foreign_component(config: Mapping[str, Any], name: str, folder: Path) -> dict[str, Any]:
    """This project's config.json for a drafter in the format `name`. It has the dimensions of the
    target that the format states; the target's fingerprint is unknown.

    Raises:
        ValueError: a missing key, an unsupported option, a value of a wrong type or out of range.
    """
    module, where = FORMATS[name], str(folder / CONFIG)
    try:
        with strange_values(f"{where} is not a whole {name} config"):
            described = module.component(config)
    except ValueError as error:
        raise ValueError(f"{folder}: {error}") from error
    # The same checks as for a config of our own.
    kind = module.DRAFTER
    check_shape(described, _COMPONENT, where)
    check_dimensions(described["shape"], where)
    check_arguments(kind, described["arguments"], where)
    return {
        "drafter_type": kind.__module__.rsplit(".", 1)[-1],
        "class": kind.__name__,
        "format": name,
        "arguments": described["arguments"],
        "original": dict(config),
        "target": {"name": described["target"], "fingerprint": None, "shape": described["shape"]},
    }
