"""Writing folders of components, and reading folders from elsewhere.

Only safetensors and JSON are read, which cannot run code. PyTorch files (`.bin`, `.pt`, the only
files of some public drafters) are pickles and are refused.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from modules.runtime.files import as_umask_says

CONFIG, WEIGHTS = "config.json", "model.safetensors"
PICKLED = ("pytorch_model.bin", "medusa_lm_head.pt")
"""PyTorch files that engines read; they are written here and never read."""
PICKLE_ENDINGS = (".bin", ".pt", ".pth")
"""File endings of PyTorch files, which are never read here."""


HUB_SECONDS = 120.0
"""Seconds without an answer after which a request to the Hub fails."""


@contextmanager
def hub_answers_within(seconds: float) -> Iterator[None]:
    """Set a timeout for requests to the Hub in the block that have none.

    Some client functions disable the session's timeout (`model_info`), so a hook changes every
    request before it is sent.
    """
    from huggingface_hub.utils import get_session

    def limit(request: Any) -> None:
        timeouts = request.extensions.get("timeout", {})
        limits = {
            kind: timeouts.get(kind) or seconds for kind in ("connect", "read", "write", "pool")
        }
        request.extensions = {**request.extensions, "timeout": limits}

    hooks = get_session().event_hooks["request"]
    hooks.append(limit)
    try:
        yield
    finally:
        hooks.remove(limit)


def write_json(file: Path, value: Any) -> None:
    """Write indented JSON with sorted keys."""
    file.write_text(json.dumps(value, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def write_tensors(
    file: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None
) -> None:
    """Write a safetensors file with default permissions; tensors are copied and made contiguous."""
    copies = {
        name: tensor.detach().to("cpu", copy=True).contiguous() for name, tensor in tensors.items()
    }
    save_file(copies, file, metadata={"format": "pt", **(metadata or {})})
    as_umask_says(file)


def read_tensors(folder: Path) -> dict[str, Tensor]:
    """All tensors of the safetensors files of a folder in another format.

    Raises:
        ValueError: no such file, or a damaged one; for pickles the message tells how to convert
            them.
    """
    files = sorted(folder.glob("*.safetensors"))
    if files:
        return {name: tensor for file in files for name, tensor in _safetensors(file).items()}
    refuse_pickles((path.name for path in folder.iterdir()), str(folder))
    raise ValueError(f"{folder} holds no weights: no *.safetensors")


def refuse_pickles(names: Iterable[str], where: str) -> None:
    """Raise ValueError if PyTorch files are among these names, with instructions to convert them.

    Called only where there are no safetensors.
    """
    pickles = sorted(name for name in names if name.endswith(PICKLE_ENDINGS))
    if pickles:
        raise ValueError(
            f"{where} holds its weights as {pickles[0]} only, a pickle, which can run code: "
            "convert it where you trust it, safetensors.torch.save_file(torch.load(FILE, "
            f"weights_only=True), '{WEIGHTS}'), and give the folder with that file and {CONFIG}"
        )


def tensor_names(folder: Path) -> set[str]:
    """Names of all tensors in the safetensors files of a folder, without reading them."""
    names: set[str] = set()
    for file in folder.glob("*.safetensors"):
        with _damage_named(file), safe_open(file, framework="pt") as opened:
            names.update(opened.keys())
    return names


def _safetensors(file: Path) -> dict[str, Tensor]:
    with _damage_named(file):
        return load_file(file)


@contextmanager
def _damage_named(file: Path) -> Iterator[None]:
    try:
        yield
    except (SafetensorError, OSError) as error:
        raise ValueError(
            f"{file} cannot be read as safetensors ({error}): it is damaged or incomplete"
        ) from error


class Ledger:
    """Tensors of a file in another format, each taken once by name and shape, so that none is
    misread or ignored.

    Args:
        tensors: by name.
        source: the file's name in error messages.
    """

    def __init__(self, tensors: Mapping[str, Tensor], source: str) -> None:
        self.tensors, self.source = dict(tensors), source

    def __contains__(self, name: str) -> bool:
        return name in self.tensors

    def take(self, name: str, *shape: int) -> Tensor:
        """The tensor of that name, which must have that shape.

        Raises:
            ValueError: it is missing, or has another shape.
        """
        if name not in self.tensors:
            raise ValueError(f"{self.source}: {name} is missing")
        tensor = self.tensors.pop(name)
        if tuple(tensor.shape) != shape:
            raise ValueError(
                f"{self.source}: {name} has shape {tuple(tensor.shape)} instead of {shape}"
            )
        return tensor

    def drop(self, ending: str) -> None:
        """Drop tensors whose names end so: redundant ones that follow from the config."""
        self.tensors = {
            name: tensor for name, tensor in self.tensors.items() if not name.endswith(ending)
        }

    def close(self) -> None:
        """Raise ValueError if a tensor was not taken; ignoring it would change the drafts."""
        if self.tensors:
            names = ", ".join(sorted(self.tensors)[:4])
            raise ValueError(
                f"{self.source}: {names} has no place in this drafter: it was trained with "
                "something that is not supported here"
            )
