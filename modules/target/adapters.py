"""Low-rank adapters on a frozen target's linear layers (LoRA, Hu et al. 2021), part of the module
that trains them.

The target's weights are never copied into a trained module: an adapter is its two factors alone,
and `twin` is the target with its own weights and these factors.

Shape legend: I inputs and O outputs of a linear layer.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from math import sqrt
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import nn

from modules.contracts.shapes import TargetShape
from modules.target.architecture import Architecture

if TYPE_CHECKING:
    from modules.contracts.target import Target

FEED_FORWARD = ("gate_proj", "up_proj", "down_proj")
EVERY_LINEAR = ("q_proj", "k_proj", "v_proj", "o_proj", *FEED_FORWARD)


class LowRank(nn.Module):
    """The factors of a linear layer's change of weight, up · down: zero at the start."""

    def __init__(self, inputs: int, outputs: int, rank: int) -> None:
        super().__init__()
        self.down, self.up = (
            nn.Parameter(torch.empty(rank, inputs)),
            nn.Parameter(torch.zeros(outputs, rank)),
        )
        nn.init.kaiming_uniform_(self.down, a=sqrt(5))


class Adapters(nn.ModuleList):
    """The factors for linear layers of a Llama-type target: one `ModuleDict` by layer name for each
    of its layers.

    Args:
        shape: the target's dimensions.
        rank, alpha, dropout: as in LoRA; the change of weight is alpha / rank · up · down.
        layers: which linear parts of a layer are adapted.
        name: what is appended to the name of an adapted target.
    """

    def __init__(
        self,
        shape: TargetShape,
        rank: int,
        alpha: float,
        dropout: float,
        layers: Sequence[str] = EVERY_LINEAR,
        name: str = "adapted",
    ) -> None:
        if rank < 1:
            raise ValueError(f"rank must be at least 1, got {rank}")
        if not 0 <= dropout < 1:
            raise ValueError(f"dropout must lie in [0, 1), got {dropout}")
        sizes = layer_sizes(shape)
        super().__init__(
            nn.ModuleDict({layer: LowRank(*sizes[layer], rank) for layer in layers})
            for _ in range(shape.num_layers)
        )
        self.rank, self.alpha, self.dropout, self.layers, self.name = (
            rank,
            alpha,
            dropout,
            tuple(layers),
            name,
        )
        self._twin: tuple[Target, Target] | None = None

    def twin(
        self, target: Target, lm_head: LowRank | None = None, training: bool | None = None
    ) -> Target:
        """A target that shares all weights with `target` and has these factors (made once).

        Args:
            target: whose weights are used.
            lm_head: factors for the LM head too.
            training: whether dropout acts; None: as this module's own mode says.
        """
        if self._twin is None or self._twin[0] is not target:
            self._twin = (target, self._make_twin(target, lm_head))
        for factors, module in self._adapted_modules(self._twin[1].architecture, lm_head):
            # Assigned in every call: ZeRO stage 3 gathers parameters when they are read.
            module.lora_A["default"].weight, module.lora_B["default"].weight = (
                factors.down,
                factors.up,
            )
            module.lora_dropout.train(self.training if training is None else training)
        return self._twin[1]

    def _make_twin(self, target: Target, lm_head: LowRank | None) -> Target:
        from peft import LoraConfig, inject_adapter_in_model

        # 1. A copy of the modules on the same weights.
        self.refuse_other_layers(target)
        tensors = [*target.model.parameters(), *target.model.buffers()]
        shared = copy.deepcopy(
            target.model, {id(target): target} | {id(tensor): tensor for tensor in tensors}
        )
        # 2. PEFT adds its adapters, and freezes everything.
        names = [*self.layers, *(["lm_head"] if lm_head is not None else [])]
        config = LoraConfig(
            r=self.rank,
            lora_alpha=cast(int, self.alpha),
            lora_dropout=self.dropout,
            target_modules=names,
        )
        learns = {id(factor): factor.requires_grad for factor in self._factors(lm_head)}
        twin = cast(Any, type(target))(
            inject_adapter_in_model(config, shared), target.tokenizer, f"{target.name}+{self.name}"
        )
        # 3. The factors learn as before.
        for factor in self._factors(lm_head):
            factor.requires_grad_(learns[id(factor)])
        return twin

    def _factors(self, lm_head: LowRank | None) -> list[nn.Parameter]:
        return [*self.parameters(), *(lm_head.parameters() if lm_head is not None else ())]

    @torch.no_grad()
    def merged(self, target: Target, lm_head: LowRank | None = None) -> Target:
        """A copy of the target with the changes added to its weights: a different model with
        another fingerprint.
        """
        self.refuse_other_layers(target)
        # 1. A copy of the model.
        model = copy.deepcopy(target.model, {id(target): target})
        # 2. Add the change to each weight.
        for factors, module in self._adapted_modules(Architecture(model), lm_head):
            change = (self.alpha / self.rank) * (factors.up @ factors.down)
            module.weight = nn.Parameter(
                module.weight + change.to(module.weight), requires_grad=False
            )
        # 3. An LM head of other weights is no longer the embedding.
        if lm_head is not None:
            model.config.tie_word_embeddings = False
        # 4. The target last: its stock model has the weights that are there now.
        return cast(Any, type(target))(model, target.tokenizer, f"{target.name}+{self.name}")

    def _adapted_modules(
        self, architecture: Architecture, lm_head: LowRank | None
    ) -> list[tuple[LowRank, Any]]:
        pairs: list[tuple[LowRank, Any]] = [] if lm_head is None else [(lm_head, architecture.head)]
        for adapters, layer in zip(self, architecture.layers, strict=True):
            modules = {name.rsplit(".", 1)[-1]: module for name, module in layer.named_modules()}
            pairs += [
                (cast(LowRank, factors), modules[name])
                for name, factors in cast(nn.ModuleDict, adapters).items()
            ]
        return pairs

    def refuse_other_layers(self, target: Target) -> None:
        """ValueError when the target's layers do not have these linear parts."""
        names = {
            name.rsplit(".", 1)[-1] for name, _ in target.architecture.layers[0].named_modules()
        }
        missing = [name for name in self.layers if name not in names]
        if missing:
            raise ValueError(
                f"target {target.name!r} has no layers {', '.join(missing)} to adapt: {self.name} "
                "needs a Llama-type target"
            )


def layer_sizes(shape: TargetShape) -> dict[str, tuple[int, int]]:
    """Inputs and outputs (I, O) of a Llama-type layer's linear parts."""
    size, queries, keys = (
        shape.hidden_size,
        shape.num_heads * shape.head_dim,
        shape.num_kv_heads * shape.head_dim,
    )
    inner = shape.intermediate_size
    return {
        "q_proj": (size, queries),
        "k_proj": (size, keys),
        "v_proj": (size, keys),
        "o_proj": (queries, size),
        "gate_proj": (size, inner),
        "up_proj": (size, inner),
        "down_proj": (inner, size),
    }
