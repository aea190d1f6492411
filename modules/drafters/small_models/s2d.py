"""S2D: a drafter with several exits, trained by sorted fine-tuning (Kavehzadeh et al. 2024, arXiv
2407.01955).

For every exit l_i, the first l_i layers, the final norm and the LM head form a language model;
sorted fine-tuning (Sorted LLaMA, arXiv 2309.08968; SortedNet, arXiv 2309.00255) trains all of them.
Each level of a draft exits as soon as the drafter is confident enough.

Shape legend: B sequences, T tokens of a packed row, N rows of one call, M training rows, W frontier
nodes, R rows of a proposal, A accepted rows, H hidden size, D draft vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import TYPE_CHECKING, Literal, cast

import torch
from torch import Tensor, nn

from modules.contracts.batches import TextBatch
from modules.contracts.drafter import Context, Drafter, DraftState, Frontier, TreeBuilder
from modules.contracts.losses import Losses, Mean
from modules.contracts.rows import with_children
from modules.contracts.shapes import StateName, TargetShape
from modules.contracts.token_tree import SiblingDraw, TokenTree
from modules.contracts.verification import Accepted, Verified
from modules.drafters.heads.base import soft_labels
from modules.drafters.small_models.exit_segments import Pending, Segment
from modules.drafters.small_models.vocabularies import TokenDrafter
from modules.drafters.trained import CHEAP_BUDGET
from modules.layers.decoder_layer import DecoderLayer, run_layers, target_weight
from modules.losses.averages import SharedCount
from modules.losses.chunked import (
    IGNORED,
    Head,
    TrainingRows,
    accuracy,
    cross_entropy,
    training_rows,
)
from modules.target.kernels.cpu_kernels import narrow_linear
from modules.target.tokenizers.vocabulary import vocabulary_hash
from modules.trees.reranked import RerankedTree
from modules.trees.static import StaticTree

if TYPE_CHECKING:
    from modules.contracts.target import Target


@dataclass
class S2DState(DraftState):
    """State of an S2D drafter's sequences.

    segments: the layers up to the first exit, between the first and the second, and so on.
    thresholds: the probability required to exit, for each exit but the last.
    wanted_B: int64 [B], tokens to draft next where the chain's length adapts.
    above_BRR, positions_BR: which rows of this proposal each row sees, and their positions.
    exits: the exit of each level of this proposal.
    """

    segments: list[Segment]
    thresholds: list[float]
    wanted_B: Tensor
    above_BRR: Tensor
    positions_BR: Tensor
    exits: list[int] = field(default_factory=list)

    def begin(self) -> None:
        """Drop the rows of the last proposal."""
        self.above_BRR, self.positions_BR, self.exits = (
            self.above_BRR[:, :0, :0],
            self.positions_BR[:, :0],
            [],
        )
        for segment in self.segments:
            segment.forget_proposal()

    def add(self, frontier: Frontier) -> None:
        """Append rows that see what their parents see, and themselves."""
        self.above_BRR = with_children(self.above_BRR, frontier.parents_BW)
        positions = (self.lengths_B[:, None] + frontier.depth).expand_as(frontier.tokens_BW)
        self.positions_BR = torch.cat([self.positions_BR, positions], dim=1)


class S2D(TokenDrafter):
    """A small language model made from the target's first layers, with several exits.

    Loss: (1 / n) Σ_i CE(W RMSNorm(h^{l_i}), next token), all exits in one pass, the same norm and
    LM head for all. Drafting: a level of the tree exits at the first exit whose most likely token,
    over the level's nodes and in every sequence of the batch, has a probability above the exit's
    threshold; the last exit accepts every level.

    It reads only tokens, so one drafter serves targets of any size with its vocabulary, each with
    its own thresholds (`AtThresholds`, or the attribute `thresholds`).

    Args:
        shape: dimensions of the target it is made from; its layers are of that size.
        exits: layers after which drafting may stop, ascending, the last its depth; null: a third,
            two thirds and all of a fifth of the target's layers (the paper: 6, 9 and 12 of 32).
        thresholds: of every exit but the last, or one for all; at 1 or more the exit is never
            taken and its LM head not computed.
        draft_vocabulary: how many token ids can be drafted; None for all.
        labels: `"hard"`, the text's tokens (the paper), or `"soft"`, the target's distribution of
            them.
        sorted_training: False trains the last exit only (plain fine-tuning, the paper's control).
        frozen_embedding: do not train the embedding, a copy of the target's.
        draft_length: tokens of a chain at first, or levels of a tree.
        adaptive: lengthen the chain by two tokens when all of it was accepted, within the budget,
            and shorten it by one otherwise.
        width: 1 drafts a chain; more, a tree that expands so many nodes per level (EAGLE-2's).
        tokenizer: hash of the vocabulary it reads; filled in by `initialise`.
    """

    def __init__(
        self,
        shape: TargetShape,
        exits: list[int] | None = None,
        thresholds: list[float] | float = 0.5,
        draft_vocabulary: int | None = None,
        labels: Literal["hard", "soft"] = "hard",
        sorted_training: bool = True,
        frozen_embedding: bool = True,
        draft_length: int = 3,
        adaptive: bool = True,
        width: int = 1,
        tokenizer: str | None = None,
    ) -> None:
        super().__init__(shape, shape.vocab_size, draft_vocabulary)
        # 1. Check exits, sizes and thresholds.
        self.exits = default_exits(shape.num_layers) if exits is None else exits
        _check_exits(self.exits, shape.num_layers)
        if draft_length < 1 or width < 1:
            raise ValueError(
                f"draft_length and width must be at least 1, got {draft_length} and {width}"
            )
        self.thresholds = checked_thresholds(thresholds, len(self.exits))
        self.soft_labels = soft_labels(labels)
        self.sorted_training, self.frozen_embedding = sorted_training, frozen_embedding
        self.draft_length, self.adaptive = draft_length, adaptive and width == 1
        # 2. A language model with one norm and LM head for all exits.
        self.embedding = nn.Embedding(shape.vocab_size, shape.hidden_size)
        self.embedding.requires_grad_(not frozen_embedding)
        self.layers = nn.ModuleList(DecoderLayer(shape) for _ in range(self.exits[-1]))
        self.norm = nn.RMSNorm(shape.hidden_size, shape.norm_eps)
        self.lm_head = nn.Linear(shape.hidden_size, self.draft_size, bias=False)
        self._builder = (
            StaticTree.chain(draft_length) if width == 1 else RerankedTree(draft_length, width)
        )
        self._budget = max(CHEAP_BUDGET, draft_length)

    @torch.no_grad()
    def initialise(self, target: Target) -> None:
        """Copy the target's embedding, first layers, final norm and LM head, and store the
        tokenizer's hash.
        """
        every = torch.arange(self.shape.vocab_size, device=target.device)
        self.embedding.weight.copy_(target.embed(every))
        self.lm_head.weight.copy_(
            target.lm_head_rows(every if self.vocabulary_D is None else self.vocabulary_D)
        )
        norm = target_weight(target, "norm")
        if norm is not None:
            self.norm.weight.copy_(norm)
        for index, layer in enumerate(self.layers):
            cast(DecoderLayer, layer).copy_from(target, index)
        self.arguments |= {"tokenizer": vocabulary_hash(target.tokenizer)}

    def head(self, depth: int, target: Target) -> Head:
        """Its own LM head, the same for all exits."""
        return lambda hidden: narrow_linear(hidden, self.lm_head.weight)[..., : self.draft_size]

    def part(self, exit_index: int) -> nn.ModuleList:
        """The layers between the previous exit and this one."""
        start = self.exits[exit_index - 1] if exit_index else 0
        return cast(nn.ModuleList, self.layers[start : self.exits[exit_index]])

    # -- training ----------------------------------------------------------------------------------

    @property
    def training_states(self) -> tuple[StateName, ...]:
        """No states with hard labels; the target's final states for soft ones."""
        return ("final",) if self.soft_labels else ()

    def exit_features(self, batch: TextBatch, rows: TrainingRows) -> Iterator[Tensor]:
        """The LM head's inputs [M,H] of the rows that predict the labels, exit by exit."""
        hidden, seen = self.embedding(self.read_ids(batch.input_ids)), batch.rows()
        for exit_index in range(len(self.exits)):
            hidden = run_layers(self.part(exit_index), hidden, seen)
            yield self.norm(hidden.flatten(0, 1)[rows.flat_MK1[:, 1]])

    def teacher_forced(
        self, batch: TextBatch, target: Target, rows: TrainingRows
    ) -> Iterator[Tensor]:
        """The LM head's inputs [M,H] at the last exit: a single draft step."""
        yield list(self.exit_features(batch, rows))[-1]

    def loss(self, batch: TextBatch, target: Target, progress: float) -> Losses:
        """The mean of the exits' cross-entropies, or the last exit's; metrics are cross-entropy and
        accuracy per exit.
        """
        # 1. Rows and labels, the same for every exit.
        rows = training_rows(batch, 1)
        labels_M = self.labels(batch, target, rows)[:, 0].contiguous()
        flat_M = rows.flat_MK1[:, 1].contiguous()
        distributions, counted_M = self.distributions(batch, target, rows), labels_M != IGNORED
        count = SharedCount(counted_M.sum())
        total, metrics = torch.zeros((), device=labels_M.device), {}
        # 2. One pass through the layers; exits without weight are only evaluated.
        for exit_index, feature in enumerate(self.exit_features(batch, rows)):
            weight = self.exit_weights[exit_index]
            if self.training and not weight:
                continue
            losses, ranks = cross_entropy(
                feature, self.head(0, target), labels_M, self.draft_size, distributions, flat_M
            )
            if weight:
                total = total + weight * (losses * counted_M).sum() / count.divisor()
            name = f"exit_{self.exits[exit_index]}"
            metrics[f"cross_entropy_{name}"] = Mean(losses.detach().sum(), count.local)
            metrics[f"top1_{name}"] = accuracy(ranks, rows.valid_MK[:, 0], 1)
        return Losses(total, metrics)

    @property
    def exit_weights(self) -> list[float]:
        """Weights of the exits' losses; they sum to 1."""
        count = len(self.exits)
        return [1 / count] * count if self.sorted_training else [0.0] * (count - 1) + [1.0]

    # -- decoding ----------------------------------------------------------------------------------

    def start(self, context: Context) -> S2DState:
        """State with the whole prompt pending in the first segment; the first draft runs it."""
        embedded = self.embedding(self.read_ids(context.input_ids_BT))
        segments = [
            Segment.empty(self.shape, len(self.part(i)), embedded) for i in range(len(self.exits))
        ]
        segments[0].pending = Pending(embedded, context.lengths_B)
        wanted = torch.full_like(context.lengths_B, self.draft_length)
        blank = torch.zeros(len(wanted), 0, 0, dtype=torch.bool, device=wanted.device)
        return S2DState(
            context,
            context.newest_B,
            context.lengths_B,
            segments,
            list(self.thresholds),
            wanted,
            blank,
            wanted.new_zeros(len(wanted), 0),
        )

    def propose(self, state: DraftState, budget: int) -> TokenTree:
        """A chain whose length follows the last acceptances, or the builder's tree."""
        if not self.adaptive:
            return super().propose(state, budget)
        assert isinstance(state, S2DState)
        state.wanted_B = state.wanted_B.clamp(1, max(1, budget))
        return StaticTree.chain(int(state.wanted_B.max())).build(self, state, budget)

    def expand(self, state: DraftState, frontier: Frontier) -> Tensor:
        """Logits [B,W,D] of the token after each frontier node, from the first exit above its
        threshold.
        """
        assert isinstance(state, S2DState)
        # 1. The new rows enter the first segment as embeddings.
        if frontier.depth == 0:
            state.begin()
        state.add(frontier)
        first, width = state.segments[0], frontier.tokens_BW.shape[1]
        first.rows_BRH = torch.cat(
            [first.rows_BRH, self.embedding(self.read_ids(frontier.tokens_BW))], dim=1
        )
        # 2. Segment by segment, until an exit is taken; outputs become inputs of the next segment.
        for exit_index, segment in enumerate(state.segments):
            prefix, outputs = segment.catch_up(
                self.part(exit_index), state.above_BRR, state.positions_BR
            )
            if exit_index + 1 < len(state.segments):
                deeper = state.segments[exit_index + 1]
                deeper.pending = deeper.pending.and_then(prefix)
                deeper.rows_BRH = torch.cat([deeper.rows_BRH, outputs], dim=1)
                if state.thresholds[exit_index] >= 1:
                    continue
            logits = self.head(0, state.context.target)(self.norm(outputs[:, -width:]))
            if self.leaves(logits, exit_index, state):
                state.exits.append(self.exits[exit_index])
                return logits
        raise AssertionError("the last exit must accept every level")

    def leaves(self, logits_BWD: Tensor, exit_index: int, state: S2DState) -> bool:
        """Whether a level exits here. The decision depends on probabilities only, never on tokens
        drawn from them.
        """
        if exit_index == len(self.exits) - 1:
            return True
        surest_B = logits_BWD.softmax(-1).flatten(1).amax(1)
        return float(surest_B.min()) > state.thresholds[exit_index]

    def absorb(self, state: DraftState, verified: Verified, accepted: Accepted) -> S2DState:
        """State with the accepted tokens pending in the first segment; the drafted rows are
        dropped.
        """
        assert isinstance(state, S2DState)
        state.begin()
        tokens_BA, first = accepted.along_path(verified.tree.tokens_BN), state.segments[0]
        first.pending = first.pending.and_then(
            Pending(self.embedding(self.read_ids(tokens_BA)), accepted.lengths_B)
        )
        return replace(
            state,
            newest_B=accepted.next_B,
            lengths_B=state.lengths_B + accepted.lengths_B,
            wanted_B=adapted_length(state.wanted_B, verified.tree, accepted),
        )


class AtThresholds:
    """Trees of an S2D drafter at other thresholds, for another target or a comparison.

    Args:
        thresholds: of every exit but the last, or one for all.
        depth: levels.
        width: 1 drafts a chain; more, a tree that expands so many nodes per level.
    """

    sibling_draw = SiblingDraw.BY_VALUE

    def __init__(self, thresholds: list[float] | float, depth: int = 3, width: int = 1) -> None:
        self.thresholds, self.depth = thresholds, depth
        self.inner: TreeBuilder = (
            StaticTree.chain(depth) if width == 1 else RerankedTree(depth, width)
        )

    def build(self, drafter: Drafter, state: DraftState, budget: int) -> TokenTree:
        """A tree of at most `budget` drafted nodes.

        Raises ValueError for a drafter without exits, or with another number of them.
        """
        if not isinstance(drafter, S2D) or not isinstance(state, S2DState):
            raise ValueError(
                f"builder AtThresholds needs an S2D drafter, got {type(drafter).__name__}: name "
                "another"
            )
        state.thresholds = checked_thresholds(self.thresholds, len(drafter.exits))
        return self.inner.build(drafter, state, budget)


def adapted_length(wanted_B: Tensor, tree: TokenTree, accepted: Accepted) -> Tensor:
    """int64 [B]: two tokens more than were drafted where all of them were accepted, otherwise one
    less than `wanted_B`.
    """
    offered_B = tree.counts_B2[:, 0]
    return torch.where(accepted.lengths_B > offered_B, offered_B + 2, (wanted_B - 1).clamp(min=1))


def default_exits(layers: int) -> list[int]:
    """A third, two thirds and all of a fifth of the target's layers, at least two of them."""
    deepest = min(layers, max(2, layers // 5))
    return sorted({-(-deepest * part // 3) for part in (1, 2, 3)})


def checked_thresholds(thresholds: Sequence[float] | float, exits: int) -> list[float]:
    """One threshold for each exit but the last.

    Raises ValueError for a list of another length.
    """
    per_exit = (
        [float(thresholds)] * (exits - 1)
        if isinstance(thresholds, int | float)
        else list(thresholds)
    )
    if len(per_exit) != exits - 1:
        raise ValueError(
            f"thresholds must be {exits - 1}, one for each of {exits} exits but the last, got "
            f"{per_exit}"
        )
    return per_exit


def _check_exits(exits: list[int], layers: int) -> None:
    if (
        not exits
        or exits[0] < 1
        or exits[-1] > layers
        or any(low >= high for low, high in pairwise(exits))
    ):
        raise ValueError(
            f"exits must ascend from 1 to at most {layers}, the target's layers, got {exits}"
        )
