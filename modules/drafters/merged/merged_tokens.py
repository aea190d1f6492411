"""Merged tokens as drafts: the next units of dynamic tokenization (Feher et al. 2024, arXiv
2411.18553) are drafted as the base tokens that they consist of.

Shape legend: B sequences.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass, field

from modules.contracts.drafter import Context, DraftState
from modules.contracts.shapes import TargetShape
from modules.contracts.target import Target
from modules.contracts.token_tree import TokenTree
from modules.contracts.verification import Accepted, Verified
from modules.drafters.merged.unit_counts import UnitCounts, counted
from modules.drafters.retrieval.base import PerSequence, TextDrafter, TextState
from modules.drafters.retrieval.suffix_array import Datastore
from modules.tokenization.transfer.base_units import Unit, UnitRules
from modules.trees.trie import Trie, batch_of_trees

BACKOFF = 0.4
"""Weight of what follows a shorter end of the text (Brants et al. 2007)."""
EXAMINED = 2
"""Units examined per node of the budget."""
LATER = 32
"""A text is merged anew after `every` tokens, or when it is longer by this part of it."""


@dataclass(order=True)
class Continuation:
    """A unit that may come next. cost: its share, negative, so that the likeliest comes first.
    number: breaks ties. path: tokens that it and the units before it add to the text. drafted:
    how many of them are those units'.
    """

    cost: float
    number: int
    path: Unit = field(compare=False)
    drafted: int = field(compare=False)
    unit: Unit = field(compare=False)
    counts: UnitCounts = field(compare=False)


def likely_tree(text: Sequence[int], tables: Sequence[UnitCounts], budget: int) -> Trie:
    """The tokens that units pass through most often after a text: at most `budget` nodes.

    The text's last tokens begin units, or are some. The share of a node is the sum over the units
    that contain it, of their share among all that begin so, times that of the units before.

    Args:
        text: ids of base tokens.
        tables: counts, all of the same weight.
        budget: nodes below the newest token.
    """
    # 1. Units that the text ends inside of, or with; longer ends count more.
    heap: list[Continuation] = []
    for table in tables:
        weight = 1.0
        for size in range(min(len(text), table.longest), 0, -1):
            begun = table.beginning(tuple(text[-size:]))[: EXAMINED * budget]
            for unit, share in begun:
                at = len(heap)
                heap.append(Continuation(-weight * share, at, unit[size:], 0, unit, table))
            weight *= BACKOFF if begun else 1.0
    heapq.heapify(heap)
    # 2. The likeliest, and the units that follow them in turn.
    scores: dict[Unit, float] = {}
    number = len(heap)
    for _ in range(EXAMINED * budget):
        if not heap:
            break
        best = heapq.heappop(heap)
        for size in range(best.drafted + 1, min(len(best.path), budget) + 1):
            scores[best.path[:size]] = scores.get(best.path[:size], 0.0) - best.cost
        if len(best.path) >= budget:
            continue
        for unit, share in best.counts.following(best.unit)[: EXAMINED * budget]:
            number += 1
            path, drafted = best.path + unit, len(best.path)
            heapq.heappush(
                heap, Continuation(best.cost * share, number, path, drafted, unit, best.counts)
            )
    # 3. The best nodes; none has a higher score than the one above it.
    trie = Trie(text[-1])
    for path in sorted(scores, key=lambda path: (-scores[path], len(path)))[:budget]:
        trie.fuse(path, budget + 1)
    return trie


@dataclass(frozen=True)
class TextUnits:
    """The units of one text. read: its tokens when it was merged."""

    counts: UnitCounts
    read: int


@dataclass
class MergedState(TextState):
    """State with the units of each text."""

    units: PerSequence[TextUnits]


class MergedTokens(TextDrafter):
    """Merges the tokens of prompt and answer, and of a corpus if there is one, into units, and
    drafts the rest of the unit that the text has begun and the units that usually follow. The tree
    is verified token by token, so that any lossless rule keeps the target's distribution.

    The paper predicts the next unit with embeddings of a hypernetwork, and does not verify it; here
    counts predict it.

    Args:
        shape: the target's dimensions.
        datastore: folder that `python -m data.datastore` wrote, whose text is merged once; None
            merges prompt and answer only.
        merges: of the corpus, and of each text, at most.
        least: times that a pair must occur to be merged.
        boundary: that no unit crosses: `word`, `word_hyphen` or `sentence`.
        every: tokens after which a text is merged anew; long ones when they are longer by a 32nd.
        tokens: nodes drafted, unless a method's budget says otherwise.

    Raises:
        ValueError: counts below 1, another boundary, or no such datastore.
    """

    def __init__(
        self,
        shape: TargetShape,
        datastore: str | None = None,
        merges: int = 1000,
        least: int = 2,
        boundary: str = "sentence",
        every: int = 16,
        tokens: int = 7,
    ) -> None:
        super().__init__(shape)
        if min(least, every, tokens) < 1 or merges < 0:
            raise ValueError(
                "merges must be at least 0, and least, every and tokens at least 1, got "
                f"{merges}, {least}, {every} and {tokens}"
            )
        self.merges, self.least, self.every, self.tokens = merges, least, every, tokens
        # The tokenizer is known when there is a target.
        self.rules = UnitRules({}, boundary)
        self.boundary = boundary
        self.store = None if datastore is None else Datastore.load(datastore, shape.vocab_size)
        self.corpus: UnitCounts | None = None

    @property
    def default_budget(self) -> int:
        """The constructor's argument `tokens`."""
        return self.tokens

    def initialise(self, target: Target) -> None:
        """Learn what the target's tokens spell, and merge the corpus."""
        self.rules = UnitRules.of(target.tokenizer, self.boundary)
        if self.store is not None:
            self.corpus = self._counted(self.store.documents())

    def _counted(self, texts: Sequence[Sequence[int]]) -> UnitCounts:
        return counted(texts, self.rules, self.merges, self.least)

    def start(self, context: Context) -> MergedState:
        """State with the units of the prompts."""
        if not self.rules.spelled:
            self.initialise(context.target)
        state = super().start(context)
        units = PerSequence(TextUnits(self._counted([t]), len(t)) for t in state.texts())
        return MergedState(**vars(state), units=units)

    def absorb(self, state: DraftState, verified: Verified, accepted: Accepted) -> MergedState:
        """State with the emitted tokens; texts that have grown are merged anew."""
        assert isinstance(state, MergedState)
        went_on = super().absorb(state, verified, accepted)
        assert isinstance(went_on, MergedState)
        went_on.units = PerSequence(
            TextUnits(self._counted([text]), len(text))
            if len(text) - units.read >= max(self.every, units.read // LATER)
            else units
            for text, units in zip(went_on.texts(), state.units, strict=True)
        )
        return went_on

    def propose(self, state: DraftState, budget: int) -> TokenTree:
        """The likeliest nodes of each sequence, at most `budget`."""
        assert isinstance(state, MergedState)
        corpus = [] if self.corpus is None else [self.corpus]
        tries = [
            likely_tree(text, [units.counts, *corpus], budget)
            for text, units in zip(state.texts(), state.units, strict=True)
        ]
        return batch_of_trees(tries, state.newest_B.device)
