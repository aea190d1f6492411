"""Falcon: blocks of k tokens per drafter pass (Gao et al. 2025, AAAI, arXiv 2412.12639).

Row i pairs the target's state f_i with token x_{i+1} and puts out f̂_{i+k}, hence the law of
x_{i+k+1}. The last k rows of a text are a block, and one pass over it drafts k tokens; a drafted
path of k tokens and the features that were put out with them are the next block.

Shape legend: B sequences, T tokens of a packed row, P = B·T flat positions, N rows of one call, M
training rows, K rows of a block, W frontier nodes, A rows written ahead in a proposal, L memories
of the recurrence, H hidden size, D draft vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from modules.contracts.batches import TextBatch
from modules.contracts.drafter import Context, DraftState, Frontier
from modules.contracts.losses import Losses
from modules.contracts.rows import Rows
from modules.contracts.shapes import StateName, TargetShape
from modules.contracts.verification import Accepted, Verified
from modules.drafters.blocks.glancing import (
    Documents,
    block_ends,
    random_phases,
    reveal,
    revealed_positions,
)
from modules.drafters.blocks.proposal import Proposal
from modules.drafters.blocks.recurrence import RECURRENT_LAYERS, NewestRow, Recurrence
from modules.drafters.feature.eagle import adds_nothing, feature_and_token_loss, uniform_noise
from modules.drafters.trained import WIDE_BUDGET, WIDE_LEVEL, DraftStep, LearnedDrafter, rows_at
from modules.layers.activation_checkpointing import recomputed
from modules.layers.decoder_layer import Attention, DecoderLayer, LayerCache, causal_rows
from modules.layers.token_scale import token_scale
from modules.losses.chunked import Head, Laws, TrainingRows, greedy_tokens, training_rows
from modules.trees.reranked import RerankedTree
from modules.trees.threshold import ThresholdTree

if TYPE_CHECKING:
    from modules.contracts.target import Target


@dataclass
class FalconState(DraftState):
    """Falcon's knowledge of its sequences.

    cache: keys and values of the prefix (one row per token the target has read).
    memory_BLH: of the recurrence, behind the last prefix row.
    block_BKH: the layer's inputs in the last k prefix rows (a text shorter than k repeats its
    first).
    proposal: what the current proposal has computed.
    """

    cache: LayerCache
    memory_BLH: Tensor
    block_BKH: Tensor
    proposal: Proposal | None = None


class Falcon(LearnedDrafter):
    """LSTM over [e(x_{i+1}) ; f_i], then one decoder layer in which the k rows of a block see each
    other and everything before them (relaxed causal mask); frozen embedding and LM head.

    The layer reads W [s·e ; f] + U LSTM([e ; f]), U = 0 at first, so that features pass through
    before the LSTM has learnt anything; s brings embeddings to the size of features (the release
    has 1), and the LSTM reads both at unit scale. The paper's layer reads the LSTM alone, whose
    outputs lie in ±1, and the LSTM reads what it is given: `pass_through: false`. Queries and
    residuals of a block's rows start from its newest row, keys and values are each row's own; in
    the paper all are its own: `newest_row: false`.

    Loss: feature_weight · SmoothL1(f̂, f) + token_weight · CE((1 - hard_weight) p + hard_weight ·
    argmax p, q), which differs from the paper's KL and CE by a constant, over all rows of whole
    blocks. In training a share λ = glancing · (1 - progress) of the mistakes of a first pass is
    revealed in the inputs of the second (`modules.drafters.blocks.glancing`).

    Args:
        shape: the target's dimensions.
        block: k, tokens drafted per pass.
        draft_vocabulary: how many token ids can be drafted; None for all.
        glancing: λ at the beginning (0: ablation, without glancing distillation).
        revealed_loss: False leaves revealed rows out of the loss, as the Glancing Transformer does
            (Qian et al. 2021, arXiv 2008.07905); Falcon counts them.
        lstm: False leaves one linear layer, W (ablation).
        pass_through: False lets the layer read the LSTM's output alone (the paper).
        newest_row: False starts each row of a block from itself alone (the paper; so does a strict
            mask).
        relaxed_mask: False lets rows see only what stands before them (ablation).
        random_phase: let training blocks begin anywhere, as they do in decoding; False: at
            multiples of k (the paper).
        feature_weight: weight of the distance between drafted and true features.
        token_weight: weight of the cross-entropy.
        hard_weight: share of the target's most likely token in what the cross-entropy is to.
        noise: half-width of the uniform noise on input features in training, scaled by 512 / the
            tokens of the conversation.
        dropout: between the LSTM's layers.
        depth: levels of the dynamic tree that is drawn when `tree` is null.
        tree: fixed paths: `falcon_8` (released for k = 2), `falcon_8_cut_6` (its first six levels,
            for k = 3), `narrow` or a list.
    """

    soft_labels: bool = True
    first_exponent = 0
    token_scale: Tensor

    def __init__(
        self,
        shape: TargetShape,
        block: int = 2,
        draft_vocabulary: int | None = None,
        glancing: float = 0.4,
        revealed_loss: bool = True,
        lstm: bool = True,
        pass_through: bool = True,
        newest_row: bool = True,
        relaxed_mask: bool = True,
        random_phase: bool = True,
        feature_weight: float = 1.0,
        token_weight: float = 0.1,
        hard_weight: float = 0.1,
        noise: float = 0.1,
        dropout: float = 0.1,
        depth: int = 4,
        tree: list[list[int]] | str | None = "narrow",
    ) -> None:
        if block < 1:
            raise ValueError(f"block must be at least 1 token per pass, got {block}")
        if not 0 <= glancing <= 1:
            raise ValueError(f"glancing must lie in [0, 1] (0: none), got {glancing}")
        super().__init__(shape, block, draft_vocabulary, decay=1.0)
        self.block, self.glancing, self.relaxed_mask, self.random_phase = (
            block,
            glancing,
            relaxed_mask,
            random_phase,
        )
        self.feature_weight, self.token_weight, self.hard_weight = (
            feature_weight,
            token_weight,
            hard_weight,
        )
        self.revealed_loss, self.noise = revealed_loss, noise
        size = shape.hidden_size
        self.recurrence = Recurrence(size, dropout, pass_through) if lstm else None
        self.fc = nn.Linear(2 * size, size, bias=False) if pass_through or not lstm else None
        self.recall = nn.Linear(size, size, bias=False) if lstm and pass_through else None
        self.newest = NewestRow(block, size) if newest_row and relaxed_mask and block > 1 else None
        self.layer = DecoderLayer(shape, input_norm=False)
        self.register_buffer("token_scale", torch.ones(()))
        if tree is None:
            self._builder, self._wide = (
                ThresholdTree(depth),
                (RerankedTree(depth, WIDE_LEVEL), WIDE_BUDGET),
            )
        else:
            self.use_static_tree(tree)

    @torch.no_grad()
    def initialise(self, target: Target) -> None:
        """Start the layer as the target's last, where it is of its kind; where features pass
        through, they alone do at first, as in EAGLE."""
        self.layer.copy_from(target)
        self.token_scale.fill_(token_scale(target))
        if self.recall is not None:
            nn.init.zeros_(self.recall.weight)
        if self.fc is not None:
            nn.init.eye_(self.fc.weight[:, self.shape.hidden_size :])
            adds_nothing(self.layer)

    def head(self, depth: int, target: Target) -> Head:
        """The target's frozen LM head on the draft vocabulary."""
        return lambda hidden: target.logits(hidden, self.vocabulary_D, self.precision)

    @property
    def attention(self) -> Attention:
        """Of its layer."""
        assert self.layer.self_attn is not None
        return self.layer.self_attn

    def blank_memory(self, like: Tensor, count: int) -> Tensor:
        """The memory [B,L,H] before any token."""
        memories = 0 if self.recurrence is None else 2 * RECURRENT_LAYERS
        return like.new_zeros(count, memories, self.shape.hidden_size)

    def fuse(
        self,
        tokens_BN: Tensor,
        features_BNH: Tensor,
        memory_BLH: Tensor,
        target: Target,
        counts_B: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """The layer's inputs [B,N,H] at consecutive rows, and the memory behind them."""
        inputs = self.paired(tokens_BN, features_BNH, target)
        if self.recurrence is None:
            return self.joined(inputs, None), memory_BLH
        recalled, memory = self.recurrence(inputs, memory_BLH, counts_B)
        return self.joined(inputs, recalled), memory

    def paired(self, tokens_N: Tensor, features_NH: Tensor, target: Target) -> Tensor:
        """Embeddings and features side by side [...,2H]."""
        vectors = target.embed(tokens_N).to(self.precision) * self.token_scale
        return torch.cat([vectors, features_NH.to(self.precision)], dim=-1)

    def joined(self, inputs_NX: Tensor, recalled_NH: Tensor | None) -> Tensor:
        """The layer's inputs [...,H] from what the recurrence, if there is one, has read and put
        out.
        """
        if self.fc is None:
            assert recalled_NH is not None
            return recalled_NH
        return (
            self.fc(inputs_NX)
            if self.recall is None
            else self.fc(inputs_NX) + self.recall(recalled_NH)
        )

    # -- training ----------------------------------------------------------------------------------

    def laws(self, batch: TextBatch, target: Target, rows: TrainingRows) -> Laws | None:
        """The target's laws, mixed with their most likely tokens."""
        laws, share = super().laws(batch, target, rows), self.hard_weight
        assert laws is not None

        def mixed(flat_M: Tensor) -> Tensor:
            law = laws(flat_M)
            likeliest = law.argmax(-1, keepdim=True)
            return ((1 - share) * law).scatter_add(
                -1, likeliest, torch.full_like(law[..., :1], share)
            )

        return mixed if share else laws

    def loss(self, batch: TextBatch, target: Target, progress: float) -> Losses:
        """The loss of whole blocks, in training with glancing at `progress`."""
        documents = Documents.of(batch.document_ids)
        random = self.training and self.random_phase
        phase = random_phases(documents, self.block).view_as(batch.input_ids) if random else 0
        rows = training_rows(batch, self.block, block_ends(batch.position_ids, self.block, phase))
        laws = self.laws(batch, target, rows)
        inputs = self.inputs(batch)
        rate = self.glancing * (1 - progress)
        if self.training and rate > 0:
            inputs, shown_MK = self.glance(batch, target, rows, laws, inputs, rate)
            if not self.revealed_loss:
                rows = replace(rows, valid_MK=rows.valid_MK & ~shown_MK)
        outputs = self.outputs(batch, target, rows.flat_MK1[:, 0], *inputs)
        steps = self.scored(batch, target, rows, laws, ((one, one) for one in outputs.unbind(1)))
        return self.weighted(steps, batch)

    def step_loss(self, step: DraftStep, batch: TextBatch) -> Tensor:
        """Distance to the target's own features, on all rows, and cross-entropy."""
        return feature_and_token_loss(step, batch, self.feature_weight, self.token_weight)

    def inputs(self, batch: TextBatch) -> tuple[Tensor, Tensor]:
        """f of every position [P,H], with noise in training, and the tokens that follow [P]."""
        features = batch.states[self.reads].to(self.precision)
        noisy = (
            uniform_noise(features, self.noise, batch.document_ids) if self.training else features
        )
        return noisy.flatten(0, 1), batch.input_ids.roll(-1, 1).flatten()

    @torch.no_grad()
    def glance(
        self,
        batch: TextBatch,
        target: Target,
        rows: TrainingRows,
        laws: Laws | None,
        inputs: tuple[Tensor, Tensor],
        rate: float,
    ) -> tuple[tuple[Tensor, Tensor], Tensor]:
        """Inputs that reveal a share of the answers a first pass over them gets wrong, and bool
        [M,K], which rows.
        """
        assert laws is not None
        ends_M, outputs = (
            rows.flat_MK1[:, 0],
            self.outputs(batch, target, rows.flat_MK1[:, 0], *inputs),
        )
        likely = greedy_tokens(laws, rows.flat_MK1[:, 1:].flatten(), self.draft_size)
        drafted = greedy_tokens(self.head(0, target), outputs.flatten(0, 1), self.draft_size)
        wrong_MK = (drafted != likely).view(rows.valid_MK.shape)
        shown_MK = revealed_positions(
            wrong_MK, rows.valid_MK, ends_M // batch.input_ids.shape[1], rate
        )
        positions_MK = ends_M[:, None] + torch.arange(1 - self.block, 1, device=ends_M.device)
        return reveal(*inputs, positions_MK[shown_MK], self.block), shown_MK

    def unrolled(
        self, batch: TextBatch, target: Target, rows: TrainingRows
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """The outputs of the block that ends at each training row, whatever block it would fall
        into.
        """
        outputs = self.outputs(batch, target, rows.flat_MK1[:, 0], *self.inputs(batch))
        return ((output, output) for output in outputs.unbind(1))

    def teacher_forced(
        self, batch: TextBatch, target: Target, rows: TrainingRows
    ) -> Iterator[Tensor]:
        """The LM head's inputs [M,H], step by step."""
        return (feature for feature, _ in self.unrolled(batch, target, rows))

    def outputs(
        self,
        batch: TextBatch,
        target: Target,
        ends_M: Tensor,
        features_PH: Tensor,
        following_P: Tensor,
    ) -> Tensor:
        """Outputs [M,K,H] of the blocks that end at flat positions, all in one pass."""
        inputs_PH = self.fused(Documents.of(batch.document_ids), features_PH, following_P, target)
        offsets = torch.arange(1 - self.block, 1, device=ends_M.device)
        first_M1 = (ends_M - batch.position_ids.flatten()[ends_M])[:, None]
        index_MK = torch.maximum(ends_M[:, None] + offsets, first_M1)
        block_MKH = self.started(inputs_PH[index_MK])
        mixed = self._attend(
            batch, inputs_PH, block_MKH, index_MK, ends_M[:, None].expand_as(index_MK)
        )
        return recomputed(self.recompute, self.layer.after_attention, block_MKH + mixed)

    def started(self, block_NKH: Tensor) -> Tensor:
        """What blocks of rows ask with and are added to [...,K,H]."""
        return block_NKH if self.newest is None else self.newest(block_NKH)

    def fused(
        self, documents: Documents, features_PH: Tensor, following_P: Tensor, target: Target
    ) -> Tensor:
        """The layer's inputs [P,H] of all rows, the memory blank before each document; 0 on
        padding.
        """
        groups = list(documents.groups())
        places_M = torch.cat([index_SL[inside_SL] for index_SL, inside_SL in groups])
        inputs_PX = self.paired(following_P, features_PH, target)
        recalled_MH = None if self.recurrence is None else self.recurrence.over(inputs_PX, groups)
        rows_MH = self.joined(inputs_PX[places_M], recalled_MH)
        return rows_MH.new_zeros(len(following_P), rows_MH.shape[1]).index_copy(
            0, places_M, rows_MH
        )

    def _attend(
        self,
        batch: TextBatch,
        inputs_PH: Tensor,
        block_MKH: Tensor,
        index_MK: Tensor,
        ends_MK: Tensor,
    ) -> Tensor:
        """Attention outputs [M,K,H] of chosen rows, which ask as `block_MKH`, sequence by
        sequence.
        """
        sequences, length = batch.input_ids.shape
        _, keys, values = self.attention.project(
            inputs_PH.view(sequences, length, -1), batch.position_ids
        )
        queries, _, _ = self.attention.project(block_MKH, batch.position_ids.flatten()[index_MK])
        visible_PT = batch.rows().visible_BNJ.flatten(0, 1)
        mixed, own_M = [], index_MK[:, 0] // length
        for b in range(sequences):
            rows = index_MK[own_M == b].flatten()
            seen = visible_PT[ends_MK[own_M == b].flatten() if self.relaxed_mask else rows]
            asked = queries[own_M == b].flatten(0, 1)[None]
            mixed.append(
                self.attention.attend(asked, keys[b : b + 1], values[b : b + 1], seen[None])[0]
            )
        return self.attention.o_proj(torch.cat(mixed)).view(*index_MK.shape, self.shape.hidden_size)

    # -- decoding ----------------------------------------------------------------------------------

    @property
    def decoding_states(self) -> tuple[StateName, ...]:
        """The target's final states."""
        return (self.reads,)

    def start(self, context: Context) -> FalconState:
        """Read the prompts."""
        features, counts_B = context.states[self.reads].to(self.precision), context.lengths_B
        following = context.input_ids_BT.roll(-1, 1).scatter(
            1, counts_B[:, None] - 1, context.newest_B[:, None]
        )
        cache = LayerCache.empty(self.shape, counts_B, self.precision)
        state = FalconState(
            context,
            context.newest_B,
            counts_B,
            cache,
            self.blank_memory(features, len(counts_B)),
            features[:, :0],
        )
        memory, block = self._read(state, following, features, counts_B)
        return replace(state, memory_BLH=memory, block_BKH=block)

    def absorb(self, state: DraftState, verified: Verified, accepted: Accepted) -> FalconState:
        """Read the accepted rows with the target's true features, of whatever tree they were."""
        assert isinstance(state, FalconState)
        features = accepted.along_path(verified.states[self.reads])
        memory, block = self._read(
            state, accepted.emitted(verified.tree), features, accepted.lengths_B, accepted.lengths
        )
        return replace(
            state,
            newest_B=accepted.next_B,
            lengths_B=state.lengths_B + accepted.lengths_B,
            memory_BLH=memory,
            block_BKH=block,
            proposal=None,
        )

    def _read(
        self,
        state: FalconState,
        following_BN: Tensor,
        features_BNH: Tensor,
        counts_B: Tensor,
        counts: list[int] | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Put the first `counts_B` rows into the cache; the memory behind them and the last k layer
        inputs.

        Keys and values of a row do not depend on its block, so a block that reaches back over rows
        read before needs their layer inputs only.
        """
        inputs, memory = self.fuse(
            following_BN, features_BNH, state.memory_BLH, state.context.target, counts_B
        )
        _, keys, values = self.attention.project(
            inputs, causal_rows(state.cache.lengths_B, inputs.shape[1]).position_ids_BN
        )
        state.cache.write(keys, values)
        state.cache.keep(counts_B, counts)
        before = (
            state.block_BKH
            if state.block_BKH.shape[1]
            else inputs[:, :1].expand(-1, self.block, -1)
        )
        last_BK = counts_B[:, None] + torch.arange(self.block, device=counts_B.device)
        return memory, rows_at(torch.cat([before, inputs], dim=1), last_BK)

    def expand(self, state: DraftState, frontier: Frontier) -> Tensor:
        """Logits [B,W,D] of the token after each frontier node; every k levels a pass over a block
        for each node.
        """
        assert isinstance(state, FalconState)
        output, width = frontier.depth % self.block, frontier.tokens_BW.shape[1]
        if frontier.depth == 0 or state.proposal is None:
            state.proposal = self._first_pass(state, frontier)
        else:
            above = state.proposal.blocks_BR.gather(1, frontier.parents_BW)
            if output == 0:
                self._next_pass(state, state.proposal, frontier, above)
                above = (
                    torch.arange(width, device=above.device).expand_as(above) + state.proposal.first
                )
            state.proposal.add(frontier, above)
        return state.proposal.laws(output, width)

    def _first_pass(self, state: FalconState, frontier: Frontier) -> Proposal:
        """The last block of the prefix, whose rows the cache has."""
        lengths_B1, used = state.cache.lengths_B[:, None], state.cache.longest
        positions = (lengths_B1 + torch.arange(-self.block, 0, device=lengths_B1.device)).clamp(
            min=0
        )
        block_BKH = self.started(state.block_BKH)
        queries, _, _ = self.attention.project(block_BKH, positions)
        newest = lengths_B1.expand_as(positions) - 1 if self.relaxed_mask else positions
        visible = torch.arange(used, device=positions.device) <= newest[..., None]
        mixed = self.attention.mix(
            queries, state.cache.keys_BCGD[:, :used], state.cache.values_BCGD[:, :used], visible
        )
        features = self.layer.after_attention(block_BKH + mixed)[:, None]
        return Proposal(
            frontier.tokens_BW,
            frontier.parents_BW,
            torch.zeros_like(frontier.tokens_BW),
            features,
            state.memory_BLH.flatten(1)[:, None],
            visible.new_zeros(len(visible), 1, 0),
            self.head(0, state.context.target)(features),
        )

    def _next_pass(
        self, state: FalconState, proposal: Proposal, frontier: Frontier, above_BW: Tensor
    ) -> None:
        """A block for each frontier node: the last k tokens on its path, and the features they were
        drafted from.
        """
        (batch, width), size = above_BW.shape, self.shape.hidden_size
        before = rows_at(proposal.features_BCKH.flatten(2), above_BW).reshape(
            batch * width, self.block, size
        )
        memory = rows_at(proposal.memory_BCX, above_BW).reshape(batch * width, -1, size)
        tokens = proposal.last_tokens(frontier, self.block).flatten(0, 1)
        inputs, memory = self.fuse(tokens, before, memory, state.context.target)
        seen = self._see(proposal.above_BCA, above_BW)
        start_B = state.cache.lengths_B + frontier.depth - self.block
        positions = (start_B[:, None] + torch.arange(self.block, device=start_B.device)).repeat(
            1, width
        )
        rows = Rows(positions, self._visible(seen))
        inputs = inputs.view(batch, width, self.block, size)
        block = self.started(inputs).flatten(1, 2)
        features = self.layer(inputs.flatten(1, 2), rows, state.cache, block, block).view_as(inputs)
        proposal.first = proposal.features_BCKH.shape[1]
        proposal.features_BCKH = torch.cat([proposal.features_BCKH, features], dim=1)
        proposal.memory_BCX = torch.cat(
            [proposal.memory_BCX, memory.reshape(batch, width, -1)], dim=1
        )
        proposal.above_BCA = torch.cat(
            [F.pad(proposal.above_BCA, (0, width * self.block)), seen], dim=1
        )
        proposal.logits_BCKD = self.head(0, state.context.target)(features)

    def _see(self, above_BCA: Tensor, blocks_BW: Tensor) -> Tensor:
        """bool [B,W,A+W·K]: a new block sees what the block above it sees, and itself."""
        own = torch.eye(
            blocks_BW.shape[1], dtype=torch.bool, device=above_BCA.device
        ).repeat_interleave(self.block, 1)
        return torch.cat([rows_at(above_BCA, blocks_BW), own.expand(len(above_BCA), -1, -1)], dim=2)

    def _visible(self, seen_BWA: Tensor) -> Tensor:
        """bool [B,W·K,A]: what each row of new blocks sees, of which the last W·K columns are their
        own.
        """
        visible = seen_BWA.repeat_interleave(self.block, dim=1)
        if self.relaxed_mask:
            return visible
        width = visible.shape[1]
        strict = torch.ones(width, width, dtype=torch.bool, device=visible.device).tril()
        return visible & F.pad(strict, (visible.shape[2] - width, 0), value=True)
