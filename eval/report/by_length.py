"""A method's figures by length of the context: powers of two from 1k tokens on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import log2
from statistics import fmean, median
from typing import Any

from eval.metrics import acceptance as metrics
from eval.metrics.acceptance import Speed
from eval.run.journal import Record
from eval.tasks.answer_checks import Check, score
from modules.contracts.target import Target

Answers = Mapping[str, Record]
SHORTEST = 1024
"""Shorter contexts are counted with this one, where there are longer ones."""
COLUMNS = {
    "mean_accepted_tokens": "τ",
    "tokens_per_second": "tokens/s",
    "speedup": "speedup",
    "time_to_first_token": "s to the first token",
    "kv_bytes_per_step": "KV MB a step",
    "peak_memory_bytes": "peak GB",
    "score": "score",
}
"""Columns of the table, by key of an entry."""
PLOTTED = {
    "tokens_per_second": "tokens per second",
    "mean_accepted_tokens": "tokens per target call (τ)",
    "kv_bytes_per_step": "bytes of keys and values a step",
    "time_to_first_token": "seconds to the first token",
    "score": "score",
}
"""Figures with a plot over length."""
_UNITS = {"kv_bytes_per_step": 1e-6, "peak_memory_bytes": 1e-9}


def length_of(record: Record) -> int:
    """The power of two nearest to the tokens of a prompt."""
    return max(SHORTEST, 2 ** round(log2(max(1, len(record.prompt_ids)))))


def by_length(
    target: Target, answers: Answers, plain: Answers, checks: Mapping[str, Check]
) -> list[dict[str, Any]]:
    """Figures for each length; none where no context is longer than `SHORTEST`.

    Args:
        target: whose tokenizer reads the answers.
        answers: of a method, by prompt.
        plain: of plain decoding.
        checks: how answers are scored, by prompt.
    """
    lengths = {prompt: length_of(answer) for prompt, answer in answers.items()}
    if max(lengths.values(), default=0) <= SHORTEST:
        return []
    return [
        _figures(target, {p: a for p, a in answers.items() if lengths[p] == length}, plain, checks)
        | {"context": length}
        for length in sorted(set(lengths.values()))
    ]


def _figures(
    target: Target, answers: Answers, plain: Answers, checks: Mapping[str, Check]
) -> dict[str, Any]:
    """One length's figures.

    kv_bytes_per_step: bytes of the target's keys and values that a step reads for a sequence,
    drafting with the target included; None where they were not counted. score: mean over the
    prompts that are scored.
    """
    traces = [answer.trace for answer in answers.values()]
    speeds, others = (
        [Speed(max(0, len(a.trace.ids) - 1), a.trace.decode_seconds) for a in chosen]
        for chosen in (answers.values(), [plain[prompt] for prompt in answers])
    )
    read = [count for trace in traces for count in trace.kv_bytes if count]
    scores = [
        score(target.tokenizer.decode(a.trace.ids, skip_special_tokens=True), checks[prompt])
        for prompt, a in answers.items()
        if prompt in checks
    ]
    counts = [count for trace in traces for count in trace.accepted]
    return {
        "prompts": len(answers),
        "prompt_tokens": fmean(len(answer.prompt_ids) for answer in answers.values()),
        "mean_accepted_tokens": metrics.mean_accepted_tokens(counts),
        "tokens_per_second": metrics.rate(speeds),
        "speedup": metrics.micro_speedup(speeds, others),
        "time_to_first_token": median(trace.time_to_first_token for trace in traces),
        "kv_bytes_per_step": fmean(read) if read else None,
        "peak_memory_bytes": max(answer.peak_memory for answer in answers.values()),
        "score": fmean(scores) if scores else None,
    }


def _with_lengths(methods: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    # Reports of earlier versions have no such key.
    return [method for method in methods if method.get("by_length")]


def plotted_lengths(methods: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    """The figures of `PLOTTED` that some method has."""
    entries = [entry for method in _with_lengths(methods) for entry in method["by_length"]]
    return {
        key: words
        for key, words in PLOTTED.items()
        if any(entry[key] is not None for entry in entries)
    }


def length_table(methods: Sequence[Mapping[str, Any]]) -> tuple[list[str], list[list[str]]]:
    """Header, and a line for each length and method; without lengths no lines."""
    lines = [
        (
            entry["context"],
            [
                f"{entry['context'] / 1024:g}k",
                method["name"],
                f"{entry['prompts']}",
                *(_cell(entry[key], _UNITS.get(key, 1.0)) for key in COLUMNS),
            ],
        )
        for method in _with_lengths(methods)
        for entry in method["by_length"]
    ]
    ordered = sorted(lines, key=lambda line: line[0])
    return ["context", "method", "prompts", *COLUMNS.values()], [cells for _, cells in ordered]


def _cell(value: float | None, unit: float) -> str:
    return "–" if value is None else f"{value * unit:.2f}"
