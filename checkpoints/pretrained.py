"""Saving and loading trained components: `config.json`, `model.safetensors`, `provenance.json`,
`README.md`.

A saved component names its class by the stem of its file (`drafter_type`), and loading searches the
`modules` package only: a downloaded folder can never name code to import. Drafters in other
formats (`checkpoints.formats`) load as well, with their target, which supplies the dimensions that
their files lack.
"""

from __future__ import annotations

import importlib
import json
import logging
import re
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

import modules
from checkpoints.card import model_card
from checkpoints.checks import (
    CONFIG_SHAPE,
    check_arguments,
    check_shape,
    check_tensors,
    check_values,
    some,
    strange_values,
    target_shape,
)
from checkpoints.folders import (
    CONFIG,
    HUB_SECONDS,
    WEIGHTS,
    Ledger,
    hub_answers_within,
    read_tensors,
    refuse_pickles,
    tensor_names,
    write_json,
)
from checkpoints.folders import write_tensors as write_safetensors
from checkpoints.formats.known import FORMATS, foreign_component, format_of
from checkpoints.provenance import Provenance
from configs.command_line.shapes import Each
from modules.contracts.shapes import TargetShape
from modules.contracts.trainable import Trainable, TrainedFor
from modules.runtime.files import read_object, whole_folder
from modules.target.loading import missing_here

if TYPE_CHECKING:
    from modules.contracts.target import Target

logger = logging.getLogger(__name__)

Config = dict[str, Any]
Tensors = dict[str, Tensor]


def _with_token_scale(config: Config, tensors: Tensors) -> tuple[Config, Tensors]:
    """Version 2 scales the token embeddings that are read with features; version 1 did not."""
    if config["drafter_type"] in ("eagle", "fspad", "falcon", "hydra"):
        tensors = {**tensors, "token_scale": torch.ones(())}
    return config, tensors


RENAMED = {("sorted", "Sorted"): ("s2d", "S2D")}
"""Earlier `drafter_type` and `class` of components, and their current names."""
MIGRATIONS: tuple[Callable[[Config, Tensors], tuple[Config, Tensors]], ...] = (_with_token_scale,)
"""Entry n migrates config.json and tensors from format version n + 1 to version n + 2."""
FORMAT_VERSION = len(MIGRATIONS) + 1
PROVENANCE, CARD = "provenance.json", "README.md"
IN_RUN, BESIDE = "drafter", "slipstream"
"""Folders of a component: in a run, and in a repository that an engine reads."""
_IDENTIFIER = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_WANTED = ["*.json", "*.safetensors", CARD]
"""Files of a Hub repository that are downloaded."""
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+(@[\w./-]+)?")


# -- saving ----------------------------------------------------------------------------------------


def save_pretrained(trainable: Trainable, folder: str | Path, provenance: Provenance) -> Path:
    """Write a component's folder atomically; an earlier one of the same name is replaced.

    Args:
        trainable: the component; its whole `state_dict` is written, shared memory only once.
        folder: folder to write.
        provenance: target, data and settings of the training; also used in the model card.
    """
    folder, config = Path(folder), describe(trainable, provenance)
    with whole_folder(folder) as fresh:
        write_json(fresh / CONFIG, config)
        write_json(fresh / PROVENANCE, provenance.as_dict())
        _write_weights(trainable, fresh / WEIGHTS)
        (fresh / CARD).write_text(model_card(trainable, config, provenance), encoding="utf-8")
    return folder


def describe(trainable: Trainable, provenance: Provenance) -> dict[str, Any]:
    """The `config.json` of a component."""
    arguments = trainable.config()
    shape = arguments.pop("shape")
    return {
        "drafter_type": type(trainable).__module__.rsplit(".", 1)[-1],
        "class": type(trainable).__name__,
        "format_version": FORMAT_VERSION,
        "arguments": arguments,
        "target": {**provenance.target, "shape": shape},
    }


def _write_weights(trainable: Trainable, file: Path) -> None:
    # Safetensors refuses tensors that share memory: one is written, the others become aliases.
    unique: dict[str, Tensor] = {}
    first: dict[tuple[Any, ...], str] = {}
    aliases: dict[str, str] = {}
    for name, tensor in trainable.state_dict().items():
        memory = (
            tensor.untyped_storage().data_ptr(),
            tensor.storage_offset(),
            tuple(tensor.shape),
            tensor.stride(),
        )
        if tensor.numel() and memory in first:
            aliases[name] = first[memory]
        else:
            first[memory] = name
            unique[name] = tensor
    write_safetensors(file, unique, {"aliases": json.dumps(aliases)})


# -- loading ---------------------------------------------------------------------------------------


def load_pretrained(name: str | Path, target: Target | None = None) -> Trainable:
    """Load a component from a run folder, its own folder or the Hub; also a drafter in one of
    `checkpoints.formats`.

    Args:
        name: a run (a folder with `drafter/`), a drafter folder, or a Hub id (`USER/NAME`,
            `USER/NAME@REVISION`).
        target: the target to serve; compatibility is checked, and its device taken. Other formats
            require it.

    Raises:
        ValueError: no component, an unknown type, missing, unexpected or reshaped tensors, or an
            incompatible target.
    """
    folder = find_folder(name)
    config, tensors = _whole(
        read_config(folder), folder, None if target is None else target.shape, target
    )
    # 1. Build it, after a comparison of config and tensors, and load the weights.
    trainable = _build(config, folder, tensors)
    assign_weights(trainable, tensors, str(folder / WEIGHTS))
    check_values(trainable, str(folder / WEIGHTS))
    # 2. Its origin, and whether it may serve this target.
    trainable.trained_for, trainable.loaded_from = trained_for(config), str(name)
    if target is not None:
        check_compatible(trainable, target, str(name))
        trainable.serve(target)
        trainable = trainable.to(target.device)
    trainable.trained_length = _trained_length(folder)
    return trainable.eval()


def _trained_length(folder: Path) -> int | None:
    """`data.max_length` of its training, if it was recorded."""
    data = read_object(folder / PROVENANCE).get("data") if (folder / PROVENANCE).is_file() else None
    length = data.get("max_length") if isinstance(data, dict) else None
    return length if isinstance(length, int) else None


def _whole(
    config: Config, folder: Path, shape: TargetShape | None, target: Target | None
) -> tuple[Config, Tensors]:
    """Config and tensors in the current version: migrated from an older one, or translated from
    another format.
    """
    if "format" in config:
        return _translated(config, folder, shape, target)
    tensors = _read_weights(folder / WEIGHTS)
    for migration in MIGRATIONS[config["format_version"] - 1 :]:
        config, tensors = migration(config, tensors)
    return config, tensors


def _translated(
    config: Config, folder: Path, shape: TargetShape | None, target: Target | None
) -> tuple[Config, Tensors]:
    if shape is None:
        raise ValueError(
            f"{folder} is in the format {config['format']!r}, which does not tell all dimensions "
            "of its target: load it with its target"
        )
    # The target's dimensions, overridden by those that the file states.
    shape = TargetShape(**{**asdict(shape), **config["target"]["shape"]})
    ledger = Ledger(read_tensors(folder), str(folder))
    ledger.drop("rotary_emb.inv_freq")
    with strange_values(f"{folder} does not fit the format {config['format']!r}"):
        tensors = FORMATS[config["format"]].weights(
            ledger, shape, config["arguments"], config["original"], target
        )
    ledger.close()
    return {**config, "target": {**config["target"], "shape": asdict(shape)}}, tensors


def _build(config: Mapping[str, Any], folder: Path, tensors: Tensors) -> Trainable:
    """The component of a config, built first without memory and compared with the tensors."""
    kind, where = trainable_class(config["drafter_type"], config["class"]), str(folder / CONFIG)
    shape = target_shape(config["target"]["shape"], where)
    check_arguments(kind, config["arguments"], where)
    with strange_values(f"{where} does not fit {kind.__name__}"):
        with torch.device("meta"):
            outline = kind(shape, **config["arguments"])
        check_tensors(outline, tensors, str(folder / WEIGHTS))
        return kind(shape, **config["arguments"])


def find_folder(name: str | Path) -> Path:
    """The folder with a component's `config.json`, downloaded from the Hub if `name` is not a local
    folder.
    """
    path = Path(name)
    for folder in _places(path):
        if (folder / CONFIG).is_file():
            return folder
    if path.exists():
        raise ValueError(
            f"{str(name)!r} holds no trained component: neither {IN_RUN}/{CONFIG} nor {CONFIG} is "
            "in it"
        )
    if not _HUB_ID.fullmatch(str(name)) or missing_here(name):
        raise ValueError(
            f"{str(name)!r} does not exist: give a run folder, a drafter folder or a Hub id "
            "(USER/NAME)"
        )
    return _download(str(name))


def _places(path: Path) -> tuple[Path, ...]:
    """Folders that may hold the component: an engine's own files come last."""
    return path / IN_RUN, path / BESIDE, path


def _download(name: str) -> Path:
    from huggingface_hub import HfApi, snapshot_download

    repository, _, revision = name.partition("@")
    try:
        # Without safetensors the repository's names show whether it has pickles instead.
        with hub_answers_within(HUB_SECONDS):
            folder = Path(
                snapshot_download(repository, revision=revision or None, allow_patterns=_WANTED)
            )
            whole = any(folder.rglob("*.safetensors"))
            names = [] if whole else HfApi().list_repo_files(repository, revision=revision or None)
    except Exception as error:  # the client's errors have no common base
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ValueError(
            f"{name!r} is neither a folder here nor a reachable Hub repository ({reason})"
        ) from error
    refuse_pickles(names, f"Hub repository {name!r}")
    place = next((place for place in _places(folder) if (place / CONFIG).is_file()), None)
    if place is None:
        raise ValueError(f"Hub repository {name!r} holds no {CONFIG}: it is not a drafter")
    return place


def read_config(folder: Path) -> Config:
    """A component's checked `config.json`; for a drafter in another format, the equivalent (with
    `format`).

    Raises:
        ValueError: not JSON, an unknown format, or a later version.
    """
    # 1. Another format, if keys of ours are missing.
    config = read_object(folder / CONFIG)
    missing = {"drafter_type", "class", "format_version", "arguments", "target"} - set(config)
    if missing:
        name = format_of(config, tensor_names(folder), str(folder / CONFIG))
        if name is not None:
            return foreign_component(config, name, folder)
        raise ValueError(
            f"{folder / CONFIG} lacks {', '.join(sorted(missing))}: it is not a Slipstream "
            f"component, nor a drafter in one of the formats {', '.join(FORMATS)}"
        )
    # 2. Keys, values and version of our format; earlier names become current ones.
    if "format" in config:
        raise ValueError(
            f"{folder / CONFIG}: `format` is no key of a Slipstream component: take it out"
        )
    check_shape(config, CONFIG_SHAPE, str(folder / CONFIG))
    version = config["format_version"]
    if not 1 <= version <= FORMAT_VERSION:
        raise ValueError(
            f"{folder / CONFIG}: format_version {version} cannot be read, only 1 to "
            f"{FORMAT_VERSION}: update Slipstream"
        )
    named = config["drafter_type"], config["class"]
    kind, name = RENAMED.get(named, named)
    return {**config, "drafter_type": kind, "class": name}


def target_of(name: str | Path) -> str:
    """The name of the target that a component was trained for.

    Raises:
        ValueError: its format does not state it.
    """
    target = read_config(find_folder(name))["target"]["name"]
    if not target:
        raise ValueError(
            f"{str(name)!r} does not tell what target it was trained for: give --target"
        )
    return target


def trainable_class(drafter_type: str, name: str) -> type[Trainable]:
    """The class `name` of the one file `drafter_type.py` inside the `modules` package."""
    root = Path(str(modules.__file__)).parent
    if not _IDENTIFIER.fullmatch(drafter_type) or not _IDENTIFIER.fullmatch(name):
        raise ValueError(
            f"drafter_type {drafter_type!r}, class {name!r}: these are not names of a module and a "
            "class"
        )
    # Only names of existing files are imported, never a path from the config.
    files = sorted(root.rglob(f"{drafter_type}.py"))
    if len(files) != 1:
        raise ValueError(
            f"drafter_type {drafter_type!r} names {len(files)} files under modules/: it must name "
            "one"
        )
    path = ".".join(files[0].relative_to(root.parent).with_suffix("").parts)
    kind = getattr(importlib.import_module(path), name, None)
    if not isinstance(kind, type) or not issubclass(kind, Trainable):
        raise ValueError(f"class {name!r} is not a trainable component of {path}")
    return kind


def assign_weights(trainable: Trainable, tensors: Mapping[str, Tensor], source: str) -> None:
    """Load tensors strictly; the module takes their dtypes. `source` names them in errors."""
    check_tensors(trainable, tensors, source)
    expected = trainable.state_dict(keep_vars=True)
    for name, tensor in tensors.items():
        if expected[name].dtype != tensor.dtype:
            expected[name].data = expected[name].data.to(tensor.dtype)
    trainable.load_state_dict(tensors)


def _read_weights(file: Path) -> dict[str, Tensor]:
    if not file.is_file():
        raise ValueError(f"{file} does not exist: the component is incomplete")
    try:
        with safe_open(file, framework="pt") as opened:
            names: list[str] = list(opened.keys())
            tensors: dict[str, Tensor] = {name: opened.get_tensor(name) for name in names}
            aliases = _aliases((opened.metadata() or {}).get("aliases", "{}"), file)
    except (SafetensorError, OSError) as error:
        raise ValueError(
            f"{file} cannot be read as safetensors ({error}): it is damaged or incomplete"
        ) from error
    # Aliases share the memory of a tensor that must be there.
    lost = set(aliases.values()) - set(tensors)
    if lost:
        raise ValueError(
            f"{file} lacks {some(lost)}, which other tensors share: it is damaged or incomplete"
        )
    return {**tensors, **{alias: tensors[name] for alias, name in aliases.items()}}


def _aliases(text: str, file: Path) -> Mapping[str, str]:
    try:
        aliases = json.loads(text)
    except (ValueError, RecursionError):
        raise ValueError(f"{file}: its aliases are not JSON: it is damaged") from None
    check_shape(aliases, Each(str), f"{file}: its aliases")
    return aliases


def trained_for(config: Config) -> TrainedFor:
    """The target of a component's config: name, dimensions, fingerprint and precision.

    Raises:
        ValueError: a precision that there is not.
    """
    target, dtype = config["target"], config["target"].get("dtype")
    if dtype is not None and not isinstance(getattr(torch, dtype, None), torch.dtype):
        raise ValueError(f"target: dtype {dtype!r} is unknown: write a name such as bfloat16")
    shape = TargetShape(**target["shape"])
    return TrainedFor(target["name"], shape, target["fingerprint"], dtype)


def check_compatible(trainable: Trainable, target: Target, name: str) -> None:
    """Raise ValueError if the component `name` may not serve the target."""
    reason = trainable.compatibility(target)
    if reason is not None:
        raise ValueError(f"{name!r} {reason}")


def warm_start(trainable: Trainable, name: str | Path) -> None:
    """Load the weights of an earlier component into `trainable`, which keeps its precision.

    An earlier component of a base class provides part of the weights (Medusa-2 starts from Medusa-1
    heads), one of the same class all of them. Drafters in other formats count as their class here.

    Raises:
        ValueError: an unrelated class, a layout of another kind, or tensors that do not fit.
    """
    folder = find_folder(name)
    config, tensors = _whole(read_config(folder), folder, trainable.arguments["shape"], None)
    kind = trainable_class(config["drafter_type"], config["class"])
    # 1. Class, arguments and rotary parameters must agree.
    if not isinstance(trainable, kind):
        raise ValueError(
            f"init_from {str(name)!r} is a {kind.__name__}, the config trains a "
            f"{type(trainable).__name__}: they must agree"
        )
    refusal = trainable.refusal_to_start(config["arguments"])
    if refusal is not None:
        raise ValueError(f"init_from {str(name)!r} has {refusal}")
    rope = trainable.arguments["shape"].rope
    if "format" in config and config["target"]["shape"]["rope"] != rope:
        raise ValueError(
            f"init_from {str(name)!r} was trained with rotary parameters "
            f"{config['target']['shape']['rope']}, the target has {rope}: it would start wrong"
        )
    # 2. Weights in the component's own dtypes; a base class leaves the others as they are.
    current = trainable.state_dict()
    if type(trainable) is not kind:
        tensors = {**current, **tensors}
    cast_tensors = {
        key: tensor.to(current[key].dtype) if key in current else tensor
        for key, tensor in tensors.items()
    }
    assign_weights(trainable, cast_tensors, str(folder / WEIGHTS))
    check_values(trainable, f"init_from {str(name)!r}")


__all__ = ["Provenance", "load_pretrained", "save_pretrained", "warm_start"]
