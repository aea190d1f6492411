"""Text as words, whose concatenation is the text."""

from __future__ import annotations

import random
from collections.abc import Iterator

import regex

_BOUNDARIES = regex.compile(r"(?wV1)\b")
"""Unicode's default word boundaries (UAX 29)."""
_INSIDE = regex.compile(r"(?V1)(?<=\p{Ll})(?=\p{Lu})|(?<=[\p{P}\p{S}])|(?=[\p{P}\p{S}])")
"""Places in camelCase, and on both sides of punctuation."""
_PUNCTUATION = regex.compile(r"[\p{P}\p{S}]")
_SPACED = regex.compile(r"\s*\S+|\s+")


def unicode_words(text: str) -> list[str]:
    """Words of hierarchical autoregressive transformers (Neitemeier et al. 2025, arXiv 2501.10322):
    Unicode's word boundaries, cut at punctuation and in camelCase; a space belongs to the word
    behind it and punctuation to the word before it, where they touch: `Hello,| world!`.
    """
    words: list[str] = []
    start, touching = "", False
    for piece in _pieces(text):
        if piece.isspace():
            # The last space begins the next word, earlier ones are words of their own.
            words += [part for part in (start, piece[:-1]) if part]
            start, touching = piece[-1], False
        elif not _PUNCTUATION.match(piece):
            words.append(start + piece)
            start, touching = "", True
        elif touching:
            words[-1] += piece
        else:
            start += piece
    return [*words, start] if start else words


def _pieces(text: str) -> Iterator[str]:
    for chunk in _BOUNDARIES.split(text):
        yield from (piece for piece in _INSIDE.split(chunk) if piece)


def spaced_words(text: str) -> list[str]:
    """Words between spaces, each with the spaces before it."""
    return _SPACED.findall(text)


def capped(word: str, most: int) -> Iterator[str]:
    """The word in parts of at most `most` bytes of UTF-8, cut between characters.

    Raises:
        ValueError: a character has more bytes.
    """
    part, size = "", 0
    for character in word:
        width = len(character.encode())
        if width > most:
            raise ValueError(f"{character!r} has {width} bytes, a word at most {most}: raise it")
        if size + width > most:
            yield part
            part, size = "", 0
        part, size = part + character, size + width
    if part:
        yield part


def with_typos(text: str, share: float, seed: int) -> str:
    """The text with two neighbouring letters swapped in this share of its words of four letters or
    more.
    """
    draw, words = random.Random(seed), []
    for word in spaced_words(text):
        letters = [i for i in range(1, len(word)) if word[i - 1].isalpha() and word[i].isalpha()]
        if len(letters) > 2 and draw.random() < share:
            i = draw.choice(letters)
            word = word[: i - 1] + word[i] + word[i - 1] + word[i + 1 :]
        words.append(word)
    return "".join(words)
