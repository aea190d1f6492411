"""Dynamic tokenization: boundaries of tokens chosen for a batch by merging its own tokens
(Feher et al. 2024, arXiv 2411.18553, section 3).

Shape legend: M merged tokens, L pieces of a token, H hidden size.
"""

from __future__ import annotations

import heapq
import re
from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from modules.tokenization.transfer.frozen_base import Base
from modules.tokenization.transfer.hypernetwork import Hypernetwork, pieces_of

Piece = bytes | int
"""The bytes of a token, or the id of a special one, which is never merged."""
BOUNDARIES = ("pretoken", "word", "word_hyphen", "sentence")
_SPACE = re.compile(r"\s")
_SENTENCE_END = re.compile(r"[.!?][\"')\]]*\s+\S")


def merge(
    batch: Sequence[Sequence[Any]], merges: int, valid: Callable[..., bool], least: int = 1
) -> list[list[Any]]:
    """The batch after so many merges: each joins every occurrence, from left to right, of the pair
    of neighbours that is most frequent in the whole batch among the valid ones. Of pairs that are
    equally frequent the first to occur is taken. Ends early where no pair is left.

    Args:
        batch: rows of pieces: bytes, or tuples of ids; numbers are special and never joined.
        merges: at most.
        valid: whether two pieces may be joined; see `validity`.
        least: times that a pair must occur to be joined.
    """
    pairs = _Pairs(batch, valid)
    for _ in range(merges):
        best = pairs.most_frequent(least)
        if best is None:
            break
        pairs.join(best)
    return pairs.rows()


class _Pairs:
    """Pieces as linked lists, and where each valid pair of neighbours stands. A merge changes only
    the pairs around its places, so that its cost does not grow with the text.

    Args:
        batch, valid: as in `merge`.
    """

    def __init__(self, batch: Sequence[Sequence[Any]], valid: Callable[..., bool]) -> None:
        self.valid, self.allowed = valid, dict[tuple, bool]()
        self.pieces: list[Any] = []
        self.before: list[int] = []
        self.after: list[int] = []
        self.begins: list[int] = []
        self.places: dict[tuple, set[int]] = {}
        for row in batch:
            first, last = len(self.pieces), len(self.pieces) + len(row) - 1
            self.begins.append(first if row else -1)
            self.pieces += row
            self.before += [place - 1 if place > first else -1 for place in range(first, last + 1)]
            self.after += [place + 1 if place < last else -1 for place in range(first, last + 1)]
        for place in range(len(self.pieces)):
            self._add(place)
        # The most frequent pair first, then the one that occurs first.
        self.heap = [(-len(places), min(places), pair) for pair, places in self.places.items()]
        heapq.heapify(self.heap)

    def most_frequent(self, least: int) -> tuple | None:
        """The pair to be joined next; None where none occurs `least` times."""
        # Counts in the heap are never too small: occurrences that a pair gains are pushed, those
        # that it loses are looked up here.
        while self.heap:
            count, first, pair = self.heap[0]
            places = self.places.get(pair)
            if places and (-len(places), min(places)) == (count, first):
                return pair if len(places) >= least else None
            heapq.heappop(self.heap)
            if places:
                heapq.heappush(self.heap, (-len(places), min(places), pair))
        return None

    def join(self, pair: tuple) -> None:
        """Join every occurrence of a pair, from left to right."""
        joined, gained = pair[0] + pair[1], dict[tuple, None]()
        for place in sorted(self.places.pop(pair)):
            # The occurrence before it may have taken its first piece.
            if self.pieces[place] != pair[0]:
                continue
            follower, earlier = self.after[place], self.before[place]
            # 1. The pairs around it are gone.
            self._remove(earlier)
            self._remove(follower)
            # 2. One piece stands for both.
            later = self.after[follower]
            self.pieces[place], self.pieces[follower] = joined, None
            self.after[place] = later
            if later >= 0:
                self.before[later] = place
            # 3. New pairs.
            gained |= dict.fromkeys(self._add(earlier) + self._add(place))
        for new in gained:
            if places := self.places.get(new):
                heapq.heappush(self.heap, (-len(places), min(places), new))

    def rows(self) -> list[list[Any]]:
        """The pieces of every row."""
        rows = []
        for place in self.begins:
            row = []
            while place >= 0:
                row.append(self.pieces[place])
                place = self.after[place]
            rows.append(row)
        return rows

    def _pair(self, place: int) -> tuple | None:
        """The valid pair that begins at a place."""
        if place < 0 or self.after[place] < 0:
            return None
        pair = self.pieces[place], self.pieces[self.after[place]]
        if pair not in self.allowed:
            special = any(isinstance(each, int) for each in pair)
            self.allowed[pair] = not special and self.valid(*pair)
        return pair if self.allowed[pair] else None

    def _add(self, place: int) -> list[tuple]:
        pair = self._pair(place)
        if pair is None:
            return []
        self.places.setdefault(pair, set()).add(place)
        return [pair]

    def _remove(self, place: int) -> None:
        pair = self._pair(place)
        if pair in self.places:
            self.places[pair].discard(place)


def validity(
    boundary: str, pretokens: Callable[[str], list[str]] | None = None
) -> Callable[[bytes, bytes], bool]:
    """Which joined pieces stay within a boundary.

    Args:
        boundary: `pretoken`: the joined text is one pre-token, or as `word` where it ends inside
            of a character. `word`: no space inside, only in front, or nothing but spaces without a
            double newline. `word_hyphen`: nor a hyphen inside. `sentence`: no end of a sentence
            inside.
        pretokens: the tokenizer's pre-tokenizer, for `pretoken`.

    Raises:
        ValueError: another boundary, or no pre-tokenizer for `pretoken`.
    """
    if boundary not in BOUNDARIES:
        raise ValueError(f"boundary {boundary!r} is unknown: use {', '.join(BOUNDARIES)}")
    if boundary == "pretoken" and pretokens is None:
        raise ValueError("boundary 'pretoken' needs the tokenizer's pre-tokenizer: use word")

    def valid(left: bytes, right: bytes) -> bool:
        """Whether the two together stay within it."""
        # Parts of a character may be joined, but take nothing beyond the boundary with them.
        data, whole = left + right, True
        try:
            text = data.decode()
        except UnicodeDecodeError:
            text, whole = data.decode(errors="replace"), False
        if text.isspace():
            return "\n\n" not in text
        if boundary == "pretoken" and whole:
            assert pretokens is not None
            return len(pretokens(text)) == 1
        if boundary == "sentence":
            return not _SENTENCE_END.search(text) and "\n\n" not in text
        inside = text[1:]
        return not _SPACE.search(inside) and (boundary != "word_hyphen" or "-" not in inside)

    return valid


class DynamicEmbeddings:
    """Embeddings of merged tokens by a hypernetwork, kept for tokens that return.

    Args:
        network: trained for the base model.
        base: the model.
        originals: a single base token has the base model's own embedding; else a predicted one.
        remembered: tokens whose embedding is kept, the least recently used are dropped.
    """

    def __init__(
        self, network: Hypernetwork, base: Base, originals: bool = True, remembered: int = 1 << 16
    ) -> None:
        self.network, self.base, self.originals = network, base, originals
        self.remembered = remembered
        self.cache: OrderedDict[bytes, Tensor] = OrderedDict()
        self.ids = {data: i for i, data in base.spelled.items()}
        self.predicted = 0

    def vectors(self, pieces: Sequence[Piece]) -> Tensor:
        """Input embeddings [M,H] of pieces."""
        fresh = [
            piece
            for piece in dict.fromkeys(pieces)
            if isinstance(piece, bytes)
            and piece not in self.cache
            and not (self.originals and piece in self.ids)
        ]
        if fresh:
            places = self.base.source_TS.device
            rows = pieces_of(fresh, self.base.target.tokenizer, self.network.length).to(places)
            vectors = self.network.all_of(self.base.source_TS, rows)[0].to(
                self.base.embedding.dtype
            )
            # A vector by itself: a view would keep all of them.
            self.cache.update(zip(fresh, map(torch.clone, vectors), strict=True))
            self.predicted += len(fresh)
        made = torch.stack([self._vector(piece) for piece in pieces])
        while len(self.cache) > self.remembered:
            self.cache.popitem(last=False)
        return made

    def _vector(self, piece: Piece) -> Tensor:
        if isinstance(piece, int):
            return self.base.embedding[piece]
        if self.originals and piece in self.ids:
            return self.base.embedding[self.ids[piece]]
        self.cache.move_to_end(piece)
        return self.cache[piece]


def pieces_of_ids(base: Base, ids: Sequence[int]) -> list[Piece]:
    """The bytes of every id; ids without bytes (special tokens) stay ids."""
    return [base.spelled[i] if base.spelled.get(i) else i for i in ids]
