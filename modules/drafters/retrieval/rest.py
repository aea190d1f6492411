"""REST: draft the commonest continuations of the text's end in a corpus (He et al. 2023, arXiv
2311.08252).

Shape legend: B sequences.
"""

from __future__ import annotations

from modules.contracts.drafter import DraftState
from modules.contracts.shapes import TargetShape
from modules.contracts.token_tree import TokenTree
from modules.drafters.retrieval.base import TextDrafter, TextState
from modules.drafters.retrieval.suffix_array import ORDERED, Datastore
from modules.trees.trie import Trie, batch_of_trees, frequent_prefixes


class Rest(TextDrafter):
    """The longest suffix of the text that occurs in the datastore, and a trie of what followed
    there most often.

    Args:
        shape: the target's dimensions.
        datastore: folder that `python -m data.datastore` wrote.
        longest, shortest: tokens of the suffix looked up.
        length: tokens of a continuation.
        hits: occurrences read at most, evenly chosen from all.
        tokens: nodes drafted, unless a method's budget says otherwise (the paper: 64).
    """

    def __init__(
        self,
        shape: TargetShape,
        datastore: str,
        longest: int = 16,
        shortest: int = 2,
        length: int = 10,
        hits: int = 5000,
        tokens: int = 7,
    ) -> None:
        super().__init__(shape)
        if not 1 <= shortest <= longest <= ORDERED:
            raise ValueError(
                f"shortest and longest must satisfy 1 <= shortest <= longest <= {ORDERED}, got "
                f"{shortest} and {longest}"
            )
        if min(length, hits, tokens) < 1:
            raise ValueError(
                f"length, hits and tokens must be at least 1, got {length}, {hits} and {tokens}"
            )
        self.longest, self.shortest, self.length, self.hits, self.tokens = (
            longest,
            shortest,
            length,
            hits,
            tokens,
        )
        self.datastore = Datastore.load(datastore, shape.vocab_size)

    @property
    def default_budget(self) -> int:
        """As many as it was made for."""
        return self.tokens

    def propose(self, state: DraftState, budget: int) -> TokenTree:
        """A trie of at most `budget` nodes; none where nothing was found."""
        assert isinstance(state, TextState)
        tries = []
        for text in state.texts():
            trie = Trie(text[-1])
            for path, _ in self.retrieve(text, budget):
                trie.fuse(path, budget + 1)
            tries.append(trie)
        return batch_of_trees(tries, state.newest_B.device)

    def retrieve(self, text: list[int], most: int) -> list[tuple[list[int], int]]:
        """The commonest continuations and their counts, prefixes first."""
        matched, begin, end = self.datastore.longest_match(text, self.longest, self.shortest)
        if not matched:
            return []
        found = self.datastore.continuations(matched, begin, end, self.length, self.hits)
        return frequent_prefixes(found, most)
