"""Folders of these models: `config.json` and `model.safetensors`."""

from __future__ import annotations

import importlib
import json
import re
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from modules.runtime.argument_types import check_scalars
from modules.runtime.files import as_umask_says, read_object, whole_folder
from modules.tokenization.contract import LanguageModel
from modules.tokenization.units import units_of

CONFIG, WEIGHTS = "config.json", "model.safetensors"
_CLASS = re.compile(r"[a-z][a-z0-9_]*\.[A-Z][A-Za-z0-9]*")


def save_language_model(model: LanguageModel, folder: Path, training: dict[str, Any]) -> None:
    """Write weights and config atomically.

    Args:
        model: to save.
        folder: to write.
        training: JSON-able; what it was trained on, for the reader.
    """
    kind = type(model)
    config = {
        "class": f"{kind.__module__.rsplit('.', 1)[-1]}.{kind.__name__}",
        "settings": model.settings,
        "units": model.units.config(),
        "training": training,
    }
    with whole_folder(folder) as fresh:
        (fresh / CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        weights = {name: tensor.cpu().contiguous() for name, tensor in model.state_dict().items()}
        save_file(weights, fresh / WEIGHTS, metadata={"format": "pt"})
        as_umask_says(fresh / WEIGHTS)


def load_language_model(folder: str | Path) -> LanguageModel:
    """A saved model, in evaluation mode. Nothing of the size that a config claims is allocated
    before the weights were found to have it.

    Args:
        folder: of the model, or the run's, which has it as `model`.

    Raises:
        ValueError: a config that is no language model's, or weights that are not the config's.
    """
    place = Path(folder)
    if not (place / CONFIG).is_file() and (place / "model" / CONFIG).is_file():
        place /= "model"
    config, where = read_object(place / CONFIG), str(place / CONFIG)
    settings = config.get("settings")
    if not isinstance(settings, dict):
        raise ValueError(f"{where} has no `settings`: it is no language model of ours")
    kind, units = _class_of(config.get("class"), where), units_of(config.get("units") or {})
    check_scalars(kind, settings, where)
    # 1. An outline without memory takes the file's tensors, if they are of its shapes.
    try:
        tensors = load_file(place / WEIGHTS)
        with torch.device("meta"):
            outline = kind(units, **settings)
        outline.load_state_dict(tensors, assign=True)
    except (TypeError, ValueError, RuntimeError, SafetensorError, OSError) as error:
        line = " ".join(str(error).split())
        raise ValueError(f"{place}: settings and weights do not fit: {line}") from error
    if not all(bool(tensor.isfinite().all()) for tensor in tensors.values()):
        raise ValueError(f"{place / WEIGHTS} holds NaN or infinity: train the model again")
    # 2. The model itself has buffers besides.
    model = kind(units, **settings)
    model.load_state_dict(tensors)
    return model.eval()


def _class_of(name: Any, where: str) -> type[LanguageModel]:
    """A class of this folder by the names of its file and its own."""
    if not isinstance(name, str) or not _CLASS.fullmatch(name):
        raise ValueError(f"{where}: class {name!r} is no language model of ours")
    file, _, member = name.partition(".")
    try:
        kind = getattr(importlib.import_module(f"{__package__}.{file}"), member)
    except (ImportError, AttributeError):
        raise ValueError(f"{where}: class {name!r} is no language model of ours") from None
    if not isinstance(kind, type) or not issubclass(kind, LanguageModel):
        raise ValueError(f"{where}: class {name!r} is no language model of ours")
    return kind
