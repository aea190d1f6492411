"""Speedup over plain decoding with its paired bootstrap interval, and whether the tokens are the
same, as a Hugging Face `evaluate` metric."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import datasets
import evaluate

from eval.metrics.acceptance import Speed, bootstrap_interval, first_divergence, micro_speedup

_INPUTS = """predictions, references: token ids of the method and of plain decoding, by prompt.
seconds, reference_seconds: what decoding each of them took, prefill left out."""


class LosslessSpeedup(evaluate.Metric):
    """The first token of an answer comes from prefill and is not counted. `speedup` is null unless
    all tokens agree; `ratio` is the same figure whether they do or not."""

    def _info(self) -> evaluate.MetricInfo:
        ids = datasets.Sequence(datasets.Value("int64"))
        features = datasets.Features({"predictions": ids, "references": ids})
        return evaluate.MetricInfo(
            description=__doc__ or "", citation="", inputs_description=_INPUTS, features=features
        )

    def _compute(
        self,
        predictions: Sequence[Sequence[int]],
        references: Sequence[Sequence[int]],  # pyright: ignore
        seconds: Sequence[float],
        reference_seconds: Sequence[float],
    ) -> dict[str, Any]:
        if not len(predictions) == len(seconds) == len(reference_seconds):
            raise ValueError(
                "seconds and reference_seconds must have one entry per prompt "
                f"({len(predictions)}), got {len(seconds)} and {len(reference_seconds)}"
            )
        # The first token comes from prefill, whose time is left out.
        method, plain = (
            [Speed(max(len(ids) - 1, 0), taken) for ids, taken in zip(answers, times, strict=True)]
            for answers, times in ((predictions, seconds), (references, reference_seconds))
        )
        same = [
            first_divergence(list(expected), list(actual)) is None
            for expected, actual in zip(references, predictions, strict=True)
        ]
        ratio = micro_speedup(method, plain)
        return {
            "speedup": ratio if all(same) else None,
            "ratio": ratio,
            "ci95": bootstrap_interval(method, plain),
            "identical_outputs": sum(same),
            "prompts": len(same),
        }
