"""Medusa-2: heads and target trained together, the target through low-rank adapters (Cai et al.
2024, section 2.2.2).

Shape legend: B sequences, T tokens of a packed row, M training rows, H hidden size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from math import pi, sin
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from modules.contracts.batches import TextBatch
from modules.contracts.losses import Losses, Mean
from modules.contracts.shapes import StateName, TargetShape
from modules.contracts.trainable import Footprint, GradientLayers, TrainingResult
from modules.drafters.heads.medusa import Medusa
from modules.losses.averages import SharedCount
from modules.losses.chunked import cross_entropy, entropies, next_token_rows, target_distributions
from modules.target.adapters import Adapters, LowRank

if TYPE_CHECKING:
    from modules.contracts.target import Target


class Medusa2(Medusa):
    """Medusa whose target is trained too. It decodes losslessly with respect to `adapt(target)`,
    which is a different model.

    L = L_LM + coefficient · s(progress) · Σ_k decay^(k+1) CE_k. L_LM is the cross-entropy of the
    data, or with `self_distillation` KL(p_target ‖ p_adapted). The usual second stage starts from
    trained Medusa-1 heads.

    Args:
        shape: the target's dimensions (Llama-type layers only).
        heads, blocks, draft_vocabulary, tree, decay: as in Medusa, with one trainable LM
            head per head.
        rank, alpha, dropout: of the adapters, which sit on every linear layer and on the LM head.
        coefficient: weight of the heads' losses.
        schedule: `"constant"`, or `"sine"`: s rises as sin(π/2 · progress / ramp) until `ramp`,
            then stays 1. In validation it is 1 throughout.
        ramp: share of the training over which s rises.
        self_distillation: train on the unchanged target's distributions instead of the data (for
            text that the target generated).
        head_lr_scale: learning rate of the heads as a multiple of the adapters'.
    """

    def __init__(
        self,
        shape: TargetShape,
        heads: int = 5,
        blocks: int = 1,
        draft_vocabulary: int | None = None,
        tree: list[list[int]] | str | None = None,
        decay: float = 0.8,
        rank: int = 32,
        alpha: float = 16.0,
        dropout: float = 0.05,
        coefficient: float = 0.2,
        schedule: Literal["constant", "sine"] = "constant",
        ramp: float = 1.0,
        self_distillation: bool = False,
        head_lr_scale: float = 4.0,
    ) -> None:
        super().__init__(shape, heads, blocks, "own", draft_vocabulary, tree, decay)
        if schedule not in ("constant", "sine"):
            raise ValueError(f"schedule must be 'constant' or 'sine', got {schedule!r}")
        if not 0 < ramp <= 1:
            raise ValueError(f"ramp must lie in (0, 1], got {ramp}")
        self.coefficient, self.schedule, self.ramp = coefficient, schedule, ramp
        self.self_distillation, self.head_lr_scale = self_distillation, head_lr_scale
        self.adapters = Adapters(shape, rank, alpha, dropout, name="medusa2")
        self.lm_head_adapter = LowRank(shape.hidden_size, shape.vocab_size, rank)

    # -- training ----------------------------------------------------------------------------------

    def footprint(self, rows: int, length: int) -> Footprint:
        """Adds the target's layers, which run with a gradient."""
        layers = GradientLayers(self.shape, adapted=True, dropout=self.adapters.dropout > 0)
        return replace(super().footprint(rows, length), layers=layers)

    @property
    def training_states(self) -> tuple[StateName, ...]:
        """No cached states: the adapted target runs in every step."""
        return ()

    @property
    def online(self) -> bool:
        """True: its target changes while it trains."""
        return True

    def parameter_groups(self) -> list[dict[str, Any]]:
        """The heads learn `head_lr_scale` times as fast as the adapters."""
        adapters = [*self.adapters.parameters(), *self.lm_head_adapter.parameters()]
        adapter_ids = {id(parameter) for parameter in adapters}
        heads = [
            parameter
            for parameter in self.declared_parameters()
            if id(parameter) not in adapter_ids
        ]
        return [
            {"params": adapters, "lr_scale": 1.0},
            {"params": heads, "lr_scale": self.head_lr_scale},
        ]

    def ramp_up(self, progress: float) -> float:
        """s(progress), the weight of the heads' losses over the training, in [0, 1]."""
        return 1.0 if self.schedule == "constant" else sin(pi / 2 * min(1.0, progress / self.ramp))

    def loss(self, batch: TextBatch, target: Target, progress: float) -> Losses:
        """Language loss of the adapted target plus the ramped losses of the heads."""
        # The language loss is a mean over all rows of all processes.
        flat_M, labels_M = next_token_rows(batch)
        count = SharedCount(torch.as_tensor(len(flat_M), device=flat_M.device))
        # The heads read the adapted target's states, and their gradient reaches the adapters.
        twin = self.adapted_twin(target)
        final_BTH = twin.features(batch, ("final",), gradient=True)["final"]
        read = {"final": final_BTH.to(self.precision)}
        heads = super().loss(replace(batch, states=read), twin, progress)
        features_MH = final_BTH.flatten(0, 1)[flat_M]
        losses_M = self._language_losses(batch, target, twin, features_MH, flat_M, labels_M)
        total = (
            losses_M.sum() / count.divisor()
            + self.coefficient * self.ramp_up(progress) * heads.total
        )
        language = Mean(losses_M.detach().sum(), count.local)
        return Losses(total, {**heads.metrics, "language_loss": language})

    def _language_losses(
        self,
        batch: TextBatch,
        target: Target,
        twin: Target,
        features_MH: Tensor,
        flat_M: Tensor,
        labels_M: Tensor,
    ) -> Tensor:
        size = self.shape.vocab_size
        if not self.self_distillation:
            return cross_entropy(features_MH, twin.logits, labels_M, size)[0]
        # KL(p_target ‖ p_adapted): the cross-entropy less the unchanged target's entropy.
        unchanged = target.features(batch, ("final",))["final"]
        distributions = target_distributions(target.unrounded_logits, unchanged, flat_M, size)
        return cross_entropy(features_MH, twin.logits, labels_M, size, distributions, flat_M)[
            0
        ] - entropies(distributions, flat_M, size)

    def adapted_twin(self, target: Target) -> Target:
        """A target that shares all weights with `target` and runs through this module's adapters
        (made once).
        """
        self._refuse_other_layers(target)
        return self.adapters.twin(target, self.lm_head_adapter)

    def adapt(self, target: Target) -> Target:
        """A copy of the target with the adapters added to its weights: a different model, with its
        own fingerprint.
        """
        self._refuse_other_layers(target)
        return self.adapters.merged(target, self.lm_head_adapter)

    def adapt_sharing(self, target: Target) -> Target:
        """The twin without dropout: equal to `adapt` up to rounding, with only the adapters as
        additional memory.
        """
        self._refuse_other_layers(target)
        return self.adapters.twin(target, self.lm_head_adapter, training=False)

    def finish(self, batches: Iterable[TextBatch], target: Target) -> TrainingResult:
        """As the base class; an optimised tree is measured on the adapted target."""
        twin = self.adapt_sharing(target)
        finals = ((batch, twin.features(batch, ("final",))["final"]) for batch in batches)
        filled = (
            replace(batch, states={"final": final_BTH.to(self.precision)})
            for batch, final_BTH in finals
        )
        return super().finish(filled, twin)

    def _refuse_other_layers(self, target: Target) -> None:
        try:
            self.adapters.refuse_other_layers(target)
        except ValueError as error:
            raise ValueError(
                f"{error}; use modules.drafters.heads.medusa.Medusa with this one"
            ) from None
