"""Mean natural log probability per emitted token under the target, and its perplexity, as a Hugging
Face `evaluate` metric."""

from __future__ import annotations

import math
from collections.abc import Sequence

import datasets
import evaluate


class TargetLogLikelihood(evaluate.Metric):
    """Pooled over tokens, not over answers."""

    def _info(self) -> evaluate.MetricInfo:
        features = datasets.Features({"predictions": datasets.Sequence(datasets.Value("float64"))})
        return evaluate.MetricInfo(
            description=__doc__ or "",
            citation="",
            features=features,
            inputs_description="predictions: log probability of each token, answer by answer.",
        )

    def _compute(  # pyright: ignore
        self, predictions: Sequence[Sequence[float]]
    ) -> dict[str, float]:
        tokens = [value for answer in predictions for value in answer]
        if not tokens:
            raise ValueError(
                "predictions hold no token: give the log probabilities of at least one"
            )
        mean = math.fsum(tokens) / len(tokens)
        return {"log_likelihood_per_token": mean, "perplexity": math.exp(-mean)}
