"""From records to the figures of each method."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import median
from typing import Any

from eval.methods.rows import Row
from eval.metrics import acceptance as metrics
from eval.metrics.acceptance import Identity, Speed
from eval.metrics.losslessness import Verdict, judge
from eval.metrics.repetition import KEY as LESS_REPETITIVE
from eval.metrics.repetition import less_repetitive
from eval.metrics.speed_model import Calls, latency_per_sequence, speed_model
from eval.report.answer_quality import Answered, Scoring, agreements, quality_figures
from eval.report.by_length import by_length
from eval.run.journal import Record
from modules.cost_model.latency_table import LatencyTable
from modules.decoding.decoder import Trace
from modules.decoding.timing import PHASES
from modules.target.gguf_name import title
from modules.target.kv_cache import PromptMemory

REMEMBERED = 2 << 30
"""Bytes of keys and values of long prompts that answers are compared after."""
Answers = Mapping[str, Record]
"""One row's answers by prompt id, passes folded into one."""


@dataclass(frozen=True)
class Summary:
    """One method's results. `figures` is its entry in the report; plots and the terminal use the
    rest.
    """

    row: Row
    figures: dict[str, Any]
    answers: Answers
    verdicts: Mapping[str, Verdict]


def summarise(
    rows: Sequence[Row],
    records: Sequence[Record],
    scoring: Scoring | None = None,
    most: int | None = None,
) -> list[Summary]:
    """Every row's summary, in the order of `rows`.

    The target's latency t(rows) is measured here for the speed model, once per target and batch
    size. Answers are scored according to `scoring`. `most` is the number of prompts in the largest
    batch: no larger one is timed.
    """
    with PromptMemory(REMEMBERED).used():
        return _summaries(rows, records, scoring or Scoring(), most)


def _summaries(
    rows: Sequence[Row], records: Sequence[Record], scoring: Scoring, most: int | None
) -> list[Summary]:
    # 1. Fold repeated passes, and time the target's calls.
    folded = {
        row.name: fold([record for record in records if record.row == row.name]) for row in rows
    }
    tables, scored = measure_tables(rows, folded, most), scoring.chosen(rows)
    # 2. Figures of speed, acceptance and identity.
    summaries = [
        _summary(
            row,
            folded[row.name],
            folded[row.baseline],
            folded[row.yardstick or row.baseline],
            records,
            tables.get((id(row.target), row.batch_size)),
        )
        for row in rows
    ]
    # 3. The same by length of the context.
    for row, summary in zip(rows, summaries, strict=True):
        plain = folded[row.baseline]
        summary.figures["by_length"] = by_length(
            row.target, folded[row.name], plain, scoring.usable
        )
    # 4. Quality, for the rows whose answers are scored.
    judged = {
        row.name: Answered(folded[row.name], agreements(row.target, folded[row.name]))
        for row in rows
        if row.name in scored
    }
    for row, summary in zip(rows, summaries, strict=True):
        if row.name in scored:
            summary.figures["quality"] |= quality_figures(
                row.target, judged[row.name], judged[row.baseline], scoring.usable
            )
    return summaries


def measure_tables(
    rows: Sequence[Row], folded: Mapping[str, Answers], most: int | None = None
) -> dict[tuple[int, int], LatencyTable]:
    """Latency t(rows) per sequence by target and batch size, up to the widest call, after a context
    of median length. Batch sizes above `most`, which no batch reached, are timed at `most`."""
    tables: dict[tuple[int, int], LatencyTable] = {}
    for row in rows:
        # All rows of this target and batch size, to find the widest call.
        alike = [
            other
            for other in rows
            if other.target is row.target and other.batch_size == row.batch_size
        ]
        answers = [answer for other in alike for answer in folded[other.name].values()]
        widths = [rows for answer in answers for rows in answer.trace.rows]
        key = id(row.target), row.batch_size
        if widths and key not in tables:
            # Half of an answer lies before an average call.
            context = median(
                len(answer.prompt_ids) + len(answer.trace.ids) // 2 for answer in answers
            )
            together = row.batch_size if most is None else min(row.batch_size, most)
            tables[key] = latency_per_sequence(row.target, max(widths), int(context), together)
    return tables


def fold(records: Sequence[Record]) -> dict[str, Record]:
    """One record per prompt: tokens of the first pass, median seconds and highest memory of all
    passes.
    """
    by_prompt: dict[str, list[Record]] = {}
    for record in sorted(records, key=lambda record: (record.repeat, record.again)):
        by_prompt.setdefault(record.prompt, []).append(record)
    return {prompt: _middle(runs) for prompt, runs in by_prompt.items()}


def _middle(runs: Sequence[Record]) -> Record:
    seconds = {phase: median(run.trace.seconds.get(phase, 0.0) for run in runs) for phase in PHASES}
    trace = replace(
        runs[0].trace,
        seconds=seconds,
        time_to_first_token=median(run.trace.time_to_first_token for run in runs),
    )
    return replace(runs[0], trace=trace, peak_memory=max(run.peak_memory for run in runs))


def speed(trace: Trace) -> Speed:
    """Tokens after the prefill's, and their decoding time in seconds."""
    return Speed(max(0, len(trace.ids) - 1), trace.decode_seconds)


def _summary(
    row: Row,
    answers: Answers,
    plain: Answers,
    standard: Answers,
    records: Sequence[Record],
    table: LatencyTable | None,
) -> Summary:
    # Greedy rows are compared token by token, and every row with the speed model.
    verdicts = _verdicts(row, answers, plain, standard) if row.greedy else {}
    model = None if table is None else speed_model(calls_of(answers), calls_of(plain), table)
    figures = {
        **_description(row),
        **_identity(row, answers, verdicts),
        **_speeds(answers, plain),
        "predicted_speedup": model["predicted"] if model else None,
        "speed_model": model,
        **_acceptance(answers),
        **_costs(row, answers),
        "quality": _quality(row, records, verdicts),
        LESS_REPETITIVE: _less_repetitive_half(answers, plain),
        "by_task": _by_task(answers, plain, verdicts),
        "by_length": [],
    }
    return Summary(row, {key: figures[key] for key in METHOD_KEYS}, answers, verdicts)


def _verdicts(row: Row, answers: Answers, plain: Answers, standard: Answers) -> dict[str, Verdict]:
    """Each answer compared with the yardstick's, or with the baseline's where a later turn's prompt
    differs from the yardstick's.
    """
    verdicts: dict[str, Verdict] = {}
    for prompt, answer in answers.items():
        same = standard[prompt].prompt_ids == answer.prompt_ids
        expected = (standard if same else plain)[prompt].trace.ids
        verdicts[prompt] = judge(row.target, answer.prompt_ids, expected, answer.trace.ids)
    return verdicts


def calls_of(answers: Answers) -> Calls:
    """The calls of some answers, as the speed model reads them."""
    traces = [answer.trace for answer in answers.values()]
    rows = [rows for trace in traces for rows in trace.rows]
    return Calls(emitted(answers), rows, phases(answers))


METHOD_KEYS = (
    "name",
    "target",
    "engine",
    "builder",
    "rule",
    "budget",
    "draft_precision",
    "temperature",
    "batch_size",
    "claims_lossless",
    "lossless",
    "prompts",
    "identical_outputs",
    "tie_divergences",
    "first_divergence",
    "new_tokens",
    "seconds",
    "tokens_per_second",
    "time_to_first_token",
    "speedup",
    "predicted_speedup",
    "speed_model",
    "mean_accepted_tokens",
    "mean_accepted_tokens_ci95",
    "acceptance_by_depth",
    "conditional_acceptance_by_depth",
    "accepted_length_histogram",
    "seconds_by_phase",
    "peak_memory_bytes",
    "drafter_parameters",
    "quality",
    LESS_REPETITIVE,
    "by_task",
    "by_length",
)
"""Keys of a method in `report.json`, schema 1, in order."""


def _description(row: Row) -> dict[str, Any]:
    return {
        "name": row.name,
        "target": title(row.target.name),
        "engine": row.engine,
        "builder": row.builder,
        "rule": row.rule,
        "budget": row.budget,
        "draft_precision": row.draft_precision,
        "temperature": row.sampling.temperature,
        "batch_size": row.batch_size,
        "claims_lossless": row.claims_lossless,
        "drafter_parameters": row.drafter_parameters,
    }


def _identity(row: Row, answers: Answers, verdicts: Mapping[str, Verdict]) -> dict[str, Any]:
    kinds = [verdict.identity for verdict in verdicts.values()]
    same, ties = kinds.count(Identity.IDENTICAL), kinds.count(Identity.TIE)
    return {
        "prompts": len(answers),
        "lossless": same + ties == len(answers) if row.greedy else None,
        "identical_outputs": same if row.greedy else None,
        "tie_divergences": ties if row.greedy else None,
        "first_divergence": _first_divergence(verdicts),
    }


def _first_divergence(verdicts: Mapping[str, Verdict]) -> dict[str, Any] | None:
    """The first true difference, else the first tie, as token ids without text."""
    for kind in (Identity.DIFFERENT, Identity.TIE):
        for prompt, verdict in verdicts.items():
            if verdict.identity is kind:
                return {
                    "prompt": prompt,
                    "position": verdict.position,
                    "expected": verdict.expected,
                    "actual": verdict.actual,
                    "logit_gap": verdict.gap,
                }
    return None


def _pairs(
    answers: Answers, plain: Answers, task: str | None = None
) -> tuple[list[Speed], list[Speed]]:
    prompts = [prompt for prompt, answer in answers.items() if task is None or answer.task == task]
    return [speed(answers[prompt].trace) for prompt in prompts], [
        speed(plain[prompt].trace) for prompt in prompts
    ]


def _speeds(answers: Answers, plain: Answers) -> dict[str, Any]:
    # Paired by prompt, so that intervals resample both together.
    method, baseline = _pairs(answers, plain)
    tasks = {task: _pairs(answers, plain, task) for task in tasks_of(answers)}
    interval = metrics.bootstrap_interval(method, baseline)
    return {
        "new_tokens": sum(len(answer.trace.ids) for answer in answers.values()),
        "seconds": sum(speed.seconds for speed in method),
        "tokens_per_second": metrics.rate(method),
        "time_to_first_token": median(
            answer.trace.time_to_first_token for answer in answers.values()
        ),
        "speedup": {
            "micro": metrics.micro_speedup(method, baseline),
            "macro": metrics.macro_speedup(tasks),
            "ci95": list(interval) if interval else None,
        },
    }


def tasks_of(answers: Answers) -> list[str]:
    """Task names in order of appearance."""
    return list(dict.fromkeys(answer.task for answer in answers.values()))


def emitted(answers: Answers) -> list[int]:
    """Emitted tokens of each target call, over all prompts."""
    return [count for answer in answers.values() for count in answer.trace.accepted]


def phases(answers: Answers) -> dict[str, float]:
    """Seconds by phase, summed over all prompts."""
    return {
        phase: sum(answer.trace.seconds[phase] for answer in answers.values()) for phase in PHASES
    }


def _acceptance(answers: Answers) -> dict[str, Any]:
    counts = emitted(answers)
    offered = [depth for answer in answers.values() for depth in answer.trace.offered]
    per_prompt = [
        Speed(sum(answer.trace.accepted), len(answer.trace.accepted)) for answer in answers.values()
    ]
    return {
        "mean_accepted_tokens": metrics.mean_accepted_tokens(counts),
        "mean_accepted_tokens_ci95": metrics.rate_interval(per_prompt),
        "acceptance_by_depth": metrics.acceptance_by_depth(counts),
        "conditional_acceptance_by_depth": metrics.conditional_acceptance_by_depth(counts, offered),
        "accepted_length_histogram": metrics.accepted_length_histogram(counts),
    }


def _costs(row: Row, answers: Answers) -> dict[str, Any]:
    return {
        "seconds_by_phase": phases(answers),
        "peak_memory_bytes": max(answer.peak_memory for answer in answers.values()),
    }


def _quality(
    row: Row, records: Sequence[Record], verdicts: Mapping[str, Verdict]
) -> dict[str, Any]:
    """Noise of a baseline (its second run against its first), flip rate at low precision, drafted
    nodes per call, and the decoder's own figures (`quality_of`)."""
    # The decoder's own figures, on top of those of the row.
    row_records = [record for record in records if record.row == row.name]
    quality_of = getattr(row.decoder, "quality_of", None)
    quality: dict[str, Any] = {
        **row.quality,
        **(quality_of([record.trace for record in row_records]) if quality_of else {}),
    }
    # Cost of drafting.
    nodes = [count for record in row_records if not record.again for count in record.trace.nodes]
    if any(nodes):
        drafting = sum(
            record.trace.seconds.get("draft", 0.0) for record in row_records if not record.again
        )
        quality["drafted_nodes_per_call"] = sum(nodes) / len(nodes)
        quality["draft_seconds_per_node"] = drafting / sum(nodes)
    # Share of tokens that a call of one row would choose differently.
    flips = [verdict.flips for verdict in verdicts.values() if verdict.flips is not None]
    if flips:
        quality["flip_rate"] = sum(flips) / len(flips)
    # Noise: the second run of the same prompts.
    again = [record for record in row_records if record.again]
    if again:
        second, first = _pairs(
            fold(again), fold([record for record in row_records if not record.again])
        )
        quality["noise"] = {
            "micro": metrics.micro_speedup(second, first),
            "ci95": metrics.bootstrap_interval(second, first),
        }
    return quality


def _less_repetitive_half(answers: Answers, plain: Answers) -> dict[str, Any] | None:
    """Figures on the half of the prompts whose plain answers repeat themselves least; None below
    two prompts.
    """
    chosen = less_repetitive({prompt: plain[prompt].trace.ids for prompt in answers})
    here = {prompt: answer for prompt, answer in answers.items() if prompt in chosen}
    if not here:
        return None
    method, baseline = _pairs(here, plain)
    return {
        "prompts": len(here),
        "speedup": metrics.micro_speedup(method, baseline),
        "ci95": metrics.bootstrap_interval(method, baseline),
        "mean_accepted_tokens": metrics.mean_accepted_tokens(emitted(here)),
    }


def _by_task(answers: Answers, plain: Answers, verdicts: Mapping[str, Verdict]) -> dict[str, Any]:
    return {task: _task(task, answers, plain, verdicts) for task in tasks_of(answers)}


def _task(
    task: str, answers: Answers, plain: Answers, verdicts: Mapping[str, Verdict]
) -> dict[str, Any]:
    # The same figures as over all prompts, on this task's.
    here = {prompt: answer for prompt, answer in answers.items() if answer.task == task}
    method, baseline = _pairs(here, plain)
    same = [
        verdicts[prompt].identity is Identity.IDENTICAL for prompt in here if prompt in verdicts
    ]
    return {
        "prompts": len(here),
        "new_tokens": sum(len(answer.trace.ids) for answer in here.values()),
        "seconds": sum(speed.seconds for speed in method),
        "tokens_per_second": metrics.rate(method),
        "speedup": metrics.micro_speedup(method, baseline),
        "ci95": metrics.bootstrap_interval(method, baseline),
        "mean_accepted_tokens": metrics.mean_accepted_tokens(emitted(here)),
        "identical_outputs": sum(same) if verdicts else None,
    }
