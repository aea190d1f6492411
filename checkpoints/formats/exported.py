"""The content of an export, before it is written."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

if TYPE_CHECKING:
    from modules.drafters.trained import TrainedDrafter


@dataclass(frozen=True)
class Exported:
    """A drafter in an engine's format.

    config: content of `config.json`.
    tensors: by the engine's names.
    weights: names of weight files, each with all tensors.
    usage: the command that starts the engine (`FOLDER` stands for the export's folder).
    notes: what its user must know.
    tokenizer: saved in the folder, for a drafter that is a complete model.
    shards: weight files with other tensors, by name.
    copied: files that belong to the folder as they are.
    """

    config: Mapping[str, Any]
    tensors: Mapping[str, Tensor]
    weights: tuple[str, ...] = ("model.safetensors",)
    usage: str = ""
    notes: tuple[str, ...] = field(default=())
    tokenizer: Any = None
    shards: Mapping[str, Mapping[str, Tensor]] = field(default_factory=dict)
    copied: tuple[Path, ...] = ()


def trimmed_note(drafter: TrainedDrafter) -> tuple[str, ...]:
    """A note about a trimmed draft vocabulary, which the format cannot express."""
    if drafter.vocabulary_D is None:
        return ()
    return (
        f"the engine drafts from all {drafter.shape.vocab_size} tokens, this project from "
        f"{drafter.draft_size}: where the likeliest is none of these, drafts differ",
    )


def served_name(name: str) -> str:
    """A target's name for engines: the Hub id of the embedded target, otherwise the same name."""
    return HUB_NAMES.get(name, name)


HUB_NAMES = {"smollm2-135m": "HuggingFaceTB/SmolLM2-135M-Instruct"}
"""Hub ids of targets whose name here differs."""
