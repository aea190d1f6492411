"""A growing text in the tokens of another tokenizer."""

from __future__ import annotations

from modules.byte_level.vocabulary import ByteVocabulary, unfinished, word_begins

LOOSE = 48
"""Bytes after which the beginning of a text is no longer tokenised anew."""


class Retokenised:
    """The tokens that a tokenizer writes for a text that grows at its end. Only the last words are
    tokenised anew.

    Args:
        vocabulary: of the tokenizer.
        text: to begin with; special tokens in it are read as such.
    """

    def __init__(self, vocabulary: ByteVocabulary, text: str = "") -> None:
        self.vocabulary = vocabulary
        self.fixed: list[int] = vocabulary.tokenizer.encode(text, add_special_tokens=False)
        """Tokens that stay."""
        self.tail = b""
        """Bytes whose tokens may still change."""
        # 1. What stands behind the last special token; only that may go on.
        ordinary, special = 0, False
        for i in reversed(self.fixed):
            special = i not in vocabulary.data
            if special:
                break
            ordinary += 1
        data = vocabulary.spelled(self.fixed[len(self.fixed) - ordinary :])
        # 2. Its last word, if that is tokenised alike alone.
        starts = (i for i in range(len(data) - 1, 0, -1) if word_begins(data, i))
        border = next(starts, 0)
        last = self._written(data[border:]) if border or special else []
        if last and self.fixed[-len(last) :] == last:
            self.fixed, self.tail = self.fixed[: -len(last)], data[border:]
        self._loose = self._written(self.tail)

    @property
    def ids(self) -> list[int]:
        """The tokens of the text, as far as it has whole characters."""
        return self.fixed + self._loose

    def _written(self, data: bytes) -> list[int]:
        return words(self.vocabulary, data)

    def extend(self, data: bytes) -> None:
        """Append bytes to the text."""
        self.tail += data
        last = len(self.tail) - LOOSE
        border = next((i for i in range(last, 0, -1) if word_begins(self.tail, i)), 0)
        if border > 0:
            self.fixed = self.fixed + self._written(self.tail[:border])
            self.tail = self.tail[border:]
        self._loose = self._written(self.tail)


def words(vocabulary: ByteVocabulary, data: bytes) -> list[int]:
    """The tokens of bytes that begin a word or follow a special token, as far as these have whole
    characters.
    """
    text = data[: len(data) - unfinished(data)[0]].decode("utf-8", "replace")
    if vocabulary.dummy_prefix:
        text = text.removeprefix(" ")
    return vocabulary.tokenizer.encode(text, add_special_tokens=False) if text else []


def continued(vocabulary: ByteVocabulary, before: bytes, data: bytes) -> list[int]:
    """Tokens that spell `data`, as the tokenizer writes it after `before`, a text of one or more
    words. Of a token that it would write across the border, the second part is spelled by the
    longest tokens that fit.
    """
    ids, place = words(vocabulary, before + data), 0
    # Special tokens in the text are there as it writes them.
    pieces = [vocabulary.bytes_in_text(i) for i in ids]
    border = len(before) + (b"".join(pieces) == b" " + before + data)
    rest: list[int] = []
    for i, piece in zip(ids, pieces, strict=True):
        if place >= border:
            rest.append(i)
        elif place + len(piece) > border:
            rest += vocabulary.longest_matches(piece[border - place :])
        place += len(piece)
    return rest
