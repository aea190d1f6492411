"""The multi-token-prediction head in a target's checkpoint, by the names of its layouts.

The library's models leave these tensors out, so they are read from the target's own files.

Shape legend: H hidden size.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import LocalEntryNotFoundError
from safetensors import safe_open
from torch import Tensor

from modules.target.loading import locate

if TYPE_CHECKING:
    from modules.contracts.target import Target

QWEN = {
    "fc": "eh_proj",
    "pre_fc_norm_embedding": "enorm",
    "pre_fc_norm_hidden": "hnorm",
    "norm": "norm",
    "layers.0": "layer",
}
"""Modules of Qwen's layout behind `mtp.`, and the drafter's names of them."""
DEEPSEEK = {"enorm": "enorm", "hnorm": "hnorm", "eh_proj": "eh_proj", "shared_head.norm": "norm"}
"""The same of DeepSeek's layout behind `model.layers.L.`, where all others are of the layer."""
_SHARED = ("embed_tokens.", "shared_head.head.")
"""What DeepSeek's layout repeats of the target."""


@dataclass(frozen=True)
class Stored:
    """A tensor of the head in the target's files: its file, its name there, its values, and what is
    added to them (1 for norms that are stored less one).
    """

    file: Path
    name: str
    tensor: Tensor
    offset: float

    @property
    def values(self) -> Tensor:
        """As the drafter holds them, in float32."""
        return self.tensor.float() + self.offset

    def bits_of(self, values: Tensor) -> Tensor:
        """The drafter's values as they are stored; where they are the file's, its own bits."""
        trained = (values.float() - self.offset).to(self.tensor.dtype)
        return torch.where(values.float() == self.values, self.tensor, trained)


def stored_head(target: Target) -> dict[str, Stored]:
    """The head's tensors in the target's files by the drafter's names; empty if the files hold
    none. Of several heads the first.
    """
    layers = target.shape.num_layers
    wanted = re.compile(rf"mtp\.|model\.layers\.{layers}\.")
    offset = 1.0 if target.architecture.offset_norms else 0.0
    return {
        ours: Stored(file, name, tensor, offset * (tensor.dim() == 1 and "norm" in name))
        for file in weight_files(target.name)
        for name, tensor in _tensors(file, wanted)
        if (ours := drafters_name(name, layers)) is not None
    }


def native_head(target: Target) -> dict[str, Tensor]:
    """The head's tensors under the drafter's names, norms as factors; empty if the checkpoint has
    none.
    """
    return {ours: stored.values for ours, stored in stored_head(target).items()}


def drafters_name(name: str, layers: int) -> str | None:
    """The drafter's name of a tensor of a target with so many layers; None if it has none."""
    if name.startswith("mtp."):
        rest = name.removeprefix("mtp.")
        return next(
            (f"{ours}{rest[len(part) :]}" for part, ours in QWEN.items() if _is_of(rest, part)),
            None,
        )
    rest = name.removeprefix(f"model.layers.{layers}.")
    if rest == name or rest.startswith(_SHARED):
        return None
    return next(
        (f"{ours}{rest[len(part) :]}" for part, ours in DEEPSEEK.items() if _is_of(rest, part)),
        f"layer.{rest}",
    )


def _is_of(name: str, module: str) -> bool:
    return name.startswith(f"{module}.")


def weight_files(name: str) -> list[Path]:
    """The safetensors files of a target that has been loaded."""
    place = Path(locate(name))
    if not place.is_dir():
        try:
            place = Path(snapshot_download(name, local_files_only=True))
        except LocalEntryNotFoundError:
            return []
    return sorted(place.glob("*.safetensors"))


def _tensors(file: Path, wanted: re.Pattern[str]) -> Iterator[tuple[str, Tensor]]:
    """The tensors of a file whose names begin so."""
    with safe_open(file, framework="pt") as opened:
        names = opened.keys()
        yield from ((name, opened.get_tensor(name)) for name in names if wanted.match(name))
