"""EAGLE-3: fused features of several layers and training on its own outputs (Li et al. 2025, arXiv
2503.01840), and EAGLE-3.1: normalised features (2026, arXiv 2605.09992).

Shape legend: B sequences, T tokens of a packed row, N rows of one call, M training rows, J draft
steps, U positions whose distributions are asked for, H hidden size, D draft vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from modules.contracts.batches import TextBatch
from modules.contracts.shapes import StateName, TargetShape
from modules.drafters.feature.base import FeatureDrafter
from modules.layers.decoder_layer import DecoderLayer, target_weight
from modules.losses.chunked import Head, TrainingRows
from modules.target.kernels.cpu_kernels import narrow_linear

if TYPE_CHECKING:
    from modules.contracts.target import Target


class Eagle3(FeatureDrafter):
    """g_t = W_f [states of several layers at t]; the layer reads [RMSNorm(e(x_{t+1})) ;
    RMSNorm(g_t)] and adds to g_t; its output a_t replaces g in the next step, and the logits are
    W_d RMSNorm(a_t).

    Loss: Σ_j decay^j · cross-entropy to the target's distribution over the draft vocabulary, on
    assistant positions whose token can be drafted. The paper selects positions by the target's most
    likely token (`greedy_labels`), which needs the whole LM head; with 8,192 of SmolLM2's tokens
    the selection differs at 3 to 5 % of the positions.

    EAGLE-3.1: a_t is a sum that grows from step to step, and attention drifts from the text to
    drafted rows. `norm_output` gives the next step RMSNorm(a_t) instead, with the norm before the
    LM head, and `fc_norm` (the paper) or `norm_before_fc` (what speculators 0.9 trains, with
    `norm_before_residual`) normalises what is fused.

    Args:
        shape: the target's dimensions.
        draft_vocabulary: how many token ids can be drafted; None for all.
        fused_layers: states that are fused, `k` the input of layer k; None: 2, L // 2 and L - 3 of
            L layers.
        steps: draft steps unrolled in training (1: ablation, no training-time test).
        decay: step j weighs decay^j.
        norm_before_residual: whether attention is added to the normalised feature (engines assume
            what is exported).
        fc_norm: whether each fused state is normalised first, by a norm of its own.
        norm_output: whether the next step reads the normalised output.
        depth: levels of its default tree.
        tree: fixed paths instead of that tree: a name or a list of paths.
        greedy_labels: count positions, and accuracy, by the target's most likely token instead of
            the text's own. On text that is not the target's greedy answer, accuracy by the text's
            own tokens differs from how often drafts are accepted.
        divergence: how the target's distribution is learnt (`modules.losses.divergences`).
        norm_before_fc: whether the fused states are normalised together, by one norm over their
            concatenation; not with `fc_norm`.
        qk_norm: whether the layer normalises queries and keys, as Qwen3's; null: as the target's.
        window: positions that attention reaches back over the text, the row itself included; null:
            all of them. For texts longer than the trained length, where drafts without it fail; it
            costs acceptance within that length.
        sinks: first positions of the text that attention reaches beside the window (StreamingLLM,
            Xiao et al. 2024, arXiv 2309.17453); only with a window, and not exported.
        rebase: whether sinks are read as if they stood right before the window, so that no distance
            is greater than both together; otherwise at their positions in the text.
    """

    def __init__(
        self,
        shape: TargetShape,
        draft_vocabulary: int | None = None,
        fused_layers: list[int] | None = None,
        steps: int = 3,
        decay: float = 0.8,
        norm_before_residual: bool = False,
        fc_norm: bool = False,
        norm_output: bool = False,
        depth: int = 5,
        tree: list[list[int]] | str | None = None,
        greedy_labels: bool = False,
        divergence: str = "cross_entropy",
        norm_before_fc: bool = False,
        qk_norm: bool | None = None,
        window: int | None = None,
        sinks: int = 0,
        rebase: bool = False,
    ) -> None:
        super().__init__(shape, steps, draft_vocabulary, decay, depth, tree)
        self.use_divergence(divergence)
        check_options(fc_norm, norm_before_fc, window)
        # 1. Settings.
        self.fused_layers = fused_states(shape.num_layers, fused_layers)
        self.norm_before_residual, self.norm_output = norm_before_residual, norm_output
        self.greedy_labels, self.window, self.sinks = greedy_labels, window, sinks
        self.rebase = rebase
        if rebase and not sinks:
            raise ValueError("rebase is true without sinks, whose positions it changes: set sinks")
        if sinks and window is None:
            raise ValueError(f"sinks {sinks} without a window: all positions are reached, set 0")
        # 2. Modules, named as in the release.
        size, fused = shape.hidden_size, len(self.fused_layers)
        self.fc = nn.Linear(fused * size, size, bias=False)
        self.fc_norm = (
            nn.ModuleList(nn.RMSNorm(size, shape.norm_eps) for _ in range(fused))
            if fc_norm
            else None
        )
        self.input_norm = nn.RMSNorm(fused * size, shape.norm_eps) if norm_before_fc else None
        self.input_layernorm, self.hidden_norm, self.norm = (
            nn.RMSNorm(size, shape.norm_eps) for _ in range(3)
        )
        layer_shape = shape if qk_norm is None else replace(shape, qk_norm=qk_norm)
        self.layer = DecoderLayer(layer_shape, input_norm=False, input_width=2)
        self.lm_head = nn.Linear(size, self.draft_size, bias=False)

    @torch.no_grad()
    def initialise(self, target: Target) -> None:
        """Start from the target: fusion passes on the last fused state, the draft head and the norm
        before it are copies, and so is the layer's half that reads features, where the target's
        last layer is of the same type.
        """
        # 1. The draft head, the fusion and the final norm.
        every = torch.arange(self.shape.vocab_size, device=target.device)
        rows = every if self.vocabulary_D is None else self.vocabulary_D.to(target.device)
        self.lm_head.weight.copy_(target.lm_head_rows(rows))
        nn.init.zeros_(self.fc.weight)
        nn.init.eye_(self.fc.weight[:, -self.shape.hidden_size :])
        norm = target_weight(target, "norm")
        if norm is not None:
            self.norm.weight.copy_(norm)
        # 2. The layer's projections read [token ; feature]: the target's fill the second half.
        last = DecoderLayer(self.shape)
        if last.copy_from(target):
            assert last.input_layernorm is not None
            self.hidden_norm.weight.copy_(last.input_layernorm.weight)
            theirs = last.state_dict()
            for name, weight in self.layer.state_dict().items():
                if name in theirs:
                    weight[..., -theirs[name].shape[-1] :].copy_(theirs[name])

    def labels(self, batch: TextBatch, target: Target, rows: TrainingRows) -> Tensor:
        """Draft vocabulary indices [M,J] of the text's tokens, or of the target's most likely
        ones.
        """
        if not self.greedy_labels:
            return super().labels(batch, target, rows)
        return self.labels_by_target(batch, target, rows)

    @property
    def feature_states(self) -> tuple[StateName, ...]:
        """The fused layers' inputs."""
        return tuple(self.fused_layers)

    def read(self, states: Mapping[StateName, Tensor]) -> Tensor:
        """g, from the concatenation of the fused states."""
        parts = [states[layer].to(self.precision) for layer in self.fused_layers]
        return self.fusion(torch.cat(parts, dim=-1))

    def fusion(self, joined_NX: Tensor) -> Tensor:
        """g [..., H] from concatenated states, normalised first where the drafter does that."""
        if self.fc_norm is not None:
            parts = joined_NX.chunk(len(self.fc_norm), dim=-1)
            normed = [norm(part) for norm, part in zip(self.fc_norm, parts, strict=True)]
            joined_NX = torch.cat(normed, dim=-1)
        return self.fc(joined_NX if self.input_norm is None else self.input_norm(joined_NX))

    def fuse(self, vectors_NH: Tensor, features_NH: Tensor) -> tuple[Tensor, Tensor]:
        """Token and feature, each normalised, concatenated; the residual is the feature itself, or
        the normalised one with `norm_before_residual`.
        """
        normalised = self.hidden_norm(features_NH)
        inputs = torch.cat([self.input_layernorm(vectors_NH), normalised], dim=-1)
        return inputs, normalised if self.norm_before_residual else features_NH

    def outputs(self, hidden_NY: Tensor) -> tuple[Tensor, Tensor]:
        """The normalised output for the LM head, the output itself for the next step."""
        normalised = self.norm(hidden_NY)
        return normalised, normalised if self.norm_output else hidden_NY

    def head(self, depth: int, target: Target) -> Head:
        """Its own LM head."""
        return lambda hidden: narrow_linear(hidden, self.lm_head.weight)


def fused_states(count: int, listed: list[int] | None) -> list[int]:
    """The fused states of a target of `count` layers, `k` the input of layer k: those listed, or 2,
    L // 2 and L - 3.

    Raises:
        ValueError: a listed state that the target does not have, or none.
    """
    if listed is None:
        return sorted({2 % count, count // 2, max(count - 3, 0)})
    if not listed or min(listed) < 0 or max(listed) >= count:
        raise ValueError(
            f"fused_layers must be layers of the target, 0 to {count - 1}, got {listed}"
        )
    return listed


def check_options(fc_norm: bool, norm_before_fc: bool, window: int | None) -> None:
    """Raise ValueError for norms that exclude each other, and a window without the text."""
    if fc_norm and norm_before_fc:
        raise ValueError(
            "fc_norm and norm_before_fc are both true, but fused states are normalised once: set "
            "one of them to false"
        )
    if window == 0:
        raise ValueError("window must be at least 1, the row itself, or null for all of the text")
