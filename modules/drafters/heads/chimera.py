"""Chimera: heads on the target's state and on a light draft state that reads the tokens drafted so
far (Zeng et al. 2024, arXiv 2402.15758).

At position t the target has given the states f_0 … f_t, and x_{t+1} is known. A trigram vector
g_j is made of the tokens x_{j-2}, x_{j-1}, x_j. One decoder layer reads the rows f_0 … f_t and
g_1 … g_{t+1}; its output z_{t+1} at the last row estimates f_{t+1}, and head 0 drafts x_{t+2} of
[f_t ; z_{t+1}]. Further rows are g_{t+1+d} of drafted tokens. They see f_0 … f_t, the estimates
z_{t+1} … z_{t+d} in place of states, and themselves.

Shape legend: B sequences, T tokens of a packed row, N rows of one call, W frontier nodes, R rows
of a proposal, S slots, M training rows, J earlier steps, H hidden size, X a head's input, D draft
vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar, Literal

import torch
from torch import Tensor, nn

from modules.contracts.batches import TextBatch
from modules.contracts.drafter import Context, DraftState, Frontier, ProposalRows
from modules.contracts.losses import Mean
from modules.contracts.rows import Rows, rows_at
from modules.contracts.shapes import TargetShape
from modules.contracts.trainable import Footprint
from modules.contracts.verification import Accepted, Verified
from modules.drafters.heads.base import SteppedHeads, refuse_unknown
from modules.drafters.heads.trigrams import (
    MOST_ENTRIES,
    TrigramMemo,
    document_trigrams,
    trigram_encoder,
)
from modules.drafters.trained import DraftStep
from modules.layers.activation_checkpointing import recomputed
from modules.layers.decoder_layer import Attention, DecoderLayer, LayerCache
from modules.layers.hanging_attention import MAX_SCORES, Prefix
from modules.layers.token_scale import token_scale
from modules.losses.chunked import (
    Distributions,
    Head,
    TrainingRows,
    accuracy,
    cross_entropy,
    greedy_tokens,
    smooth_l1,
)

if TYPE_CHECKING:
    from modules.contracts.target import Target


@dataclass
class ChimeraState(DraftState):
    """What Chimera knows of its sequences.

    cache: keys and values of its layer, of f_0, g_1, f_1, g_2, … in turn.
    final_BH: f_t. drafted_BH: z_{t+1}.
    pairs_BR2: int64, the last two tokens up to each row of the proposal, its own included; row 0 is
    the newest token's.
    rows: the proposal so far.
    """

    cache: LayerCache
    final_BH: Tensor
    drafted_BH: Tensor
    pairs_BR2: Tensor
    rows: ProposalRows


@dataclass(frozen=True)
class ComparedStep(DraftStep):
    """A draft step that is also compared with the target.

    likely_ranks_M: ranks of the target's most likely tokens, of rows whose label counts; None in
    training.
    """

    likely_ranks_M: Tensor | None = None

    def metrics(self) -> dict[str, Mean]:
        """Also top-1 to top-5 accuracy by the text's tokens and by the target's most likely
        ones.
        """
        by_text = {
            f"top{best}_{self.depth}": accuracy(self.ranks_M, self.valid_M, best)
            for best in range(1, 6)
        }
        if self.likely_ranks_M is None:
            return super().metrics() | by_text
        by_target = {
            f"likely_top{best}_{self.depth}": accuracy(self.likely_ranks_M, self.valid_M, best)
            for best in range(1, 6)
        }
        return super().metrics() | by_text | by_target


class Chimera(SteppedHeads):
    """A trigram encoder, one decoder layer over states and trigrams, and K heads that read the
    target's state beside the layer's output.

    g_j = W_o (c_j + SiLU(W c_j + b)), c_j = s · [e_{j-2} ; e_{j-1} ; e_j] of the target's input
    embeddings, W = 0 at the start. Head d is a matrix over [f_t ; z_{t+1+d}] that starts as the
    target's LM head twice. Without z, head 0 would repeat the target's prediction of x_{t+1}.
    Loss: Σ_d decay^d · cross-entropy of head d, and feature_weight · smooth L1(z_{t+1}, f_{t+1}),
    which the release computes and leaves out.

    Args:
        shape: the target's dimensions.
        heads: K.
        lm_head: `"own"` (a trainable matrix per head), `"tied"` (one for all heads) or `"shared"`
            (the target's, frozen, behind a trainable map [f ; z] -> H per head). The latter two are
            smaller than the paper's.
        trigrams: whether g_j is made of three tokens, or s · e_j alone (ablation).
        attention: whether the layer's rows attend to others; otherwise it is its feed-forward half
            (ablation of the full-context block).
        block_start: `"random"`, or `"target"`: the layer starts as the target's last one.
        draft_vocabulary: how many token ids can be drafted; null for all.
        tree: paths, or a name of `modules.trees.named_trees` (the paper's: `eagle_25`); null is
            `narrow`, on a GPU `mc_sim_7b_63`.
        decay: head d weighs decay^d.
        labels: `"hard"` (tokens of the text), `"greedy"` (the target's most likely tokens) or
            `"soft"` (its distributions).
        feature_weight: of the smooth L1 distance; 0 as in the release.
        self_fed: whether a step of training reads the most likely token of the head before it,
            instead of the text's. Validation always reads the text's: a tree's nodes count only
            where those before them are right.
        detach: whether no gradient flows from a step to those before it.
        scale_tokens: whether s brings embeddings to the size of states
            (`modules.layers.token_scale`); otherwise, as in the release, s = 1.
        memo: trigram vectors that are kept in decoding, across steps and requests; 0: none. A
            look-up reads the device.
        divergence: how the target's distribution is learnt (`modules.losses.divergences`).
    """

    first_exponent: ClassVar[int] = 0
    token_scale: Tensor

    def __init__(
        self,
        shape: TargetShape,
        heads: int = 4,
        lm_head: Literal["own", "tied", "shared"] = "own",
        trigrams: bool = True,
        attention: bool = True,
        block_start: Literal["random", "target"] = "random",
        draft_vocabulary: int | None = None,
        tree: list[list[int]] | str | None = None,
        decay: float = 1.0,
        labels: Literal["hard", "greedy", "soft"] = "hard",
        feature_weight: float = 1.0,
        self_fed: bool = True,
        detach: bool = True,
        scale_tokens: bool = True,
        memo: int = 4096,
        divergence: str = "cross_entropy",
    ) -> None:
        super().__init__(shape, heads, draft_vocabulary, decay)
        refuse_unknown("lm_head", lm_head, ("own", "tied", "shared"))
        refuse_unknown("block_start", block_start, ("random", "target"))
        refuse_unknown("labels", labels, ("hard", "greedy", "soft"))
        if memo > MOST_ENTRIES:
            raise ValueError(f"memo must be at most {MOST_ENTRIES}, got {memo}: keep fewer vectors")
        if feature_weight < 0:
            raise ValueError(f"feature_weight must be 0 (off) or more, got {feature_weight}")
        self.soft_labels, self.label_kind = labels == "soft", labels
        self.use_divergence(divergence)
        self.block_start, self.feature_weight = block_start, feature_weight
        self.self_fed, self.detach, self.scale_tokens = self_fed, detach, scale_tokens
        # 1. What makes draft states.
        size = shape.hidden_size
        self.register_buffer("token_scale", torch.ones(()))
        self.trigrams = trigram_encoder(size) if trigrams else None
        self._memo = TrigramMemo(memo) if trigrams and memo else None
        self.block = DecoderLayer(shape, attention=attention)
        # 2. Heads over two states, or maps of two states before the target's head.
        self.tied = lm_head == "tied"
        self.maps = nn.ModuleList()
        if lm_head == "shared":
            self.maps.extend(nn.Linear(2 * size, size, bias=False) for _ in range(heads))
        else:
            self.use_own_lm_heads(bias=False, states=2)
            self.lm_heads = self.lm_heads[:1] if self.tied else self.lm_heads
        self.use_tree(tree)

    @torch.no_grad()
    def initialise(self, target: Target) -> None:
        """Also start the layer and the maps, and measure the scale of embeddings."""
        super().initialise(target)
        if self.block_start == "target":
            self.block.copy_from(target)
        both_H2H = torch.eye(self.shape.hidden_size).repeat(1, 2)
        for part in self.maps.parameters():
            part.copy_(both_H2H)
        if self.scale_tokens:
            self.token_scale.fill_(token_scale(target))

    # -- what it computes --------------------------------------------------------------------------

    @property
    def attention(self) -> Attention:
        """The self-attention of its layer."""
        assert self.block.self_attn is not None
        return self.block.self_attn

    def encode(self, ids: Tensor, target: Target) -> Tensor:
        """Trigram vectors [..., H] of int64 ids [..., 3]."""
        vectors = target.embed(ids).to(self.precision) * self.token_scale
        return vectors[..., -1, :] if self.trigrams is None else self.trigrams(vectors.flatten(-2))

    def recall(self, ids: Tensor, target: Target) -> Tensor:
        """The same, from the memo where it has them."""
        if self._memo is None or self.trigrams is None:
            return self.encode(ids, target)
        vectors_MH = self._memo.vectors(
            ids.flatten(0, -2), lambda more: self.encode(more, target), self.trigrams, target
        )
        return vectors_MH.view(*ids.shape[:-1], -1)

    def _keys_and_values(
        self, hidden_BNH: Tensor, position_ids_BN: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Of rows of its layer."""
        inputs = self.block.attention_inputs(hidden_BNH)
        _, keys, values = self.attention.project(inputs, position_ids_BN)
        return keys, values

    def feature(self, depth: int, final: Tensor, drafted: Tensor) -> Tensor:
        """The input of LM head `depth`, [..., 2H]; [..., H] before the target's head."""
        both = torch.cat([final, drafted], dim=-1)
        return self.maps[depth](both) if len(self.maps) else both

    def head(self, depth: int, target: Target) -> Head:
        """Inputs [..., X] of step `depth` -> logits [..., D]."""
        return super().head(0 if self.tied else depth, target)

    # -- training ----------------------------------------------------------------------------------

    def footprint(self, rows: int, length: int) -> Footprint:
        """Its own LM heads over two states, and the scores of its attention."""
        whole = super().footprint(rows, length)
        score_heads = self.shape.num_heads if self.block.self_attn is not None else 0
        return replace(
            whole,
            own_head=len(self.lm_heads) > 0,
            score_heads=score_heads,
            most_scores=MAX_SCORES,
        )

    def labels(self, batch: TextBatch, target: Target, rows: TrainingRows) -> Tensor:
        """Draft vocabulary indices [M,K] of the text's tokens, or of the target's most likely
        ones.
        """
        if self.label_kind == "greedy":
            return self.labels_by_target(batch, target, rows)
        return super().labels(batch, target, rows)

    def unrolled(
        self, batch: TextBatch, target: Target, rows: TrainingRows
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """The heads' inputs [M,X] and the draft states z [M,H], step by step."""
        final_BTH = batch.states[self.reads].to(self.precision)
        following_BT3 = document_trigrams(batch).roll(-1, 1)
        # 1. Vectors g_{j+1} at every position j, and what rows of the first and later steps see.
        vectors_BTH = self.encode(following_BT3, target)
        prefixes = self._prefixes(batch, final_BTH, vectors_BTH, rows)
        # 2. Inputs of the first step.
        final_MH, vectors_MH = rows.take(final_BTH), rows.take(vectors_BTH)
        positions_M, pair_M2 = rows.take(batch.position_ids), rows.take(following_BT3)[:, 1:]
        feature, hanging = final_MH, []
        for depth in range(self.heads):
            # 3. A later step reads the trigram that ends in one more token.
            if depth:
                token_M = self._read_token(depth, feature, rows, target)
                trigram_M3 = torch.cat([pair_M2, token_M[:, None]], dim=1)
                vectors_MH, pair_M2 = self.encode(trigram_M3, target), trigram_M3[:, 1:]
            # 4. Its output joins the rows that later steps see.
            drafted, *row = recomputed(
                self.recompute,
                self._draft,
                vectors_MH,
                positions_M + 1 + depth,
                None if prefixes is None else prefixes[depth > 0],
                tuple(hanging),
            )
            hanging.append(row)
            feature = self.feature(depth, final_MH, drafted)
            yield feature, drafted

    def _prefixes(
        self, batch: TextBatch, final_BTH: Tensor, vectors_BTH: Tensor, rows: TrainingRows
    ) -> tuple[Prefix, Prefix] | None:
        """Keys and values that rows of the first step see, f and g, and those of later steps, f
        alone; own rows are left out of both. None without attention.
        """
        if self.block.self_attn is None:
            return None
        keys_f, values_f = self._keys_and_values(final_BTH, batch.position_ids)
        keys_g, values_g = self._keys_and_values(vectors_BTH, batch.position_ids + 1)
        seen_rows, flat_M, length = batch.rows(), rows.flat_MK1[:, 0], batch.input_ids.shape[1]

        def visible(sequence: int, places_M: Tensor) -> Tensor:
            return seen_rows.sequence(sequence).visible_at(places_M[None])[0]

        def with_trigrams(sequence: int, places_M: Tensor) -> Tensor:
            # A row's own trigram vector hangs on it, so that every step is one computation.
            seen_MT = visible(sequence, places_M)
            before_MT = seen_MT.scatter(1, places_M[:, None], False)
            return torch.cat([seen_MT, before_MT], 1)

        keys_BSGE, values_BSGE = torch.cat([keys_f, keys_g], 1), torch.cat([values_f, values_g], 1)
        first = Prefix(keys_BSGE, values_BSGE, with_trigrams, flat_M, length)
        return first, Prefix(keys_f, values_f, visible, flat_M, length)

    def _draft(
        self,
        vectors_MH: Tensor,
        positions_M: Tensor,
        prefix: Prefix | None,
        hanging: Sequence[Sequence[Tensor]],
    ) -> tuple[Tensor, ...]:
        """One step: draft states [M,H] and their keys and values, if there is attention. `hanging`
        are those of earlier steps.
        """
        if prefix is None:
            return (self.block.after_attention(vectors_MH),)
        inputs = self.block.attention_inputs(vectors_MH)
        queries, key, value = (
            part[0] for part in self.attention.project(inputs[None], positions_M[None])
        )
        mixed = self.attention.o_proj(prefix.mix(queries, [*hanging, (key, value)]).flatten(1))
        drafted = self.block.after_attention(vectors_MH + mixed)
        stands = drafted.detach() if self.detach else drafted
        keys, values = self._keys_and_values(stands[None], positions_M[None])
        return drafted, keys[0], values[0]

    @torch.no_grad()
    def _read_token(
        self, depth: int, feature_MX: Tensor, rows: TrainingRows, target: Target
    ) -> Tensor:
        """int64 [M]: the token that step `depth` reads, the text's or the one that the head before
        it, whose input is `feature_MX`, finds most likely.
        """
        if not (self.self_fed and self.training):
            return rows.tokens_MK1[:, depth]
        index_M = greedy_tokens(self.head(depth - 1, target), feature_MX, self.draft_size)
        return index_M if self.vocabulary_D is None else self.vocabulary_D[index_M]

    def step_loss(self, step: DraftStep, batch: TextBatch) -> Tensor:
        """Cross-entropy; of the first step also the distance of z_{t+1} from f_{t+1}."""
        entropy = super().step_loss(step, batch)
        if step.depth or not self.feature_weight:
            return entropy
        states_MH = batch.states[self.reads].flatten(0, 1)[step.flat_M]
        distance = step.mean(smooth_l1(step.carried_MH, states_MH), every_label=True)
        return entropy + self.feature_weight * distance

    def scored(
        self,
        batch: TextBatch,
        target: Target,
        rows: TrainingRows,
        distributions: Distributions | None,
        outputs: Iterable[tuple[Tensor, Tensor]],
    ) -> Iterator[DraftStep]:
        """Also ranks the target's most likely tokens, in validation alone: that takes its whole LM
        head.
        """
        likely_MK = None if self.training else self.labels_by_target(batch, target, rows)
        for step in super().scored(batch, target, rows, distributions, outputs):
            ranks_M = None
            if likely_MK is not None:
                likely_M, head = likely_MK[:, step.depth].contiguous(), self.head
                with torch.no_grad():
                    _, ranks_M = cross_entropy(
                        step.feature_MH, head(step.depth, target), likely_M, self.draft_size
                    )
            yield ComparedStep(**vars(step), likely_ranks_M=ranks_M)

    # -- decoding ----------------------------------------------------------------------------------

    def start(self, context: Context) -> ChimeraState:
        """State after the prompts, from the target's states of them."""
        cache = LayerCache.empty(self.shape, context.lengths_B, self.precision)
        # Token 1 is read behind the first token, repeated.
        first_B2 = context.input_ids_BT[:, :1].expand(-1, 2)
        tokens = torch.cat([first_B2, context.following_BT], dim=1)
        final_BNH = context.states[self.reads]
        read = self._read(final_BNH, tokens, context.lengths_B, context.target, cache)
        rows = ProposalRows.none(context.newest_B)
        return ChimeraState(context, context.newest_B, context.lengths_B, cache, *read, rows)

    def absorb(self, state: DraftState, verified: Verified, accepted: Accepted) -> ChimeraState:
        """State after the accepted rows of any tree."""
        assert isinstance(state, ChimeraState)
        tokens = torch.cat([state.pairs_BR2[:, 0], accepted.emitted(verified.tree)], dim=1)
        final_BH, drafted_BH, pairs_BR2 = self._read(
            accepted.along_path(verified.states[self.reads]),
            tokens,
            accepted.lengths_B,
            state.context.target,
            state.cache,
            accepted.lengths,
        )
        return replace(
            state,
            newest_B=accepted.next_B,
            lengths_B=state.lengths_B + accepted.lengths_B,
            final_BH=final_BH,
            drafted_BH=drafted_BH,
            pairs_BR2=pairs_BR2,
            rows=ProposalRows.none(accepted.next_B),
        )

    def _read(
        self,
        final_BNH: Tensor,
        tokens_BX: Tensor,
        counts_B: Tensor,
        target: Target,
        cache: LayerCache,
        counts: list[int] | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Read the first `counts_B` (`counts` on the host) of N states, and the tokens behind them.

        Returns the last state [B,H], z [B,H] of the token behind it, and the last two tokens
        [B,1,2]. `tokens_BX` begins with the token of the first state and the one before it (X =
        N+2).
        """
        final_BNH, trigrams_BN3 = final_BNH.to(self.precision), tokens_BX.unfold(1, 3, 1)
        last_B1, vectors_BNH = counts_B[:, None] - 1, self.recall(trigrams_BN3, target)
        vectors_B1H = rows_at(vectors_BNH, last_B1)
        mixed = 0.0
        if self.block.self_attn is not None:
            mixed = self._read_rows(final_BNH, vectors_BNH, counts_B, cache, counts)
        drafted_B1H = self.block.after_attention(vectors_B1H + mixed)
        pairs_BR2 = rows_at(trigrams_BN3, last_B1)[..., 1:]
        return rows_at(final_BNH, last_B1)[:, 0], drafted_B1H[:, 0], pairs_BR2

    def _read_rows(
        self,
        final_BNH: Tensor,
        vectors_BNH: Tensor,
        counts_B: Tensor,
        cache: LayerCache,
        counts: list[int] | None,
    ) -> Tensor:
        """Write rows of states and of trigrams, and return what the last trigram's row attends to
        [B,1,H].
        """
        # 1. Both in turn, f at its own position and g at the next.
        inputs = torch.stack([final_BNH, vectors_BNH], dim=2).flatten(1, 2)
        order = torch.arange(inputs.shape[1], device=inputs.device)
        positions = (cache.lengths_B[:, None] + 1 + order) // 2
        keys, values = cache.write(*self._keys_and_values(inputs, positions))
        # 2. The last trigram's row sees all of them.
        seen_B1 = 2 * counts_B[:, None]
        newest = Rows(positions.gather(1, seen_B1 - 1), (order < seen_B1)[:, None])
        visible = cache.visible(newest, keys.shape[1])
        cache.keep(2 * counts_B, None if counts is None else [2 * count for count in counts])
        asking = self.block.attention_inputs(rows_at(vectors_BNH, counts_B[:, None] - 1))
        queries, _, _ = self.attention.project(asking, newest.position_ids_BN)
        return self.attention.mix(queries, keys, values, visible)

    def expand(self, state: DraftState, frontier: Frontier) -> Tensor:
        """Logits [B,W,D] of the token after each frontier node, all nodes of a level in one call of
        the layer.
        """
        assert isinstance(state, ChimeraState)
        target, (batch, width) = state.context.target, frontier.tokens_BW.shape
        state.rows = state.rows.add(frontier)
        rows = state.rows.newest(frontier, state.lengths_B)
        # 1. The root was read with the prefix; other nodes end a trigram of their own.
        if frontier.depth == 0:
            state.pairs_BR2 = state.pairs_BR2[:, :1]
            drafted_BWH = state.drafted_BH[:, None]
        else:
            pairs_BW2 = rows_at(state.pairs_BR2, frontier.parents_BW)
            trigrams_BW3 = torch.cat([pairs_BW2, frontier.tokens_BW[..., None]], dim=-1)
            state.pairs_BR2 = torch.cat([state.pairs_BR2, trigrams_BW3[..., 1:]], dim=1)
            drafted_BWH = self._draft_level(self.recall(trigrams_BW3, target), rows, state.cache)
        # 2. Descendants see the outputs, which take the slots of the trigrams' rows.
        if self.block.self_attn is not None and frontier.depth + 1 < self.heads:
            keys, values = self._keys_and_values(drafted_BWH, rows.position_ids_BN)
            state.cache.write(keys, values, rows.visible_BNJ.shape[2] - width)
        final_BWH = state.final_BH[:, None].expand(batch, width, -1)
        feature = self.feature(frontier.depth, final_BWH, drafted_BWH)
        return self.head(frontier.depth, target)(feature)

    def _draft_level(self, vectors_BWH: Tensor, rows: Rows, cache: LayerCache) -> Tensor:
        """Outputs [B,W,H] of drafted nodes, which see f_0 … f_t, those above them and
        themselves.
        """
        if self.block.self_attn is None:
            return self.block.after_attention(vectors_BWH)
        # States have every other slot.
        slots_S = torch.arange(0, cache.longest, 2, device=vectors_BWH.device)
        committed_BS = torch.where(slots_S < cache.lengths_B[:, None], slots_S, -1)
        rows = replace(rows, committed_BS=committed_BS)
        mixed = self.attention(self.block.attention_inputs(vectors_BWH), rows, cache)
        return self.block.after_attention(vectors_BWH + mixed)
