"""Hierarchical autoregressive transformers (Neitemeier et al. 2025, arXiv 2501.10322)."""

from __future__ import annotations

from modules.tokenization.units import Units
from modules.tokenization.word_model import WordModel
from modules.tokenization.words import unicode_words


class Hierarchical(WordModel):
    """Words by Unicode's boundaries, bytes inside; one state of the encoder is a word to the
    backbone, whose state is the first position of the byte decoder. See `WordModel`.
    """

    def __init__(
        self,
        units: Units,
        width: int = 256,
        layers: int = 4,
        heads: int = 4,
        unit_width: int = 128,
        unit_layers: int = 2,
        unit_heads: int = 4,
        most_bytes: int = 24,
        length: int = 128,
    ) -> None:
        super().__init__(
            units,
            width=width,
            layers=layers,
            heads=heads,
            unit_width=unit_width,
            unit_layers=unit_layers,
            unit_heads=unit_heads,
            pooled=1,
            most_bytes=most_bytes,
            length=length,
            learned_positions=False,
        )

    def split(self, text: str) -> list[str]:
        """By Unicode's word boundaries, punctuation and capital letters."""
        return unicode_words(text)
