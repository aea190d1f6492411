"""RASD: what is retrieved, pruned by what a drafter finds plausible, fused with the drafter's tree (Quan et al. 2025,
arXiv 2503.03434).

Shape legend: B sequences, W frontier rows, D draft vocabulary, T tokens of a text, L tokens of a continuation.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from modules.core.batches import StateName
from modules.core.drafter import (
    Accepted,
    Context,
    Drafter,
    DraftState,
    Frontier,
    TreeBuilder,
    Verified,
    check_depth,
)
from modules.core.trainable import TargetShape
from modules.training_free.rest import Rest
from modules.training_free.text import TextDrafter, TextState
from modules.training_free.trie import END, Trie, batch_of_trees, frequent_prefixes
from modules.trees.candidates import log_law
from modules.trees.tree import Law, TokenTree

Ranked = list[tuple[list[int], int]]
"""Continuations and how often each occurred."""


class Overheard:
    """A drafter as a tree builder sees it, which keeps the laws it is asked for.

    Args:
        drafter: who answers.
    """

    def __init__(self, drafter: Drafter) -> None:
        self._drafter = drafter
        self.tokens: list[Tensor] = []
        self.parents: list[Tensor] = []
        self.laws: list[Tensor] = []

    @property
    def vocabulary_D(self) -> Tensor | None:
        """The drafter's."""
        return self._drafter.vocabulary_D

    def expand(self, state: DraftState, frontier: Frontier) -> Tensor:
        """The drafter's logits, and a note of their law."""
        logits_BWD = self._drafter.expand(state, frontier)
        self.tokens.append(frontier.tokens_BW)
        self.parents.append(frontier.parents_BW.expand_as(frontier.tokens_BW))
        self.laws.append(log_law(logits_BWD.detach()).exp())
        return logits_BWD

    def opinion(self, sequence: int) -> Opinion:
        """What the drafter said about one sequence."""
        if not self.laws:
            return Opinion([], [], None, self.vocabulary_D)
        return Opinion(torch.cat(self.tokens, 1)[sequence].tolist(), torch.cat(self.parents, 1)[sequence].tolist(),
                       torch.cat(self.laws, 1)[sequence], self.vocabulary_D)


@dataclass
class Opinion:
    """A drafter's laws [W,D] at the nodes that it expanded, whose tokens and parents' row numbers are given."""

    tokens: list[int]
    parents: list[int]
    laws_WD: Tensor | None
    vocabulary_D: Tensor | None
    _columns: dict[int, int] | None = field(default=None, init=False)

    def __post_init__(self) -> None:
        """Index the rows by parent and token."""
        self._rows = {(parent, token): row
                      for row, (parent, token) in reversed(list(enumerate(zip(self.parents, self.tokens))))}

    def judge(self, path: Sequence[int], top: int, least: float) -> float | None:
        """The probability of the part of a path that the drafter has a law for; None when a token on it is neither
        among the `top` likeliest nor as likely as `least`. A token outside the draft vocabulary ends that part."""
        row: int | None = 0
        found = 1.0
        for token in path:
            if row is None or self.laws_WD is None or (column := self._column(token)) is None:
                break
            law_D = self.laws_WD[row]
            probability = float(law_D[column])
            if probability < least and int((law_D > law_D[column]).sum()) >= top:
                return None
            found, row = found * probability, self._rows.get((row, token))
        return found

    def _column(self, token: int) -> int | None:
        if self.vocabulary_D is None:
            return token
        if self._columns is None:
            self._columns = {known: column for column, known in enumerate(self.vocabulary_D.tolist())}
        return self._columns.get(token)


@dataclass
class RasdState(TextState):
    """The partner's own state."""

    partner: DraftState | None


class Rasd(TextDrafter):
    """Continuations of the text's end, from the text and perhaps a corpus, beside a drafter's tree. Without a partner
    it is its retrieval half. All nodes are point masses: the target's draw does not look at how they came about.

    Args:
        shape: the target's dimensions.
        partner: the drafter whose tree is fused; an evaluation names it as its methods name drafters.
        datastore: folder that `python -m data.datastore` wrote; None retrieves from the text alone.
        longest: tokens of the suffix looked up in the text. length: of a continuation.
        top, least: a retrieved token stays when the partner has it among the `top` likeliest or finds it at least as
            likely as `least`.
        retrieved: nodes of the budget that the partner leaves to retrieval.
        builder: grows the partner's tree in place of its own builder; an evaluation names it as its methods do.
        tokens: nodes drafted in all, unless a method's budget says otherwise (the sheet's order of size: 60 and 30).

    Raises:
        ValueError: a partner or a builder whose trees cannot be fused.
    """

    def __init__(self, shape: TargetShape, partner: Drafter | None = None, datastore: str | None = None,
                 longest: int = 3, length: int = 16, top: int = 10, least: float = 0.01, retrieved: int = 3,
                 tokens: int = 7, builder: TreeBuilder | None = None) -> None:
        super().__init__(shape)
        if min(longest, length, top, retrieved) < 1 or tokens <= retrieved:
            raise ValueError(f"longest, length, top and retrieved must be at least 1 and tokens above retrieved, got "
                             f"{longest}, {length}, {top}, {retrieved} and {tokens}")
        if partner is not None:
            _check_fusable(partner, builder)
        self.partner, self.builds, self.longest, self.length = partner, builder, longest, length
        self.top, self.least, self.retrieved, self.tokens = top, least, retrieved, tokens
        self.rest = None if datastore is None else Rest(shape, datastore, length=length)

    @property
    def default_budget(self) -> int:
        """As many as it was made for."""
        return self.tokens

    @property
    def learns(self) -> bool:
        """As its partner does."""
        return self.partner is not None and self.partner.learns

    @property
    def decoding_states(self) -> tuple[StateName, ...]:
        """The partner's."""
        return () if self.partner is None else self.partner.decoding_states

    def start(self, context: Context) -> RasdState:
        """The text, and the partner's start."""
        state = super().start(context)
        return RasdState(**vars(state), partner=None if self.partner is None else self.partner.start(context))

    def absorb(self, state: DraftState, verified: Verified, accepted: Accepted) -> RasdState:
        """Both halves learn what was emitted, whoever drafted it."""
        assert isinstance(state, RasdState)
        went_on = super().absorb(state, verified, accepted)
        assert isinstance(went_on, RasdState)
        if self.partner is not None and state.partner is not None:
            went_on.partner = self.partner.absorb(state.partner, verified, accepted)
        return went_on

    def propose(self, state: DraftState, budget: int) -> TokenTree:
        """The partner's tree, then the retrieved paths that it does not rule out, the best first."""
        assert isinstance(state, RasdState)
        drafted, heard = self._partners_tree(state, max(1, budget - self.retrieved))
        tries = []
        for sequence, text in enumerate(state.texts()):
            trie = Trie(text[-1]) if drafted is None else as_trie(drafted, sequence)
            opinion = None if heard is None else heard.opinion(sequence)
            for path in prune(self.retrieve(text, budget), opinion, self.top, self.least):
                trie.fuse(path, budget + 1)
            tries.append(trie)
        return batch_of_trees(tries, state.newest_B.device)

    def _partners_tree(self, state: RasdState, budget: int) -> tuple[TokenTree | None, Overheard | None]:
        if self.partner is None or state.partner is None:
            return None, None
        if self.builds is None and type(self.partner).propose is not Drafter.propose:
            return self.partner.propose(state.partner, budget), None
        heard, builder = Overheard(self.partner), self.builds or self.partner.builder
        return builder.build(heard, state.partner, budget), heard  # type: ignore[arg-type]

    def retrieve(self, text: list[int], most: int) -> Ranked:
        """The commonest continuations in the text; in the corpus, if nothing like the text's end stood before."""
        found = frequent_prefixes(matches(np.array(text), self.longest, self.length), most)
        return found if found or self.rest is None else self.rest.retrieve(text, most)


def matches(text_T: np.ndarray, longest: int, length: int) -> np.ndarray:
    """What followed every earlier occurrence of the longest suffix that has one: int64 [C,L], `END` behind the text."""
    for size in range(min(longest, len(text_T) - 1), 0, -1):
        windows = np.lib.stride_tricks.sliding_window_view(text_T[:-1], size)
        begins = np.flatnonzero((windows == text_T[-size:]).all(1)) + size
        if len(begins):
            padded = np.append(text_T, np.full(length, END))
            return padded[begins[:, None] + np.arange(length)]
    return np.empty((0, length), dtype=np.int64)


def prune(found: Ranked, opinion: Opinion | None, top: int, least: float) -> list[list[int]]:
    """The retrieved paths that the drafter does not rule out, by its probability times their share of occurrences."""
    total = sum(count for path, count in found if len(path) == 1)
    judged = [(1.0 if opinion is None else opinion.judge(path, top, least), count, path) for path, count in found]
    kept = [(-trust * count / total, len(path), path) for trust, count, path in judged if trust is not None]
    return [path for _, _, path in sorted(kept, key=lambda entry: entry[:2])]


def _check_fusable(partner: Drafter, builder: TreeBuilder | None) -> None:
    """Refuse, by name, trees that are not chosen by value, deeper than the partner drafts, or not of candidates alone:
    fused, every node is a point mass."""
    law = partner.law if builder is None else builder.law
    if law is not Law.POINT:
        kind = type(partner if builder is None else builder).__name__
        raise ValueError(f"rasd: {kind} draws its siblings ({law.name.lower()}), but a fused tree is verified by "
                         "value: give a `builder` that chooses, such as modules.trees.rerank.RerankedTree")
    if partner.least_budget > 1:
        raise ValueError(f"rasd: partner {type(partner).__name__} needs rows that only compute, which a fused tree "
                         "does not keep: name another partner")
    if builder is not None:
        check_depth(builder, partner)


def as_trie(tree: TokenTree, sequence: int) -> Trie:
    """One sequence's drafted candidates; siblings of equal token become one node."""
    assert tree.candidate_BN is None, "a partner's tree consists of candidates: `_check_fusable`"
    tokens, parents = tree.tokens_BN[sequence].tolist(), tree.parents_BN[sequence].tolist()
    trie, places = Trie(tokens[0]), {0: 0}
    for node in range(1, len(tokens)):
        if parents[node] != node:
            path = [*trie.path(places[parents[node]]), tokens[node]]
            places[node] = trie.fuse(path, len(tokens))
    return trie
