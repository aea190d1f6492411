"""Share of answers that end in the solution's number (GSM8K), as a Hugging Face `evaluate`
metric.
"""

from __future__ import annotations

from collections.abc import Sequence

import datasets
import evaluate

from eval.tasks.answer_checks import same_number


class ExactMatchNumber(evaluate.Metric):
    """Mean over the answers, each against its own reference."""

    def _info(self) -> evaluate.MetricInfo:
        text = datasets.Value("string")
        return evaluate.MetricInfo(
            description=__doc__ or "",
            citation="",
            inputs_description="texts and references",
            features=datasets.Features({"predictions": text, "references": text}),
        )

    def _compute(  # pyright: ignore
        self, predictions: Sequence[str], references: Sequence[str]
    ) -> dict[str, float]:
        values = [
            float(same_number(answer, wanted))
            for answer, wanted in zip(predictions, references, strict=True)
        ]
        return {"exact_match": sum(values) / len(values)}
