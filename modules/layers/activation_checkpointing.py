"""Activation checkpointing: blocks that recompute their activations in the backward pass instead of
storing them.

Chen et al. 2016, arXiv 1604.06174. A block has an attribute `recompute`;
`use_activation_checkpointing` sets it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint


def recomputed(wanted: bool, function: Callable[..., Any], *arguments: Any) -> Any:
    """The function's outputs; if `wanted`, only its arguments are stored for the backward pass."""
    if wanted and torch.is_grad_enabled():
        return checkpoint(function, *arguments, use_reentrant=False)
    return function(*arguments)


def use_activation_checkpointing(trainable: nn.Module) -> None:
    """Recompute all blocks of a component that support it, including the layers of stock models.

    Raises:
        ValueError: it has no such block.
    """
    blocks: list[Any] = [
        module
        for module in trainable.modules()
        if hasattr(module, "recompute") or hasattr(module, "gradient_checkpointing_enable")
    ]
    for block in blocks:
        if hasattr(block, "recompute"):
            block.recompute = True
        else:
            block.gradient_checkpointing_enable({"use_reentrant": False})
    if not blocks:
        raise ValueError(
            f"trainer.activation_checkpointing is true, but {type(trainable).__name__} has no "
            "layers of its own to recompute: set it to false"
        )
