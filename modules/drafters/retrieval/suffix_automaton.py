"""SAM decoding: draft the tokens that followed an earlier occurrence of the longest possible
suffix, in the text or in a corpus (Hu et al. 2024, arXiv 2411.10666; Blumer et al. 1985 for the
suffix automaton).

Shape legend: B sequences.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import cast

from modules.contracts.drafter import Context, Drafter, DraftState, proposal
from modules.contracts.shapes import TargetShape
from modules.contracts.token_tree import TokenTree
from modules.contracts.verification import Accepted, Verified
from modules.drafters.retrieval.base import PerSequence
from modules.drafters.retrieval.partner import Partnered, PartneredState, as_trie
from modules.drafters.retrieval.suffix_array import ORDERED, Datastore
from modules.trees.trie import Trie, batch_of_trees, likeliest

HITS = 5000
"""At most so many occurrences in a corpus are read, evenly spaced among all, as in REST."""


class SuffixAutomaton:
    """All substrings of a growing text, and its longest suffix that occurred before. Amortised O(1)
    per token.

    States are numbered from 0 (the empty string). `first_end[s]` is the position after the first
    occurrence.
    """

    def __init__(self) -> None:
        self.text: list[int] = []
        self.moves: list[dict[int, int]] = [{}]
        self.links, self.lengths, self.first_end = [-1], [0], [0]
        self._last = self._cursor = self.matched = 0

    def extend(self, token: int) -> None:
        """Append a token. The cursor moves first, so that it points to an earlier occurrence."""
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
        """The state of `state`'s string plus the token; split from a longer string if they share
        a state.
        """
        reached = self.moves[state][token]
        if self.lengths[reached] == self.lengths[state] + 1:
            return reached
        # The copy takes over the shorter strings and the moves that lead to them.
        copy = self._state(
            dict(self.moves[reached]),
            self.links[reached],
            self.lengths[state] + 1,
            self.first_end[reached],
        )
        self.links[reached] = copy
        while state != -1 and self.moves[state].get(token) == reached:
            self.moves[state][token] = copy
            state = self.links[state]
        if self._cursor == reached and self.matched <= self.lengths[copy]:
            self._cursor = copy
        return copy

    def continuation(self, count: int, shortest: int) -> list[int]:
        """Up to `count` tokens after an earlier occurrence of the matched suffix. While fewer
        tokens follow, shorter suffixes (of at least `shortest` tokens) are tried.
        """
        state, matched, best = self._cursor, self.matched, list[int]()
        while state > 0 and matched >= shortest and len(best) < count:
            end = self.first_end[state]
            best = max(best, self.text[end : end + count], key=len)
            state = self.links[state]
            matched = self.lengths[state]
        return best


@dataclass
class SuffixState(PartneredState):
    """State with the suffix automaton of each text."""

    automata: PerSequence[SuffixAutomaton]


class Suffix(Partnered):
    """A chain of the tokens that followed the longest match of the text's end, in the text or in a
    corpus, whichever match is longer; where both are short, a partner drafts.

    The paper uses a static automaton for a corpus's longest match and its most frequent
    continuation. Here a suffix array gives the same; matches are limited to `ORDERED` tokens.

    Args:
        shape: the target's dimensions.
        shortest: matches shorter than this draft nothing, or let the partner draft (the paper, with
            a partner: 5).
        tokens: at most so many are drafted, unless a method's budget says otherwise (the paper:
        40).
        datastore: folder that `python -m data.datastore` wrote; None searches the text only.
        bias: subtracted from the length of a match in the corpus (the paper: 5). Replaying 146
            held-out answers of the embedded target, with its answers to other prompts as the
            corpus, gave 1.78 tokens per call at 1, 1.61 at 5, and 1.48 without a corpus.
        partner: drafts where no match is long enough; an evaluation names it as its methods name
            drafters.

    Raises:
        ValueError: no such datastore, or a partner whose trees are not chosen by value.
    """

    def __init__(
        self,
        shape: TargetShape,
        shortest: int = 1,
        tokens: int = 7,
        datastore: str | None = None,
        bias: int = 1,
        partner: Drafter | None = None,
    ) -> None:
        if shortest < 1 or tokens < 1:
            raise ValueError(f"shortest and tokens must be at least 1, got {shortest} and {tokens}")
        super().__init__(shape, partner)
        self.shortest, self.tokens, self.bias = shortest, tokens, bias
        self.corpus = None if datastore is None else Datastore.load(datastore, shape.vocab_size)

    @property
    def default_budget(self) -> int:
        """The constructor's argument `tokens`."""
        return self.tokens

    def start(self, context: Context) -> SuffixState:
        """State with the automaton of the prompt and the first token, and the partner's start."""
        state = super().start(context)
        automata = PerSequence(SuffixAutomaton() for _ in state.newest_B)
        for automaton, text in zip(automata, state.texts(), strict=True):
            for token in text:
                automaton.extend(token)
        return SuffixState(**vars(state), automata=automata)

    def propose(self, state: DraftState, budget: int) -> TokenTree:
        """A chain of at most `budget` tokens per sequence, or the partner's tree."""
        assert isinstance(state, SuffixState)
        # Chains of the matches; None where a match is too short.
        drafts = [self.continuation(automaton, budget) for automaton in state.automata]
        tries = [Trie(newest) for newest in state.newest_B.tolist()]
        for trie, draft in zip(tries, drafts, strict=True):
            trie.fuse(draft or (), budget + 1)
        # The partner drafts once for the whole batch, and only if a sequence needs it.
        if self.partner is not None and state.partner is not None and None in drafts:
            drafted = proposal(self.partner, state.partner, budget)
            tries = [
                as_trie(drafted, sequence) if draft is None else trie
                for sequence, (trie, draft) in enumerate(zip(tries, drafts, strict=True))
            ]
        return batch_of_trees(tries, state.newest_B.device)

    def continuation(self, automaton: SuffixAutomaton, count: int) -> list[int] | None:
        """Up to `count` tokens after the longest match; None where it is below `shortest`."""
        if self.corpus is not None:
            end = automaton.text[-ORDERED:]
            matched, first, last = self.corpus.longest_match(end, ORDERED, 1)
            if matched - self.bias >= max(self.shortest, automaton.matched + 1):
                return likeliest(self.corpus.continuations(matched, first, last, count, HITS))
        long_enough = automaton.matched >= self.shortest
        return automaton.continuation(count, self.shortest) if long_enough else None

    def absorb(self, state: DraftState, verified: Verified, accepted: Accepted) -> SuffixState:
        """Append the emitted tokens to the automata."""
        assert isinstance(state, SuffixState)
        emitted = accepted.emitted(verified.tree).tolist()
        counts = accepted.lengths_B.tolist()
        for automaton, tokens, count in zip(state.automata, emitted, counts, strict=True):
            for token in tokens[:count]:
                automaton.extend(token)
        return cast(SuffixState, super().absorb(state, verified, accepted))
