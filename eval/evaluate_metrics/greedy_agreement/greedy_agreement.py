"""How far answers agree with the target's greedy answers, as a Hugging Face `evaluate` metric."""

from __future__ import annotations

from collections.abc import Sequence

import datasets
import evaluate

from eval.metrics.acceptance import first_divergence
from eval.tasks.answer_checks import common_prefix


class GreedyAgreement(evaluate.Metric):
    """`common_prefix`: mean share of the greedy answer before the first difference; `identical`:
    share of answers.
    """

    def _info(self) -> evaluate.MetricInfo:
        ids = datasets.Sequence(datasets.Value("int64"))
        return evaluate.MetricInfo(
            description=__doc__ or "",
            citation="",
            inputs_description="token ids of answers and of greedy answers",
            features=datasets.Features({"predictions": ids, "references": ids}),
        )

    def _compute(
        self,
        predictions: Sequence[Sequence[int]],
        references: Sequence[Sequence[int]],  # pyright: ignore
    ) -> dict[str, float]:
        pairs = list(zip(predictions, references, strict=True))
        prefixes = [common_prefix(answer, greedy) for answer, greedy in pairs]
        same = [first_divergence(list(greedy), list(answer)) is None for answer, greedy in pairs]
        return {"common_prefix": sum(prefixes) / len(pairs), "identical": sum(same) / len(pairs)}
