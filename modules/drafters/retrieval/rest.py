"""REST: draft the most frequent continuations of the text's end in a corpus (He et al. 2023, arXiv
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
    """Looks up the longest suffix of the text that occurs in the datastore, and drafts a trie of
    its most frequent continuations.

    Args:
        shape: the target's dimensions.
        datastore: folder that `python -m data.datastore` wrote.
        longest, shortest: tokens of the suffix looked up.
        length: tokens of a continuation.
        hits: at most so many occurrences are read, evenly spaced among all.
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
        self.longest, self.shortest, self.length = longest, shortest, length
        self.hits, self.tokens = hits, tokens
        self.datastore = Datastore.load(datastore, shape.vocab_size)

    @property
    def default_budget(self) -> int:
        """The constructor's argument `tokens`."""
        return self.tokens

    def propose(self, state: DraftState, budget: int) -> TokenTree:
        """A trie of at most `budget` nodes; only the root where the suffix does not occur."""
        assert isinstance(state, TextState)
        tries = []
        for text in state.texts():
            trie = Trie(text[-1])
            for path, _ in self.retrieve(text, budget):
                trie.fuse(path, budget + 1)
            tries.append(trie)
        return batch_of_trees(tries, state.newest_B.device)

    def retrieve(self, text: list[int], most: int) -> list[tuple[list[int], int]]:
        """The most frequent continuations and their counts, prefixes first."""
        matched, begin, end = self.datastore.longest_match(text, self.longest, self.shortest)
        if not matched:
            return []
        following = self.datastore.continuations(matched, begin, end, self.length, self.hits)
        return frequent_prefixes(following, most)
