"""Generalised Aggressive Decoding (GAD): a non-autoregressive transformer drafts a block of tokens
(Xia et al. 2022, arXiv 2203.16487; Ge et al. 2022, arXiv 2205.10350).

Shape legend: B sequences, T prompt tokens, S source tokens, L answer tokens (padded), P answers of
a batch, M blocks of a training batch, K tokens of a block, H hidden size, D draft vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from modules.contracts.batches import TextBatch
from modules.contracts.drafter import Context, DraftState
from modules.contracts.losses import Losses
from modules.contracts.shapes import StateName, TargetShape
from modules.contracts.trainable import Footprint, GradientLayers
from modules.contracts.verification import Accepted, Verified
from modules.drafters.blocks.base import BlockDrafter, BlockState
from modules.drafters.blocks.glancing import random_positions
from modules.drafters.blocks.nar_transformer import BERT_STD, Layers, Memory, NarTransformer
from modules.drafters.retrieval.base import appended
from modules.losses.chunked import Distributions, Head, TrainingRows, draft_labels
from modules.target.seq2seq.encoders import config_of_encoder, encoder_of_config
from modules.target.seq2seq.pairs import Pairs

if TYPE_CHECKING:
    from modules.contracts.target import Target


@dataclass
class GadState(BlockState):
    """GAD's state of its sequences.

    memory: of the prompts. answer_BL: int64, the answers so far; undefined after the newest token.
    """

    memory: Memory
    answer_BL: Tensor

    @property
    def counts_B(self) -> Tensor:
        """int64 [B]: tokens of each answer, the newest included."""
        return self.lengths_B + 1 - self.context.lengths_B


class Gad(BlockDrafter):
    """An encoder reads the prompt, a decoder with bidirectional attention reads the answer so far
    and K masks: its outputs at the masks are the draft. It reads tokens only, so its target may be
    an encoder-decoder model, as in the paper, or a decoder-only one.

    Training draws one block per answer: the cut is c = n - (floor(n U(0, 1)) + 1) for an answer of
    n tokens. Of the K labels from there (those beyond the end are ignored) a share ρ · wrong /
    masked, by the mistakes of a first pass, is revealed in the inputs of the second (Glancing
    Transformer, Qian et al. 2021, arXiv 2008.07905); both have the same dropout. Loss: mean
    cross-entropy, label-smoothed, of the slots that are still masked. ρ falls linearly from
    `glancing` to `glancing_end`; in validation nothing is revealed. The paper trains on answers of
    the target (`python -m data.regenerate`).

    Prefix and block are read anew for each draft, since the block changes the prefix's states.

    Args:
        shape: the target's dimensions; the hidden size is the target's.
        block: K, tokens drafted per pass (25 in the paper).
        layers: of the encoder and of the decoder (6 in the paper).
        heads: attention heads (8 in the paper).
        intermediate_size: of the feed-forward layers; null for four times the hidden size (the
            paper's 2048 of 512).
        dropout: in training (0.1 and 0.2 in the paper).
        norm_first: False normalises sums, as the first Transformer did (inferred: the paper does
            not say).
        positions: tokens that have a position of their own; later ones share the last.
        draft_vocabulary: how many token ids can be drafted; None for all.
        glancing: ρ at the beginning; 0 and `glancing_end` 0 are training without glancing.
        glancing_end: ρ at the end.
        smoothing: of the labels.
        copy_encoder: begin with the encoder of an encoder-decoder target and its embedding, as
            recommended; False begins with an own encoder of `layers` layers, as for decoder-only
            targets.
        encoder: config of the copied encoder; filled in by `initialise`.
    """

    def __init__(
        self,
        shape: TargetShape,
        block: int = 25,
        layers: int = 6,
        heads: int = 8,
        intermediate_size: int | None = None,
        dropout: float = 0.1,
        norm_first: bool = True,
        positions: int = 1024,
        draft_vocabulary: int | None = None,
        glancing: float = 0.5,
        glancing_end: float = 0.3,
        smoothing: float = 0.1,
        copy_encoder: bool = True,
        encoder: dict[str, Any] | None = None,
    ) -> None:
        super().__init__(shape, block, draft_vocabulary, decay=1.0)
        size = shape.hidden_size
        _check(size, layers, heads, positions)
        for name, value in (
            ("glancing", glancing),
            ("glancing_end", glancing_end),
            ("smoothing", smoothing),
            ("dropout", dropout),
        ):
            if not 0 <= value < 1:
                raise ValueError(f"{name} must lie in [0, 1) (0: none), got {value}")
        # 1. Settings of training.
        self.glancing, self.glancing_end, self.smoothing = glancing, glancing_end, smoothing
        self.copy_encoder, inner = copy_encoder, intermediate_size or 4 * size
        self._gradient = replace(shape, num_layers=2 * layers, intermediate_size=inner)
        # 2. Embedding, encoder and decoder.
        parts = Layers(size, layers, heads, inner, dropout, norm_first)
        self.transformer = NarTransformer(size, parts, block, positions)
        self.encoder: Any = None
        self.own_embedding: nn.Embedding | None = nn.Embedding(shape.vocab_size, size)
        nn.init.normal_(self.own_embedding.weight, 0, BERT_STD)
        if encoder is not None:
            self._adopt(encoder_of_config(encoder, shape))

    def _adopt(self, encoder: nn.Module) -> None:
        """Use a stock encoder and its embedding instead of its own."""
        self.encoder, self.own_embedding, self.transformer.layers.encoder = encoder, None, None

    @property
    def embedding(self) -> nn.Embedding:
        """Of tokens: the encoder's input, the decoder's, and the LM head."""
        if self.own_embedding is None:
            return self.encoder.get_input_embeddings()
        return self.own_embedding

    @torch.no_grad()
    def initialise(self, target: Target) -> None:
        """Copy the target's encoder, where it has one, or else its embedding; then bring the logits
        to unit scale.
        """
        source: Any = getattr(target.architecture, "encoder", None)
        if self.copy_encoder and source is not None:
            self.arguments["encoder"] = config_of_encoder(source)
            stock = encoder_of_config(self.arguments["encoder"], self.shape)
            self._adopt(stock.to(self.embedding.weight))
            self.encoder.load_state_dict(source.state_dict())
        elif self.copy_encoder:
            self.embedding.weight.copy_(target.copy_weight("embed"))
        table, norm = self.embedding.weight.float(), self.transformer.layers.decoder.norm
        assert isinstance(norm, nn.LayerNorm)
        norm.weight.fill_(float(len(table) ** 0.5 / table.norm()))

    # -- what it reads -----------------------------------------------------------------------------

    @property
    def training_states(self) -> tuple[StateName, ...]:
        """No states of the target: it reads tokens only."""
        return ()

    @property
    def decoding_states(self) -> tuple[StateName, ...]:
        """No states of the target, as in training."""
        return ()

    def head(self, depth: int, target: Target) -> Head:
        """Its own embedding, as the LM head."""
        return self._logits

    def _logits(self, hidden: Tensor) -> Tensor:
        table_DH = self.embedding.weight
        chosen = self.vocabulary_D
        return F.linear(hidden, table_DH if chosen is None else table_DH[chosen])

    def read_sources(self, ids_BS: Tensor, lengths_B: Tensor) -> Memory:
        """What the encoder makes of right-padded prompts."""
        order = torch.arange(ids_BS.shape[1], device=ids_BS.device)
        padding_BS = order >= lengths_B[:, None]
        if self.encoder is None:
            states_BSH = self.transformer.encode(self.embedding, ids_BS, padding_BS)
        else:
            read = self.encoder(input_ids=ids_BS, attention_mask=(~padding_BS).long())
            states_BSH = read.last_hidden_state
        return Memory(states_BSH, padding_BS)

    # -- training ----------------------------------------------------------------------------------

    def footprint(self, rows: int, length: int) -> Footprint:
        """Its two stacks of layers, with a gradient."""
        return replace(super().footprint(rows, length), layers=GradientLayers(self._gradient))

    def loss(self, batch: TextBatch, target: Target, progress: float) -> Losses:
        """Label-smoothed cross-entropy of the masked slots of one block per answer."""
        # 1. A block of each answer, and the encoder's output for both passes.
        pairs = Pairs.of(batch)
        pairs, labelled = (_blank(batch), False) if pairs is None else (pairs, True)
        cuts_P = self.drawn_cuts(pairs.answer_lengths_P)
        rows = block_rows(batch, pairs, cuts_P, self.block)
        rows = replace(rows, valid_MK=rows.valid_MK & labelled)
        memory = self.read_sources(pairs.sources_PS, pairs.source_lengths_P)
        # 2. A first pass decides what is revealed in the second.
        revealed_MK = None
        if self.training:
            rate = self.glancing + (self.glancing_end - self.glancing) * progress
            revealed_MK = self.glanced(memory, pairs.answers_PN, cuts_P, rows, rate)
            rows = replace(rows, valid_MK=rows.valid_MK & (revealed_MK < 0))
        outputs_MKH = self.transformer.fill(
            self.embedding, memory, pairs.answers_PN, cuts_P, revealed_MK
        )
        # 3. The loss of the slots that are still masked.
        steps = ((feature, feature) for feature in outputs_MKH.unbind(1))
        distributions = self.distributions(batch, target, rows)
        return self.weighted(self.scored(batch, target, rows, distributions, steps), batch)

    def drawn_cuts(self, lengths_P: Tensor) -> Tensor:
        """int64 [P]: tokens before the block of each answer of n tokens, uniform in 0 … n - 1; the
        same in each validation.
        """
        seeded = None if self.training else torch.Generator().manual_seed(0)
        uniform_P = torch.rand(len(lengths_P), generator=seeded).to(lengths_P.device)
        return lengths_P - (lengths_P * uniform_P).long() - 1

    @torch.no_grad()
    def glanced(
        self, memory: Memory, answers_PN: Tensor, cuts_P: Tensor, rows: TrainingRows, rate: float
    ) -> Tensor:
        """int64 [P,K]: the labels that are revealed, -1 elsewhere. The random state is left as it
        was, so that the next pass has the same dropout.
        """
        labels_PK = rows.tokens_MK1[:, 1:]
        cuda = [labels_PK.device] if labels_PK.device.type == "cuda" else []
        with torch.random.fork_rng(cuda):
            outputs_PKH = self.transformer.fill(self.embedding, memory, answers_PN, cuts_P)
            guesses_PK = self._logits(outputs_PKH).argmax(-1)
            if self.vocabulary_D is not None:
                guesses_PK = self.vocabulary_D[guesses_PK]
            chosen_PK = random_positions(guesses_PK != labels_PK, rows.valid_MK, rate)
        return torch.where(chosen_PK, labels_PK, -1)

    def distributions(
        self, batch: TextBatch, target: Target, rows: TrainingRows
    ) -> Distributions | None:
        """The smoothed labels, by the flat positions before them."""
        if not self.smoothing:
            return None
        labels_F = draft_labels(batch.input_ids.flatten(), self.vocabulary_D).clamp(min=0)
        size, dtype = self.draft_size, torch.promote_types(self.precision, torch.float32)

        def smoothed(flat_M: Tensor) -> Tensor:
            even_MD = torch.full(
                (len(flat_M), size), self.smoothing / size, dtype=dtype, device=flat_M.device
            )
            label_M1 = labels_F[(flat_M + 1).clamp(max=len(labels_F) - 1), None]
            return even_MD.scatter_add(
                1, label_M1, torch.full_like(label_M1, 1, dtype=dtype) - self.smoothing
            )

        return smoothed

    def block_outputs(self, batch: TextBatch, target: Target, rows: TrainingRows) -> Tensor:
        """The LM head's inputs [M,K,H] in the blocks after any rows, with nothing revealed."""
        pairs = Pairs.of(batch)
        pairs = _blank(batch) if pairs is None else pairs
        # 1. The answer of each row, and how much of it stands before the block.
        label_M = rows.flat_MK1[:, 1] + 1
        owner_M = (torch.searchsorted(pairs.places_P, label_M, right=True) - 1).clamp(min=0)
        before_M = (label_M - pairs.places_P[owner_M]).clamp(min=0)
        cuts_M = torch.minimum(before_M, pairs.answer_lengths_P[owner_M])
        # 2. Encode each prompt once.
        memory = self.read_sources(pairs.sources_PS, pairs.source_lengths_P).select(owner_M)
        return self.transformer.fill(self.embedding, memory, pairs.answers_PN[owner_M], cuts_M)

    # -- decoding ----------------------------------------------------------------------------------

    def start(self, context: Context) -> GadState:
        """State with the encoded prompts and the first token."""
        memory = self.read_sources(context.input_ids_BT, context.lengths_B)
        answer_BL = F.pad(context.newest_B[:, None], (0, self.block))
        return GadState(context, context.newest_B, context.lengths_B, memory, answer_BL)

    def absorb(self, state: DraftState, verified: Verified, accepted: Accepted) -> GadState:
        """State with the emitted tokens appended to the answers."""
        assert isinstance(state, GadState)
        emitted = accepted.emitted(verified.tree)
        return replace(
            state,
            newest_B=accepted.next_B,
            lengths_B=state.lengths_B + accepted.lengths_B,
            answer_BL=appended(state.answer_BL, state.counts_B, emitted),
            proposal=None,
        )

    def block_logits(self, state: BlockState) -> Tensor:
        """Logits [B,K,D] of the K tokens that follow the newest one."""
        assert isinstance(state, GadState)
        return self._logits(
            self.transformer.fill(self.embedding, state.memory, state.answer_BL, state.counts_B)
        )


def block_rows(batch: TextBatch, pairs: Pairs, cuts_P: Tensor, size: int) -> TrainingRows:
    """The block of `size` labels after the first `cuts_P` tokens of each answer."""
    ids, slots = batch.input_ids.flatten(), torch.arange(size + 1, device=cuts_P.device)
    # The first label is x_{t+2}.
    label_M1 = (pairs.places_P + cuts_P)[:, None]
    following_MK1 = (label_M1 - 1 + slots).clamp(0, len(ids) - 1)
    valid_MK = cuts_P[:, None] + slots[:-1] < pairs.answer_lengths_P[:, None]
    return TrainingRows((following_MK1 - 1).clamp(min=0), ids[following_MK1], valid_MK)


def _blank(batch: TextBatch) -> Pairs:
    """One pair for a batch without any, whose labels count nowhere: all layers must run."""
    token_11, length_1 = batch.input_ids[:1, :1], torch.ones_like(batch.input_ids[0, :1])
    return Pairs(token_11, length_1, token_11, length_1, length_1)


def _check(size: int, layers: int, heads: int, positions: int) -> None:
    if min(layers, heads, positions) < 1:
        raise ValueError(
            f"layers, heads and positions must be at least 1, got {layers}, {heads}, {positions}"
        )
    if size % heads:
        raise ValueError(
            f"heads must divide the target's hidden size of {size}, got {heads}: choose another "
            "number"
        )
