"""What words are spelled with: bytes, characters or subwords."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

BYTES = 256
MOST_UNITS = 1 << 20


class Units(ABC):
    """An alphabet, with ids from 0 to `size` - 1."""

    size: int

    @abstractmethod
    def encode(self, word: str) -> list[int]:
        """The ids that spell a word."""

    @abstractmethod
    def decode(self, ids: Sequence[int]) -> str:
        """The text that ids spell; bytes that are no UTF-8 are replaced."""

    @abstractmethod
    def config(self) -> dict[str, Any]:
        """JSON-able; `units_of` makes the same units of it."""

    @property
    @abstractmethod
    def widths(self) -> list[int]:
        """Bytes of UTF-8 that each id stands for."""


class ByteUnits(Units):
    """The 256 bytes of UTF-8."""

    size = BYTES

    def encode(self, word: str) -> list[int]:
        """Its bytes, from 0 to 255."""
        return list(word.encode())

    def decode(self, ids: Sequence[int]) -> str:
        """The text of the bytes; what is no UTF-8 becomes U+FFFD."""
        return bytes(ids).decode(errors="replace")

    def config(self) -> dict[str, Any]:
        """Nothing but the kind."""
        return {"kind": "bytes"}

    @property
    def widths(self) -> list[int]:
        """A byte each, by definition."""
        return [1] * BYTES


class CharacterUnits(Units):
    """The characters of an alphabet; all others are the last id, which is written as U+FFFD."""

    def __init__(self, alphabet: str) -> None:
        self.alphabet = alphabet
        self.ids = {character: i for i, character in enumerate(alphabet)}
        self.size = len(alphabet) + 1

    def encode(self, word: str) -> list[int]:
        """An id for each character."""
        return [self.ids.get(character, self.size - 1) for character in word]

    def decode(self, ids: Sequence[int]) -> str:
        """The characters in order."""
        return "".join((self.alphabet + "\ufffd")[i] for i in ids)

    def config(self) -> dict[str, Any]:
        """The alphabet is a string."""
        return {"kind": "characters", "alphabet": self.alphabet}

    @property
    def widths(self) -> list[int]:
        """Of an unknown character: 1, the least."""
        return [*(len(character.encode()) for character in self.alphabet), 1]


class SubwordUnits(Units):
    """A byte-level BPE whose pieces never cross the boundary of a word."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer, self.size = tokenizer, tokenizer.get_vocab_size()

    def encode(self, word: str) -> list[int]:
        """The pieces that BPE makes of this word alone."""
        return self.tokenizer.encode(word).ids

    def decode(self, ids: Sequence[int]) -> str:
        """The text of the pieces together."""
        return self.tokenizer.decode(list(ids))

    def config(self) -> dict[str, Any]:
        """The tokenizer's own JSON, as text."""
        return {"kind": "subwords", "tokenizer": self.tokenizer.to_str()}

    @property
    def widths(self) -> list[int]:
        """Every character of a byte-level piece is a byte."""
        return [len(self.tokenizer.id_to_token(i) or "") for i in range(self.size)]


def check_units(kind: str, vocabulary: int) -> None:
    """ValueError for another kind, or without room for the 256 bytes in the BPE's vocabulary."""
    if kind not in ("bytes", "characters", "subwords"):
        raise ValueError(f"units {kind!r} is unknown: use bytes, characters or subwords")
    if kind == "subwords" and vocabulary < BYTES:
        raise ValueError(f"vocabulary {vocabulary} has no room for all bytes: use 256 or more")


def make_units(kind: str, words: Iterable[str], vocabulary: int) -> Units:
    """Units for these words.

    Args:
        kind: `bytes`, `characters` or `subwords`.
        words: of the training text.
        vocabulary: the most frequent so many characters, or pieces of the BPE.

    Raises:
        ValueError: as `check_units`.
    """
    check_units(kind, vocabulary)
    if kind == "bytes":
        return ByteUnits()
    if kind == "characters":
        counts: dict[str, int] = {}
        for character in "".join(words):
            counts[character] = counts.get(character, 0) + 1
        frequent = sorted(counts, key=lambda character: (-counts[character], character))
        return CharacterUnits("".join(sorted(frequent[: vocabulary - 1])))
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(words, trainer)
    return SubwordUnits(tokenizer)


def units_of(config: Mapping[str, Any]) -> Units:
    """The units of a saved model.

    Raises:
        ValueError: it is no config of units, or too large a one.
    """
    try:
        kind = config["kind"]
        units: Units = (
            ByteUnits()
            if kind == "bytes"
            else CharacterUnits(str(config["alphabet"]))
            if kind == "characters"
            else SubwordUnits(Tokenizer.from_str(config["tokenizer"]))
        )
    except Exception as error:  # `tokenizers` raises Exception itself
        raise ValueError(f"units cannot be read: {error}: save the model again") from error
    if units.size > MOST_UNITS:
        raise ValueError(f"units: {units.size} are more than {MOST_UNITS}: not a model of ours")
    return units
