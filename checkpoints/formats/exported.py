"""What an export is, before it is written."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor


@dataclass(frozen=True)
class Exported:
    """A drafter in an engine's format.

    config: of `config.json`. tensors: by the engine's names. weights: file names, each holding all
    the tensors.
    usage: how the engine is started with it (`FOLDER` stands for where it lies). notes: what its
    user must know.
    tokenizer: to be saved beside it, for what is a model of its own.
    """

    config: Mapping[str, Any]
    tensors: Mapping[str, Tensor]
    weights: tuple[str, ...] = ("model.safetensors",)
    usage: str = ""
    notes: tuple[str, ...] = field(default=())
    tokenizer: Any = None


def served_name(name: str) -> str:
    """What an engine calls a target: the Hub id of the embedded one, any other as it is."""
    return HUB_NAMES.get(name, name)


HUB_NAMES = {"smollm2-135m": "HuggingFaceTB/SmolLM2-135M-Instruct"}
"""Hub ids of targets that have another name here."""
