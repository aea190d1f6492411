"""The report of an evaluation: `report.json` (schema 1), `report.md`, and the tables on the
terminal.
"""

from __future__ import annotations

import os
import platform
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from rich.cells import cell_len
from rich.markup import escape
from rich.table import Table

from checkpoints.markdown import plain
from checkpoints.provenance import command_line, git_revision, package_versions
from checkpoints.reports import SCHEMA
from configs.command_line.redaction import redact
from eval.methods.rows import EXPORT_NOTES
from eval.metrics.repetition import KEY as LESS_REPETITIVE
from eval.metrics.speed_model import explanations, is_baseline
from eval.report.answer_quality import (
    constraint_lines,
    control_lines,
    program_lines,
    quality_table,
)
from eval.report.by_length import length_table
from eval.report.load_curves import READING as LOAD_READING
from eval.report.load_curves import TITLE as LOAD
from eval.report.load_curves import load_table
from eval.report.summary import Summary
from eval.tasks.contamination import overlap_lines
from modules.contracts.target import Target
from modules.cost_model.latency_table import processor_model
from modules.target.gguf_name import title

Figures = Mapping[str, Any]


def build_report(summaries: Sequence[Summary], settings: Mapping[str, Any]) -> dict[str, Any]:
    """The report as JSON-able values: environment, targets, settings, methods."""
    targets = {id(summary.row.target): summary.row.target for summary in summaries}
    return {
        "schema": SCHEMA,
        "environment": environment(),
        "targets": [describe(target) for target in targets.values()],
        "settings": redact(settings),
        "methods": [summary.figures for summary in summaries],
    }


def describe(target: Target) -> dict[str, Any]:
    """A target's entry in the report."""
    packed = f", {target.quantisation}" if target.quantisation else ""
    return {
        "name": title(target.name),
        "parameters": target.parameter_count,
        "dtype": str(target.dtype).removeprefix("torch.") + packed,
        "fingerprint": target.fingerprint(),
    }


def environment() -> dict[str, Any]:
    """Hardware, software, revision and command line of a run."""
    return {
        "device": device_name(),
        "cores": os.cpu_count(),
        "system": platform.platform(),
        "packages": package_versions(),
        "git_revision": git_revision(),
        "command": command_line(),
    }


def device_name() -> str:
    """The GPU's name, or the CPU's where the system reports it."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    return processor_model() or platform.processor() or platform.machine()


def failures(report: Mapping[str, Any]) -> list[str]:
    """Names of the methods that promise losslessness, decode greedily, and gave other tokens."""
    return [
        method["name"]
        for method in report["methods"]
        if method["claims_lossless"] and method["temperature"] == 0 and method["lossless"] is False
    ]


# -- words -----------------------------------------------------------------------------------------


def number(value: float | None, digits: int = 2, unit: str = "") -> str:
    """A figure, or a dash where there is none."""
    return "–" if value is None else f"{value:.{digits}f}{unit}"


def times(value: float | None) -> str:
    """A ratio with the sign ×, or a dash where there is none."""
    return number(value, 2, "×")


def interval(bounds: Sequence[float] | None) -> str:
    """A 95% interval with two digits, or a dash where there is none."""
    return "–" if bounds is None else f"{bounds[0]:.2f}–{bounds[1]:.2f}"


def lossless(method: Figures) -> str:
    """The verdict with the numbers of identical answers and ties, or `sampled`."""
    word = lossless_word(method)
    if method["lossless"] is None:
        return word
    ties = f", {method['tie_divergences']} ties" if method["tie_divergences"] else ""
    return f"{word} ({method['identical_outputs']}/{method['prompts']}{ties})"


def lossless_word(method: Figures) -> str:
    """`yes`, `NO` for a violated claim, `lossy` without a claim, `sampled` where tokens cannot be
    compared, `not compared` for a server's greedy text.
    """
    if method["lossless"] is None:
        return "sampled" if method["temperature"] else "not compared"
    return "yes" if method["lossless"] else "NO" if method["claims_lossless"] else "lossy"


def share(value: float | None) -> str:
    """A share in percent, or a dash where there is none."""
    return "–" if value is None else f"{value:.1%}"


OUTSIDE = "outside forwards"


def outside(method: Figures) -> float | None:
    """Share of decoding time outside the forward passes: accepting, committing and other work. None
    for an engine that does not report phases."""
    seconds = method["seconds_by_phase"]
    if not seconds["verify"]:
        return None
    decoding = sum(taken for phase, taken in seconds.items() if phase != "prefill")
    return (seconds["accept"] + seconds["commit"] + seconds["other"]) / decoding


COLUMNS = (
    "method",
    "speedup",
    "95% interval",
    "macro",
    "predicted",
    "τ",
    "tokens/s",
    "first token",
    "lossless",
)
_ONLY_ON_PAPER = ("macro", "predicted", "first token")


def cells(method: Figures) -> list[str]:
    """One line of the main table."""
    speedup = method["speedup"]
    return [
        method["name"],
        times(speedup["micro"]),
        interval(speedup["ci95"]),
        times(speedup["macro"]),
        times(method["predicted_speedup"]),
        number(method["mean_accepted_tokens"]),
        number(method["tokens_per_second"], 1),
        number(1000 * method["time_to_first_token"], 0, " ms"),
        lossless(method),
    ]


def noise_lines(report: Mapping[str, Any]) -> list[str]:
    """Ratio of the two runs of each baseline; smaller differences between methods mean nothing.

    An interval that excludes 1 shows that the machine changed between neighbouring runs.
    """
    noises = [(method["name"], method["quality"].get("noise")) for method in report["methods"]]
    unsteady = ", which excludes 1: the machine was not steady, measure again"
    return [
        f"noise: {name} against itself {number(noise['micro'], 3, '×')} (95% interval "
        f"{interval(noise['ci95'])}{'' if holds_one(noise) else unsteady})"
        for name, noise in noises
        if noise
    ]


def export_lines(methods: Sequence[Figures]) -> list[str]:
    """Differences between drafters and their exports to an engine, each with the rows affected."""
    notes = dict.fromkeys(
        note for method in methods for note in method["quality"].get(EXPORT_NOTES, ())
    )
    named = {
        note: [
            method["name"] for method in methods if note in method["quality"].get(EXPORT_NOTES, ())
        ]
        for note in notes
    }
    return [f"exported {', '.join(names)}: {note}" for note, names in named.items()]


def holds_one(noise: Mapping[str, Any]) -> bool:
    """Whether the interval of a baseline against itself contains 1; True without an interval."""
    return noise["ci95"] is None or noise["ci95"][0] <= 1.0 <= noise["ci95"][1]


def caption(report: Mapping[str, Any]) -> str:
    """One line with targets, prompts, lengths and device."""
    settings, method = report["settings"], report["methods"][0]
    targets = ", ".join(
        f"{target['name']} ({_size(target)}{target['dtype']})" for target in report["targets"]
    )
    tasks, limit = len(settings["tasks"]), settings["max_new_tokens"]
    questions = f"{method['prompts']} prompts in {tasks} tasks, up to {limit} new tokens"
    threads = "1 thread" if settings["threads"] == 1 else f"{settings['threads']} threads"
    return f"{targets}; {questions}; {report['environment']['device']}, {threads}"


def _size(target: Mapping[str, Any]) -> str:
    """Millions of parameters, where they are known: a served target's are not."""
    return f"{target['parameters'] / 1e6:.0f}M, " if target["parameters"] else ""


# -- terminal --------------------------------------------------------------------------------------

_FOLDED = 16
"""Least width in characters of a folded text column before other columns are left out."""


def main_table(report: Mapping[str, Any], width: int = 120) -> Table:
    """The Rich table of all methods, at most `width` characters wide. Where not all columns fit,
    names are folded, then tokens/s and the interval are left out."""
    # The terminal shows fewer columns than the files.
    shown = [index for index, column in enumerate(COLUMNS) if column not in _ONLY_ON_PAPER]
    rows = [[cells(method)[index] for index in shown] for method in report["methods"]]
    bad = set(failures(report))
    styles = ["red" if method["name"] in bad else None for method in report["methods"]]
    return fitted_table(
        "Speedup over autoregressive decoding",
        [COLUMNS[index] for index in shown],
        rows,
        styles,
        width,
        spare=("tokens/s", "95% interval"),
        words=("method", "lossless"),
        caption=caption(report),
    )


def fitted_table(
    title: str,
    header: Sequence[str],
    rows: Sequence[Sequence[str]],
    styles: Sequence[str | None],
    width: int,
    spare: Sequence[str],
    words: Sequence[str],
    caption: str = "",
) -> Table:
    """A Rich table whose figures are never truncated.

    Args:
        title, caption: text above and below.
        header: names of the columns.
        rows, styles: cells, and the style of each row.
        width: available characters.
        spare: columns to leave out, in this order, until the rest fits.
        words: text columns, which may be folded.
    """
    # 1. The least width of each column; text may be folded.
    columns = zip(header, *rows, strict=True)
    widths = {name: max(map(cell_len, (name, *inside))) for name, *inside in columns}
    least = {name: min(widths[name], _FOLDED) if name in words else widths[name] for name in header}
    # 2. Leave out spare columns until the rest fits.
    shown = list(header)
    for name in spare:
        if sum(least[column] + 3 for column in shown) + 1 > width:
            shown.remove(name)
    # 3. Build the table with what remains.
    table = Table(title=title, caption=escape(caption), title_justify="left")
    for name in shown:
        folded = name in words
        table.add_column(
            name,
            justify="left" if folded else "right",
            overflow="fold",
            no_wrap=not folded,
            min_width=None if folded else widths[name],
        )
    places = [header.index(name) for name in shown]
    for row, style in zip(rows, styles, strict=True):
        table.add_row(*(escape(row[place]) for place in places), style=style)
    return table


# -- markdown --------------------------------------------------------------------------------------


def markdown(report: Mapping[str, Any]) -> str:
    """`report.md`: the main table, speedup by task, time per phase, and how to read them."""
    # Cells of the tables, one line a method.
    methods = report["methods"]
    tasks, phases = list(methods[0]["by_task"]), list(methods[0]["seconds_by_phase"])
    by_task = [
        [method["name"], *(_task_cell(method, task) for task in tasks)] for method in methods
    ]
    by_phase = [
        [
            method["name"],
            *(number(method["seconds_by_phase"][p]) for p in phases),
            share(outside(method)),
        ]
        for method in methods
    ]
    # Sections in order; those without content are left out.
    return (
        "\n\n".join(
            [
                "# Evaluation",
                plain(caption(report)) + ".",
                *map(plain, noise_lines(report)),
                _table(COLUMNS, [cells(m) for m in methods]),
                *(
                    f"**{plain(name)} promises the autoregressive row's tokens and gave others.**"
                    for name in failures(report)
                ),
                *(f"{plain(line)}." for line in export_lines(methods)),
                *(f"{plain(line)}." for line in idle_lines(methods)),
                *_loads(methods),
                *_halves(methods),
                *_predictions(methods),
                *_qualities(methods),
                *_drafting(methods),
                *_tasks(report["settings"]),
                *_lengths(methods),
                "## Speedup by task",
                _table(["method", *tasks], by_task),
                *_acceptance(methods),
                "## Seconds by phase",
                _table(["method", *phases, OUTSIDE], by_phase),
                *_overlaps(methods),
                "## Reading",
                READING,
            ]
        )
        + "\n"
    )


HALF = "On the less repetitive half of the prompts"
READING = """\
Speedup is tokens per second of decoding (without prefill) divided by that of the autoregressive row
on the same prompts, in the same process, interleaved prompt by prompt. The interval is a paired
bootstrap over prompts, macro the mean over tasks. τ is tokens per verification call, including its
bonus token, without tokens after an answer's end. Predicted is τ times t(1) over t(rows) plus
drafting, where t is the target's time for a call of that many rows, measured separately; the
factors under "Predicted and measured" explain the difference to the measured speedup, and a factor
below 1 is lost time. Lossless: token ids identical to the autoregressive row's. A tie is a first
divergence between two tokens whose teacher-forced logits differ by at most 0.001; in bfloat16
(float16), where rounding depends on the width of a call, it is an answer all of whose tokens are
within 0.5 (0.0625) of the largest logit. The less repetitive half are the prompts whose plain
answers repeat fewest of their runs of four tokens, so that lookup has the least to copy. On a CPU,
peak memory is that of the whole process."""


def half_table(methods: Sequence[Figures]) -> tuple[list[str], list[list[str]]]:
    """Header and lines of the methods on the less repetitive half, without baselines; no lines
    where no half was measured.
    """
    halves = [
        (method["name"], method[LESS_REPETITIVE])
        for method in methods
        if method.get(LESS_REPETITIVE) and not is_baseline(method)
    ]
    return ["method", "speedup", "95% interval", "τ", "prompts"], [
        [
            name,
            times(half["speedup"]),
            interval(half["ci95"]),
            number(half["mean_accepted_tokens"]),
            str(half["prompts"]),
        ]
        for name, half in halves
    ]


def _loads(methods: Sequence[Figures]) -> list[str]:
    header, rows = load_table(methods)
    return [f"## {LOAD}", _table(header, rows), LOAD_READING + "."] if rows else []


def _halves(methods: Sequence[Figures]) -> list[str]:
    header, rows = half_table(methods)
    return [f"## {HALF}", _table(header, rows)] if rows else []


def _predictions(methods: Sequence[Figures]) -> list[str]:
    lines = explanations(methods)
    return (
        ["## Predicted and measured", "\n".join(f"- {plain(line)}" for line in lines)]
        if lines
        else []
    )


def _overlaps(methods: Sequence[Figures]) -> list[str]:
    lines = overlap_lines(methods)
    return (
        ["## Prompts in the training data", "\n".join(f"- {plain(line)}" for line in lines)]
        if lines
        else []
    )


def idle_lines(methods: Sequence[Figures]) -> list[str]:
    """A line for each method whose measured budget is 0."""
    return [
        f"{method['name']} drafts nothing: on this device no tree of it promised more than plain "
        "decoding (budget: auto)"
        for method in methods
        if method["builder"] and method["budget"] == 0
    ]


def _qualities(methods: Sequence[Figures]) -> list[str]:
    header, rows = quality_table(methods)
    return (
        [
            "## Quality of answers",
            _table(header, rows),
            *map(plain, control_lines(methods)),
            *program_lines(methods),
            *map(plain, constraint_lines(methods)),
        ]
        if rows
        else []
    )


def drafting_table(methods: Sequence[Figures]) -> tuple[list[str], list[list[str]]]:
    """Header and lines of the methods that draft: drafted nodes per call and their time."""
    header = [
        "method",
        "drafted tokens a call",
        "ms a call",
        "ms a drafted token",
        "τ",
        "drafter's parameters",
    ]
    # Methods whose drafting was timed.
    drafting = [
        (method, method["quality"])
        for method in methods
        if "draft_seconds_per_node" in method["quality"]
    ]
    return header, [
        [
            method["name"],
            number(quality["drafted_nodes_per_call"]),
            number(1e3 * quality["draft_seconds_per_node"] * quality["drafted_nodes_per_call"]),
            number(1e3 * quality["draft_seconds_per_node"]),
            number(method["mean_accepted_tokens"]),
            f"{method['drafter_parameters'] or 0:,}",
        ]
        for method, quality in drafting
    ]


def _drafting(methods: Sequence[Figures]) -> list[str]:
    header, rows = drafting_table(methods)
    return ["## Drafting", _table(header, rows)] if rows else []


def _lengths(methods: Sequence[Figures]) -> list[str]:
    header, rows = length_table(methods)
    return ["## By length of the context", _table(header, rows)] if rows else []


def task_table(settings: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Header and lines of the tasks' prompts, languages, modes of thinking and metrics; no lines
    where nothing is said of any."""
    described = settings.get("task_table", {})
    said = any(entry[key] for entry in described.values() for key in _SAID_OF_TASKS)
    lines = [
        [task, str(entry["prompts"]), *(entry[key] or "–" for key in _SAID_OF_TASKS)]
        for task, entry in described.items()
    ]
    return ["task", "prompts", "language", "thinking", "scored by"], lines if said else []


_SAID_OF_TASKS = ("language", "thinking", "metric")


def _tasks(settings: Mapping[str, Any]) -> list[str]:
    header, lines = task_table(settings)
    return ["## Tasks", _table(header, lines)] if lines else []


def _acceptance(methods: Sequence[Figures]) -> list[str]:
    rows = [
        [m["name"], *map(number, m["acceptance_by_depth"])]
        for m in methods
        if m["acceptance_by_depth"]
    ]
    depths = range(1, max(map(len, rows), default=1))
    title = "## Share of calls that accept at least d drafts"
    return [title, _table(["method", *map(str, depths)], rows)] if rows else []


def _task_cell(method: Figures, task: str) -> str:
    entry = method["by_task"].get(task)
    return "–" if entry is None else f"{number(entry['speedup'], 2)} ({interval(entry['ci95'])})"


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [
        header,
        ["---"] * len(header),
        *(list(row) + [""] * (len(header) - len(row)) for row in rows),
    ]
    return "\n".join("| " + " | ".join(plain(cell) for cell in line) + " |" for line in lines)
