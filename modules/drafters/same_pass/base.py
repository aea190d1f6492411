"""What drafters share whose guesses come from rows of the target's own pass: prompt tokens (PPD),
pseudo states (Hidden Transfer).

Guess i = 1 … of the token at position t is a row at position t + i (`guess_rows`), whose state
gives the logits of x_{t+1+i}; draft step d is guess d + 1. Tokens never see these rows, so the
target's own logits do not change.

Shape legend: B sequences, T tokens of a packed row, N nodes, W frontier nodes, M training rows, P
guess rows, K guesses, E their rows, H hidden size, X concatenated states of a guess's rows, D draft
vocabulary.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar, Literal

import torch
from torch import Tensor

from modules.contracts.batches import TextBatch
from modules.contracts.drafter import Context, DraftState, Frontier
from modules.contracts.losses import Losses
from modules.contracts.rows import Rows, rows_at
from modules.contracts.shapes import StateName, TargetShape
from modules.contracts.token_tree import TokenTree
from modules.contracts.trainable import Footprint, GradientLayers, TrainingResult
from modules.contracts.verification import Accepted, Verified
from modules.drafters.heads.base import refuse_unknown, soft_labels
from modules.drafters.same_pass.dynamic_tree import drafted
from modules.drafters.same_pass.guess_rows import GuessRows, HostCounts
from modules.drafters.same_pass.sparse_tree import SparseTrees, assumed, descending, sparse_trees
from modules.drafters.trained import DraftStep, TrainedDrafter, measured_accuracies
from modules.losses.chunked import TrainingRows, training_rows
from modules.losses.row_subsets import some_rows

if TYPE_CHECKING:
    from modules.contracts.target import Target

MEASURED_GROUPS = 128
"""Positions of a row or document that accuracies are measured at."""
NARROW_ROWS, WIDE_ROWS = 12, 64
"""Rows of a call with a sparse tree, by default on a CPU and on a GPU."""


@dataclass
class GuessState(DraftState):
    """State of the guesses after the last accepted node.

    states_BKX: the states of its guess rows; None: there were none.
    available: the number of guesses that the node had.
    """

    states_BKX: Tensor | None
    available: HostCounts


class SamePassDrafter(TrainedDrafter):
    """Base of drafters that guess in the target's own pass.

    Subclasses define `following`, the rows that guess, and `head`.

    The first call after the prompt verifies only the newest token, followed by its guess rows.

    Args:
        shape: the target's dimensions.
        guesses: K, how many tokens can be drafted in a row.
        members: rows of a guess.
        draft_vocabulary: how many token ids can be drafted; None for all.
        decay: loss weight of step d, `decay ** (d + first_exponent)`.
        labels: `soft` learns the target's distribution, `hard` the tokens of the data.
        groups_per: whether positions are chosen of each packed `row` or of each `document`.
        accuracies: how often the rank-r token of each guess is right, which sparse trees are made
            from; None: assumed ones.
        rows: of a call with a sparse tree: the newest token, drafts and guess rows; None: the
            device's default.
    """

    guess_state: ClassVar[StateName] = "final"
    """The state of guess rows that the LM head reads, or what comes before it."""
    divergence_name = "forward_kl"
    training_reads: tuple[StateName, ...] = ("final",)
    """States of the tokens that the loss reads."""
    make_trees = staticmethod(sparse_trees)
    """What makes sparse trees of accuracies, rows of a call, and rows of a guess."""
    random_cuts = True
    """Whether training draws its positions anew in every step."""
    dynamic = True
    """Whether it drafts sparse trees and not a fixed one."""

    def __init__(
        self,
        shape: TargetShape,
        guesses: int,
        members: int,
        draft_vocabulary: int | None,
        decay: float,
        labels: Literal["soft", "hard"],
        groups_per: Literal["row", "document"],
        accuracies: list[list[float]] | None,
        rows: int | None,
    ) -> None:
        refuse_unknown("groups_per", groups_per, ("row", "document"))
        super().__init__(shape, guesses, draft_vocabulary, decay)
        self.guesses, self.members = guesses, members
        self.soft_labels, self.groups_per = soft_labels(labels), groups_per
        self.call_rows = rows
        if accuracies is not None and len(accuracies) != guesses:
            raise ValueError(
                f"accuracies has {len(accuracies)} rows for {guesses} {self.depth_unit}: give one "
                "for each"
            )
        self.accuracies = assumed(guesses) if accuracies is None else descending(accuracies)

    @abstractmethod
    def following(self, rows: Rows, counts_BN: Tensor, width: int) -> GuessRows:
        """The first `counts_BN` guesses of each row, `width` guess rows in all."""

    def sparse_trees(self, budget: int) -> SparseTrees:
        """The trees of all states for calls of so many rows beside the newest token's."""
        table = tuple(row[: self.draft_size] for row in self.accuracies)
        return self.make_trees(table, budget + 1, self.members)

    @property
    def max_depth(self) -> int:
        """One level per guess."""
        return self.guesses

    @property
    def default_budget(self) -> int:
        """Rows beside the newest token's where the tree is sparse, guess rows included; drafted
        nodes of others.
        """
        if not self.dynamic:
            return super().default_budget
        rows = self.call_rows or (WIDE_ROWS if self.on_gpu else NARROW_ROWS)
        return max(rows - 1, self.least_budget)

    def check_rows(self) -> None:
        """ValueError where calls have fewer rows than a tree needs."""
        if self.call_rows is not None and self.call_rows <= self.least_budget:
            raise ValueError(
                f"rows must be at least {self.least_budget + 1}, got {self.call_rows}: raise it"
            )

    # -- training ----------------------------------------------------------------------------------

    @property
    def online(self) -> bool:
        """True: guess rows pass through the target in every step."""
        return True

    def footprint(self, rows: int, length: int) -> Footprint:
        """Adds the target's layers, through which guess rows have a gradient."""
        layers = GradientLayers(self.shape, adapted=True)
        return replace(super().footprint(rows, length), layers=layers)

    def cuts(self, batch: TextBatch, most: int | Tensor) -> TrainingRows:
        """Up to so many positions of every packed row or document (or int64 [B,T], of that of each
        token): random ones in training, otherwise evenly spaced.
        """
        rows = training_rows(batch, self.draft_steps)
        drawn = self.training and self.random_cuts
        return some_rows(rows, batch, most, self.groups_per == "document", drawn)

    def measured_rows(self, batch: TextBatch, target: Target) -> TrainingRows:
        """More of them than in training, without a gradient."""
        return self.cuts(batch, MEASURED_GROUPS)

    def passed(
        self,
        batch: TextBatch,
        target: Target,
        rows: TrainingRows,
        names: tuple[StateName, ...] = (),
    ) -> tuple[dict[StateName, Tensor], dict[StateName, Tensor]]:
        """One pass: states of the tokens [B,T,H] and of the guess rows [M,K,X] that follow the
        chosen ones.

        Args:
            batch: the tokens.
            target: reads them, at its own precision.
            rows: the chosen ones.
            names: states beside those of `training_reads` and `guess_state`; of guess rows, those
                from the layer on where they enter.
        """
        batch_size, length = batch.input_ids.shape
        flat_M = rows.flat_MK1[:, 0]
        # 1. Guess rows after every chosen token.
        counts_BT = torch.zeros_like(batch.input_ids)
        counts_BT.view(-1)[flat_M] = self.guesses
        width = max(1, int(counts_BT.sum(1).max()) * self.members)
        appended = self.following(batch.rows(), counts_BT, width)
        last = target.max_positions - 1
        appended = replace(appended, position_ids_BP=appended.position_ids_BP.clamp(max=last))
        # 2. The target reads both.
        wanted = tuple(dict.fromkeys((*self.training_reads, self.guess_state, *names)))
        with torch.autocast(batch.input_ids.device.type, enabled=False):
            states = target.features(
                batch, wanted, gradient=torch.is_grad_enabled(), auxiliary=appended
            )
        # 3. The states after each chosen token.
        assert appended.first_BN is not None
        entries = torch.arange(self.guesses * self.members, device=flat_M.device)
        index_ME = appended.first_BN.flatten()[flat_M][:, None] + entries
        index_ME = index_ME + (flat_M // length)[:, None] * width
        after = {
            name: self.side_by_side(state[:, length:].flatten(0, 1)[index_ME])
            for name, state in states.items()
            if state.shape[1] > length
        }
        return {name: state[:, :length] for name, state in states.items()}, after

    def side_by_side(self, states: Tensor) -> Tensor:
        """States [...,E,H] as [...,K,X]: those of a guess in one row."""
        return states.unflatten(-2, (self.guesses, self.members)).flatten(-2)

    def teacher_forced(
        self, batch: TextBatch, target: Target, rows: TrainingRows
    ) -> Iterator[Tensor]:
        """The LM head's inputs [M,X], guess by guess."""
        yield from self.passed(batch, target, rows)[1][self.guess_state].unbind(1)

    def guessed(self, batch: TextBatch, target: Target) -> tuple[TextBatch, Iterator[DraftStep]]:
        """The batch with the target's states, and every guess after the chosen rows; both of the
        same pass.
        """
        rows = self.rows(batch, target)
        states, after = self.passed(batch, target, rows)
        batch = replace(batch, states={name: state.detach() for name, state in states.items()})
        outputs = ((state, state) for state in after[self.guess_state].unbind(1))
        distributions = self.distributions(batch, target, rows)
        return batch, self.scored(batch, target, rows, distributions, outputs)

    def steps(self, batch: TextBatch, target: Target) -> Iterator[DraftStep]:
        """Every guess over the chosen rows, with the target's distributions of the same pass."""
        return self.guessed(batch, target)[1]

    def loss(self, batch: TextBatch, target: Target, progress: float) -> Losses:
        """The weighted losses of the guesses; per-guess accuracies as metrics."""
        batch, steps = self.guessed(batch, target)
        return self.weighted(steps, batch)

    def finish(self, batches: Iterable[TextBatch], target: Target) -> TrainingResult:
        """Measure how often each rank is right, for the sparse trees."""
        if not self.dynamic:
            return super().finish(batches, target)
        table = measured_accuracies(self, batches, target).tolist()
        self.accuracies = descending(table)
        self.arguments["accuracies"] = [list(row) for row in self.accuracies]
        expected = self.sparse_trees(self.default_budget).tokens
        return TrainingResult({"tree/expected_tokens": expected})

    # -- decoding ----------------------------------------------------------------------------------

    @property
    def decoding_states(self) -> tuple[StateName, ...]:
        """The state that the LM head reads, or what comes before it."""
        return (self.guess_state,)

    def start(self, context: Context) -> GuessState:
        """State before any guess row was read."""
        none = HostCounts([0] * len(context.newest_B))
        return GuessState(context, context.newest_B, context.lengths_B, None, none)

    def propose(self, state: DraftState, budget: int) -> TokenTree:
        """The sparse tree of each sequence's state, or the fixed one that was asked for; without
        guesses only the newest token.
        """
        assert isinstance(state, GuessState)
        if state.states_BKX is None:
            return TokenTree.root(state.newest_B)
        if not self.dynamic:
            return super().propose(state, budget)
        # 1. The likeliest tokens of every level that a tree has.
        trees, count = self.sparse_trees(budget), max(1, *state.available)
        logits_BKD = self.head(0, state.context.target)(state.states_BKX[:, :count])
        tokens_BKR = logits_BKD.topk(trees.ranks, dim=-1).indices
        if self.vocabulary_D is not None:
            tokens_BKR = self.vocabulary_D[tokens_BKR]
        # 2. The tree of each sequence, and its guess rows.
        tree, counts_BN, counts = drafted(trees, state.available, state.newest_B, tokens_BKR)
        tree = replace(tree, vocabulary_D=self.vocabulary_D)
        return self.with_guesses(state, tree, counts_BN, counts)

    def expand(self, state: DraftState, frontier: Frontier) -> Tensor:
        """Logits [B,W,D], the same for every node of a depth; uniform without guesses."""
        assert isinstance(state, GuessState)
        width = frontier.tokens_BW.shape[1]
        if state.states_BKX is None:
            nothing = torch.zeros(1, 1, 1, device=state.newest_B.device, dtype=self.precision)
            return nothing.expand(len(state.newest_B), width, self.draft_size)
        logits_BD = self.head(frontier.depth, state.context.target)(
            state.states_BKX[:, frontier.depth]
        )
        return logits_BD[:, None].expand(-1, width, -1)

    def prepare(self, state: DraftState, tree: TokenTree) -> TokenTree:
        """The tree with all guesses after every node, unless it has some."""
        if tree.auxiliary is not None:
            return tree
        everywhere = ((self.guesses,) * tree.size,) * len(tree.tokens_BN)
        counts_BN = torch.full_like(tree.tokens_BN, self.guesses)
        return self.with_guesses(state, tree, counts_BN, everywhere)

    def with_guesses(
        self,
        state: DraftState,
        tree: TokenTree,
        counts_BN: Tensor,
        counts: tuple[tuple[int, ...], ...],
    ) -> TokenTree:
        """The tree with so many guesses after each node (`counts`: the same on the host)."""
        width = self.members * max(map(sum, counts))
        appended = self.following(tree.rows(state.lengths_B), counts_BN, width)
        return replace(tree, auxiliary=replace(appended, counts=counts))

    def absorb(self, state: DraftState, verified: Verified, accepted: Accepted) -> GuessState:
        """State with the guesses of the last accepted node."""
        after, appended = super().absorb(state, verified, accepted), verified.tree.auxiliary
        assert isinstance(after, GuessState)
        if not isinstance(appended, GuessRows) or appended.first_BN is None:
            return replace(after, states_BKX=None, available=HostCounts([0] * len(accepted.paths)))
        # Guess rows of the next node follow; `available` excludes them.
        states = verified.auxiliary_states[self.guess_state]
        entries = torch.arange(self.guesses * self.members, device=states.device)
        first_B1 = appended.first_BN.gather(1, accepted.last_B[:, None])
        states_BEH = rows_at(states, (first_B1 + entries).clamp(max=states.shape[1] - 1))
        available = HostCounts(
            counts[path[-1]] for counts, path in zip(appended.counts, accepted.paths, strict=True)
        )
        return replace(after, states_BKX=self.side_by_side(states_BEH), available=available)


def started_embeddings(target: Target, text: str | None, count: int) -> Tensor:
    """Embeddings [count,H] to start from: those of a text's tokens, repeated; without a text random
    ones of the same size as the target's.
    """
    listed = target.tokenizer(text, add_special_tokens=False)["input_ids"] if text else []
    if listed:
        ids = torch.tensor(listed, device=target.device)
        return target.embed(ids.repeat(-(-count // len(ids)))[:count])
    some = torch.arange(min(1024, target.shape.vocab_size), device=target.device)
    size = float(target.embed(some).float().std())
    return size * torch.randn(count, target.shape.hidden_size, device=target.device)
