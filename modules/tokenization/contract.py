"""What a language model of this folder answers: rows of a text, and their score.

Shape legend: B rows, T words or tokens of a row, C units of a word.
"""

from __future__ import annotations

import inspect
import math
from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from typing_extensions import Self

from modules.tokenization.units import Units

PAD = -1
"""In rows, where a word or a row has ended. A target of the loss that does not count."""

MOST_LENGTH = 1 << 16
"""Positions of a row at most; attention's time grows with their square."""


@dataclass(frozen=True)
class Score:
    """Sums over a batch.

    nll: negative log likelihood in nats, with its gradient. predictions: how many it sums over.
    bytes: of the text that was predicted. words: that were predicted. right: of them, those whose
    every unit, and whose end, was the likeliest: greedy decoding writes exactly this word.
    """

    nll: Tensor
    predictions: int
    bytes: int
    words: int
    right: int

    @property
    def loss(self) -> Tensor:
        """Mean nats of a prediction."""
        return self.nll / max(1, self.predictions)

    @property
    def bits_per_byte(self) -> float:
        """Comparable between units, as perplexities of different tokenizers are not."""
        return float(self.nll) / math.log(2) / max(1, self.bytes)

    @property
    def word_accuracy(self) -> float | None:
        """The share of words that are right; None where no words are counted."""
        return self.right / self.words if self.words else None

    def __add__(self, other: Score) -> Score:
        return Score(
            self.nll + other.nll,
            self.predictions + other.predictions,
            self.bytes + other.bytes,
            self.words + other.words,
            self.right + other.right,
        )


class LanguageModel(nn.Module):
    """A language model with units of its own.

    A subclass's constructor takes `units` first and JSON-able keyword arguments after it; they are
    remembered in `settings`, which is what a folder stores.

    Raises:
        ValueError: a count below one, or a length above `MOST_LENGTH`.
    """

    settings: dict[str, Any]
    unit_bytes: Tensor
    pooled = 1
    """Positions that the widest part has for each word or token."""

    def __new__(cls, *args: Any, **kwargs: Any) -> Self:
        """Remember the constructor's arguments, defaults filled in."""
        model = super().__new__(cls)
        signature = inspect.signature(cls.__init__)
        # Copies are made without arguments, and get their settings afterwards.
        bound = signature.bind_partial(None, *args, **kwargs)
        bound.apply_defaults()
        names = list(signature.parameters)[2:]
        settings = {name: bound.arguments[name] for name in names if name in bound.arguments}
        for name, value in settings.items():
            if signature.parameters[name].annotation == "int" and value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
            if name == "length" and value > MOST_LENGTH:
                raise ValueError(f"length must be at most {MOST_LENGTH}, got {value}")
        object.__setattr__(model, "settings", settings)
        return model

    def __init__(self, units: Units) -> None:
        super().__init__()
        self.units = units
        widths = torch.tensor([*units.widths, 0])
        self.register_buffer("unit_bytes", widths, persistent=False)

    @property
    def end(self) -> int:
        """The id behind all units: the end of a word, or of a text."""
        return self.units.size

    @abstractmethod
    def rows(self, text: str) -> list[Tensor]:
        """A text in rows [T, …] of at most the model's length."""

    @abstractmethod
    def score(self, rows: Tensor, draws: torch.Generator) -> Score:
        """The score of rows [B, T, …], padded with `PAD`.

        Args:
            rows: of `rows`, stacked.
            draws: for models that draw masks or vectors.
        """

    def details(self, held_out: Tensor) -> dict[str, float]:
        """Further figures of a trained model, from padded rows [B,T, …] of held-out text."""
        return {}

    def stacked(self, rows: Sequence[Tensor]) -> Tensor:
        """Rows as one tensor, padded behind."""
        return pad_sequence(list(rows), batch_first=True, padding_value=PAD)

    def spelled(self, ids: Tensor) -> int:
        """Bytes of the text that ids spell, `PAD` and ends left out."""
        return int(self.unit_bytes[ids[ids != PAD]].sum())
