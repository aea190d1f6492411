"""Medusa-2: heads and target trained together, the target through low-rank adapters (Cai et al. 2024, section 2.2.2).

Shape legend: B sequences, T tokens of a packed row, M training rows, H hidden size, V vocabulary.
"""

from __future__ import annotations

import copy
from dataclasses import replace
from math import pi, sin, sqrt
from typing import TYPE_CHECKING, Any, Literal, cast

import torch
from torch import Tensor, nn

from modules.core.batches import StateName, TextBatch
from modules.core.losses import cross_entropy, entropies, next_token_rows, target_laws
from modules.core.trainable import Losses, Mean, TargetShape
from modules.heads.medusa import Medusa

if TYPE_CHECKING:
    from modules.core.target import Target


class LowRank(nn.Module):
    """The factors of a linear layer's change of weight, up · down: zero at the start (LoRA, Hu et al. 2021)."""

    def __init__(self, inputs: int, outputs: int, rank: int) -> None:
        super().__init__()
        self.down, self.up = nn.Parameter(torch.empty(rank, inputs)), nn.Parameter(torch.zeros(outputs, rank))
        nn.init.kaiming_uniform_(self.down, a=sqrt(5))


class Medusa2(Medusa):
    """Medusa whose target moves too: it decodes with `adapt(target)`, a different model, exactly as that one would.

    L = L_LM + coefficient · s(progress) · Σ_k decay^(k+1) CE_k. L_LM is the cross-entropy of the data, or with
    `self_distillation` KL(p_target ‖ p_adapted). The usual second stage starts from trained Medusa-1 heads.

    Args:
        shape: the target's dimensions (Llama-type layers only).
        heads, blocks, draft_vocabulary, tree, decay: as in Medusa, with an LM head of its own per head.
        rank, alpha, dropout: of the adapters, which sit on every linear layer and on the LM head.
        coefficient: weight of the heads' losses.
        schedule: `"constant"`, or `"sine"`: s rises as sin(π/2 · progress / ramp) until `ramp`, then stays 1.
        ramp: share of the training over which s rises.
        self_distillation: keep to the unchanged target's laws instead of the data (for text it wrote itself).
        head_lr_scale: learning rate of the heads as a multiple of the adapters'.
    """

    def __init__(self, shape: TargetShape, heads: int = 5, blocks: int = 1, draft_vocabulary: int | None = None,
                 tree: list[list[int]] | str = "narrow", decay: float = 0.8, rank: int = 32, alpha: float = 16.0,
                 dropout: float = 0.05, coefficient: float = 0.2, schedule: Literal["constant", "sine"] = "constant",
                 ramp: float = 1.0, self_distillation: bool = False, head_lr_scale: float = 4.0) -> None:
        super().__init__(shape, heads, blocks, "own", draft_vocabulary, tree, decay)
        if schedule not in ("constant", "sine"):
            raise ValueError(f"schedule must be 'constant' or 'sine', got {schedule!r}")
        if not 0 < ramp <= 1:
            raise ValueError(f"ramp must lie in (0, 1], got {ramp}")
        self.rank, self.alpha, self.dropout = rank, alpha, dropout
        self.coefficient, self.schedule, self.ramp = coefficient, schedule, ramp
        self.self_distillation, self.head_lr_scale = self_distillation, head_lr_scale
        self.adapters = nn.ModuleList(
            nn.ModuleDict({name: LowRank(*size, rank) for name, size in _layer_sizes(shape).items()})
            for _ in range(shape.num_layers))
        self.lm_head_adapter = LowRank(shape.hidden_size, shape.vocab_size, rank)
        self._twin: tuple[Target, Target] | None = None

    # -- training ---------------------------------------------------------------------------------------------

    @property
    def training_states(self) -> tuple[StateName, ...]:
        """None: the adapted target is run anew in every step."""
        return ()

    @property
    def online(self) -> bool:
        """Its target changes while it trains."""
        return True

    def parameter_groups(self) -> list[dict[str, Any]]:
        """The heads learn `head_lr_scale` times as fast as the adapters."""
        adapters = [*self.adapters.parameters(), *self.lm_head_adapter.parameters()]
        known = {id(parameter) for parameter in adapters}
        heads = [parameter for parameter in self.declared_parameters() if id(parameter) not in known]
        return [{"params": adapters, "lr_scale": 1.0}, {"params": heads, "lr_scale": self.head_lr_scale}]

    def ramp_up(self, progress: float) -> float:
        """s(progress)."""
        return 1.0 if self.schedule == "constant" else sin(pi / 2 * min(1.0, progress / self.ramp))

    def loss(self, batch: TextBatch, target: Target, progress: float) -> Losses:
        """Language loss of the adapted target plus the ramped losses of its heads."""
        twin = self.adapted_twin(target)
        final_BTH = twin.features(batch, ("final",), gradient=True)["final"]
        heads = super().loss(replace(batch, states={"final": final_BTH}), twin, progress)
        losses_M = self._language_losses(batch, target, twin, final_BTH)
        count = torch.as_tensor(len(losses_M), device=losses_M.device)
        total = losses_M.sum() / count.clamp(min=1) + self.coefficient * self.ramp_up(progress) * heads.total
        return Losses(total, {**heads.metrics, "language_loss": Mean(losses_M.detach().sum(), count)})

    def _language_losses(self, batch: TextBatch, target: Target, twin: Target, final_BTH: Tensor) -> Tensor:
        flat_M, labels_M = next_token_rows(batch)
        features_MH, size = final_BTH.flatten(0, 1)[flat_M], self.shape.vocab_size
        if not self.self_distillation:
            return cross_entropy(features_MH, twin.logits, labels_M, size)[0]
        unchanged = target.features(batch, ("final",))["final"]
        laws = target_laws(target.logits, unchanged, flat_M, size)
        return cross_entropy(features_MH, twin.logits, labels_M, size, laws, flat_M)[0] - entropies(laws, flat_M, size)

    def adapted_twin(self, target: Target) -> Target:
        """A target that shares all weights with `target` and runs through this module's adapters (made once)."""
        if self._twin is None or self._twin[0] is not target:
            self._twin = (target, self._make_twin(target))
        for _, module in self._adapted_modules(self._twin[1]):
            module.lora_dropout.train(self.training)
        return self._twin[1]

    def _make_twin(self, target: Target) -> Target:
        from peft import LoraConfig, inject_adapter_in_model
        self._refuse_other_layers(target)
        tensors = [*target.model.parameters(), *target.model.buffers()]
        shared = copy.deepcopy(target.model, {id(target): target} | {id(tensor): tensor for tensor in tensors})
        config = LoraConfig(r=self.rank, lora_alpha=cast(int, self.alpha), lora_dropout=self.dropout,
                            target_modules=[*_layer_sizes(self.shape), "lm_head"])
        twin = type(target)(inject_adapter_in_model(config, shared), target.tokenizer, self._adapted_name(target))
        for factors, module in self._adapted_modules(twin):
            module.lora_A["default"].weight, module.lora_B["default"].weight = factors.down, factors.up
            factors.requires_grad_(True)
        return twin

    # -- the target it decodes with -----------------------------------------------------------------------------

    @torch.no_grad()
    def adapt(self, target: Target) -> Target:
        """A copy of the target with the adapters added to its weights: a different model, with its own fingerprint."""
        self._refuse_other_layers(target)
        adapted = type(target)(copy.deepcopy(target.model, {id(target): target}), target.tokenizer,
                               self._adapted_name(target))
        for factors, module in self._adapted_modules(adapted):
            change = (self.alpha / self.rank) * (factors.up @ factors.down)
            module.weight = nn.Parameter(module.weight + change.to(module.weight), requires_grad=False)
        cast(Any, adapted.model).config.tie_word_embeddings = False
        return adapted

    def _adapted_modules(self, target: Target) -> list[tuple[LowRank, Any]]:
        pairs: list[tuple[LowRank, Any]] = [(self.lm_head_adapter, target.anatomy.head)]
        for adapters, layer in zip(self.adapters, target.anatomy.layers, strict=True):
            found = {name.rsplit(".", 1)[-1]: module for name, module in layer.named_modules()}
            pairs += [(cast(LowRank, factors), found[name]) for name, factors in cast(nn.ModuleDict, adapters).items()]
        return pairs

    def _adapted_name(self, target: Target) -> str:
        return f"{target.name}+medusa2"

    def _refuse_other_layers(self, target: Target) -> None:
        names = {name.rsplit(".", 1)[-1] for name, _ in target.anatomy.layers[0].named_modules()}
        missing = [name for name in _layer_sizes(self.shape) if name not in names]
        if missing:
            raise ValueError(f"target {target.name!r} has no layers {', '.join(missing)} to adapt: Medusa-2 needs a "
                             "Llama-type target; use modules.heads.medusa.Medusa with this one")


def _layer_sizes(shape: TargetShape) -> dict[str, tuple[int, int]]:
    """Inputs and outputs of a layer's linear parts."""
    size, queries, keys = shape.hidden_size, shape.num_heads * shape.head_dim, shape.num_kv_heads * shape.head_dim
    inner = shape.intermediate_size
    return {"q_proj": (size, queries), "k_proj": (size, keys), "v_proj": (size, keys), "o_proj": (queries, size),
            "gate_proj": (size, inner), "up_proj": (size, inner), "down_proj": (inner, size)}
