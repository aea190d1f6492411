"""Small models with random weights, and a text."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from modules.tokenization.contract import LanguageModel

TEXT = "The cat sat on the mat, and the dog saw the cat. A cat sat."
SIZES: dict[str, Any] = {"width": 16, "layers": 2, "heads": 2, "length": 32}


def seeded(model: LanguageModel) -> Any:
    """Weights that are far from their small beginnings, so that nothing is near zero."""
    draws = torch.Generator().manual_seed(0)
    for weights in model.parameters():
        noise = torch.randn(weights.shape, generator=draws) * 0.3
        weights.data = weights.data + noise if weights.dim() == 1 else noise
    return model.double().eval()


def draws() -> torch.Generator:
    return torch.Generator().manual_seed(1)


def rows_of(model: LanguageModel, text: str = TEXT) -> Tensor:
    return model.stacked(model.rows(text))
