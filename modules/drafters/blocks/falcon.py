"""Falcon: blocks of k tokens per drafter pass (Gao et al. 2025, AAAI, arXiv 2412.12639).

Row i pairs the target's state f_i with token x_{i+1} and outputs f̂_{i+k}, hence the distribution
of x_{i+k+1}. The last k rows of a text are a block, and one pass over it drafts k tokens. A drafted
path of k tokens, with the features output for them, is the next block.

Shape legend: B sequences, T tokens of a packed row, P = B·T flat positions, N rows of one call, M
training rows, K rows of a block, W frontier nodes, C blocks of a proposal, A rows written ahead in
it, L memories of the recurrence, X the same, flat, H hidden size, D draft vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from modules.contracts.batches import TextBatch
from modules.contracts.drafter import Context, Frontier
from modules.contracts.losses import Losses
from modules.contracts.rows import Rows, causal_rows, rows_at
from modules.contracts.shapes import TargetShape
from modules.drafters.blocks.base import BlockDrafter, BlockState
from modules.drafters.blocks.documents import Documents, block_ends, random_phases
from modules.drafters.blocks.glancing import reveal, revealed_positions
from modules.drafters.blocks.recurrence import RECURRENT_LAYERS, NewestRow, Recurrence
from modules.drafters.feature.eagle import adds_nothing, feature_and_token_loss, uniform_noise
from modules.drafters.trained import (
    CHEAP_BUDGET,
    WIDE_BUDGET,
    WIDE_LEVEL,
    DraftStep,
    TrainedDrafter,
)
from modules.layers.activation_checkpointing import recomputed
from modules.layers.decoder_layer import Attention, DecoderLayer, LayerCache
from modules.layers.token_scale import token_scale
from modules.losses.chunked import Distributions, TrainingRows, greedy_tokens, training_rows
from modules.trees.reranked import RerankedTree
from modules.trees.threshold import ThresholdTree

if TYPE_CHECKING:
    from modules.contracts.target import Target


@dataclass
class Passes:
    """Outputs of a proposal's passes that the next pass reads.

    features_BCKH, memory_BCX: the blocks' outputs, and the recurrence's memory after their inputs.
    above_BCA: which of the rows written ahead each block sees, its own included.
    """

    features_BCKH: Tensor
    memory_BCX: Tensor
    above_BCA: Tensor


@dataclass
class FalconState(BlockState):
    """Falcon's state of its sequences.

    cache: keys and values of the prefix (one row per token the target has read).
    memory_BLH: memory of the recurrence after the last prefix row.
    block_BKH: the layer's inputs in the last k prefix rows (a text shorter than k repeats its
    first).
    passes: of the current proposal.
    """

    cache: LayerCache
    memory_BLH: Tensor
    block_BKH: Tensor
    passes: Passes | None = None


class Falcon(BlockDrafter):
    """LSTM over [e(x_{i+1}) ; f_i], then one decoder layer in which the k rows of a block see each
    other and everything before them (relaxed causal mask); frozen embedding and LM head.

    The layer reads W [s·e ; f] + U LSTM([e ; f]), U = 0 at initialisation, so that features pass
    through before the LSTM is trained; s brings embeddings to the size of features (the release
    has 1), and the LSTM reads both at unit scale. In the paper the layer reads only the LSTM,
    whose outputs lie in ±1, and the LSTM reads unscaled inputs: `pass_through: false`. Queries and
    residuals of a block's rows start from its newest row, keys and values from each row itself; in
    the paper all start from the row itself: `newest_row: false`.

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
        relaxed_mask: False lets rows see only earlier rows (ablation).
        random_phase: let training blocks begin anywhere, as they do in decoding; False: at
            multiples of k (the paper).
        feature_weight: weight of the distance between drafted and true features.
        token_weight: weight of the cross-entropy.
        hard_weight: share of the target's most likely token in the cross-entropy's labels.
        noise: half-width of the uniform noise on input features in training, scaled by 512 / the
            tokens of the conversation.
        dropout: between the LSTM's layers.
        depth: levels of the dynamic tree that is drawn when `tree` is null.
        tree: fixed paths: `falcon_8` (released for k = 2), `falcon_8_cut_6` (its first six levels,
            for k = 3), `narrow` or a list.
        divergence: how the target's distribution is learnt (`modules.losses.divergences`).
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
        divergence: str = "cross_entropy",
    ) -> None:
        if not 0 <= glancing <= 1:
            raise ValueError(f"glancing must lie in [0, 1] (0: none), got {glancing}")
        super().__init__(shape, block, draft_vocabulary, decay=1.0)
        self.use_divergence(divergence)
        # 1. Settings of training.
        self.glancing = glancing
        self.relaxed_mask = relaxed_mask
        self.random_phase = random_phase
        self.feature_weight = feature_weight
        self.token_weight = token_weight
        self.hard_weight = hard_weight
        self.revealed_loss = revealed_loss
        self.noise = noise
        # 2. Recurrence, fusion and layer.
        size = shape.hidden_size
        self.recurrence = Recurrence(size, dropout, pass_through) if lstm else None
        self.fc = nn.Linear(2 * size, size, bias=False) if pass_through or not lstm else None
        self.recall = nn.Linear(size, size, bias=False) if lstm and pass_through else None
        self.newest = NewestRow(block, size) if newest_row and relaxed_mask and block > 1 else None
        self.layer = DecoderLayer(shape, input_norm=False)
        self.register_buffer("token_scale", torch.ones(()))
        # 3. The tree: dynamic, or fixed paths.
        if tree is None:
            self._builder = ThresholdTree(depth)
            self._budget = CHEAP_BUDGET
            self._wide = (RerankedTree(depth, WIDE_LEVEL), WIDE_BUDGET)
        else:
            self.use_static_tree(tree)

    @torch.no_grad()
    def initialise(self, target: Target) -> None:
        """Copy the target's last layer where it has the same type. With `pass_through` only
        features have an effect at initialisation, as in EAGLE.
        """
        self.layer.copy_from(target)
        self.token_scale.fill_(token_scale(target))
        if self.recall is not None:
            nn.init.zeros_(self.recall.weight)
        if self.fc is not None:
            nn.init.eye_(self.fc.weight[:, self.shape.hidden_size :])
            adds_nothing(self.layer)

    @property
    def attention(self) -> Attention:
        """The self-attention of its layer."""
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
        """The layer's inputs [B,N,H] at consecutive rows, and the memory after them."""
        inputs = self.paired(tokens_BN, features_BNH, target)
        if self.recurrence is None:
            return self.joined(inputs, None), memory_BLH
        recalled, memory = self.recurrence(inputs, memory_BLH, counts_B)
        return self.joined(inputs, recalled), memory

    def paired(self, tokens_N: Tensor, features_NH: Tensor, target: Target) -> Tensor:
        """Embeddings and features, concatenated [...,2H]."""
        vectors = target.embed(tokens_N).to(self.precision) * self.token_scale
        return torch.cat([vectors, features_NH.to(self.precision)], dim=-1)

    def joined(self, inputs_NX: Tensor, recalled_NH: Tensor | None) -> Tensor:
        """The layer's inputs [...,H] from the recurrence's inputs and, where there is one, its
        outputs.
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

    def distributions(
        self, batch: TextBatch, target: Target, rows: TrainingRows
    ) -> Distributions | None:
        """(1 - hard_weight) p + hard_weight · argmax p of the target's distributions p."""
        distributions, share = super().distributions(batch, target, rows), self.hard_weight
        assert distributions is not None

        def mixed(flat_M: Tensor) -> Tensor:
            probs = distributions(flat_M)
            likeliest = probs.argmax(-1, keepdim=True)
            return ((1 - share) * probs).scatter_add(
                -1, likeliest, torch.full_like(probs[..., :1], share)
            )

        return mixed if share else distributions

    def blocks(self, batch: TextBatch, target: Target) -> TrainingRows:
        """Consecutive whole blocks; in training each document starts at a random phase."""
        documents = Documents.of(batch.document_ids)
        random = self.training and self.random_phase
        phase = random_phases(documents, self.block).view_as(batch.input_ids) if random else 0
        return training_rows(batch, self.block, block_ends(batch.position_ids, self.block, phase))

    def loss(self, batch: TextBatch, target: Target, progress: float) -> Losses:
        """The loss of whole blocks, in training with glancing at `progress`."""
        rows = self.blocks(batch, target)
        distributions = self.distributions(batch, target, rows)
        inputs = self.inputs(batch)
        rate = self.glancing * (1 - progress)
        # Glancing: labels that a first pass misses are revealed in the inputs.
        if self.training and rate > 0:
            inputs, shown_MK = self.glance(batch, target, rows, distributions, inputs, rate)
            if not self.revealed_loss:
                rows = replace(rows, valid_MK=rows.valid_MK & ~shown_MK)
        outputs = self.outputs(batch, target, rows.flat_MK1[:, 0], *inputs)
        steps = self.scored(
            batch, target, rows, distributions, ((slot, slot) for slot in outputs.unbind(1))
        )
        return self.weighted(steps, batch)

    def weighted(self, steps: Iterable[DraftStep], batch: TextBatch) -> Losses:
        """Slot by slot: distances are means over all rows, cross-entropies over labels."""
        return TrainedDrafter.weighted(self, steps, batch)

    def step_loss(self, step: DraftStep, batch: TextBatch) -> Tensor:
        """Distance to the target's features on all rows, and cross-entropy."""
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
        distributions: Distributions | None,
        inputs: tuple[Tensor, Tensor],
        rate: float,
    ) -> tuple[tuple[Tensor, Tensor], Tensor]:
        """Inputs that reveal a share of the labels that a first pass over them misses, and bool
        [M,K], the rows.
        """
        assert distributions is not None
        # 1. A first pass: rows where its most likely token differs from the target's.
        ends_M = rows.flat_MK1[:, 0]
        outputs = self.outputs(batch, target, ends_M, *inputs)
        likely = greedy_tokens(distributions, rows.flat_MK1[:, 1:].flatten(), self.draft_size)
        drafted = greedy_tokens(self.head(0, target), outputs.flatten(0, 1), self.draft_size)
        wrong_MK = (drafted != likely).view(rows.valid_MK.shape)
        # 2. A random share of them, revealed at the rows of their blocks.
        shown_MK = revealed_positions(
            wrong_MK, rows.valid_MK, ends_M // batch.input_ids.shape[1], rate
        )
        positions_MK = ends_M[:, None] + torch.arange(1 - self.block, 1, device=ends_M.device)
        return reveal(*inputs, positions_MK[shown_MK], self.block), shown_MK

    def block_outputs(self, batch: TextBatch, target: Target, rows: TrainingRows) -> Tensor:
        """Outputs [M,K,H] of the block that ends at each training row, also at rows inside a
        training block.
        """
        return self.outputs(batch, target, rows.flat_MK1[:, 0], *self.inputs(batch))

    def outputs(
        self,
        batch: TextBatch,
        target: Target,
        ends_M: Tensor,
        features_PH: Tensor,
        following_P: Tensor,
    ) -> Tensor:
        """Outputs [M,K,H] of the blocks that end at flat positions, all in one pass."""
        # 1. Inputs of all rows; the recurrence reads whole documents.
        inputs_PH = self.fused(Documents.of(batch.document_ids), features_PH, following_P, target)
        offsets = torch.arange(1 - self.block, 1, device=ends_M.device)
        # 2. Rows of each block; at the start of a document its first row is repeated.
        first_M1 = (ends_M - batch.position_ids.flatten()[ends_M])[:, None]
        index_MK = torch.maximum(ends_M[:, None] + offsets, first_M1)
        block_MKH = self.started(inputs_PH[index_MK])
        # 3. Attention of the block rows to their document, and the rest of the layer.
        mixed = self._attend(
            batch, inputs_PH, block_MKH, index_MK, ends_M[:, None].expand_as(index_MK)
        )
        return recomputed(self.recompute, self.layer.after_attention, block_MKH + mixed)

    def started(self, block_NKH: Tensor) -> Tensor:
        """Inputs of queries and residuals in blocks of rows [...,K,H]."""
        return block_NKH if self.newest is None else self.newest(block_NKH)

    def fused(
        self, documents: Documents, features_PH: Tensor, following_P: Tensor, target: Target
    ) -> Tensor:
        """The layer's inputs [P,H] of all rows, 0 on padding; the memory is blank before each
        document.
        """
        # Documents are read in groups; their rows then go back to their flat positions.
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
        """Attention outputs [M,K,H] of chosen rows, with queries from `block_MKH`, sequence by
        sequence.
        """
        sequences, length = batch.input_ids.shape
        _, keys, values = self.attention.project(
            inputs_PH.view(sequences, length, -1), batch.position_ids
        )
        queries, _, _ = self.attention.project(block_MKH, batch.position_ids.flatten()[index_MK])
        visible_PT = batch.rows().visible_BNJ.flatten(0, 1)
        mixed, sequences_M = [], index_MK[:, 0] // length
        for b in range(sequences):
            # Under the relaxed mask a row sees what the last row of its block sees.
            rows = index_MK[sequences_M == b].flatten()
            seen = visible_PT[ends_MK[sequences_M == b].flatten() if self.relaxed_mask else rows]
            chosen = queries[sequences_M == b].flatten(0, 1)[None]
            mixed.append(
                self.attention.attend(chosen, keys[b : b + 1], values[b : b + 1], seen[None])[0]
            )
        return self.attention.o_proj(torch.cat(mixed)).view(*index_MK.shape, self.shape.hidden_size)

    # -- decoding ----------------------------------------------------------------------------------

    @property
    def max_depth(self) -> None:
        """No limit: a path of k drafted tokens is the next block."""
        return None

    def blank_state(self, context: Context) -> FalconState:
        """State with an empty cache, a blank memory and no block."""
        counts_B, size = context.lengths_B, self.shape.hidden_size
        cache = LayerCache.empty(self.shape, counts_B, self.precision)
        features_B0H = context.states[self.reads].new_zeros(len(counts_B), 0, size)
        features_B0H = features_B0H.to(self.precision)
        memory_BLH = self.blank_memory(features_B0H, len(counts_B))
        return FalconState(context, context.newest_B, counts_B, cache, memory_BLH, features_B0H)

    def read(
        self,
        state: BlockState,
        features_BNX: Tensor,
        following_BN: Tensor,
        counts_B: Tensor,
        counts: list[int] | None = None,
    ) -> FalconState:
        """Write the first `counts_B` rows into the cache, with the target's true features.

        Keys and values of a row do not depend on its block, so for rows that were read before a
        block needs only their layer inputs.
        """
        assert isinstance(state, FalconState)
        inputs, memory = self.fuse(
            following_BN, features_BNX, state.memory_BLH, state.context.target, counts_B
        )
        _, keys, values = self.attention.project(
            inputs, causal_rows(state.cache.lengths_B, inputs.shape[1]).position_ids_BN
        )
        state.cache.write(keys, values)
        state.cache.keep(counts_B, counts)
        # The last k layer inputs are the block; the first row pads a text shorter than k.
        before = (
            state.block_BKH
            if state.block_BKH.shape[1]
            else inputs[:, :1].expand(-1, self.block, -1)
        )
        last_BK = counts_B[:, None] + torch.arange(self.block, device=counts_B.device)
        block = rows_at(torch.cat([before, inputs], dim=1), last_BK)
        return replace(state, memory_BLH=memory, block_BKH=block, passes=None)

    def block_logits(self, state: BlockState) -> Tensor:
        """Logits [B,K,D] from a pass over the last block of the prefix, whose rows are cached."""
        assert isinstance(state, FalconState)
        # 1. Positions of the last k rows, and the slots that they see.
        lengths_B1, used = state.cache.lengths_B[:, None], state.cache.longest
        offsets = torch.arange(-self.block, 0, device=lengths_B1.device)
        positions = (lengths_B1 + offsets).clamp(min=0)
        block_BKH = self.started(state.block_BKH)
        queries, _, _ = self.attention.project(block_BKH, positions)
        newest = lengths_B1.expand_as(positions) - 1 if self.relaxed_mask else positions
        visible = torch.arange(used, device=positions.device) <= newest[..., None]
        mixed = self.attention.mix(queries, *state.cache.first(used), visible)
        # 2. Outputs, and the state from which further blocks start.
        features = self.layer.after_attention(block_BKH + mixed)
        nothing_above = visible.new_zeros(len(visible), 1, 0)
        memory = state.memory_BLH.flatten(1)[:, None]
        state.passes = Passes(features[:, None], memory, nothing_above)
        return self.head(0, state.context.target)(features)

    def next_block_logits(self, state: BlockState, frontier: Frontier, above_BW: Tensor) -> Tensor:
        """Logits [B,W,K,D] of a block per frontier node: the last k tokens on its path, and the
        features that drafted them.
        """
        assert isinstance(state, FalconState) and state.passes and state.proposal
        passes, (batch, width), size = state.passes, above_BW.shape, self.shape.hidden_size
        # 1. The outputs of the blocks above are the inputs of these blocks.
        before = rows_at(passes.features_BCKH.flatten(2), above_BW)
        before = before.reshape(batch * width, self.block, size)
        memory = rows_at(passes.memory_BCX, above_BW).reshape(batch * width, -1, size)
        tokens = state.proposal.last_tokens(frontier, self.block).flatten(0, 1)
        inputs, memory = self.fuse(tokens, before, memory, state.context.target)
        # 2. The layer attends to the prefix, the blocks above and the block itself.
        seen = self._see(passes.above_BCA, above_BW)
        start_B = state.cache.lengths_B + frontier.depth - self.block
        offsets = torch.arange(self.block, device=start_B.device)
        positions = (start_B[:, None] + offsets).repeat(1, width)
        rows = Rows(positions, self._visible(seen))
        inputs = inputs.view(batch, width, self.block, size)
        block = self.started(inputs).flatten(1, 2)
        features = self.layer(inputs.flatten(1, 2), rows, state.cache, block, block).view_as(inputs)
        # 3. State for the next pass.
        passes.features_BCKH = torch.cat([passes.features_BCKH, features], dim=1)
        memory_BWX = memory.reshape(batch, width, -1)
        passes.memory_BCX = torch.cat([passes.memory_BCX, memory_BWX], dim=1)
        padded = F.pad(passes.above_BCA, (0, width * self.block))
        passes.above_BCA = torch.cat([padded, seen], dim=1)
        return self.head(0, state.context.target)(features)

    def _see(self, above_BCA: Tensor, blocks_BW: Tensor) -> Tensor:
        """bool [B,W,A+W·K]: a new block sees what the block above it sees, and itself."""
        itself = torch.eye(
            blocks_BW.shape[1], dtype=torch.bool, device=above_BCA.device
        ).repeat_interleave(self.block, 1)
        return torch.cat(
            [rows_at(above_BCA, blocks_BW), itself.expand(len(above_BCA), -1, -1)], dim=2
        )

    def _visible(self, seen_BWA: Tensor) -> Tensor:
        """bool [B,W·K,A]: what each row of new blocks sees; the last W·K columns are the new rows
        themselves.
        """
        visible = seen_BWA.repeat_interleave(self.block, dim=1)
        if self.relaxed_mask:
            return visible
        width = visible.shape[1]
        strict = torch.ones(width, width, dtype=torch.bool, device=visible.device).tril()
        return visible & F.pad(strict, (visible.shape[2] - width, 0), value=True)
