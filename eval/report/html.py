"""`report.html`: one self-contained page."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

from eval.metrics.speed_model import explanations, is_baseline
from eval.report import plots
from eval.report.answer_quality import (
    constraint_lines,
    control_lines,
    program_lines,
    quality_table,
)
from eval.report.by_length import length_table, plotted_lengths
from eval.report.load_curves import LATENCIES, curves, latency_by_throughput, load_table
from eval.report.load_curves import READING as LOAD_READING
from eval.report.load_curves import TITLE as LOAD
from eval.report.markdown import (
    COLUMNS,
    HALF,
    READING,
    caption,
    cells,
    drafting_table,
    export_lines,
    failures,
    half_table,
    idle_lines,
    noise_lines,
)
from eval.tasks.contamination import overlap_lines
from modules.runtime.html_page import html_page

STYLE = """
body { max-width: 72rem; }
h2 { font-size: 1.1rem; margin: 2.4rem 0 .6rem; }
p { margin: .4rem 0; max-width: 60rem; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
th, td { padding: .45rem .7rem; border-bottom: 1px solid var(--line); text-align: right;
  white-space: nowrap; }
th { color: var(--quiet); font-weight: 600; font-size: .85rem; }
td:first-child, th:first-child { text-align: left; }
tr.bad td { color: #b3261e; background: #fdf1f0; } .alarm { color: #b3261e; font-weight: 600; }
.pair { display: flex; flex-wrap: wrap; gap: 1.5rem; align-items: flex-start; }
.pair > figure { flex: 1 1 24rem; }
.lines { white-space: pre-line; }
.answer { white-space: pre-wrap; border: 1px solid var(--line); border-radius: 8px;
  padding: 1rem 1.2rem; }
.answer mark { background: #d5ebf7; color: inherit; border-radius: 2px;
  box-shadow: inset 0 -2px 0 #8cc4e4; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: .2rem 1.2rem; margin: 0; }
dt { color: var(--quiet); } dd { margin: 0; overflow-wrap: anywhere; }
"""


@dataclass(frozen=True)
class Sample:
    """A sample answer to an embedded prompt: pieces of text, with a flag for accepted drafts."""

    method: str
    question: str
    pieces: Sequence[tuple[str, bool]]


def page(report: Mapping[str, Any], sample: Sample | None) -> str:
    """The HTML page of a report."""
    # Everything in the order of the page; empty sections give no parts.
    measured = [method for method in report["methods"] if not is_baseline(method)]
    remarks = (
        *noise_lines(report),
        *export_lines(report["methods"]),
        *idle_lines(report["methods"]),
    )
    parts = [
        f'<p class="quiet">{escape(caption(report))}.</p>',
        *_alarms(report),
        main_table(report),
        *(f'<p class="quiet">{escape(line[0].upper() + line[1:])}.</p>' for line in remarks),
        *_loads(report["methods"]),
        *_pictures(report["methods"], measured),
        *_halves(report["methods"]),
        *_qualities(report["methods"]),
        *_drafting(report["methods"]),
        *_lengths(report["methods"]),
        *_predictions(report["methods"]),
        *_sample(sample),
        *_overlaps(report["methods"]),
        f'<h2>Reading</h2><p class="quiet">{escape(READING)}</p>',
        _facts(report),
    ]
    heading = "Speedup over autoregressive decoding"
    return html_page("Slipstream evaluation", parts, STYLE, heading)


def _alarms(report: Mapping[str, Any]) -> Iterable[str]:
    return (
        f'<p class="alarm">{escape(name)} promises the autoregressive row’s tokens and gave '
        "others.</p>"
        for name in failures(report)
    )


def main_table(report: Mapping[str, Any]) -> str:
    """The table of all methods, one line each."""
    return table(COLUMNS, [cells(method) for method in report["methods"]], set(failures(report)))


def table(header: Sequence[str], lines: Sequence[Sequence[str]], bad: Collection[str] = ()) -> str:
    """An HTML table; lines whose first cell is among `bad` are marked."""
    head = "".join(f"<th>{escape(column)}</th>" for column in header)
    body = "".join(
        f"<tr{' class=bad' if line[0] in bad else ''}>"
        + "".join(f"<td>{escape(cell)}</td>" for cell in line)
        + "</tr>"
        for line in lines
    )
    table = f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"
    return f'<div class="scroll">{table}</div>'


def _loads(methods: Sequence[Mapping[str, Any]]) -> Iterable[str]:
    header, lines = load_table(methods)
    if lines:
        yield f"<h2>{LOAD}</h2>" + table(header, lines)
        yield f'<p class="quiet">{escape(LOAD_READING)}.</p>'
    if curves(methods):
        pictures = "".join(
            f"<figure>{latency_by_throughput(methods, key)}</figure>" for key in LATENCIES
        )
        yield f'<h2>Latency against throughput</h2><div class="pair">{pictures}</div>'


def _halves(methods: Sequence[Mapping[str, Any]]) -> Iterable[str]:
    header, lines = half_table(methods)
    if lines:
        yield f"<h2>{HALF}</h2>" + table(header, lines)


def _qualities(methods: Sequence[Mapping[str, Any]]) -> Iterable[str]:
    header, lines = quality_table(methods)
    if lines:
        yield "<h2>Quality of answers</h2>" + table(header, lines)
        # The verdicts on controls, then the curves of lossy rules.
        remarks = (
            *control_lines(methods),
            *program_lines(methods),
            *constraint_lines(methods),
        )
        yield from (f"<p>{escape(line[0].upper() + line[1:])}.</p>" for line in remarks)
        if plots.relaxed(methods):
            yield (
                '<h2>What relaxing costs</h2><div class="pair">'
                + "".join(
                    f"<figure>{plots.trade_off(methods, key)}</figure>" for key in plots.GAINS
                )
                + "</div>"
            )


def _drafting(methods: Sequence[Mapping[str, Any]]) -> Iterable[str]:
    header, lines = drafting_table(methods)
    if lines:
        yield "<h2>Drafting</h2>" + table(header, lines)


def _lengths(methods: Sequence[Mapping[str, Any]]) -> Iterable[str]:
    header, lines = length_table(methods)
    if lines:
        yield "<h2>By length of the context</h2>" + table(header, lines) + '<div class="pair">'
        for key, words in plotted_lengths(methods).items():
            yield f"<figure><h2>{words}</h2>{plots.against_length(methods, key, words)}</figure>"
        yield "</div>"


def _pictures(
    methods: Sequence[Mapping[str, Any]], measured: Sequence[Mapping[str, Any]]
) -> Iterable[str]:
    # Bars by task.
    shown = plots.fastest(measured)
    left_out = (
        f"<p>The {len(shown)} fastest of {len(measured)}.</p>" if len(shown) < len(measured) else ""
    )
    if measured:
        picture = f"<figure>{plots.speedup_by_task(shown)}</figure>"
        yield f"<h2>Speedup by task, with 95% intervals</h2>{picture}{left_out}"
    # Acceptance, speed over variants, and time, side by side where the page is wide.
    yield '<div class="pair">'
    if any(method["acceptance_by_depth"] for method in shown):
        yield f"<figure><h2>Acceptance by depth</h2>{plots.acceptance_by_depth(shown)}</figure>"
    if any(len(method["accepted_length_histogram"] or ()) > 1 for method in shown):
        yield f"<figure><h2>Drafts accepted by a call</h2>{plots.accepted_lengths(shown)}</figure>"
    for key, words in (("batch_size", "batch size"), ("temperature", "temperature")):
        if plots.series(measured, key):
            picture = plots.speedup_against(measured, key)
            yield f"<figure><h2>Speedup against {words}</h2>{picture}</figure>"
    yield f"<figure><h2>Time per phase</h2>{plots.time_per_phase(methods)}</figure></div>"


def _predictions(methods: Sequence[Mapping[str, Any]]) -> Iterable[str]:
    lines = explanations(methods)
    if lines:
        yield "<h2>Predicted and measured</h2>"
        yield from (f"<p>{escape(line)}</p>" for line in lines)


def _overlaps(methods: Sequence[Mapping[str, Any]]) -> Iterable[str]:
    lines = overlap_lines(methods)
    if lines:
        yield "<h2>Prompts in the training data</h2>"
        yield from (f"<p>{escape(line)}</p>" for line in lines)


def _sample(sample: Sample | None) -> Iterable[str]:
    if sample is None:
        return
    # Share of the characters that accepted drafts gave.
    share = sum(len(text) for text, drafted in sample.pieces if drafted) / max(
        1, sum(len(t) for t, _ in sample.pieces)
    )
    yield f'<h2>A sample answer</h2><p class="lines">{escape(sample.question)}</p>'
    shaded_part = f"shaded: drafted and accepted, {share:.0%} of the text"
    yield f'<p class="quiet">{escape(sample.method)}; {shaded_part}.</p>'
    yield f'<div class="answer">{shaded(sample.pieces)}</div>'


def shaded(pieces: Sequence[tuple[str, bool]]) -> str:
    """Text with the drafted pieces marked; neighbouring drafts share one mark."""
    parts, open_mark = [], False
    for text, drafted in pieces:
        if drafted != open_mark:
            parts.append("<mark>" if drafted else "</mark>")
            open_mark = drafted
        parts.append(escape(text))
    return "".join(parts) + ("</mark>" if open_mark else "")


def _facts(report: Mapping[str, Any]) -> str:
    # All settings except for tasks, which have rows in the tables.
    environment, settings = report["environment"], report["settings"]
    packages = ", ".join(f"{name} {version}" for name, version in environment["packages"].items())
    facts = {
        "device": environment["device"],
        "system": environment["system"],
        "packages": packages,
        "revision": environment["git_revision"] or "unknown",
        "command": environment["command"],
        **{
            key.replace("_", " "): value
            for key, value in settings.items()
            if key not in ("tasks", "task_table")
        },
        "targets": ", ".join(
            f"{target['name']} {target['fingerprint']}" for target in report["targets"]
        ),
    }
    entries = "".join(
        f"<dt>{escape(key)}</dt><dd>{escape(str(value))}</dd>" for key, value in facts.items()
    )
    return f"<h2>Settings</h2><dl>{entries}</dl>"
