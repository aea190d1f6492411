"""The model that SkipDecode trains: adapters on the target, or a copy of all of its weights."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import nn

from modules.contracts.shapes import TargetShape
from modules.target.adapters import Adapters
from modules.target.hf_models import config_of_dict, config_of_shape, fresh_model
from modules.target.target import Target as LoadedTarget

if TYPE_CHECKING:
    from modules.contracts.target import Target


class LowRankTuning(Adapters):
    """The target's own weights with low-rank adapters on every linear layer."""

    def model(self, target: Target, training: bool = False) -> Target:
        """The adapted target; `training`: with dropout."""
        return self.twin(target, training=training and self.training)

    def freeze(self, layers: Iterable[int]) -> None:
        """Train nothing of these layers."""
        for layer in layers:
            self[layer].requires_grad_(False)


class WholeTuning(nn.Module):
    """A model of its own that starts as the target.

    Args:
        shape: the target's dimensions.
        config: the model's config as plain values; None: of the target, filled in by `initialise`.
    """

    def __init__(self, shape: TargetShape, config: dict[str, Any] | None) -> None:
        super().__init__()
        made = (
            config_of_shape(shape, shape.num_layers)
            if config is None
            else config_of_dict(config, None)
        )
        # `copy_from` replaces a model that has no config yet.
        with nullcontext() if config is not None else torch.device("meta"):
            self._adopt(fresh_model(made))

    def _adopt(self, model: Any) -> None:
        # A list hides the wrapper from nn.Module: its weights are those of `self.weights`.
        self._runner = [LoadedTarget(model, None, "skipdecode")]
        self.weights = model.requires_grad_(True).train(self.training)

    def copy_from(self, target: Target) -> Any:
        """Start as the target; returns its config."""
        stock = target.stock
        self._adopt(fresh_model(stock.config))
        self.weights.load_state_dict(stock.state_dict())
        return self.weights.config

    def model(self, target: Target, training: bool = False) -> Target:
        """The trained model; `target` is not used."""
        return cast("Target", self._runner[0])

    def freeze(self, layers: Iterable[int]) -> None:
        """Train nothing of these layers."""
        for layer in layers:
            self._runner[0].architecture.layers[layer].requires_grad_(False)
