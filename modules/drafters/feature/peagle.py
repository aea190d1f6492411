"""P-EAGLE: EAGLE-3 that drafts all tokens in one pass, by mask slots (Hui et al. 2026, arXiv
2602.01469).

Slot 0 is EAGLE-3's newest row. Slot d > 0 is d positions after it; it reads a learned state and a
mask token in place of the feature and the token that are not known yet.

Shape legend: B sequences, T tokens of a packed row, N rows of one call, M training rows, K slots,
R slots with a mask, E mask slots of a training step, X width of the first layer's inputs, H hidden
size, D draft vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from modules.contracts.batches import TextBatch
from modules.contracts.drafter import Context, DraftState, Frontier
from modules.contracts.losses import Losses
from modules.contracts.rows import Rows, causal_rows, rows_at
from modules.contracts.shapes import StateName, TargetShape
from modules.contracts.verification import Accepted, Verified
from modules.drafters.block_diffusion.dflash import attention_of, unused_token
from modules.drafters.feature.eagle import adds_nothing
from modules.drafters.feature.eagle3 import Eagle3
from modules.drafters.heads.base import refuse_unknown
from modules.drafters.trained import DraftStep
from modules.layers.activation_checkpointing import recomputed
from modules.layers.decoder_layer import DecoderLayer, LayerCache, run_layers
from modules.layers.hanging_attention import Prefix
from modules.losses.averages import divisor
from modules.losses.chunked import TrainingRows
from modules.losses.row_subsets import some_of_each
from modules.trees.named_trees import Path
from modules.trees.static import StaticTree

if TYPE_CHECKING:
    from modules.contracts.target import Target

KeysValues = tuple[Tensor, Tensor]


@dataclass
class PEagleState(DraftState):
    """State of its sequences.

    caches: keys and values of the prefix in each layer (one row per token the target has read).
    outputs_BKH: what the LM head reads in every slot.
    logits_BKD: of all slots, once a proposal has begun.
    """

    caches: list[LayerCache]
    outputs_BKH: Tensor
    logits_BKD: Tensor | None = None


class PEagle(Eagle3):
    """Row t reads the token x_{t+1} and the feature g_t as EAGLE-3's first step does; behind it
    follow K - 1 slots of mask token and learned state, at the positions after it. A slot sees the
    rows of its document up to t and the slots before it. Slot d drafts x_{t+2+d}; the first layer
    reads [token ; feature], later ones are ordinary.

    Training expands a text to all slots of all rows. Conditional drop-out leaves of slot d only
    max(ratio^d, least_ratio) of each packed row's rows, those of slot d + 1 among those of slot d.
    Loss: plain mean of the cross-entropies to the target's distributions over all slots left.

    Args:
        shape: the target's dimensions.
        block: K, tokens drafted per pass.
        layers: decoder layers; the paper has 4.
        draft_vocabulary: how many token ids can be drafted; null for all.
        fused_layers: states that are fused, `k` the input of layer k; null: 2, L // 2 and L - 3.
        ratio: share of the rows that train a slot, by the share of the slot before it.
        least_ratio: the smallest such share.
        anchors: rows of a packed row that train mask slots, at most; null: all of them. A cap
            leaves more weight to the first slot.
        partitions: parts of a training step's mask slots, computed one after the other and again in
            the backward pass, for long rows: memory is that of one part.
        mask_token: id whose embedding the mask slots read; null chooses one that does not occur in
            text (`unused_token`).
        embeddings: `target`: the target's token embeddings, frozen; `own`: a copy that is trained,
            as in the paper.
        norm_before_residual: whether attention is added to the normalised feature.
        norm_before_fc: whether the fused states are normalised together.
        qk_norm: whether layers normalise queries and keys, as Qwen3's; null: as the target's.
        tree: paths or the name of a tree, filled with the likeliest tokens of each slot; null: the
            chain of all slots.
        greedy_labels: count positions by the target's most likely token, as in EAGLE-3.
        divergence: how the target's distribution is learnt (`modules.losses.divergences`).
    """

    depth_unit = "tokens in a block"

    def __init__(
        self,
        shape: TargetShape,
        block: int = 8,
        layers: int = 2,
        draft_vocabulary: int | None = None,
        fused_layers: list[int] | None = None,
        ratio: float = 0.7,
        least_ratio: float = 0.2,
        anchors: int | None = None,
        partitions: int = 1,
        mask_token: int | None = None,
        embeddings: Literal["target", "own"] = "target",
        norm_before_residual: bool = False,
        norm_before_fc: bool = False,
        qk_norm: bool | None = None,
        tree: list[Path] | str | None = None,
        greedy_labels: bool = False,
        divergence: str = "cross_entropy",
    ) -> None:
        # 1. Settings.
        _check(shape, block, layers, anchors, partitions, mask_token)
        _check_shares(ratio, least_ratio)
        refuse_unknown("embeddings", embeddings, ("target", "own"))
        super().__init__(
            shape,
            draft_vocabulary,
            fused_layers,
            steps=block,
            decay=1.0,
            norm_before_residual=norm_before_residual,
            depth=block,
            tree=tree,
            greedy_labels=greedy_labels,
            divergence=divergence,
            norm_before_fc=norm_before_fc,
            qk_norm=qk_norm,
        )
        self.ratio, self.least_ratio, self.anchors = ratio, least_ratio, anchors
        self.partitions, self.mask_token = partitions, mask_token
        if tree is None:
            self._builder, self._wide, self._budget = StaticTree.chain(block), (None, 0), block
        # 2. Modules, named as in the release.
        self.mask_hidden = nn.Parameter(torch.randn(1, 1, self.fc.in_features))
        self.layers = nn.ModuleList(DecoderLayer(self.layer.shape) for _ in range(layers - 1))
        self.embed_tokens = (
            nn.Embedding(shape.vocab_size, shape.hidden_size) if embeddings == "own" else None
        )

    @torch.no_grad()
    def initialise(self, target: Target) -> None:
        """Start as EAGLE-3 does, with later layers that add nothing; choose the mask."""
        super().initialise(target)
        self.mask_token = self.arguments["mask_token"] = self.mask(target)
        for layer in self.layers:
            assert isinstance(layer, DecoderLayer)
            if layer.shape == self.shape:
                layer.copy_from(target)
            adds_nothing(layer)
        if self.embed_tokens is not None:
            every = torch.arange(self.shape.vocab_size, device=target.device)
            self.embed_tokens.weight.copy_(target.embed(every))

    def refusal_to_start(self, arguments: Mapping[str, Any]) -> str | None:
        """Slots of another mask token are others."""
        ours, theirs = self.arguments["mask_token"], arguments.get("mask_token")
        if theirs is not None and theirs != ours:
            return f"mask_token {theirs!r} there and {ours!r} here: set mask_token to {theirs!r}"
        return super().refusal_to_start(arguments)

    def mask(self, target: Target) -> int:
        """The id whose embedding the mask slots read."""
        return unused_token(target) if self.mask_token is None else self.mask_token

    def vectors(self, ids: Tensor, target: Target) -> Tensor:
        """The target's token embeddings [..., H], or its own."""
        return super().vectors(ids, target) if self.embed_tokens is None else self.embed_tokens(ids)

    def mask_slot(self, target: Target) -> tuple[Tensor, Tensor]:
        """What the first layer reads in a slot with a mask: attention's input [X] and residual
        [H].
        """
        token = torch.tensor(self.mask(target), device=self.mask_hidden.device)
        return self.fuse(self.vectors(token, target), self.fusion(self.mask_hidden.flatten()))

    @property
    def stack(self) -> list[DecoderLayer]:
        """All layers, the one of two inputs first."""
        return [self.layer, *(layer for layer in self.layers if isinstance(layer, DecoderLayer))]

    # -- training ----------------------------------------------------------------------------------

    def unrolled(
        self, batch: TextBatch, target: Target, rows: TrainingRows
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """The LM head's inputs [M,H] slot by slot, in all slots of all rows."""
        every_MK = torch.ones_like(rows.valid_MK)
        return ((each, each) for each in self.slots(batch, target, rows, every_MK))

    def chosen(self, rows: TrainingRows, batch: TextBatch) -> Tensor:
        """bool [M,K]: the slots that are trained, all labels up to theirs being in the row's
        document; at random in training, otherwise evenly spaced.
        """
        chosen_MK = torch.zeros_like(rows.valid_MK)
        chosen_MK[:, 0] = True
        # 1. The rows that train mask slots.
        packed_M = rows.flat_MK1[:, 0] // batch.input_ids.shape[1]
        pool = some_of_each(packed_M, self.anchors or len(packed_M), self.training)
        # 2. Of those of each slot, some train the next. The share is of each packed row: which
        #    slots train does not depend on the other rows of the batch.
        count_M = packed_M[pool].bincount(minlength=len(batch.input_ids))[packed_M].double()
        for slot in range(1, self.draft_steps):
            pool = pool[rows.valid_MK[pool, slot]]
            wanted_M = (max(self.ratio**slot, self.least_ratio) * count_M).round().long()
            pool = pool[some_of_each(packed_M[pool], wanted_M[pool], self.training)]
            chosen_MK[pool, slot] = True
        return chosen_MK

    def slots(
        self, batch: TextBatch, target: Target, rows: TrainingRows, chosen_MK: Tensor
    ) -> list[Tensor]:
        """The LM head's inputs [M',H] in every slot, of the M' rows that are chosen there; all are
        in slot 0.
        """
        # 1. The rows of the text, whose keys and values in each layer the mask slots see.
        features = self.read(batch.states).to(self.precision)
        inputs, hidden = self.fuse(self.vectors(batch.input_ids.roll(-1, 1), target), features)
        seen, text = batch.rows(), list[KeysValues]()
        for i, layer in enumerate(self.stack):
            inputs = layer.attention_inputs(hidden) if i else inputs
            hidden, *made = recomputed(self.recompute, _text_layer, layer, inputs, hidden, seen)
            text.append((made[0], made[1]))
        # 2. The mask slots, in parts of about as many slots.
        slot, parts = self.mask_slot(target), []
        sums_M = chosen_MK[:, 1:].sum(1).cumsum(0)
        part_M = (sums_M - 1).clamp(min=0) * self.partitions // sums_M[-1:].clamp(min=1)
        again = self.recompute or self.partitions > 1
        for part in range(self.partitions):
            flat = [
                rows.flat_MK1[chosen_MK[:, d] & (part_M == part), 0]
                for d in range(1, self.draft_steps)
            ]
            parts.append(recomputed(again, self._mask_slots, *slot, text, batch, flat))
        first = self.norm(rows.take(hidden))
        return [first, *(torch.cat(made) for made in zip(*parts, strict=True))]

    def _mask_slots(
        self,
        inputs_X: Tensor,
        residual_H: Tensor,
        text: Sequence[KeysValues],
        batch: TextBatch,
        flat: Sequence[Tensor],
    ) -> tuple[Tensor, ...]:
        """The LM head's inputs [M',H] in the slots with a mask.

        Args:
            inputs_X, residual_H: what the first layer reads in them.
            text: the text's keys and values in each layer.
            batch: whose rows they are.
            flat: flat positions [M'] of the rows that a slot follows, ascending, one for each slot;
                those of a slot are among those of the slot before.
        """
        # 1. All slots side by side, and where a slot's rows are among those of earlier slots.
        sizes, places_T = [len(each) for each in flat], batch.position_ids.flatten()
        visible, length = self.seen_by(batch, 0), batch.input_ids.shape[1]
        positions_E = torch.cat([places_T[each] + d for d, each in enumerate(flat, 1)])
        inputs, hidden = inputs_X.expand(sum(sizes), -1), residual_H.expand(sum(sizes), -1)
        index = [
            [torch.searchsorted(flat[j], at) for j in range(d + 1)] for d, at in enumerate(flat)
        ]
        # 2. Layer by layer: the text up to the slot's row, and the slots from that row on.
        for i, (layer, (keys, values)) in enumerate(zip(self.stack, text, strict=True)):
            inputs, attention = layer.attention_inputs(hidden) if i else inputs, attention_of(layer)
            made = attention.project(inputs[None], positions_E[None])
            queries, own_keys, own_values = (part[0].split(sizes) for part in made)
            mixed = []
            for d, at in enumerate(flat):
                earlier = [
                    (own_keys[j][index[d][j]], own_values[j][index[d][j]]) for j in range(d + 1)
                ]
                prefix = Prefix(keys, values, visible, at, length)
                mixed.append(prefix.mix(queries[d], earlier))
            mixed_EH = attention.o_proj(torch.cat(mixed).flatten(1))
            hidden = layer.after_attention(layer.with_attention(hidden, mixed_EH))
        return self.norm(hidden).split(sizes)

    def steps(self, batch: TextBatch, target: Target) -> Iterator[DraftStep]:
        """Every slot over the rows that are chosen there."""
        rows = self.rows(batch, target)
        chosen_MK, labels_MK = self.chosen(rows, batch), self.labels(batch, target, rows)
        distributions = self.distributions(batch, target, rows)
        ended_M = None
        for slot, outputs in enumerate(self.slots(batch, target, rows, chosen_MK)):
            chosen_M = chosen_MK[:, slot]
            (step,) = self.compared(
                rows.only(chosen_M),
                labels_MK[chosen_M],
                distributions,
                [(outputs, outputs)],
                lambda depth: self.head(depth, target),
                self.divergence,
                slot,
                None if ended_M is None else ended_M[chosen_M],
            )
            blank_M = step.losses_M.new_zeros(len(chosen_M))
            ended_M = blank_M.masked_scatter(chosen_M, step.losses_M)
            yield step

    def weighted(self, steps: Iterator[DraftStep], batch: TextBatch) -> Losses:
        """The mean over all slots with a label, and their metrics."""
        total, count, metrics = torch.zeros((), device=batch.input_ids.device), 0, {}
        for step in steps:
            total = total + (step.losses_M * step.counted_M).sum()
            count = count + step.counted_M.sum()
            metrics |= step.metrics()
        return Losses(total / divisor(torch.as_tensor(count)), metrics)

    # -- decoding ----------------------------------------------------------------------------------

    @property
    def max_depth(self) -> int | None:
        """K, the tokens of a block."""
        return self.draft_steps

    def start(self, context: Context) -> DraftState:
        """State after the prompts, from the target's states of them."""
        caches = [
            LayerCache.empty(self.shape, context.lengths_B, self.precision) for _ in self.stack
        ]
        outputs = self._one_pass(
            context.states, context.following_BT, context.lengths_B, context.target, caches
        )
        return PEagleState(context, context.newest_B, context.lengths_B, caches, outputs)

    def absorb(self, state: DraftState, verified: Verified, accepted: Accepted) -> DraftState:
        """State after the accepted rows of any tree, and the next slots, in one pass."""
        assert isinstance(state, PEagleState)
        states = {name: accepted.along_path(verified.states[name]) for name in self.feature_states}
        outputs = self._one_pass(
            states,
            accepted.emitted(verified.tree),
            accepted.lengths_B,
            state.context.target,
            state.caches,
            accepted.lengths,
        )
        return replace(
            state,
            newest_B=accepted.next_B,
            lengths_B=state.lengths_B + accepted.lengths_B,
            outputs_BKH=outputs,
            logits_BKD=None,
        )

    def _one_pass(
        self,
        states: Mapping[StateName, Tensor],
        next_BN: Tensor,
        counts_B: Tensor,
        target: Target,
        caches: list[LayerCache],
        counts: list[int] | None = None,
    ) -> Tensor:
        """The LM head's inputs [B,K,H] in the slots behind the first `counts_B` rows (`counts` on
        the host), which enter the caches.
        """
        # 1. The rows of the text, then the slots with a mask.
        features, more = self.read(states).to(self.precision), self.draft_steps - 1
        inputs, residual = self.fuse(self.vectors(next_BN, target), features)
        masked = (part.expand(len(next_BN), more, -1) for part in self.mask_slot(target))
        inputs, residual = (
            torch.cat(pair, 1) for pair in zip((inputs, residual), masked, strict=True)
        )
        # 2. All layers; of the rows that are written only those of the text are counted.
        rows = slots_behind(caches[0].lengths_B, next_BN.shape[1], counts_B, more)
        hidden = self.layer(inputs, rows, caches[0], residual)
        hidden = run_layers(self.layers, hidden, rows, caches[1:])
        for cache in caches:
            cache.keep(counts_B, counts)
        # 3. Slot 0 is the last row of the text.
        masked_R = next_BN.shape[1] + torch.arange(more, device=next_BN.device)
        index = torch.cat([counts_B[:, None] - 1, masked_R.expand(len(next_BN), -1)], 1)
        return self.norm(rows_at(hidden, index))

    def expand(self, state: DraftState, frontier: Frontier) -> Tensor:
        """Logits [B,W,D] of the token after each frontier node, which its depth alone decides."""
        assert isinstance(state, PEagleState)
        if state.logits_BKD is None:
            state.logits_BKD = self.head(0, state.context.target)(state.outputs_BKH)
        slot_B1D = state.logits_BKD[:, frontier.depth, None]
        return slot_B1D.expand(-1, frontier.tokens_BW.shape[1], -1)


def slots_behind(start_B: Tensor, count: int, counts_B: Tensor, slots: int) -> Rows:
    """`count` consecutive rows after `start_B` earlier ones, of which sequences have `counts_B`,
    and as many slots behind the last of these. A slot sees these and the slots before it.
    """
    text, ahead = causal_rows(start_B, count), torch.arange(slots, device=start_B.device)
    positions = torch.cat([text.position_ids_BN, (start_B + counts_B)[:, None] + ahead], 1)
    counted_BN = torch.arange(count, device=start_B.device) < counts_B[:, None]
    chain = (ahead[:, None] >= ahead).expand(len(start_B), -1, -1)
    below = torch.cat([counted_BN[:, None].expand(-1, slots, -1), chain], 2)
    return Rows(positions, torch.cat([F.pad(text.visible_BNJ, (0, slots)), below], 1))


def _text_layer(
    layer: DecoderLayer, inputs_BTX: Tensor, residual_BTH: Tensor, seen: Rows
) -> tuple[Tensor, Tensor, Tensor]:
    """A layer's outputs at the rows of the text, and their keys and values."""
    attention = attention_of(layer)
    queries, keys, values = attention.project(inputs_BTX, seen.position_ids_BN)
    mixed = attention.among(queries, keys, values, seen)
    return layer.after_attention(layer.with_attention(residual_BTH, mixed)), keys, values


def _check(
    shape: TargetShape,
    block: int,
    layers: int,
    anchors: int | None,
    partitions: int,
    mask_token: int | None,
) -> None:
    """Raise ValueError for a count outside of its range."""
    if block < 2:
        raise ValueError(f"block must be at least 2 tokens (1 is EAGLE-3), got {block}")
    counts = {"layers": layers, "partitions": partitions, "anchors": anchors}
    for name, value in counts.items():
        if value is not None and value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")
    if mask_token is not None and mask_token >= shape.vocab_size:
        raise ValueError(
            f"mask_token must be an id below {shape.vocab_size}, the target's vocabulary, got "
            f"{mask_token}"
        )


def _check_shares(ratio: float, least_ratio: float) -> None:
    """Raise ValueError for shares outside of 0 to 1."""
    for name, value in (("ratio", ratio), ("least_ratio", least_ratio)):
        if not 0 <= value <= 1:
            raise ValueError(f"{name} must lie in [0, 1], got {value}")
