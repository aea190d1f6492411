"""From the answers of a load to a row of the report."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from eval.metrics import acceptance as metrics
from eval.metrics.acceptance import Speed
from eval.report.summary import METHOD_KEYS
from eval.serving.client import Timing
from eval.serving.load import Run
from eval.serving.settings import ENGINE, Load
from modules.contracts.sampling import Sampling
from modules.decoding.timing import PHASES

PERCENTILES = (50, 90, 99)


@dataclass(frozen=True)
class Point:
    """One server under one load.

    name: of the server's rows, without the load. run: its answers. drafts: what its metrics say
    about them.
    """

    name: str
    load: Load
    run: Run
    drafts: Mapping[str, Any] | None


def row_of(point: Point, plain: Point | None, model: str, sampling: Sampling) -> dict[str, Any]:
    """The row of a point: keys of every report's methods, and `serving`.

    Args:
        point: what is described.
        plain: the server without a drafter under the same load; the point itself for its own row,
            None where there is one server only.
        model: name of the target.
        sampling: how tokens were chosen.
    """
    answers = {timing.question.prompt: timing for timing in point.run.whole}
    others = {} if plain is None else {t.question.prompt: t for t in plain.run.whole}
    both = [prompt for prompt in answers if prompt in others]
    drafts = point.drafts or drafts_of(point.run.whole)
    decoding = sum(timing.after_first for timing in answers.values())
    figures: dict[str, Any] = {
        **dict.fromkeys(METHOD_KEYS),
        "name": point.name + point.load.suffix,
        "target": model,
        "engine": ENGINE,
        "temperature": sampling.temperature,
        "batch_size": point.load.concurrency or 1,
        "claims_lossless": True,
        "prompts": len(answers),
        "new_tokens": sum(timing.tokens for timing in answers.values()),
        "seconds": decoding,
        "tokens_per_second": metrics.rate([speed(timing) for timing in answers.values()]),
        "time_to_first_token": _middle([timing.to_first for timing in answers.values()]),
        "speedup": _speedup(answers, others, both),
        "mean_accepted_tokens": None if drafts is None else drafts["tokens_per_call"],
        "acceptance_by_depth": [] if drafts is None else drafts["by_depth"],
        "conditional_acceptance_by_depth": [],
        "accepted_length_histogram": [],
        "seconds_by_phase": {
            **dict.fromkeys(PHASES, 0.0),
            "prefill": sum(timing.to_first for timing in answers.values()),
            "other": decoding,
        },
        "peak_memory_bytes": 0,
        "quality": {},
        "by_task": {
            task: _task(answers, others, [p for p in answers if answers[p].question.task == task])
            for task in dict.fromkeys(timing.question.task for timing in answers.values())
        },
    }
    return {**figures, "serving": serving_figures(point, others, both, drafts)}


def serving_figures(
    point: Point,
    others: Mapping[str, Timing],
    both: Sequence[str],
    drafts: Mapping[str, Any] | None,
) -> dict[str, Any]:
    """What a load test adds to a row.

    tokens_per_second: of all requests together, over the whole load. Times in seconds:
    time_to_first_token; inter_token_latency, the mean time of an answer's later tokens;
    inter_piece_latency, the gaps between its pieces, each of one or more tokens; request_seconds.
    """
    run, whole = point.run, point.run.whole
    answers = {timing.question.prompt: timing for timing in whole}
    gaps = [b - a for timing in whole for a, b in zip(timing.pieces, timing.pieces[1:])]
    later = [t.after_first / (t.tokens - 1) for t in whole if t.tokens > 1]
    same = sum(answers[prompt].text == others[prompt].text for prompt in both)
    return {
        "server": point.name,
        "concurrency": point.load.concurrency,
        "request_rate": point.load.rate,
        "requests": len(run.timings),
        "failed": len(run.timings) - len(whole),
        "seconds": run.seconds,
        "requests_per_second": len(whole) / run.seconds,
        "tokens_per_second": sum(timing.tokens for timing in whole) / run.seconds,
        "tokens_counted_by": "server" if all(t.counted for t in whole) else "pieces of text",
        "time_to_first_token": spread([timing.to_first for timing in whole]),
        "inter_token_latency": spread(later),
        "inter_piece_latency": spread(gaps),
        "request_seconds": spread([timing.ended - timing.sent for timing in whole]),
        "drafts": drafts,
        "compared": len(both),
        "same_text": same if both else None,
    }


def speed(timing: Timing) -> Speed:
    """Tokens after the first, and their seconds."""
    return Speed(max(0, timing.tokens - 1), timing.after_first)


def spread(seconds: Sequence[float]) -> dict[str, float] | None:
    """Mean and percentiles; None without values."""
    if not seconds:
        return None
    values = np.percentile(np.asarray(seconds), PERCENTILES)
    return {"mean": float(np.mean(seconds))} | {
        f"p{level}": float(value) for level, value in zip(PERCENTILES, values, strict=True)
    }


def drafts_of(whole: Sequence[Timing]) -> dict[str, Any] | None:
    """Drafts that answers tell of themselves (llama.cpp); None where they do not.

    An answer of n tokens, a of them accepted drafts, took n - a calls.
    """
    told_of = [timing for timing in whole if timing.drafted is not None]
    accepted = sum(timing.accepted or 0 for timing in told_of)
    calls = sum(timing.tokens for timing in told_of) - accepted
    if not told_of or calls <= 0:
        return None
    return {
        "source": "answers",
        "drafted": sum(timing.drafted or 0 for timing in told_of),
        "accepted": accepted,
        "tokens_per_call": 1 + accepted / calls,
        "by_depth": [],
    }


def _middle(seconds: Sequence[float]) -> float:
    return float(np.median(seconds)) if seconds else 0.0


def _pairs(
    answers: Mapping[str, Timing], others: Mapping[str, Timing], prompts: Sequence[str]
) -> tuple[list[Speed], list[Speed]]:
    return [speed(answers[p]) for p in prompts], [speed(others[p]) for p in prompts]


def _speedup(
    answers: Mapping[str, Timing], others: Mapping[str, Timing], both: Sequence[str]
) -> dict[str, Any]:
    """Of a request's tokens after its first, paired by prompt."""
    method, baseline = _pairs(answers, others, both)
    bounds = metrics.bootstrap_interval(method, baseline)
    tasks = dict.fromkeys(answers[prompt].question.task for prompt in both)
    by_task = {
        task: _pairs(answers, others, [p for p in both if answers[p].question.task == task])
        for task in tasks
    }
    return {
        "micro": metrics.micro_speedup(method, baseline),
        "macro": metrics.macro_speedup(by_task),
        "ci95": list(bounds) if bounds else None,
    }


def _task(
    answers: Mapping[str, Timing], others: Mapping[str, Timing], prompts: Sequence[str]
) -> dict[str, Any]:
    speeds = [speed(answers[prompt]) for prompt in prompts]
    both = [prompt for prompt in prompts if prompt in others]
    method, baseline = _pairs(answers, others, both)
    bounds = metrics.bootstrap_interval(method, baseline)
    return {
        "prompts": len(prompts),
        "new_tokens": sum(answers[prompt].tokens for prompt in prompts),
        "seconds": sum(each.seconds for each in speeds),
        "tokens_per_second": metrics.rate(speeds),
        "speedup": metrics.micro_speedup(method, baseline),
        "ci95": list(bounds) if bounds else None,
        "mean_accepted_tokens": None,
        "identical_outputs": None,
    }
