"""Suffix automaton: draft what followed the longest suffix of the text that stood there before (Hu et al. 2024,
SAM decoding, arXiv 2411.10666; Blumer et al. 1985 for the automaton).

Shape legend: B sequences, K drafted tokens.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import cast

import torch

from modules.core.drafter import Accepted, Context, DraftState, Verified
from modules.core.trainable import TargetShape
from modules.training_free.text import PerSequence, TextDrafter, TextState, chains
from modules.trees.tree import TokenTree


class SuffixAutomaton:
    """All substrings of a growing text, and the longest suffix of it that occurred before. Amortised O(1) per token.

    States are numbered from 0 (the empty string). `first_end[s]` is the position behind the first occurrence.
    """

    def __init__(self) -> None:
        self.text: list[int] = []
        self.moves: list[dict[int, int]] = [{}]
        self.links, self.lengths, self.first_end = [-1], [0], [0]
        self._last = self._cursor = self.matched = 0

    def extend(self, token: int) -> None:
        """Append a token: the cursor moves first, so that it stands at an earlier occurrence."""
        self._move(token)
        self.text.append(token)
        self._insert(token)

    def _move(self, token: int) -> None:
        while self._cursor and token not in self.moves[self._cursor]:
            self._cursor = self.links[self._cursor]
            self.matched = self.lengths[self._cursor]
        if token in self.moves[self._cursor]:
            self._cursor = self.moves[self._cursor][token]
            self.matched += 1

    def _state(self, moves: dict[int, int], link: int, length: int, first_end: int) -> int:
        self.moves.append(moves)
        self.links.append(link)
        self.lengths.append(length)
        self.first_end.append(first_end)
        return len(self.moves) - 1

    def _insert(self, token: int) -> None:
        new = self._state({}, 0, len(self.text), len(self.text))
        state, self._last = self._last, new
        while state != -1 and token not in self.moves[state]:
            self.moves[state][token] = new
            state = self.links[state]
        if state != -1:
            self.links[new] = self._at_length(state, token)

    def _at_length(self, state: int, token: int) -> int:
        """The state of `state`'s string and the token, cut off a longer one if they share a state."""
        found = self.moves[state][token]
        if self.lengths[found] == self.lengths[state] + 1:
            return found
        copy = self._state(dict(self.moves[found]), self.links[found], self.lengths[state] + 1, self.first_end[found])
        self.links[found] = copy
        while state != -1 and self.moves[state].get(token) == found:
            self.moves[state][token] = copy
            state = self.links[state]
        if self._cursor == found and self.matched <= self.lengths[copy]:
            self._cursor = copy
        return copy

    def continuation(self, count: int, shortest: int) -> list[int]:
        """Up to `count` tokens behind an earlier occurrence of the matched suffix. Shorter suffixes (of at least
        `shortest` tokens) are taken while fewer tokens follow."""
        state, matched, best = self._cursor, self.matched, list[int]()
        while state > 0 and matched >= shortest and len(best) < count:
            end = self.first_end[state]
            best = max(best, self.text[end:end + count], key=len)
            state = self.links[state]
            matched = self.lengths[state]
        return best


@dataclass
class SuffixState(TextState):
    """The text's automaton, per sequence."""

    automata: PerSequence[SuffixAutomaton]


class Suffix(TextDrafter):
    """A chain of what followed the longest earlier occurrence of the text's end, of whatever length.

    Args:
        shape: the target's dimensions.
        shortest: suffixes shorter than this draft nothing.
        tokens: drafted at most, unless a method's budget says otherwise.
    """

    def __init__(self, shape: TargetShape, shortest: int = 1, tokens: int = 7) -> None:
        super().__init__(shape)
        if shortest < 1 or tokens < 1:
            raise ValueError(f"shortest and tokens must be at least 1, got {shortest} and {tokens}")
        self.shortest, self.tokens = shortest, tokens

    @property
    def default_budget(self) -> int:
        """As many as it was made for."""
        return self.tokens

    def start(self, context: Context) -> SuffixState:
        """The automaton of the prompt and the first token."""
        state = super().start(context)
        automata = PerSequence(SuffixAutomaton() for _ in state.newest_B)
        for automaton, text in zip(automata, state.texts(), strict=True):
            for token in text:
                automaton.extend(token)
        return SuffixState(**vars(state), automata=automata)

    def propose(self, state: DraftState, budget: int) -> TokenTree:
        """A chain of at most `budget` tokens."""
        assert isinstance(state, SuffixState)
        drafts = [automaton.continuation(budget, self.shortest) for automaton in state.automata]
        return chains(state.newest_B, [torch.tensor(draft, dtype=torch.long, device=state.newest_B.device)
                                       for draft in drafts])

    def absorb(self, state: DraftState, verified: Verified, accepted: Accepted) -> SuffixState:
        """The automata read what was emitted."""
        assert isinstance(state, SuffixState)
        emitted = accepted.emitted(verified.tree).tolist()
        for automaton, tokens, count in zip(state.automata, emitted, accepted.lengths_B.tolist(), strict=True):
            for token in tokens[:count]:
                automaton.extend(token)
        return cast(SuffixState, super().absorb(state, verified, accepted))
