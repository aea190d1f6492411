"""The bytes of a tokenizer's tokens, and which sequences of tokens it would write.

Shape legend: S tokens that have bytes, sorted by these.
"""

from __future__ import annotations

import json
from bisect import bisect_left
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any

import torch

WORD_BOUNDARY = "\u2581"
"""SentencePiece's mark for a space."""
REMEMBERED = 256
"""Strings whose continuations are kept at a time."""


def bytes_of_characters() -> dict[str, int]:
    """The byte that every character of a byte-level BPE piece stands for (GPT-2's table): printable
    ones for themselves, the others for 256 and the characters after it, in order.
    """
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = iter(range(256, 512))
    return {chr(byte if byte in printable else next(others)): byte for byte in range(256)}


def token_bytes(tokenizer: Any) -> dict[int, bytes]:
    """The bytes of every token but special ones.

    Raises:
        ValueError: neither byte-level BPE nor SentencePiece nor pieces of plain text.
    """
    backend = tokenizer.backend_tokenizer
    decoder = "" if backend.decoder is None else backend.decoder.__getstate__().decode()
    kinds = set(_types(json.loads(decoder))) - {"Fuse"} if decoder else set()
    if "ByteLevel" in kinds:
        table = bytes_of_characters()
    elif not kinds or kinds & {"Metaspace", "ByteFallback"}:
        table = None
    else:
        raise ValueError(
            f"bytes of tokens are unknown for a tokenizer that decodes by {sorted(kinds)}: give a "
            "model with byte-level BPE or SentencePiece"
        )
    # Added tokens are spelled as they are; special ones stand for no text.
    added = backend.get_added_tokens_decoder()
    spelled = {i: token.content.encode() for i, token in added.items() if not token.special}
    for piece, i in tokenizer.get_vocab().items():
        if i in added or i in tokenizer.all_special_ids:
            continue
        if table is not None:
            spelled[i] = bytes(table[character] for character in piece)
        elif "ByteFallback" in kinds and len(piece) == 6 and piece[:3] == "<0x":
            spelled[i] = bytes([int(piece[3:5], 16)])
        else:
            spelled[i] = piece.replace(WORD_BOUNDARY, " ").encode()
    return {i: data for i, data in spelled.items() if data}


def _types(part: Any) -> Iterator[str]:
    """The types of a decoder and of those inside of it."""
    for inside in part.get("decoders", []):
        yield from _types(inside)
    yield part["type"]


@dataclass(frozen=True)
class Longer:
    """Tokens that go on after some bytes. ids_S: their ids. bytes_S: the byte that comes next."""

    ids_S: torch.Tensor
    bytes_S: torch.Tensor


class ByteVocabulary:
    """Tokens by their bytes.

    Args:
        tokenizer: byte-level BPE, SentencePiece, or pieces of plain text.
        size: of the model's vocabulary; tokens beyond it are left out.

    Raises:
        ValueError: another kind of tokenizer.
    """

    def __init__(self, tokenizer: Any, size: int) -> None:
        self.tokenizer = tokenizer
        self.data = {i: data for i, data in token_bytes(tokenizer).items() if i < size}
        order = sorted(self.data.items(), key=lambda item: (item[1], item[0]))
        self.ids_S = torch.tensor([i for i, _ in order])
        self.sorted = [data for _, data in order]
        self.longest = max(map(len, self.sorted))
        self._longer: dict[bytes, Longer] = {}
        first = tokenizer.encode("a", add_special_tokens=False)
        self.dummy_prefix = bool(first) and self.spelled(first) == b" a"
        """Whether a space is put before every text, as SentencePiece does."""

    def __deepcopy__(self, memo: dict) -> ByteVocabulary:
        """Itself: texts of one tokenizer share it."""
        return self

    @cached_property
    def by_bytes(self) -> dict[bytes, int]:
        """One token for every string that is a token; a piece rather than SentencePiece's token of
        a byte, then the first id."""
        pieces = self.tokenizer.convert_ids_to_tokens([int(i) for i in self.ids_S])
        chosen: dict[bytes, int] = {}
        for i, piece in zip(self.ids_S.tolist(), pieces, strict=True):
            data = self.data[i]
            # A token of one byte is spelled `<0x..>`.
            if data not in chosen or len(piece) == 1 == len(data):
                chosen[data] = i
        return chosen

    def longest_matches(self, data: bytes) -> list[int]:
        """Tokens that spell the bytes, each the longest that fits; as far as there are some."""
        ids, start = [], 0
        while start < len(data):
            stops = range(min(len(data), start + self.longest), start, -1)
            stop = next((stop for stop in stops if data[start:stop] in self.by_bytes), None)
            if stop is None:
                break
            ids.append(self.by_bytes[data[start:stop]])
            start = stop
        return ids

    def spelled(self, ids: Iterable[int]) -> bytes:
        """The bytes of tokens; special tokens have none."""
        return b"".join(self.data.get(i, b"") for i in ids)

    def bytes_in_text(self, token: int) -> bytes:
        """The bytes of a token in a text; of a special one those of its name."""
        data = self.data.get(token)
        return str(self.tokenizer.convert_ids_to_tokens(token)).encode() if data is None else data

    def begin(self, text: bytes) -> bytes:
        """The text as its tokens spell it."""
        return b" " + text if self.dummy_prefix else text

    def starting(self, data: bytes) -> slice:
        """The tokens in `sorted` that start with these bytes."""
        low, end = bisect_left(self.sorted, data), data.rstrip(b"\xff")
        if not end:
            return slice(low, len(self.sorted))
        after = end[:-1] + bytes([end[-1] + 1])
        return slice(low, bisect_left(self.sorted, after, low))

    def longer(self, data: bytes) -> Longer:
        """The tokens that start with these bytes and go on."""
        if data not in self._longer:
            if len(self._longer) >= REMEMBERED:
                self._longer.clear()
            places = self.starting(data)
            longer = [
                k for k in range(places.start, places.stop) if len(self.sorted[k]) > len(data)
            ]
            bytes_S = torch.tensor([self.sorted[k][len(data)] for k in longer], dtype=torch.long)
            self._longer[data] = Longer(self.ids_S[longer], bytes_S)
        return self._longer[data]

    def encode(self, data: bytes) -> tuple[int, ...] | None:
        """The tokens that the tokenizer writes for these bytes; None where it writes none that
        spell them, or the bytes are no UTF-8.
        """
        return self.encode_all([data])[0]

    def encode_all(self, texts: list[bytes]) -> list[tuple[int, ...] | None]:
        """`encode` for several texts."""
        # 1. Texts that are UTF-8, as the tokenizer takes them.
        readable: dict[int, str] = {}
        for place, data in enumerate(texts):
            try:
                readable[place] = self._given(data).decode()
            except UnicodeDecodeError:
                continue
        rows = self.tokenizer.backend_tokenizer.encode_batch(
            list(readable.values()), add_special_tokens=False
        )
        # 2. Tokens that spell them.
        encoded: list[tuple[int, ...] | None] = [None] * len(texts)
        for place, row in zip(readable, rows, strict=True):
            ids = self._without_added(row.ids, texts[place])
            if self.spelled(ids) == texts[place]:
                encoded[place] = tuple(ids)
        return encoded

    def _given(self, data: bytes) -> bytes:
        """What to give to a tokenizer that puts a space before it. Where the text begins otherwise,
        a new line stands between."""
        if not self.dummy_prefix or not data:
            return data
        return data[1:] if data[:1] == b" " else b"\n" + data

    def _without_added(self, ids: list[int], data: bytes) -> list[int]:
        """The tokens without those of that space and that new line."""
        if not self.dummy_prefix or data[:1] in (b" ", b""):
            return ids
        count = next((n for n in (1, 2) if self.spelled(ids[:n]) == b" \n"), 0)
        return ids[count:]

    def _endings(self, data: bytes) -> list[bytes]:
        """What may follow, to ask the tokenizer about an end that it cannot be given."""
        if self.dummy_prefix and data == b" ":
            # The space before the text is a token of its own before some characters.
            return [*(bytes([byte]) for byte in range(1, 0x80)), "\u00e9".encode()]
        return completions(data)

    def written(self, sequences: list[tuple[int, ...]]) -> list[bool]:
        """Whether the tokenizer writes these tokens for the bytes that they spell. Where those end
        inside of a character: whether it writes them first for some completion of it.
        """
        texts = [self.spelled(ids) for ids in sequences]
        endings = [self._endings(data) for data in texts]
        tried = [data + end for data, ends in zip(texts, endings, strict=True) for end in ends]
        encoded = iter(self.encode_all(tried))
        verdicts = []
        for ids, ends in zip(sequences, endings, strict=True):
            rows = [(end, next(encoded)) for end in ends]
            verdicts.append(
                any(row == ids if not end else (row or ())[: len(ids)] == ids for end, row in rows)
            )
        return verdicts


def unfinished(data: bytes) -> tuple[int, int]:
    """Bytes of a character that the data end inside of, and bytes that it still needs; 0 and 0
    where they end with a whole one.
    """
    for count in range(1, min(3, len(data)) + 1):
        byte = data[-count]
        if byte < 0x80:
            break
        if byte >= 0xC2:
            length = 2 if byte < 0xE0 else 3 if byte < 0xF0 else 4
            return (count, length - count) if length > count else (0, 0)
    return 0, 0


@lru_cache(maxsize=1024)
def going_on(opened: bytes) -> tuple[int, ...]:
    """The bytes that may follow in UTF-8 the bytes that are there of a character, or none."""

    def decodes(data: bytes) -> bool:
        try:
            data.decode()
        except UnicodeDecodeError:
            return False
        return True

    texts = {byte: opened + bytes([byte]) for byte in range(256)}
    return tuple(
        byte
        for byte, text in texts.items()
        if any(decodes(text + end) for end in completions(text))
    )


def completions(data: bytes) -> list[bytes]:
    """Ends of a character that the data stop inside of: all values of its next byte, followed by
    0x80; one empty end where none is open.
    """
    _, missing = unfinished(data)
    if not missing:
        return [b""]
    return [bytes([byte]) + b"\x80" * (missing - 1) for byte in range(0x80, 0xC0)]


def word_begins(text: bytes, place: int) -> bool:
    """Whether a space with a letter after it and a letter or digit before it stands here: there
    every tokenizer begins a new word. Letters are those of ASCII."""
    around = text[place - 1 : place + 2]
    return (
        len(around) == 3 and around[1:2] == b" " and around[:1].isalnum() and around[2:].isalpha()
    )
