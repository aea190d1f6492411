"""Tokenizers drawn at random from a buffer of texts, for training over tokenizers (Minixhofer et
al. 2024, arXiv 2405.07883, section 3).
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from modules.byte_level.vocabulary import bytes_of_characters

LONGEST = 16
"""Characters of a token."""
NOISE, SPREAD = 1e-5, 4.0
"""Median and deviation of the logarithm of the noise's scale."""


@dataclass(frozen=True)
class Substrings:
    """What tokens can be: the substrings of a buffer's words, in characters that stand for bytes.

    cut: the pre-tokenizer that makes words. shares: of each string in all occurrences. is_byte:
    whether a string is one byte; all bytes are among them.
    """

    cut: Any
    strings: list[str]
    shares: np.ndarray
    is_byte: np.ndarray

    @staticmethod
    def of(texts: Sequence[str], cut: Any) -> Substrings:
        """The substrings of at most `LONGEST` characters of the texts' words."""
        # 1. How often each word occurs.
        words: Counter[str] = Counter()
        for text in texts:
            words.update(word for word, _ in cut.pre_tokenize_str(text))
        # 2. How often each of their substrings does.
        counts: Counter[str] = Counter()
        for word, count in words.items():
            for start in range(len(word)):
                for stop in range(start + 1, min(len(word), start + LONGEST) + 1):
                    counts[word[start:stop]] += count
        alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
        for character in alphabet:
            counts.setdefault(character, 0)
        strings = sorted(counts)
        occurrences = np.array([counts[string] for string in strings], dtype=np.float64)
        shares = occurrences / max(1.0, occurrences.sum())
        return Substrings(cut, strings, shares, np.isin(strings, alphabet))


def spells_bytes(cut: Any) -> bool:
    """Whether a pre-tokenizer writes a character for every byte, as byte-level BPE does."""
    text = "a é\n\n"
    spelled = "".join(word for word, _ in cut.pre_tokenize_str(text))
    table = bytes_of_characters()
    return bytes(table.get(letter, 0) for letter in spelled) == text.encode()


class TokenizerSampler:
    """UnigramLM tokenizers over the bytes of texts, each within the words of one way to cut texts.

    Args:
        texts: the buffer.
        size: tokens of a tokenizer, all bytes included.
        seed: of all draws.
        like: a fast tokenizer whose words half of them have, so that tokens occur that GPT-2's
            pattern never joins, such as a full stop with line breaks. Others have GPT-2's; so do
            all where it is None or not byte-level.
    """

    def __init__(
        self, texts: Sequence[str], size: int, seed: int = 0, like: Any | None = None
    ) -> None:
        if size < 256:
            raise ValueError(f"size {size} has no room for all bytes: use 256 or more")
        self.size, self.draws = size, np.random.default_rng(seed)
        cuts: list[Any] = [pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)]
        its_cut = None if like is None else like.backend_tokenizer.pre_tokenizer
        if its_cut is not None and spells_bytes(its_cut):
            cuts.append(its_cut)
        self.vocabularies = [Substrings.of(texts, cut) for cut in cuts]

    def sample(self) -> Tokenizer:
        """A tokenizer of the most frequent substrings, their frequencies disturbed by noise whose
        scale is drawn first: from nearly BPE's vocabulary to nearly any.
        """
        source = self.vocabularies[int(self.draws.integers(len(self.vocabularies)))]
        scale = self.draws.lognormal(math.log(NOISE), SPREAD)
        disturbed = source.shares + self.draws.normal(0.0, scale, len(source.shares))
        # Bytes always belong to it.
        order = np.argsort(np.where(source.is_byte, -np.inf, -disturbed), kind="stable")
        chosen = order[: self.size]
        least = 1e-12
        vocabulary = [
            (source.strings[i], math.log(max(least, float(disturbed[i])))) for i in chosen
        ]
        tokenizer = Tokenizer(models.Unigram(vocabulary, None, False))
        tokenizer.pre_tokenizer = source.cut
        tokenizer.decoder = decoders.ByteLevel()
        return tokenizer
