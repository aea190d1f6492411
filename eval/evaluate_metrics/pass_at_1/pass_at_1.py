"""Share of programs that pass their tests (HumanEval's pass@1), each in a limited process of its
own, as a Hugging Face `evaluate` metric."""

from __future__ import annotations

from collections.abc import Sequence

import datasets
import evaluate

from eval.tasks.programs import passes


class PassAt1(evaluate.Metric):
    """One program per task. It runs what a model wrote: see `eval.tasks.programs.passes` for what
    its limits keep in.
    """

    def _info(self) -> evaluate.MetricInfo:
        text = datasets.Value("string")
        return evaluate.MetricInfo(
            description=__doc__ or "",
            citation="",
            inputs_description="programs and tests",
            features=datasets.Features({"predictions": text, "references": text}),
        )

    def _compute(
        self,
        predictions: Sequence[str],
        references: Sequence[str],
        seconds: float = 5.0,  # pyright: ignore
    ) -> dict[str, float]:
        passed = [
            passes(program, test, seconds)
            for program, test in zip(predictions, references, strict=True)
        ]
        return {"pass_at_1": sum(passed) / len(passed)}
