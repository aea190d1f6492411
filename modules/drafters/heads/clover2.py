"""Clover-2: Clover with an information-augmented start and knowledge distillation (Xiao et al.
2024, arXiv 2408.00264).

Shape legend: B sequences, N rows of one call, M training rows, H hidden size.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from modules.contracts.batches import TextBatch
from modules.contracts.rows import Rows
from modules.contracts.shapes import StateName, TargetShape
from modules.drafters.heads.base import HeadDrafter, refuse_unknown, soft_labels
from modules.drafters.heads.clover import AttentionDecoder
from modules.drafters.trained import DraftStep
from modules.layers.decoder_layer import DecoderLayer, LayerCache, target_weight
from modules.losses.chunked import (
    TrainingRows,
    likely_tokens,
    smooth_l1,
    target_distributions,
)

if TYPE_CHECKING:
    from modules.contracts.target import Target


class Clover2(HeadDrafter):
    """Start: h_0 = RMSNorm(layers(ResAttn_1(g_t, y_{t+1}))), g the target's output before its final
    norm.

    Step 0: feature = head_norm(FC_1 h_0). Step i: h_i = ResAttn_2(h_{i-1}, e_i), feature =
    head_norm(FC_2 [h_i ; e_i]). Logits by the frozen LM head; token vectors are that head's rows.
    Layers start as copies of the target's last one, head_norm of its final norm, every other part
    close to the identity (at H = 576, where this was tuned).

    The release, which trains for 20 epochs on large targets, has `token_scale: head`,
    `map_lr_scale: 1`, `map_bias: true` and `start_norm: final`. It also adds U(0, 0.01) to the
    identities at which FC_1 and FC_2 start.

    Args:
        shape: the target's dimensions.
        heads: K.
        layers: decoder layers at the start.
        draft_vocabulary: how many token ids can be drafted; None for all.
        tree: paths, or a name of `modules.trees.named_trees` (the paper's: `eagle_25`).
        decay: step i = 0 … K-1 weighs decay^i.
        feature_weight: weight of the smooth L1 distance to the target's own state, next to the soft
            cross-entropy.
        label_top_k, label_top_p: train step i at t only if all the tokens that it reads,
            x_{t+1} … x_{t+1+i}, are likely under the target: each among the top k of the target's
            whole distribution, with at most a mass of top_p above it (the release's optional
            `label_mask`: 8 and 0.8). The label does not matter. 0 and 1 turn the filters off; they
            are always off in validation.
        fusion: of the token y_{t+1} into the start: `"attention"`, or `"linear"`, FC [g ; y]
            (ablation).
        labels: `"soft"`, the target's distribution, or `"hard"`, the tokens of the data (ablation).
        token_scale: `"state"` scales token vectors to the norm of the states that they meet,
            `"head"` uses the LM head's rows unscaled (the release). A target's last states may be
            200 times as large as those rows, and then drafted tokens are learnt last. No gradient
            flows through the scale.
        map_lr_scale: factor on the learning rate of FC_1 and FC_2. They start as identities before
            a frozen LM head, and updates as large as the other parameters' destroy that start
            before anything is learnt.
        divergence: how the target's distribution is learnt (`modules.losses.divergences`).
    """

    reads: StateName = "pre_norm"
    first_exponent: ClassVar[int] = 0
    stored_bytes: ClassVar[tuple[float, float, float]] = (90.0, 59.0, 18.0)

    def __init__(
        self,
        shape: TargetShape,
        heads: int = 5,
        layers: int = 2,
        draft_vocabulary: int | None = None,
        tree: list[list[int]] | str = "narrow",
        decay: float = 0.7,
        feature_weight: float = 10.0,
        label_top_k: int = 0,
        label_top_p: float = 1.0,
        fusion: Literal["attention", "linear"] = "attention",
        labels: Literal["soft", "hard"] = "soft",
        map_lr_scale: float = 0.1,
        token_scale: Literal["state", "head"] = "state",
        map_bias: bool = False,
        start_norm: Literal["ones", "final"] = "ones",
        divergence: str = "cross_entropy",
    ) -> None:
        super().__init__(shape, heads, draft_vocabulary, decay)
        self.map_lr_scale, self.token_scale, self.norm_starts = (
            map_lr_scale,
            token_scale,
            start_norm,
        )
        # 1. Refuse unknown names and combinations.
        refuse_unknown("fusion", fusion, ("attention", "linear"))
        refuse_unknown("token_scale", token_scale, ("state", "head"))
        refuse_unknown("start_norm", start_norm, ("ones", "final"))
        self.soft_labels = soft_labels(labels)
        self.use_divergence(divergence)
        if not self.soft_labels and (label_top_k or label_top_p < 1):
            raise ValueError(
                "label_top_k and label_top_p go by the target's distribution, but labels is "
                "'hard': use 'soft', or set them to 0 and 1"
            )
        # 2. Settings and modules.
        size = shape.hidden_size
        self.feature_weight, self.label_top_k, self.label_top_p = (
            feature_weight,
            label_top_k,
            label_top_p,
        )
        self.start_attention = (
            _residual_attention(shape) if fusion == "attention" else LinearFusion(size)
        )
        self.step_attention = _residual_attention(shape)
        self.layers = nn.ModuleList(DecoderLayer(shape) for _ in range(layers))
        self.start_norm, self.head_norm = (nn.RMSNorm(size, shape.norm_eps) for _ in range(2))
        self.first, self.later = (
            nn.Linear(size, size, bias=map_bias),
            nn.Linear(2 * size, size, bias=map_bias),
        )
        # 3. Both maps start as identities on the hidden state.
        nn.init.eye_(self.first.weight)
        _start_from_first(self.later)
        if map_bias:
            nn.init.zeros_(self.first.bias)
            nn.init.zeros_(self.later.bias)
        self.use_static_tree(tree)

    @property
    def training_states(self) -> tuple[StateName, ...]:
        """The start, and the states that the feature loss pulls towards."""
        return (self.reads, "final")

    def parameter_groups(self) -> list[dict[str, Any]]:
        """The maps before the LM head learn `map_lr_scale` times as fast as the rest."""
        maps = [*self.first.parameters(), *self.later.parameters()]
        rest = [
            parameter
            for parameter in self.declared_parameters()
            if all(parameter is not weight for weight in maps)
        ]
        return [{"params": rest, "lr_scale": 1.0}, {"params": maps, "lr_scale": self.map_lr_scale}]

    @torch.no_grad()
    def initialise(self, target: Target) -> None:
        """Also copy the target's final norm into the last norm, or into both."""
        super().initialise(target)
        weight = target_weight(target, "norm")
        if weight is not None:
            self.head_norm.weight.copy_(weight)
            if self.norm_starts == "final":
                self.start_norm.weight.copy_(weight)

    def begin(
        self,
        hidden_BNH: Tensor,
        next_BN: Tensor,
        target: Target,
        rows: Rows,
        caches: list[LayerCache] | None,
    ) -> Tensor:
        """h_0 at every position, from its state and the token that follows."""
        hidden = self.start_attention(hidden_BNH, self.vectors(next_BN, hidden_BNH, target))
        return self.start_norm(self.run_own_layers(hidden, rows, caches))

    def step(self, depth: int, memory_NX: Tensor, tokens_N: Tensor, target: Target) -> Tensor:
        """Attend to the token; the first step's token is already part of the start."""
        return (
            memory_NX
            if depth == 0
            else self.step_attention(memory_NX, self.vectors(tokens_N, memory_NX, target))
        )

    def feature(self, depth: int, memory_NX: Tensor, tokens_N: Tensor, target: Target) -> Tensor:
        """An estimate of the target's final state at the drafted position."""
        if depth == 0:
            return self.head_norm(self.first(memory_NX))
        vectors = self.vectors(tokens_N, memory_NX, target)
        return self.head_norm(self.later(torch.cat([memory_NX, vectors], dim=-1)))

    def vectors(self, tokens_N: Tensor, beside_NH: Tensor, target: Target) -> Tensor:
        """The LM head's rows of tokens [...], scaled to the norm of the states [...,H] that they
        meet.
        """
        vectors = target.lm_head_rows(tokens_N).to(beside_NH.dtype)
        if self.token_scale == "head":
            return vectors
        return F.normalize(vectors, dim=-1) * beside_NH.detach().norm(dim=-1, keepdim=True)

    def rows(self, batch: TextBatch, target: Target) -> TrainingRows:
        """Training rows, in training only the steps whose inputs are likely enough
        (`label_top_k`, `label_top_p`).
        """
        rows = super().rows(batch, target)
        if not self.training or not (self.label_top_k or self.label_top_p < 1):
            return rows
        # Steps share most of their inputs, so the distribution of the token after each position is
        # computed once.
        positions_P, index_MK = rows.flat_MK1[:, :-1].unique(return_inverse=True)
        tokens_P, width = batch.input_ids.roll(-1, 1).flatten()[positions_P], self.shape.vocab_size
        final_BTH = batch.states["final"]
        distributions = target_distributions(target.unrounded_logits, final_BTH, positions_P, width)
        likely_P = likely_tokens(
            distributions, positions_P, tokens_P, width, self.label_top_k, self.label_top_p
        )
        # A step counts only while every token before it was likely.
        return replace(rows, valid_MK=rows.valid_MK & likely_P[index_MK].cumprod(1).bool())

    def step_loss(self, step: DraftStep, batch: TextBatch) -> Tensor:
        """feature_weight · SmoothL1(feature, f) + soft cross-entropy, with f the target's final
        state that predicts the label.

        The distance counts at every row whose label counts, in the draft vocabulary or not, since f
        does not depend on the draft vocabulary.
        """
        distance = smooth_l1(step.feature_MH, batch.states["final"].flatten(0, 1)[step.flat_M])
        distances = step.mean(distance, every_label=True)
        return self.feature_weight * distances + step.mean(step.losses_M)


class LinearFusion(nn.Module):
    """W [h ; e], at initialisation h and a little of e: replaces the residual attention in an
    ablation.
    """

    def __init__(self, size: int) -> None:
        super().__init__()
        self.linear = nn.Linear(2 * size, size, bias=False)
        _start_from_first(self.linear)

    def forward(self, hidden_NH: Tensor, token_NH: Tensor) -> Tensor:
        """Hidden states and token vectors [..., H] -> hidden states [..., H]."""
        return self.linear(torch.cat([hidden_NH, token_NH], dim=-1))


def _start_from_first(linear: nn.Linear) -> None:
    """Initialise a map of [h ; e] as [I | U(0, 0.01)]."""
    nn.init.uniform_(linear.weight, 0, 0.01)
    nn.init.eye_(linear.weight.data[:, : linear.out_features])


def _residual_attention(shape: TargetShape) -> AttentionDecoder:
    """Attention with the release's initial values: W_Q, W_K = I + U(0, 0.01), W_V = U(0, 0.01),
    biases 0.
    """
    attention = AttentionDecoder(shape, "cosine", bias=True)
    for projection in (attention.query, attention.key):
        nn.init.eye_(projection.weight)
        projection.weight.data.add_(torch.rand_like(projection.weight), alpha=0.01)
    nn.init.uniform_(attention.value.weight, 0, 0.01)
    return attention
