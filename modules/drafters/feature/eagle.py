"""EAGLE: autoregression on the target's features, with the token one step ahead (Li et al. 2024,
arXiv 2401.15077).

With the builder `modules.trees.reranked.RerankedTree` it is EAGLE-2 (Li et al. 2024, arXiv
2406.16858): the same weights.

Shape legend: B sequences, T tokens of a packed row, N rows of one call, H hidden size.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from modules.contracts.batches import TextBatch
from modules.contracts.shapes import StateName, TargetShape
from modules.drafters.feature.base import FeatureDrafter
from modules.drafters.trained import DraftStep
from modules.layers.decoder_layer import DecoderLayer
from modules.layers.token_scale import token_scale
from modules.losses.chunked import Head, smooth_l1

if TYPE_CHECKING:
    from modules.contracts.target import Target


class Eagle(FeatureDrafter):
    """z_t = W [s·e(x_{t+1}) ; f_t], then a decoder layer without input norm: f̂_{t+1}; logits by
    the frozen LM head.

    Loss (section 3.2): feature_weight · SmoothL1(f̂, f) + token_weight · soft cross-entropy (or
    another divergence), teacher forcing. The release has s = 1; here s brings embeddings to the
    size of features (`modules.layers.token_scale`), and an export folds it into W.

    Args:
        shape: the target's dimensions.
        draft_vocabulary: how many token ids can be drafted; None for all.
        bias: whether W has a bias (engines that serve it expect none, or zeros).
        feature_weight: weight of the distance between drafted and true features (0: ablation).
        token_weight: weight of the soft cross-entropy.
        noise: half-width of the uniform noise on input features in training, scaled by 512 / the
            tokens of the conversation (0: ablation).
        steps: draft steps unrolled in training; 1 is the paper's teacher forcing.
        decay: step j weighs decay^j.
        depth: levels of its default tree.
        tree: fixed paths instead of that tree: `eagle_25` (the paper), `narrow`, `optimised_N` or a
            list.
        divergence: how the target's distribution is learnt (`modules.losses.divergences`).
    """

    token_scale: Tensor

    def __init__(
        self,
        shape: TargetShape,
        draft_vocabulary: int | None = None,
        bias: bool = False,
        feature_weight: float = 1.0,
        token_weight: float = 0.1,
        noise: float = 0.1,
        steps: int = 1,
        decay: float = 0.8,
        depth: int = 5,
        tree: list[list[int]] | str | None = None,
        divergence: str = "cross_entropy",
    ) -> None:
        super().__init__(shape, steps, draft_vocabulary, decay, depth, tree)
        self.use_divergence(divergence)
        self.feature_weight, self.token_weight, self.noise = feature_weight, token_weight, noise
        self.fc = nn.Linear(2 * shape.hidden_size, shape.hidden_size, bias=bias)
        self.layer = DecoderLayer(shape, input_norm=False)
        self.register_buffer("token_scale", torch.ones(()))

    @torch.no_grad()
    def initialise(self, target: Target) -> None:
        """Start as the identity on features: fusion passes them on and the layer adds nothing. The
        layer's attention starts as in the target's last layer, where that is of the same type.
        """
        size = self.shape.hidden_size
        nn.init.eye_(self.fc.weight[:, size:])
        self.token_scale.fill_(token_scale(target))
        self.start_layer(target)

    def start_layer(self, target: Target) -> None:
        """Copy the target's last layer with its output projections set to 0, because that layer
        writes at the scale of states before the norm.
        """
        self.copy_layer(target)
        adds_nothing(self.layer)

    def copy_layer(self, target: Target) -> None:
        """Copy the matching weights of the target's last layer."""
        self.layer.copy_from(target)

    def read(self, states: Mapping[StateName, Tensor]) -> Tensor:
        """The target's final states."""
        return states[self.reads]

    def noisy(self, features_BTH: Tensor, batch: TextBatch) -> Tensor:
        """Uniform noise on the input features in training."""
        return (
            uniform_noise(features_BTH, self.noise, batch.document_ids)
            if self.training
            else features_BTH
        )

    def vectors(self, ids: Tensor, target: Target) -> Tensor:
        """The target's token embeddings [..., H], at the size of its final states."""
        return super().vectors(ids, target) * self.token_scale

    def fuse(self, vectors_NH: Tensor, features_NH: Tensor) -> tuple[Tensor, Tensor]:
        """z as the input of attention and as the residual."""
        fused = self.fc(torch.cat([vectors_NH, features_NH], dim=-1))
        return fused, fused

    def outputs(self, hidden_NY: Tensor) -> tuple[Tensor, Tensor]:
        """f̂ for the LM head and for the next step."""
        return hidden_NY, hidden_NY

    def head(self, depth: int, target: Target) -> Head:
        """The target's frozen LM head on the draft vocabulary."""
        return lambda hidden: target.logits(hidden, self.vocabulary_D, self.precision)

    def step_loss(self, step: DraftStep, batch: TextBatch) -> Tensor:
        """Distance of the drafted feature to the target's on all rows, and soft cross-entropy
        (`feature_and_token_loss`).
        """
        return feature_and_token_loss(step, batch, self.feature_weight, self.token_weight)


def adds_nothing(layer: DecoderLayer) -> None:
    """Set a layer's output projections to 0, so that it adds nothing to its input."""
    assert layer.self_attn is not None and layer.mlp is not None
    nn.init.zeros_(layer.self_attn.o_proj.weight)
    nn.init.zeros_(layer.mlp.down_proj.weight)


def uniform_noise(features_BTH: Tensor, half_width: float, document_ids_BT: Tensor) -> Tensor:
    """Features plus uniform noise from ±half_width · 512 / L, with L the tokens of the position's
    document (EAGLE's release scales it per conversation); unchanged when half_width is 0.
    """
    if not half_width:
        return features_BTH
    # L per position: tokens per document, counted with padding (-1) in slot 0.
    slots_BT = document_ids_BT + 1
    counts_BX = slots_BT.new_zeros(slots_BT.shape[0], slots_BT.shape[1] + 1)
    lengths_BT = counts_BX.scatter_add(1, slots_BT, torch.ones_like(slots_BT)).gather(1, slots_BT)
    width_BT1 = (half_width * 512 / lengths_BT)[..., None].to(features_BTH)
    return features_BTH + (2 * torch.rand_like(features_BTH) - 1) * width_BT1


def feature_and_token_loss(
    step: DraftStep, batch: TextBatch, feature_weight: float, token_weight: float
) -> Tensor:
    """feature_weight · SmoothL1 to the target's features, on all rows, + token_weight · the step's
    cross-entropy.
    """
    loss = token_weight * step.mean(step.losses_M)
    if feature_weight:
        truth = batch.states["final"].flatten(0, 1)[step.flat_M]
        distances_M = smooth_l1(step.carried_MH, truth)
        loss = loss + feature_weight * step.mean(distances_M, every_label=True)
    return loss
