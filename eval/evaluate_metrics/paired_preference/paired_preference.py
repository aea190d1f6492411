"""Wins, ties and losses of one method's scores against another's, with a paired bootstrap, as a
Hugging Face `evaluate` metric."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import datasets
import evaluate

from eval.tasks.answer_checks import paired_outcome


class PairedPreference(evaluate.Metric):
    """The figures of `eval.tasks.answer_checks.paired_outcome`."""

    def _info(self) -> evaluate.MetricInfo:
        value = datasets.Value("float64")
        return evaluate.MetricInfo(
            description=__doc__ or "",
            citation="",
            inputs_description="scores of the method and of the other, prompt by prompt",
            features=datasets.Features({"predictions": value, "references": value}),
        )

    def _compute(  # pyright: ignore
        self, predictions: Sequence[float], references: Sequence[float]
    ) -> dict[str, Any]:
        if len(predictions) != len(references):
            raise ValueError(
                f"predictions and references must pair, got {len(predictions)} and "
                f"{len(references)}"
            )
        return paired_outcome(predictions, references)
