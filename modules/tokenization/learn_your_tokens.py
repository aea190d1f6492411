"""Learn Your Tokens: words pooled from their units (Thawani et al. 2023, arXiv 2310.11628)."""

from __future__ import annotations

from modules.tokenization.units import Units
from modules.tokenization.word_model import WordModel
from modules.tokenization.words import spaced_words


class LearnYourTokens(WordModel):
    """Words between spaces, spelled with bytes, characters or subwords; four learned vectors pool
    each, and the backbone reads all four, with learned positions of words. Units, encoder, decoder
    and backbone share one width, as published. See `WordModel`.
    """

    def __init__(
        self,
        units: Units,
        width: int = 256,
        layers: int = 4,
        heads: int = 4,
        unit_layers: int = 2,
        pooled: int = 4,
        most_bytes: int = 24,
        length: int = 128,
    ) -> None:
        super().__init__(
            units,
            width=width,
            layers=layers,
            heads=heads,
            unit_width=width,
            unit_layers=unit_layers,
            unit_heads=heads,
            pooled=pooled,
            most_bytes=most_bytes,
            length=length,
            learned_positions=True,
        )

    def split(self, text: str) -> list[str]:
        """At spaces, which begin the word behind them."""
        return spaced_words(text)
