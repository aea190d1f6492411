"""Which of a drafter's tensors vLLM loads; runs inside vLLM's process.

vLLM's loaders skip tensors without a matching parameter, and leave parameters without a tensor as
they were allocated. So parameters are filled with blanks before loading: a parameter that is still
blank afterwards was missing, and a tensor whose values are in no parameter was unused.

Shape legend: R rows, X anything.
"""

from __future__ import annotations

import importlib
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from checkpoints.folders import read_tensors

NOT_READ = ("t2d",)
"""Tensors that the format requires and vLLM does not read."""
NOT_USED = re.compile(r"layers\.[1-9]\d*\.hidden_norm\.|mask_embedding$")
"""Parameters that vLLM makes and does not use: of an EAGLE-3 model the first layer alone has this
norm, and a mask's embedding is read from a file of its own, if there is one."""
TARGETS = ("embed_tokens.weight", "lm_head.weight")
"""Tensors that vLLM takes from the target where a drafter ships none."""


def watch(folder: str) -> dict[str, Any]:
    """Wrap vLLM's loader, so that it records how this folder is loaded.

    Returns:
        A dictionary that is filled during loading: `shipped` (number of tensors), names under
            `missing` and `unused`.
    """
    loader: Any = importlib.import_module(
        "vllm.model_executor.model_loader.default_loader"
    ).DefaultModelLoader
    record: dict[str, Any] = {}
    loader.load_weights = watched(loader.load_weights, Path(folder), record)
    return record


def watched(
    load_weights: Callable[..., Any], folder: Path, record: dict[str, Any]
) -> Callable[..., Any]:
    """The loader's method, which also fills `record` when it loads the folder."""

    def load(self: Any, model: nn.Module, model_config: Any) -> None:
        ours = Path(model_config.model) == folder
        if ours:
            blank(model)
        load_weights(self, model, model_config)
        if ours:
            record.update(compared(read_tensors(folder), {**parameters(model), **masks(model)}))

    return load


def parameters(model: nn.Module) -> dict[str, Tensor]:
    """The parameters that vLLM uses, by name."""
    return {name: held for name, held in model.named_parameters() if not NOT_USED.search(name)}


def masks(model: nn.Module) -> dict[str, Tensor]:
    """The state of masked slots, which vLLM holds as a buffer."""
    return {name: held for name, held in model.named_buffers() if name.endswith("mask_hidden")}


@torch.no_grad()
def blank(model: nn.Module) -> None:
    """Fill every parameter with values that no tensor has."""
    for parameter in (*model.parameters(), *masks(model).values()):
        parameter.fill_(
            float("nan") if parameter.is_floating_point() else torch.iinfo(parameter.dtype).min
        )


@torch.no_grad()
def compared(shipped: Mapping[str, Tensor], held: Mapping[str, Tensor]) -> dict[str, Any]:
    """Compare the shipped tensors with the parameters, which were blank before loading."""
    blank_names = (name for name, tensor in held.items() if bool(is_blank(tensor).any()))
    theirs = tuple(name for name in TARGETS if name not in shipped)
    missing = [name for name in blank_names if not name.endswith(theirs)]
    unused = [
        name
        for name, tensor in shipped.items()
        if name not in NOT_READ and not any(contains(other, tensor) for other in held.values())
    ]
    return {"shipped": len(shipped), "missing": missing, "unused": unused}


def is_blank(tensor: Tensor) -> Tensor:
    """Mask of the elements that are still blank."""
    return tensor.isnan() if tensor.is_floating_point() else tensor == torch.iinfo(tensor.dtype).min


def contains(held_RX: Tensor, shipped_RX: Tensor) -> bool:
    """Whether the shipped tensor is a block of consecutive rows of a parameter (merged projections
    hold several).
    """
    # A whole parameter, whatever its dimensions (a state of one row may have others).
    wanted = shipped_RX.to(held_RX.device, held_RX.dtype)
    if held_RX.numel() == wanted.numel():
        return torch.equal(held_RX.flatten(), wanted.flatten())
    # Candidates start where the first row matches.
    count = len(shipped_RX)
    if held_RX.shape[1:] != shipped_RX.shape[1:] or len(held_RX) < count:
        return False
    starts = (held_RX == wanted[0]).reshape(len(held_RX), -1).all(1).nonzero()[:, 0].tolist()
    return any(torch.equal(held_RX[start : start + count], wanted) for start in starts)
