"""A corpus of token ids with a suffix array, which finds occurrences of tokens and what follows
them (REST, He et al. 2023, arXiv 2311.08252).

Shape legend: M tokens of the corpus, C occurrences, L tokens that follow.
"""

from __future__ import annotations

import bisect
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import load_file, save_file

from modules.runtime.files import as_umask_says, read_object, whole_file
from modules.trees.trie import END, Tokens

ORDERED = 32
"""Tokens by which suffixes are ordered: longer than any query and its continuation."""
Array = NDArray[np.int32]


@dataclass(frozen=True)
class Datastore:
    """Concatenated documents, each followed by `END`, and their suffixes sorted by their first
    tokens.

    tokens_M, suffixes_M: int32; suffix i of the order begins at `suffixes_M[i]`.
    vocab_size: size of the tokenizer's vocabulary.
    """

    tokens_M: Array
    suffixes_M: Array
    vocab_size: int

    @staticmethod
    def build(documents: Iterable[Sequence[int]], vocab_size: int) -> Datastore:
        """Sort the suffixes of a corpus.

        Raises:
            ValueError: the corpus has no tokens.
        """
        tokens = np.array(
            [token for document in documents for token in [*document, END]], dtype=np.int32
        )
        if not (tokens != END).any():
            raise ValueError("the corpus has no tokens: give another data set")
        return Datastore(tokens, suffix_order(tokens), vocab_size)

    def documents(self) -> list[list[int]]:
        """The tokens of every document."""
        ends = np.flatnonzero(self.tokens_M == END)
        return [part[part != END].tolist() for part in np.split(self.tokens_M, ends)[:-1]]

    def save(self, folder: Path, source: str | None = None) -> None:
        """Write `datastore.safetensors` and then `datastore.json`, with the data set's name as
        `source`.
        """
        folder.mkdir(parents=True, exist_ok=True)
        with whole_file(folder / "datastore.safetensors") as partial:
            save_file({"tokens": self.tokens_M, "suffixes": self.suffixes_M}, partial)
            as_umask_says(partial)
        summary = {"vocab_size": self.vocab_size, "tokens": len(self.tokens_M), "source": source}
        with whole_file(folder / "datastore.json") as partial:
            partial.write_text(json.dumps(summary))

    @staticmethod
    def load(folder: str, vocab_size: int) -> Datastore:
        """Read a folder that `save` wrote.

        Raises:
            ValueError: the folder has no datastore, or one of another vocabulary.
        """
        path = Path(folder)
        if not (path / "datastore.json").is_file():
            raise ValueError(
                f"datastore {folder!r} does not exist: build it by `python -m data.datastore "
                f"--output {folder}`"
            )
        stored_size = read_object(path / "datastore.json").get("vocab_size")
        if stored_size != vocab_size:
            raise ValueError(
                f"datastore {folder!r} is of a vocabulary of {stored_size} tokens, the target has "
                f"{vocab_size}: build it with the target's tokenizer"
            )
        arrays = load_file(path / "datastore.safetensors")
        return Datastore(arrays["tokens"], arrays["suffixes"], vocab_size)

    def occurrences(self, pattern: list[int]) -> tuple[int, int]:
        """The range of suffixes, in their order, that begin with the pattern (at most `ORDERED`
        tokens).
        """

        def begin(position: int) -> list[int]:
            return self.tokens_M[position : position + len(pattern)].tolist()

        low = bisect.bisect_left(self.suffixes_M, pattern, key=begin)
        return low, bisect.bisect_right(self.suffixes_M, pattern, low, key=begin)

    def longest_match(self, text: list[int], longest: int, shortest: int) -> tuple[int, int, int]:
        """Length of the longest suffix of a text that occurs in the corpus (`shortest` to
        `longest`; 0: none), and the range of suffixes that begin with it.
        """
        # If a suffix occurs, so do all shorter ones, so binary search finds the longest.
        best = (0, 0, 0)
        low, high = shortest, min(longest, len(text))
        while low <= high:
            size = (low + high) // 2
            begin, end = self.occurrences(text[-size:])
            if end > begin:
                best, low = (size, begin, end), size + 1
            else:
                high = size - 1
        return best

    def continuations(
        self, matched: int, begin: int, end: int, length: int, most: int | None = None
    ) -> Tokens:
        """Tokens after the first `matched` ones of a range of suffixes: int64 [C,L], `END` after a
        document.

        At most `most` suffixes are read, evenly spaced, because they are sorted by the token ids
        that follow.
        """
        count = end - begin if most is None else min(most, end - begin)
        chosen = begin + np.arange(count) * (end - begin) // max(1, count)
        places = self.suffixes_M[chosen, None].astype(np.int64) + matched + np.arange(length)
        # Everything after the end of a document belongs to another one.
        following = self.tokens_M[np.minimum(places, len(self.tokens_M) - 1)].astype(np.int64)
        following[np.logical_or.accumulate(following == END, axis=1)] = END
        return following


def suffix_order(tokens_M: Array) -> Array:
    """Suffixes ordered by their first `ORDERED` tokens, by doubling (Manber and Myers 1993); ties
    by position.
    """
    rank = np.unique(tokens_M, return_inverse=True)[1].astype(np.int64) + 1
    order, span = np.argsort(rank, kind="stable"), 1
    while span < ORDERED and rank.max() < len(rank):
        # Ranks of `span` tokens and of the next `span` tokens give ranks of twice as many.
        next_rank = np.zeros_like(rank)
        next_rank[:-span] = rank[span:]
        key = rank * (len(rank) + 1) + next_rank
        order = np.argsort(key, kind="stable")
        sorted_key = key[order]
        rank[order] = 1 + np.concatenate([[0], np.cumsum(sorted_key[1:] != sorted_key[:-1])])
        span *= 2
    return order.astype(np.int32)
