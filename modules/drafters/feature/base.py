"""What feature drafters share: one decoder layer that reads features and tokens, and then its own
outputs.

Row t of a sequence pairs the feature at position t with token x_{t+1} and drafts x_{t+2}; to draft
further, the row's own output takes the place of the target's feature. The layer sees the whole
prefix, read with the target's features.

Shape legend: B sequences, T tokens of a packed row, N rows of one call, M training rows, J steps
already taken, W frontier nodes, R rows of a proposal, A rows written ahead in a proposal, H hidden
size, X width of the attention's input, Y of the layer's output, Q query heads, G key/value heads, S
slots, E head size, D draft vocabulary.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

from modules.contracts.batches import TextBatch
from modules.contracts.drafter import Context, DraftState, Frontier
from modules.contracts.rows import Rows, causal_rows, rows_at, with_children
from modules.contracts.shapes import StateName, TargetShape
from modules.contracts.trainable import Footprint
from modules.contracts.verification import Accepted, Verified
from modules.drafters.trained import WIDE_BUDGET, WIDE_LEVEL, TrainedDrafter
from modules.layers.activation_checkpointing import recomputed
from modules.layers.decoder_layer import Attention, DecoderLayer, LayerCache
from modules.layers.hanging_attention import MAX_SCORES, Prefix, Visible
from modules.layers.rebased_sinks import sink_positions, wide_keys, wide_queries, wide_row
from modules.layers.window_cache import WindowCache
from modules.losses.chunked import TrainingRows
from modules.trees.named_trees import Path
from modules.trees.reranked import RerankedTree
from modules.trees.threshold import ThresholdTree

if TYPE_CHECKING:
    from modules.contracts.target import Target


@dataclass
class FeatureState(DraftState):
    """A feature drafter's knowledge of its sequences.

    cache: its layer's keys and values of the prefix (one row per token the target has read; with a
    window, of those that later rows reach).
    carried_BH, feature_BH: outputs of the newest prefix row: the input of the next step and the
    input of the LM head.
    rows_BRH: the input of the next step from each row of this proposal; row 0 is the newest prefix
    row.
    above_BRA: which of the rows written ahead in this proposal (all but row 0) each row sees,
    itself included.
    """

    cache: LayerCache
    carried_BH: Tensor
    feature_BH: Tensor
    rows_BRH: Tensor | None = None
    above_BRA: Tensor | None = None


class FeatureDrafter(TrainedDrafter):
    """Base of the feature drafters.

    Subclasses set `layer` and define `read`, `fuse`, `outputs` and `head`.

    Args:
        shape: the target's dimensions.
        steps: draft steps unrolled in training, each on the outputs of the one before; 1 is teacher
            forcing.
        draft_vocabulary: how many token ids can be drafted; None for all.
        decay: step j weighs decay^j.
        depth: levels of its default tree, `ThresholdTree`, or on a GPU EAGLE-2's.
        tree: fixed paths instead of that tree, given in full or by name; an optimised tree is
            `steps` deep.
    """

    soft_labels: bool = True
    first_exponent: ClassVar[int] = 0
    stored_bytes: ClassVar[tuple[float, float, float]] = (116.0, 81.0, 27.0)
    window: int | None = None
    """Positions that a row's attention reaches back over the text, itself included; None: all of
    them. Drafted rows before it are always seen."""
    sinks: int = 0
    """First positions of the text that rows see beside the window."""
    rebase: bool = False
    """Whether rows read the sinks as if they stood right before the window."""
    layer: DecoderLayer

    def __init__(
        self,
        shape: TargetShape,
        steps: int,
        draft_vocabulary: int | None,
        decay: float,
        depth: int,
        tree: list[Path] | str | None,
    ) -> None:
        if steps < 1:
            raise ValueError(f"steps must be at least 1, got {steps}")
        super().__init__(shape, steps, draft_vocabulary, decay)
        if tree is None:
            self._builder, self._wide = (
                ThresholdTree(depth),
                (RerankedTree(depth, WIDE_LEVEL), WIDE_BUDGET),
            )
        else:
            self.use_static_tree(tree)

    # -- what makes a method -----------------------------------------------------------------------

    @property
    def feature_states(self) -> tuple[StateName, ...]:
        """The target states that its features are made of."""
        return (self.reads,)

    @abstractmethod
    def read(self, states: Mapping[StateName, Tensor]) -> Tensor:
        """Features [..., H] of the target's states."""

    @abstractmethod
    def fuse(self, vectors_NH: Tensor, features_NH: Tensor) -> tuple[Tensor, Tensor]:
        """The input of attention [..., X] and the residual that its output is added to [..., H]."""

    @abstractmethod
    def outputs(self, hidden_NY: Tensor) -> tuple[Tensor, Tensor]:
        """The LM head's input [..., H] and the next step's input feature [..., H]."""

    @property
    def attention(self) -> Attention:
        """The self-attention of its layer."""
        assert self.layer.self_attn is not None
        return self.layer.self_attn

    def vectors(self, ids: Tensor, target: Target) -> Tensor:
        """The target's token embeddings [..., H]."""
        return target.embed(ids).to(self.precision)

    # -- training ----------------------------------------------------------------------------------

    def footprint(self, rows: int, length: int) -> Footprint:
        """Adds the scores of training attention, which stay in memory."""
        whole = super().footprint(rows, length)
        return replace(whole, score_heads=self.shape.num_heads, most_scores=MAX_SCORES)

    @property
    def training_states(self) -> tuple[StateName, ...]:
        """The states of its features, and the target's distributions."""
        return tuple(dict.fromkeys((*self.feature_states, "final")))

    def noisy(self, features_BTH: Tensor, batch: TextBatch) -> Tensor:
        """Features as training reads them."""
        return features_BTH

    def unrolled(
        self, batch: TextBatch, target: Target, rows: TrainingRows
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Outputs of every step: the first reads the target's features, each later one the outputs
        of the step before.

        Step j is at position t + j. It sees the prefix up to t, as the first step read it, and the
        rows of later steps that started from the same t (training-time test, Li et al. 2025, arXiv
        2503.01840).
        """
        # 1. Keys and values of the prefix, read once with the target's features.
        features = self.noisy(self.read(batch.states).to(self.precision), batch)
        inputs, residual = self.fuse(self.vectors(batch.input_ids.roll(-1, 1), target), features)
        _, keys, values = self.attention.project(inputs, batch.position_ids)
        keys = self._keys(keys, batch.position_ids)
        flat_M, length = rows.flat_MK1[:, 0], batch.input_ids.shape[1]
        prefix = Prefix(keys, values, self.seen_by(batch, 0), flat_M, length)
        # 2. The first step's inputs at the training rows.
        inputs, residual = rows.take(inputs), rows.take(residual)
        positions, feature, hanging = rows.take(batch.position_ids), residual, []
        carried = residual
        # 3. A later step reads the outputs before it; its keys and values join the visible rows.
        for step in range(self.draft_steps):
            if step:
                tokens_M = self.next_tokens(rows, step, feature, target)
                inputs, residual = self.fuse(self.vectors(tokens_M, target), carried)
            if step and self.window is not None:
                prefix = Prefix(keys, values, self.seen_by(batch, step), flat_M, length)
            feature, carried, *row = recomputed(
                self.recompute,
                self._draft,
                inputs,
                residual,
                positions + step,
                prefix,
                tuple(hanging),
                step > 0,
            )
            if step:
                hanging.append(row)
            yield feature, carried

    def _queries(self, near: Tensor, inputs: Tensor, positions: Tensor) -> Tensor:
        """Queries [B,N,Q,D] of these inputs, or [B,N,Q,2 D] where sinks are rebased."""
        if not self.rebase or self.window is None:
            return near
        places = sink_positions(positions, self.window, self.sinks)
        return wide_queries(near, self.attention.project(inputs, places)[0])

    def _keys(self, keys_BNGD: Tensor, positions_BN: Tensor) -> Tensor:
        """Keys of text at these positions, to be read by `_queries`."""
        return wide_keys(keys_BNGD, positions_BN < self.sinks) if self.rebase else keys_BNGD

    def seen_by(self, batch: TextBatch, step: int) -> Visible:
        """Which tokens training rows of a step see."""
        rows, place_BT = batch.rows(), batch.position_ids

        def seen(sequence: int, places_M: Tensor) -> Tensor:
            alone = slice(sequence, sequence + 1)
            visible = rows.sequence(sequence).visible_at(places_M[None])
            here = place_BT[alone, places_M]
            return self.in_window(visible, here + step, place_BT[alone])[0]

        return seen

    def next_tokens(
        self, rows: TrainingRows, step: int, feature_MH: Tensor, target: Target
    ) -> Tensor:
        """int64 [M], the tokens that step `step` > 0 reads: those of the text. `feature_MH` is what
        the LM head read in the step before.
        """
        return rows.tokens_MK1[:, step]

    def in_window(self, visible_BNS: Tensor, rows_BN: Tensor, slots_BS: Tensor) -> Tensor:
        """bool [B,N,S]: the visible slots that rows at these positions reach."""
        if self.window is None:
            return visible_BNS
        near = rows_BN[..., None] - slots_BS[:, None] < self.window
        return visible_BNS & (near | (slots_BS < self.sinks)[:, None])

    def reached_slots(self, positions_B1: Tensor, cache: LayerCache) -> Tensor | None:
        """The committed positions that rows at a position reach (`Rows.committed_BS`)."""
        if self.window is None:
            return None
        within = torch.arange(min(self.window, cache.longest), device=positions_B1.device)
        slots_BS = (positions_B1 + 1 - self.window).clamp(min=self.sinks) + within
        first = torch.arange(min(self.sinks, cache.longest), device=positions_B1.device)
        slots_BS = torch.cat([first.expand(len(slots_BS), -1), slots_BS], 1)
        return torch.where(slots_BS < cache.positions_B[:, None], slots_BS, -1)

    def _draft(
        self,
        inputs_MX: Tensor,
        residual_MH: Tensor,
        positions_M: Tensor,
        prefix: Prefix,
        hanging: Sequence[Sequence[Tensor]],
        hangs: bool,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """One step: outputs of the training rows, and their keys and values.

        `hanging` holds keys and values of the rows of earlier steps, one per training row; the new
        rows join them if `hangs`, otherwise they are part of the prefix.
        """
        near, keys, values = self.attention.project(inputs_MX[None], positions_M[None])
        queries = self._queries(near, inputs_MX[None], positions_M[None])[0]
        key, value = wide_row(keys[0]) if self.rebase else keys[0], values[0]
        mixed = self.attention.o_proj(
            prefix.mix(queries, [*hanging, (key, value)] if hangs else hanging).flatten(1)
        )
        feature, carried = self.outputs(self.layer.after_attention(residual_MH + mixed))
        return feature, carried, key, value

    # -- decoding ----------------------------------------------------------------------------------

    @property
    def decoding_states(self) -> tuple[StateName, ...]:
        """The states of its features."""
        return self.feature_states

    def start(self, context: Context) -> FeatureState:
        """State after the prompts, from the target's states of them."""
        if self.window is None:
            cache = LayerCache.empty(self.shape, context.lengths_B, self.precision)
        else:
            cache = WindowCache.reaching(
                self.window, self.sinks, self.shape, context.lengths_B, self.precision
            )
        feature, carried = self._read_prefix(
            context.states, context.following_BT, context.lengths_B, context.target, cache
        )
        return FeatureState(context, context.newest_B, context.lengths_B, cache, carried, feature)

    def absorb(self, state: DraftState, verified: Verified, accepted: Accepted) -> FeatureState:
        """State after the accepted rows of any tree, read with the target's true features."""
        assert isinstance(state, FeatureState)
        states = {name: accepted.along_path(verified.states[name]) for name in self.feature_states}
        feature, carried = self._read_prefix(
            states,
            accepted.emitted(verified.tree),
            accepted.lengths_B,
            state.context.target,
            state.cache,
            accepted.lengths,
        )
        return replace(
            state,
            newest_B=accepted.next_B,
            lengths_B=state.lengths_B + accepted.lengths_B,
            carried_BH=carried,
            feature_BH=feature,
            rows_BRH=None,
            above_BRA=None,
        )

    def _read_prefix(
        self,
        states: Mapping[StateName, Tensor],
        next_BN: Tensor,
        counts_B: Tensor,
        target: Target,
        cache: LayerCache,
        counts: list[int] | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Write the first `counts_B` rows (`counts` on the host) into the cache, and return the
        outputs [B,H] of the last of them.
        """
        # 1. All rows enter the cache; it then drops those after the counts.
        features = self.read(states).to(self.precision)
        inputs, residual = self.fuse(self.vectors(next_BN, target), features)
        rows, last_B1 = causal_rows(cache.positions_B, next_BN.shape[1]), counts_B[:, None] - 1
        queries, keys, values = self.attention.project(inputs, rows.position_ids_BN)
        keys, values = cache.write(keys, values)
        if self.window is not None:
            place_B1 = rows.position_ids_BN.gather(1, last_B1)
            seen = rows_at(rows.visible_BNJ, last_B1)
            seen = self.in_window(seen, place_B1, rows.position_ids_BN)
            last = Rows(place_B1, seen, self.reached_slots(place_B1, cache))
            queries = self._queries(queries, inputs, rows.position_ids_BN)
            keys, values, visible = cache.chosen(last, keys, values)
            slots_BX = self._slot_positions(last, rows.position_ids_BN, keys.shape[1])
            keys = self._keys(keys, slots_BX)
        cache.keep(counts_B, counts)
        # 2. Outputs are needed at the last row only, which sees all that was kept.
        if self.window is None:
            keys, values, visible = cache.counted()
        newest = rows_at(queries.flatten(2), last_B1).view(len(counts_B), 1, *queries.shape[2:])
        mixed = self.attention.mix(newest, keys, values, visible)
        feature, carried = self.outputs(
            self.layer.after_attention(rows_at(residual, last_B1) + mixed)
        )
        return feature[:, 0], carried[:, 0]

    @staticmethod
    def _slot_positions(rows: Rows, positions_BJ: Tensor, count: int) -> Tensor:
        """int64 [B,X]: positions of the slots that `LayerCache.chosen` gives, of which the last are
        rows at `positions_BJ`; without chosen slots, of all.
        """
        if rows.committed_BS is None:
            return torch.arange(count, device=positions_BJ.device).expand(len(positions_BJ), -1)
        return torch.cat([rows.committed_BS.expand(len(positions_BJ), -1), positions_BJ], 1)

    def _attended(self, inputs_BWX: Tensor, rows: Rows, cache: LayerCache) -> Tensor:
        """The attention of drafted rows [B,W,H]."""
        if not self.rebase:
            return self.attention(inputs_BWX, rows, cache)
        positions, drafted = rows.position_ids_BN, rows.visible_BNJ.shape[2]
        near, keys, values = self.attention.project(inputs_BWX, positions)
        queries = self._queries(near, inputs_BWX, positions)
        keys, values = cache.write(keys, values, drafted - positions.shape[1])
        keys, values, visible = cache.chosen(rows, keys, values)
        # Drafted rows come after the text, so that none is a sink.
        after_BJ = cache.positions_B[:, None].expand(-1, drafted) + self.sinks
        keys = self._keys(keys, self._slot_positions(rows, after_BJ, keys.shape[1]))
        return self.attention.mix(queries, keys, values, visible)

    def expand(self, state: DraftState, frontier: Frontier) -> Tensor:
        """Logits [B,W,D] of the token after each frontier node, all nodes of a level in one call of
        the layer.
        """
        assert isinstance(state, FeatureState)
        target = state.context.target
        # The root was read with the prefix; its outputs are in the state.
        if frontier.depth == 0 or state.rows_BRH is None or state.above_BRA is None:
            state.rows_BRH = state.carried_BH[:, None]
            state.above_BRA = torch.zeros(
                len(state.carried_BH), 1, 0, dtype=torch.bool, device=state.carried_BH.device
            )
            return self.head(0, target)(state.feature_BH[:, None])
        # Each node reads its parent's output and its own token, and sees its ancestors.
        before = rows_at(state.rows_BRH, frontier.parents_BW)
        inputs, residual = self.fuse(self.vectors(frontier.tokens_BW, target), before)
        state.above_BRA = with_children(state.above_BRA, frontier.parents_BW)
        above = state.above_BRA[:, -frontier.tokens_BW.shape[1] :]
        positions = state.cache.positions_B[:, None] + (frontier.depth - 1)
        reached = self.reached_slots(positions, state.cache)
        rows = Rows(positions.expand_as(frontier.tokens_BW), above, reached)
        hidden = self.layer.after_attention(residual + self._attended(inputs, rows, state.cache))
        feature, carried = self.outputs(hidden)
        # Later levels look up their parents' outputs.
        state.rows_BRH = torch.cat([state.rows_BRH, carried], dim=1)
        return self.head(frontier.depth, target)(feature)
