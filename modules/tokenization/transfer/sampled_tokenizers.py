"""Tokenizers drawn at random from a buffer of texts, for training over tokenizers (Minixhofer et
al. 2024, arXiv 2405.07883, section 3).
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence

import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

LONGEST = 16
"""Characters of a token."""
NOISE, SPREAD = 1e-5, 4.0
"""Median and deviation of the logarithm of the noise's scale."""


class TokenizerSampler:
    """UnigramLM tokenizers over the bytes of texts.

    Args:
        texts: the buffer.
        size: tokens of a tokenizer, all bytes included.
        seed: of all draws.
    """

    def __init__(self, texts: Sequence[str], size: int, seed: int = 0) -> None:
        if size < 256:
            raise ValueError(f"size {size} has no room for all bytes: use 256 or more")
        self.size, self.draws = size, np.random.default_rng(seed)
        # 1. How often each word occurs, spelled in characters that stand for bytes.
        cut = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
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
        self.strings = sorted(counts)
        shares = np.array([counts[string] for string in self.strings], dtype=np.float64)
        self.shares = shares / max(1.0, shares.sum())
        self.is_byte = np.isin(self.strings, alphabet)

    def sample(self) -> Tokenizer:
        """A tokenizer of the most frequent substrings, their frequencies disturbed by noise whose
        scale is drawn first: from nearly BPE's vocabulary to nearly any.
        """
        scale = self.draws.lognormal(math.log(NOISE), SPREAD)
        disturbed = self.shares + self.draws.normal(0.0, scale, len(self.shares))
        # Bytes always belong to it.
        order = np.argsort(np.where(self.is_byte, -np.inf, -disturbed), kind="stable")
        chosen = order[: self.size]
        least = 1e-12
        vocabulary = [(self.strings[i], math.log(max(least, float(disturbed[i])))) for i in chosen]
        tokenizer = Tokenizer(models.Unigram(vocabulary, None, False))
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
        tokenizer.decoder = decoders.ByteLevel()
        return tokenizer
