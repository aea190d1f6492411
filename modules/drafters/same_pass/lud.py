"""Lexical unit decoding: the target itself is trained to give several tokens in one pass where it
can do so with confidence (Sun et al. 2024, arXiv 2405.15208).

Only the abstract and a short summary of the paper are public; what is marked (inferred) is ours.
A unit of n tokens t … t+n-1 is guessed by the row of token t-1 and n-1 placeholders after it, at
the positions t, t+1, …: placeholder i is guess i of `modules.drafters.same_pass.base`.

Shape legend: B sequences, T tokens of a packed row, N nodes, A accepted rows, M training rows, K
placeholders, P guess rows, X recent tokens, H hidden size.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor, nn

from modules.contracts.batches import TextBatch
from modules.contracts.drafter import Context, DraftState, Frontier
from modules.contracts.losses import Losses, Mean
from modules.contracts.rows import Rows
from modules.contracts.shapes import TargetShape
from modules.contracts.token_tree import TokenTree, packed
from modules.contracts.trainable import Footprint, GradientLayers, TrainingResult
from modules.contracts.verification import Accepted, Verified
from modules.drafters.heads.base import refuse_unknown
from modules.drafters.same_pass.base import (
    GuessState,
    SamePassDrafter,
    started_embeddings,
)
from modules.drafters.same_pass.guess_rows import GuessRows, guess_rows
from modules.drafters.same_pass.units import confident_tokens, repeating_nodes, unit_lengths
from modules.losses.averages import SharedCount
from modules.losses.chunked import (
    Head,
    TrainingRows,
    cross_entropy,
    next_token_rows,
    training_rows,
)
from modules.losses.row_subsets import some_of_each
from modules.target.adapters import Adapters
from modules.trees.confident import ConfidentChain

if TYPE_CHECKING:
    from modules.contracts.target import Target

MOST_TOKENS = 64
"""Limit on the tokens of a unit, and of a repetition."""


@dataclass
class UnitState(GuessState):
    """Guesses, and the end of the text.

    recent_BX: int64, the last tokens before the newest, different negative numbers where there are
        none.
    """

    recent_BX: Tensor


class LUD(SamePassDrafter):
    """A placeholder's embedding, and adapters on the target, with which it gives whole units.

    Decoding with it is lossless with respect to `adapt(target)`, a different model: the guesses
    are drafts, and the next pass, which computes their keys and values anyway, verifies them. With
    the rule `modules.acceptance.relaxed.UnverifiedRule` nothing is verified, as in the paper: a
    pass over n tokens and k-1 placeholders gives the next unit. The first call after the prompt has
    no guesses to draft. Answers end at an end-of-sequence token inside of a unit too.

    Loss: L_LM + parallel_weight · L_P. L_LM is the adapted target's cross-entropy of the text, L_P
    that of placeholders. One pass over a text and its placeholders trains both; tokens never see
    placeholders, and those of a unit see what is before it and each other. Units are marked as a
    text is trained on, by the target without adapters.

    Args:
        shape: the target's dimensions (Llama-type layers only).
        span: k, tokens of a unit at most; 1 + placeholders of a pass (inferred: 4).
        unit_confidence: α, the probability that the target gives each token of a unit but the first
            at least (inferred: 0.9); above 1 there are no units.
        span_confidence: β, the probability of a guess at which a span goes on (inferred: 0.9).
            Evaluations may name another by the builder `modules.trees.confident.ConfidentChain`.
        placeholder: its embedding starts as that of this text's first token; null: random.
        units: units of a packed row that placeholders follow: random ones in training, evenly
            spaced in validation.
        outside: share of units, single tokens included, in which all k-1 placeholders are trained
            on the tokens that follow, also beyond the unit's end (inferred). Decoding has them
            there too, so they learn not to be confident.
        parallel_weight: of the placeholders' loss.
        repeats: draft nothing where 1 … `repeats` tokens would stand twice in a row (inferred); 0:
            off. Not for drawn trees.
        placed: placeholders after the `last` node, where the whole draft is expected to be
            accepted, or after `every` one, so that a rejected draft is followed by guesses too.
        rank, alpha, dropout: of the adapters, on every linear layer.
    """

    depth_unit = "placeholders"
    dynamic = False

    def __init__(
        self,
        shape: TargetShape,
        span: int = 4,
        unit_confidence: float = 0.9,
        span_confidence: float = 0.9,
        placeholder: str | None = None,
        units: int = 64,
        outside: float = 0.2,
        parallel_weight: float = 1.0,
        repeats: int = 4,
        placed: Literal["last", "every"] = "last",
        rank: int = 16,
        alpha: float = 32.0,
        dropout: float = 0.05,
    ) -> None:
        if not 2 <= span <= MOST_TOKENS or repeats > MOST_TOKENS:
            raise ValueError(
                f"span must be from 2 to {MOST_TOKENS} and repeats at most that, got {span} and "
                f"{repeats}; spans of 1 are plain decoding: budget 0"
            )
        if unit_confidence <= 0 or not 0 <= outside <= 1 or parallel_weight < 0 or units < 1:
            raise ValueError(
                "unit_confidence must be above 0, outside from 0 to 1, parallel_weight at least 0 "
                f"and units at least 1, got {unit_confidence}, {outside}, {parallel_weight} and "
                f"{units}"
            )
        refuse_unknown("placed", placed, ("last", "every"))
        super().__init__(shape, span - 1, 1, None, 1.0, "hard", "row", None, None)
        self.unit_confidence, self.placeholder, self.units = unit_confidence, placeholder, units
        self.outside, self.parallel_weight = outside, parallel_weight
        self.repeats, self.placed = repeats, placed
        self.placeholder_1H = nn.Parameter(0.02 * torch.randn(1, shape.hidden_size))
        self.adapters = Adapters(shape, rank, alpha, dropout, name="lud")
        self._builder, self._budget = ConfidentChain(self.guesses, span_confidence), self.guesses

    @torch.no_grad()
    def initialise(self, target: Target) -> None:
        """Start the placeholder's embedding."""
        self.adapters.refuse_other_layers(target)
        self.placeholder_1H.copy_(started_embeddings(target, self.placeholder, 1))

    def following(self, rows: Rows, counts_BN: Tensor, width: int) -> GuessRows:
        """The first `counts_BN` placeholders of each row."""

        def entering(owner_BP: Tensor, _: Tensor) -> Tensor:
            return self.placeholder_1H[torch.zeros_like(owner_BP)]

        return guess_rows(entering, self.guesses, 1, rows, counts_BN, width)

    def head(self, depth: int, target: Target) -> Head:
        """The LM head of the target that is passed, the adapted one."""
        return target.logits

    # -- the adapted target ------------------------------------------------------------------------

    def adapt(self, target: Target) -> Target:
        """A copy of the target with the adapters added to its weights: a different model, with its
        own fingerprint.
        """
        return self.adapters.merged(target)

    def adapt_sharing(self, target: Target) -> Target:
        """The same up to rounding, on the target's own weights."""
        return self.adapters.twin(target, training=False)

    # -- training ----------------------------------------------------------------------------------

    def footprint(self, rows: int, length: int) -> Footprint:
        """Says whether the adapters drop inputs."""
        layers = GradientLayers(self.shape, adapted=True, dropout=self.adapters.dropout > 0)
        return replace(super().footprint(rows, length), layers=layers)

    def rows(self, batch: TextBatch, target: Target) -> TrainingRows:
        """The tokens before units, and of how many placeholders the labels count. `target` marks
        the units.
        """
        marked = confident_tokens(batch, target, self.unit_confidence)
        lengths_BT = unit_lengths(*marked, self.guesses + 1)
        rows = training_rows(batch, self.guesses)
        # 1. Placeholders of each unit; the unit begins at the token after the row.
        lengths_M = rows.take(lengths_BT.roll(-1, 1))
        whole_M = self._outside(len(lengths_M)).to(lengths_M.device)
        counts_M = torch.where(whole_M, self.guesses, lengths_M - 1)
        # 2. Some of those that have any.
        usable = ((lengths_M > 0) & (counts_M > 0)).nonzero()[:, 0]
        unit_M = rows.flat_MK1[usable, 0] // batch.input_ids.shape[1]
        chosen = usable[some_of_each(unit_M, self.units, self.training)]
        order = torch.arange(self.guesses, device=counts_M.device)
        valid_MK = rows.valid_MK[chosen] & (order < counts_M[chosen, None])
        return replace(rows.only(chosen), valid_MK=valid_MK)

    def _outside(self, count: int) -> Tensor:
        """bool [M]: a share of rows, at random in training, otherwise evenly spaced."""
        if self.training:
            return torch.rand(count) < self.outside
        reached = ((torch.arange(count + 1) * self.outside) + 1e-6).floor()
        return reached[1:] > reached[:-1]

    def loss(self, batch: TextBatch, target: Target, progress: float) -> Losses:
        """The adapted target's loss on the text, and that of placeholders."""
        twin, size = self.adapters.twin(target), self.shape.vocab_size
        rows = self.rows(batch, target)
        states, after = self.passed(batch, twin, rows)
        # 1. The text.
        flat_M, labels_M = next_token_rows(batch)
        states_MH = states["final"].flatten(0, 1)[flat_M]
        losses_M, _ = cross_entropy(states_MH, twin.logits, labels_M, size)
        text = Mean(losses_M.sum(), torch.as_tensor(len(losses_M), device=losses_M.device))
        # 2. The placeholders, all alike.
        outputs = ((state, state) for state in after["final"].unbind(1))
        steps = list(self.scored(batch, twin, rows, None, outputs))
        parallel = torch.stack([step.losses_M.sum() for step in steps]).sum()
        count = torch.stack([step.counted_M.sum() for step in steps]).sum()
        spoken, drafted = SharedCount(text.count), SharedCount(count)
        total = text.total / spoken.divisor()
        total = total + self.parallel_weight * parallel / drafted.divisor()
        metrics = {key: mean for step in steps for key, mean in step.metrics().items()}
        metrics["language_loss"] = Mean(text.total.detach(), text.count)
        return Losses(total, metrics)

    def finish(self, batches: Iterable[TextBatch], target: Target) -> TrainingResult:
        """As the base class, on the adapted target."""
        return super().finish(batches, self.adapt_sharing(target))

    # -- decoding ----------------------------------------------------------------------------------

    def start(self, context: Context) -> UnitState:
        """State before any placeholder was read, with the end of the prompt."""
        parts = vars(super().start(context))
        columns = torch.arange(-2 * self.repeats, 0, device=context.lengths_B.device)
        index_BX = context.lengths_B[:, None] + columns
        recent_BX = context.input_ids_BT.gather(1, index_BX.clamp(min=0))
        return UnitState(**parts, recent_BX=torch.where(index_BX < 0, index_BX, recent_BX))

    def expand(self, state: DraftState, frontier: Frontier) -> Tensor:
        """Logits [B,W,V], the same for every node of a depth; uniform without guesses."""
        assert isinstance(state, UnitState)
        logits_BWV = super().expand(state, frontier)
        return logits_BWV.masked_fill(~self._guessed(state)[:, None, None], 0.0)

    def _guessed(self, state: UnitState) -> Tensor:
        """bool [B]: sequences whose last accepted node had placeholders."""
        return torch.tensor([count > 0 for count in state.available], device=state.newest_B.device)

    def prepare(self, state: DraftState, tree: TokenTree) -> TokenTree:
        """The tree with placeholders; without drafts where they repeat the text, or where there was
        no guess.
        """
        assert isinstance(state, UnitState)
        # 1. Drafts that are chosen by value may be dropped after a look at them.
        if tree.draw_BN is None:
            usable_B = self._guessed(state)
            if self.repeats:
                usable_B &= ~repeating_nodes(tree, state.recent_BX, self.repeats).any(1)
            root_N = torch.arange(tree.size, device=usable_B.device) == 0
            real_BN = tree.acceptable_BN & (usable_B[:, None] | root_N)
            parents_BN = tree.parents_BN.expand_as(tree.tokens_BN)
            tree = packed(tree.tokens_BN, parents_BN, real_BN, tree.vocabulary_D)
        # 2. Placeholders after every node or the deepest.
        counts_BN = tree.acceptable_BN * self.guesses
        if self.placed == "last":
            deepest_B = tree.topology.depth.masked_fill(~tree.acceptable_BN, -1).argmax(1)
            last_BN = torch.zeros_like(counts_BN).scatter(1, deepest_B[:, None], 1)
            counts_BN = counts_BN * last_BN
        return self.with_guesses(state, tree, counts_BN, tuple(map(tuple, counts_BN.tolist())))

    def absorb(self, state: DraftState, verified: Verified, accepted: Accepted) -> UnitState:
        """State with the guesses of the last accepted node, and the text up to it."""
        assert isinstance(state, UnitState)
        after = super().absorb(state, verified, accepted)
        assert isinstance(after, UnitState)
        read_BA = accepted.along_path(verified.tree.tokens_BN)
        order = torch.arange(state.recent_BX.shape[1], device=read_BA.device)
        text_BX = torch.cat([state.recent_BX, read_BA], dim=1)
        return replace(after, recent_BX=text_BX.gather(1, accepted.lengths_B[:, None] + order))
