"""DFlash: all tokens of a block from one bidirectional pass over mask tokens, with the target's
states as context in every layer (Chen et al. 2026, arXiv 2602.06036).

With the newest token x_a as anchor, the context is the target's states before position a. Draft
step d drafts x_{a+1+d}.

Shape legend: B sequences, T tokens of a packed row, N committed rows, M blocks of a batch, K tokens
of a block, R rows of its pass, H hidden size, X concatenated states.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from modules.contracts.batches import TextBatch
from modules.contracts.drafter import Context
from modules.contracts.rows import Rows, causal_rows
from modules.contracts.shapes import StateName, TargetShape
from modules.drafters.block_diffusion.context_attention import TrainingBlocks, run_block_layer
from modules.drafters.blocks.base import BlockDrafter, BlockState, SlotLosses
from modules.drafters.heads.base import refuse_unknown, soft_labels
from modules.layers.activation_checkpointing import recomputed
from modules.layers.decoder_layer import (
    Attention,
    DecoderLayer,
    LayerCache,
    run_layers,
    target_weight,
)
from modules.losses.block_weights import expected_length_weights
from modules.losses.chunked import (
    Distributions,
    Head,
    TrainingRows,
    soft_cross_entropy,
    training_rows,
)
from modules.losses.row_subsets import some_rows
from modules.trees.named_trees import Path

if TYPE_CHECKING:
    from modules.contracts.target import Target

FEWEST_FUSED = 3
"""Target states that a drafter of few layers reads by default."""


@dataclass
class DFlashState(BlockState):
    """State of its sequences.

    caches: keys and values of the context in each layer (one row per token the target has read).
    outputs_BKH: what the LM head reads for the current block; None between two proposals.
    """

    caches: list[LayerCache]
    outputs_BKH: Tensor | None = None


class DFlash(BlockDrafter):
    """Block of [x_a, mask, …, mask]; queries come from the block alone, keys and values from the
    context c_i = RMSNorm(W [states of several layers at i]), i < a, and from the block, whose rows
    see each other. Layers are of Qwen3's type in the target's dimensions; embedding and LM head are
    the target's, frozen.

    Context rows do not attend to each other: their keys and values depend on their own state and
    position alone, so that they are computed once and appended to a cache.

    Loss: weighted mean of the cross-entropies of all drafted slots, in blocks at random anchors of
    every document; x_a and x_{a+1} are labels. Slot d weighs exp(-d/γ), or as D-PACE (2026, arXiv
    2605.18810) counts it (`expected_length_weights`). The denominator is the sum of the weights of
    all processes.

    Layers start at random, as published; the fusion passes on the last fused state, and the norm
    before the LM head is the target's.

    Args:
        shape: the target's dimensions.
        block: K, tokens drafted per pass. Engines count the anchor as well in layout `fill_in`.
        layers: decoder layers.
        draft_vocabulary: how many token ids can be drafted; null for all.
        fused_layers: states that are fused, `k` the input of layer k; null: as many as `layers`,
            and 3 at least, evenly from the input of layer 2 to that of layer L - 2 of L.
        layout: `fill_in`: K + 1 rows, row k drafts x_{a+k} and the anchor's row nothing (DFlash);
            `shift`: K rows, row k drafts x_{a+k+1} (DSpark). Weights of one do not fit the other.
        mask_token: id whose embedding is the mask's; null chooses one that does not occur in text
            (`unused_token`).
        anchors: blocks of each document in a training step; evenly spaced in validation.
        labels: `hard` learns the tokens of the text, best the target's own answers; `soft` its
            distributions.
        weights: `decay`: exp(-d/γ); `expected_length`: D-PACE's, for hard labels.
        gamma: γ, in slots; published: 7 for blocks of 16, 4 for 7 or 8.
        smoothing: β of D-PACE.
        tree: paths or the name of a tree, filled with the likeliest tokens of each slot; null: the
            chain of all slots.
        divergence: how soft labels are learnt (`modules.losses.divergences`).
    """

    def __init__(
        self,
        shape: TargetShape,
        block: int = 8,
        layers: int = 2,
        draft_vocabulary: int | None = None,
        fused_layers: list[int] | None = None,
        layout: Literal["fill_in", "shift"] = "fill_in",
        mask_token: int | None = None,
        anchors: int = 32,
        labels: Literal["hard", "soft"] = "hard",
        weights: Literal["decay", "expected_length"] = "decay",
        gamma: float = 4.0,
        smoothing: float = 0.5,
        tree: list[Path] | str | None = None,
        divergence: str = "cross_entropy",
    ) -> None:
        # 1. Settings.
        _check(shape, layers, anchors, mask_token, gamma, smoothing)
        refuse_unknown("layout", layout, ("fill_in", "shift"))
        refuse_unknown("weights", weights, ("decay", "expected_length"))
        if weights == "expected_length" and soft_labels(labels):
            raise ValueError(
                "weights is 'expected_length', which needs the probability of a token: set labels "
                "to 'hard', or weights to 'decay'"
            )
        super().__init__(shape, block, draft_vocabulary, math.exp(-1 / gamma))
        self.soft_labels = soft_labels(labels)
        self.use_divergence(divergence)
        self.layout, self.mask_token, self.anchors = layout, mask_token, anchors
        self.expected_length, self.smoothing = weights == "expected_length", smoothing
        self.pass_rows = block + (layout == "fill_in")
        if tree is not None:
            self.use_static_tree(tree)
        # 2. Modules, named as in the release.
        self.fused_layers = fused_states(shape.num_layers, fused_layers, layers)
        size = shape.hidden_size
        self.fc = nn.Linear(len(self.fused_layers) * size, size, bias=False)
        self.hidden_norm, self.norm = (nn.RMSNorm(size, shape.norm_eps) for _ in range(2))
        self.layers = nn.ModuleList(DecoderLayer(layer_shape(shape)) for _ in range(layers))

    @torch.no_grad()
    def initialise(self, target: Target) -> None:
        """Choose the mask, and start the fusion and the last norm from the target."""
        self.mask_token = self.arguments["mask_token"] = self.mask(target)
        nn.init.zeros_(self.fc.weight)
        nn.init.eye_(self.fc.weight[:, -self.shape.hidden_size :])
        norm = target_weight(target, "norm")
        if norm is not None:
            self.norm.weight.copy_(norm)

    def refusal_to_start(self, arguments: Mapping[str, Any]) -> str | None:
        """Other layouts and masks make other blocks, of which the weights know nothing."""
        for key in ("layout", "mask_token"):
            ours, theirs = self.arguments[key], arguments.get(key)
            if theirs is not None and theirs != ours:
                return f"{key} {theirs!r} there and {ours!r} here: set {key} to {theirs!r}"
        return super().refusal_to_start(arguments)

    def mask(self, target: Target) -> int:
        """The id whose embedding is the mask's."""
        return unused_token(target) if self.mask_token is None else self.mask_token

    def pass_inputs(self, anchors_B: Tensor, target: Target) -> Tensor:
        """Embeddings [B,R,H] of blocks with these anchors."""
        ids_BR = anchors_B.new_full((len(anchors_B), self.pass_rows), self.mask(target))
        ids_BR[:, 0] = anchors_B
        return target.embed(ids_BR).to(self.precision)

    def context(self, features_NX: Tensor) -> Tensor:
        """c [...,H] from the concatenated states."""
        return self.hidden_norm(self.fc(features_NX))

    def drafting(self, hidden_BRH: Tensor) -> Tensor:
        """What the LM head reads [B,K,H]: the normalised outputs of the rows that draft."""
        return self.norm(hidden_BRH[:, -self.block :])

    def base_head(self, target: Target) -> Head:
        """The target's frozen LM head on the outputs, whatever a subclass adds to its logits."""
        return super().head(0, target)

    # -- training ----------------------------------------------------------------------------------

    @property
    def training_states(self) -> tuple[StateName, ...]:
        """The fused states, and the final one if distributions are learnt."""
        final = ("final",) if self.soft_labels else ()
        return tuple(dict.fromkeys((*self.fused_layers, *final)))

    def blocks(self, batch: TextBatch, target: Target) -> TrainingRows:
        """Random anchors of every document in training, otherwise evenly spaced ones."""
        # Row t has its anchor at t + 1: that token and the next are labels.
        anchored_BT = batch.loss_mask.roll(-1, 1)
        rows = training_rows(batch, self.block, anchored_BT)
        rows = rows.only(rows.valid_MK[:, 0])
        return some_rows(rows, batch, self.anchors, True, self.training)

    def measured_rows(self, batch: TextBatch, target: Target) -> TrainingRows:
        """The same anchors as in validation."""
        return self.blocks(batch, target)

    def block_outputs(self, batch: TextBatch, target: Target, rows: TrainingRows) -> Tensor:
        """What the LM head reads [M,K,H] in the blocks that follow the training rows."""
        context_BTH = self.context(self.joined_states(batch.states))
        hidden_MRH = self.pass_inputs(rows.tokens_MK1[:, 0], target)
        blocks = TrainingBlocks.after(rows, batch, self.pass_rows)
        for layer in self.layers:
            hidden_MRH = recomputed(
                self.recompute,
                run_block_layer,
                layer,
                hidden_MRH,
                context_BTH,
                batch.position_ids,
                blocks,
            )
        return self.drafting(hidden_MRH)

    def base_loss(
        self,
        batch: TextBatch,
        target: Target,
        rows: TrainingRows,
        distributions: Distributions | None,
        outputs_MKH: Tensor,
    ) -> SlotLosses:
        """The loss of the logits of the outputs alone, for subclasses that add to them."""
        outputs = ((slot, slot) for slot in outputs_MKH.unbind(1))
        labels_MK, head = self.labels(batch, target, rows), self.base_head(target)
        steps = self.compared(
            rows, labels_MK, distributions, outputs, lambda _: head, soft_cross_entropy
        )
        return self.slot_losses(steps)

    def slot_weights(self, losses_MK: Tensor, counted_MK: Tensor, valid_MK: Tensor) -> Tensor:
        """exp(-d/γ), or D-PACE's weights; a label that cannot be drafted has probability 0."""
        if not self.expected_length:
            return super().slot_weights(losses_MK, counted_MK, valid_MK)
        probs_MK = torch.where(counted_MK, (-losses_MK).exp(), 0.0)
        return expected_length_weights(probs_MK, valid_MK, self.smoothing)

    # -- decoding ----------------------------------------------------------------------------------

    @property
    def decoding_states(self) -> tuple[StateName, ...]:
        """The fused states, which the context is made of."""
        return tuple(self.fused_layers)

    def blank_state(self, context: Context) -> DFlashState:
        """State with empty caches."""
        caches = [
            LayerCache.empty(self.shape, context.lengths_B, self.precision) for _ in self.layers
        ]
        return DFlashState(context, context.newest_B, context.lengths_B, caches)

    def read(
        self,
        state: BlockState,
        features_BNX: Tensor,
        following_BN: Tensor,
        counts_B: Tensor,
        counts: list[int] | None = None,
    ) -> DFlashState:
        """Append the keys and values of the first `counts_B` rows in every layer."""
        assert isinstance(state, DFlashState)
        context_BNH = self.context(features_BNX)
        for layer, cache in zip(self.layers, state.caches, strict=True):
            positions = causal_rows(cache.lengths_B, context_BNH.shape[1]).position_ids_BN
            cache.write(*attention_of(layer).keys_values(context_BNH, positions))
            cache.keep(counts_B, counts)
        return replace(state, outputs_BKH=None)

    def block_logits(self, state: BlockState) -> Tensor:
        """Logits [B,K,D] of all slots; the block's keys and values are not counted in the
        caches.
        """
        assert isinstance(state, DFlashState)
        target, lengths_B = state.context.target, state.caches[0].lengths_B
        ahead = torch.arange(self.pass_rows, device=lengths_B.device)
        every = torch.ones(self.pass_rows, self.pass_rows, dtype=torch.bool, device=ahead.device)
        rows = Rows(lengths_B[:, None] + ahead, every.expand(len(lengths_B), -1, -1))
        hidden_BRH = self.pass_inputs(state.newest_B, target)
        hidden_BRH = run_layers(self.layers, hidden_BRH, rows, state.caches)
        state.outputs_BKH = self.drafting(hidden_BRH)
        return self.base_head(target)(state.outputs_BKH)


def attention_of(layer: nn.Module) -> Attention:
    """The self-attention of a layer."""
    assert isinstance(layer, DecoderLayer) and layer.self_attn is not None
    return layer.self_attn


def layer_shape(shape: TargetShape) -> TargetShape:
    """The target's dimensions in layers of Qwen3's type: normalised queries and keys, no biases,
    all of a head rotated.
    """
    rope = {key: value for key, value in shape.rope.items() if key != "partial_rotary_factor"}
    return replace(shape, qk_norm=True, attention_bias=False, rope=rope)


def fused_states(count: int, listed: list[int] | None, layers: int) -> list[int]:
    """The fused states of a target of `count` layers, `k` the input of layer k: those listed, or
    evenly spaced ones.

    Raises:
        ValueError: a listed state that the target does not have, or none.
    """
    if listed is not None:
        if not listed or min(listed) < 0 or max(listed) >= count:
            raise ValueError(
                f"fused_layers must be layers of the target, 0 to {count - 1}, got {listed}"
            )
        return listed
    # Published: outputs of layers 1 to L - 3, which are the inputs of the next layers.
    wanted = max(layers, FEWEST_FUSED)
    evenly = (2 + round(i * (count - 4) / (wanted - 1)) for i in range(wanted))
    return sorted({min(max(k, 0), count - 1) for k in evenly})


def unused_token(target: Target) -> int:
    """An id that does not occur in text: the first behind the tokenizer's, or the last special
    token that neither begins nor ends a text, fills up a batch or stands for unknown text; the last
    id where there is none.
    """
    tokenizer, size = target.tokenizer, target.shape.vocab_size
    first = max(tokenizer.get_vocab().values()) + 1
    if first < size:
        return first
    names = ("pad_token_id", "bos_token_id", "unk_token_id")
    used = {*target.eos_ids, *(getattr(tokenizer, name, None) for name in names)}
    special = [i for i in set(tokenizer.all_special_ids) - used if i < size]
    return max(special, default=size - 1)


def _check(
    shape: TargetShape,
    layers: int,
    anchors: int,
    mask_token: int | None,
    gamma: float,
    smoothing: float,
) -> None:
    """Raise ValueError for a setting outside of its range."""
    for name, value in (("layers", layers), ("anchors", anchors)):
        if value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")
    if mask_token is not None and mask_token >= shape.vocab_size:
        raise ValueError(
            f"mask_token must be an id below {shape.vocab_size}, the target's vocabulary, got "
            f"{mask_token}"
        )
    if gamma <= 0:
        raise ValueError(f"gamma must be above 0 slots, got {gamma}")
    if not 0 <= smoothing <= 1:
        raise ValueError(f"smoothing must lie in [0, 1], got {smoothing}")
