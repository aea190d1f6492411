"""Mean F1 of the longest common subsequence of words (ROUGE-L), as a Hugging Face `evaluate`
metric.
"""

from __future__ import annotations

from collections.abc import Sequence

import datasets
import evaluate

from eval.tasks.answer_checks import rouge_l


class RougeL(evaluate.Metric):
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
            float(rouge_l(answer, wanted))
            for answer, wanted in zip(predictions, references, strict=True)
        ]
        return {"rouge_l": sum(values) / len(values)}
