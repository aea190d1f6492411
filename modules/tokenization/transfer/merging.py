"""Dynamic tokenization: boundaries of tokens chosen for a batch by merging its own tokens
(Feher et al. 2024, arXiv 2411.18553, section 3).

Shape legend: M merged tokens, L pieces of a token, H hidden size.
"""

from __future__ import annotations

import re
from collections import Counter, OrderedDict
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from modules.tokenization.transfer.frozen_base import Base
from modules.tokenization.transfer.hypernetwork import Hypernetwork, pieces_of

Piece = bytes | int
"""The bytes of a token, or the id of a special one, which is never merged."""
BOUNDARIES = ("pretoken", "word", "word_hyphen", "sentence")
_SPACE = re.compile(r"\s")
_SENTENCE_END = re.compile(r"[.!?][\"')\]]*\s+\S")


def merge(batch: Sequence[Sequence[Piece]], merges: int, valid: Callable) -> list[list[Piece]]:
    """The batch after so many merges: each joins every occurrence, from left to right, of the pair
    of neighbours that is most frequent in the whole batch among the valid ones. Of pairs that are
    equally frequent the first to occur is taken. Ends early where no pair is left.

    Args:
        batch: rows of pieces.
        merges: at most.
        valid: whether two pieces may be joined; see `validity`.
    """
    rows = [list(row) for row in batch]
    allowed: dict[tuple[Piece, Piece], bool] = {}
    for _ in range(merges):
        # 1. Count pairs; a counter keeps the order of first occurrence.
        counts: Counter[tuple[Piece, Piece]] = Counter()
        for row in rows:
            counts.update(zip(row, row[1:], strict=False))
        for pair in counts:
            if pair not in allowed:
                allowed[pair] = all(isinstance(each, bytes) for each in pair) and valid(*pair)
        best = max((pair for pair in counts if allowed[pair]), key=counts.__getitem__, default=None)
        if best is None:
            break
        # 2. Join them.
        rows = [_joined(row, best) for row in rows]
    return rows


def _joined(row: list[Piece], pair: tuple[Piece, Piece]) -> list[Piece]:
    joined: list[Piece] = []
    place = 0
    while place < len(row):
        if tuple(row[place : place + 2]) == pair:
            joined.append(row[place] + row[place + 1])  # type: ignore[operator]
            place += 2
        else:
            joined.append(row[place])
            place += 1
    return joined


def validity(
    boundary: str, pretokens: Callable[[str], list[str]] | None = None
) -> Callable[[bytes, bytes], bool]:
    """Which joined pieces stay within a boundary.

    Args:
        boundary: `pretoken`: the joined text is one pre-token. `word`: no space inside, only in
            front, or nothing but spaces without a double newline. `word_hyphen`: nor a hyphen
            inside. `sentence`: no end of a sentence inside.
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
        # Parts of a character may always be joined.
        try:
            text = (left + right).decode()
        except UnicodeDecodeError:
            return True
        if text.isspace():
            return "\n\n" not in text
        if boundary == "pretoken":
            assert pretokens is not None
            return len(pretokens(text)) == 1
        if boundary == "sentence":
            return not _SENTENCE_END.search(text) and "\n\n" not in text
        inside = text[1:]
        return not _SPACE.search(inside) and (boundary == "word" or "-" not in inside)

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
            self.cache.update(zip(fresh, vectors, strict=True))
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
