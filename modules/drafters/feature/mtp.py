"""MTP: a native multi-token-prediction head, one decoder layer on the target's last state and the
next token (DeepSeek-V3, 2024, arXiv 2412.19437; fine-tuned for several steps: FastMTP, 2025, arXiv
2509.18362).

Shape legend: N rows of one call, M training rows, H hidden size, D draft vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor, nn

from modules.contracts.batches import TextBatch
from modules.contracts.shapes import StateName, TargetShape
from modules.drafters.feature.base import FeatureDrafter
from modules.drafters.feature.eagle import adds_nothing
from modules.drafters.feature.native_head import native_head
from modules.drafters.heads.base import refuse_unknown
from modules.drafters.trained import DraftStep
from modules.layers.decoder_layer import DecoderLayer, target_weight
from modules.losses.chunked import (
    Head,
    TrainingRows,
    cross_entropy,
    greedy_tokens,
)
from modules.trees.named_trees import Path

if TYPE_CHECKING:
    from modules.contracts.target import Target


@dataclass(frozen=True, kw_only=True)
class TextStep(DraftStep):
    """A step that also learns the text's tokens: their cross-entropies, 0 where none counts."""

    text_losses_M: Tensor


class MTP(FeatureDrafter):
    """z_t = W [RMSNorm(e(x_{t+1})) ; RMSNorm(h_t)], one decoder layer on z, n_t = RMSNorm of its
    output; the logits are the target's LM head on n_t, and the next step reads n_t in place of h_t.
    Embedding and LM head are the target's, frozen.

    A target whose checkpoint has such a head gives it: then training fine-tunes it for the steps
    that it was not trained for. Otherwise it starts as a head that repeats the target's logits.

    Loss: Σ_j decay^j · cross-entropy of step j, to the text's tokens (FastMTP) or to the target's
    distributions.

    Args:
        shape: the target's dimensions.
        steps: draft steps unrolled in training, each on the outputs of the one before.
        draft_vocabulary: how many token ids can be drafted; null for all.
        decay: step j weighs decay^j; FastMTP: 0.6.
        start: `checkpoint`: from the head in the target's checkpoint; `scratch`: without it;
            `auto`: from one where there is one.
        post_norm: whether h_t is the state behind the target's final norm, as engines feed it to
            Qwen's heads.
        norm_output: whether the next step reads the normalised output, as in Qwen's heads.
        on_policy: whether later steps read the embedding of the drafter's own likeliest token in
            training, instead of the text's.
        depth: levels of its default tree.
        tree: fixed paths instead of that tree: a name or a list of paths.
        divergence: learn the target's distribution by it (`modules.losses.divergences`) instead of
            the text's tokens.
        hard_weight: weight of the cross-entropy to the text's tokens that is added to a divergence;
            0.1 with `expected_length` and a decay of 1 (AngelSpec, 2026, arXiv 2607.25852).
    """

    soft_labels = False

    def __init__(
        self,
        shape: TargetShape,
        steps: int = 3,
        draft_vocabulary: int | None = None,
        decay: float = 0.6,
        start: Literal["auto", "checkpoint", "scratch"] = "auto",
        post_norm: bool = True,
        norm_output: bool = True,
        on_policy: bool = False,
        depth: int = 5,
        tree: list[Path] | str | None = None,
        divergence: str | None = None,
        hard_weight: float = 0.0,
    ) -> None:
        # 1. Settings.
        refuse_unknown("start", start, ("auto", "checkpoint", "scratch"))
        if hard_weight < 0 or (hard_weight and divergence is None):
            raise ValueError(
                f"hard_weight is {hard_weight}: it must not be below 0, and without a divergence "
                "the text's tokens are the whole loss already: set divergence, or hard_weight to 0"
            )
        super().__init__(shape, steps, draft_vocabulary, decay, depth, tree)
        self.use_divergence(divergence, learns=True)
        self.reads: StateName = "final" if post_norm else "pre_norm"
        self.norm_output, self.on_policy, self.hard_weight = norm_output, on_policy, hard_weight
        # 2. Modules, named as in DeepSeek's layout.
        size = shape.hidden_size
        self.enorm, self.hnorm, self.norm = (nn.RMSNorm(size, shape.norm_eps) for _ in range(3))
        self.eh_proj = nn.Linear(2 * size, size, bias=False)
        self.layer = DecoderLayer(shape)

    @torch.no_grad()
    def initialise(self, target: Target) -> None:
        """Take the head of the target's checkpoint; without one start as the identity on states, so
        that the logits are those of the target, before a layer that adds nothing.

        Raises:
            ValueError: `start` asks for a head that the checkpoint does not have, or the head is
                of another architecture.
        """
        start = self.arguments["start"]
        tensors = native_head(target) if start != "scratch" else {}
        if tensors:
            self._take(tensors, target.name)
            return
        if start == "checkpoint":
            raise ValueError(
                f"start is 'checkpoint', but the files of {target.name} hold no head for later "
                "tokens (mtp.* or a layer behind the last one): set start to 'scratch'"
            )
        # The state at its own size: of a normalised one, that of the norm's gains.
        nn.init.zeros_(self.eh_proj.weight)
        nn.init.eye_(self.eh_proj.weight[:, self.shape.hidden_size :])
        gain_H = target_weight(target, "norm")
        if gain_H is not None:
            post = self.reads == "final"
            self.norm.weight.copy_(gain_H.square().mean().sqrt() if post else gain_H)
        self.layer.copy_from(target)
        adds_nothing(self.layer)

    def _take(self, tensors: Mapping[str, Tensor], name: str) -> None:
        """Load the head's tensors.

        Raises:
            ValueError: one is missing, left over, or of another shape.
        """
        mine = {key: value for key, value in self.state_dict().items() if key != "vocabulary"}
        odd = sorted(mine.keys() ^ tensors.keys())
        odd += [
            key for key in mine.keys() & tensors.keys() if mine[key].shape != tensors[key].shape
        ]
        if odd:
            raise ValueError(
                f"the head in the files of {name} is of another architecture than its layers "
                f"({', '.join(odd[:4])}): set start to 'scratch'"
            )
        for key, value in mine.items():
            value.copy_(tensors[key])

    def read(self, states: Mapping[StateName, Tensor]) -> Tensor:
        """The target's last states."""
        return states[self.reads]

    def fuse(self, vectors_NH: Tensor, features_NH: Tensor) -> tuple[Tensor, Tensor]:
        """The layer's normalised input, and z as the residual."""
        fused = self.eh_proj(torch.cat([self.enorm(vectors_NH), self.hnorm(features_NH)], -1))
        return self.layer.attention_inputs(fused), fused

    def outputs(self, hidden_NY: Tensor) -> tuple[Tensor, Tensor]:
        """n for the LM head and, unless it reads states as they are, for the next step."""
        normalised = self.norm(hidden_NY)
        return normalised, normalised if self.norm_output else hidden_NY

    def head(self, depth: int, target: Target) -> Head:
        """The target's frozen LM head on the draft vocabulary."""
        return lambda hidden: target.logits(hidden, self.vocabulary_D, self.precision)

    def steps(self, batch: TextBatch, target: Target) -> Iterator[DraftStep]:
        """Every step, with the cross-entropy to the text's tokens where that counts too."""
        for step in super().steps(batch, target):
            if not self.hard_weight:
                yield step
                continue
            head = self.head(step.depth, target)
            hard_M, _ = cross_entropy(step.feature_MH, head, step.labels_M, self.draft_size)
            yield TextStep(**vars(step), text_losses_M=hard_M)

    def step_loss(self, step: DraftStep, batch: TextBatch) -> Tensor:
        """A step's divergence, and its cross-entropy to the text's tokens where that counts."""
        loss = super().step_loss(step, batch)
        if not isinstance(step, TextStep):
            return loss
        return loss + self.hard_weight * step.mean(step.text_losses_M, every_label=False)

    def next_tokens(
        self, rows: TrainingRows, step: int, feature_MH: Tensor, target: Target
    ) -> Tensor:
        """The text's tokens, or in training on its own policy its likeliest ones."""
        if not (self.on_policy and self.training):
            return super().next_tokens(rows, step, feature_MH, target)
        with torch.no_grad():
            likely_M = greedy_tokens(self.head(step, target), feature_MH, self.draft_size)
        return likely_M if self.vocabulary_D is None else self.vocabulary_D[likely_M]
