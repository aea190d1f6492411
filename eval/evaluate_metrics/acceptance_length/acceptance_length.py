"""Mean accepted tokens per target call (τ), acceptance by depth and histogram, as a Hugging Face
`evaluate` metric.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import datasets
import evaluate

from eval.metrics.acceptance import (
    acceptance_by_depth,
    accepted_length_histogram,
    mean_accepted_tokens,
)

_INPUTS = "predictions: per prompt, the tokens kept of each target call, its bonus token counted."


class AcceptanceLength(evaluate.Metric):
    """Pooled over prompts, as in every report."""

    def _info(self) -> evaluate.MetricInfo:
        features = datasets.Features({"predictions": datasets.Sequence(datasets.Value("int64"))})
        return evaluate.MetricInfo(
            description=__doc__ or "", citation="", inputs_description=_INPUTS, features=features
        )

    def _compute(self, predictions: Sequence[Sequence[int]]) -> dict[str, Any]:  # pyright: ignore
        emitted = [tokens for prompt in predictions for tokens in prompt]
        return {
            "mean_accepted_tokens": mean_accepted_tokens(emitted),
            "acceptance_by_depth": acceptance_by_depth(emitted),
            "accepted_length_histogram": accepted_length_histogram(emitted),
        }
