"""The figures of one component in an evaluation's `report.json`, for its model card."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from checkpoints.markdown import plain
from checkpoints.provenance import Provenance
from checkpoints.reports import load_report
from configs.command_line.redaction import portable
from configs.command_line.shapes import Maybe
from modules.runtime.files import read_object

SCHEMA = 1
BASELINES = ("autoregressive", "hf_generate")
"""Rows of plain decoding, in this project's loop and in Hugging Face's."""
_VARIANT = re.compile(r"( at [\d.]+)?(, \d+ at once)?$")
"""Suffix of rows at other temperatures and batch sizes."""
Row = Mapping[str, Any]
_NEEDED = {
    "settings": {"tasks": [str], "max_new_tokens": int, "threads": int},
    "methods": [
        {
            "identical_outputs": Maybe(int),
            "tie_divergences": Maybe(int),
            "drafter_parameters": Maybe(int),
        }
    ],
}
"""Keys that a card needs besides those of every report."""


@dataclass(frozen=True)
class Measurement:
    """The part of a report that a card shows; figures are the report's own, unrounded.

    Paths of files on this machine are left out (`portable`).

    rows: of the component, at every temperature and batch size.
    baselines: rows of plain decoding.
    settings, environment, targets: as in the report.
    """

    rows: Sequence[Row]
    baselines: Sequence[Row]
    settings: Mapping[str, Any]
    environment: Mapping[str, Any]
    targets: Sequence[Mapping[str, Any]]


def measurement(
    file: Path, name: str, parameters: int, provenance: Provenance, row: str | None = None
) -> Measurement:
    """Read a report, and select the rows of a component.

    The report must contain the target that the component was trained for. Components that adapt
    their target are compared with plain decoding of the unchanged target, so it is in their reports
    too.

    Args:
        file: `report.json`.
        name: the component's default name in a report: its run's folder.
        parameters: the component's number of trained parameters.
        provenance: its target must be in the report, and it must be older than the report.
        row: the name of its rows, if it is not the default.

    Raises:
        ValueError: a missing report or another schema; a report of another drafter or target, or of
            an earlier training.
    """
    report = _read(file)
    _refuse_others(report, file, provenance)
    # 1. Rows by name, or by size if the name is not there.
    rows = [method for method in report["methods"] if _base(method) == (row or name)]
    if not rows and row is None:
        rows = _by_size(report["methods"], parameters)
    if not rows:
        names = ", ".join(dict.fromkeys(map(_base, report["methods"])))
        raise ValueError(
            f"report {str(file)!r} has no row {row or name!r}: give --row, one of {names}"
        )
    # 2. They must be this component's (0: measured without its drafter's size).
    wrong = next((each for each in rows if each["drafter_parameters"] not in (0, parameters)), None)
    if wrong is not None:
        raise ValueError(
            f"report {str(file)!r}: row {wrong['name']!r} has {wrong['drafter_parameters']} "
            f"parameters, this component {parameters}: give its own report with --report, or its "
            "row with --row"
        )
    baselines = [
        method
        for method in report["methods"]
        if method["name"].startswith(BASELINES) and method not in rows
    ]
    shown = rows, baselines, report["settings"], report["environment"], report["targets"]
    return Measurement(*portable(shown))


def _read(file: Path) -> dict[str, Any]:
    if not file.is_file():
        raise ValueError(f"report {str(file)!r} does not exist: give a report.json")
    report = read_object(file)
    missing = {"schema", "methods", "settings", "environment", "targets"} - set(report)
    if missing or report["schema"] != SCHEMA:
        raise ValueError(
            f"report {str(file)!r} is no whole report of schema {SCHEMA}: give one that eval.py "
            "wrote"
        )
    return load_report(file, _NEEDED)


def _refuse_others(report: Mapping[str, Any], file: Path, provenance: Provenance) -> None:
    wanted, targets = provenance.target, report["targets"]
    if wanted["fingerprint"] not in {target["fingerprint"] for target in targets}:
        named = (
            ", ".join(
                f"{target['name']} with weights {target['fingerprint']}" for target in targets
            )
            or "no target"
        )
        raise ValueError(
            f"report {str(file)!r} is about a {named}, this component was trained for "
            f"{wanted['name']} with weights {wanted['fingerprint']}: give its own report with "
            "--report"
        )
    # A report of an earlier training has the same target, but is older.
    written = datetime.fromtimestamp(file.stat().st_mtime, timezone.utc)
    if written < datetime.fromisoformat(provenance.created):
        raise ValueError(
            f"report {str(file)!r} is older than the component ({provenance.created}): measure "
            "again with eval.py, or leave it out with --report none"
        )


def _base(row: Row) -> str:
    return _VARIANT.sub("", row["name"])


def _by_size(rows: Sequence[Row], parameters: int) -> list[Row]:
    """Rows of the only drafter of that size, whatever its name."""
    matches = [row for row in rows if row["drafter_parameters"] == parameters]
    return matches if len({_base(row) for row in matches}) == 1 and parameters else []


# -- text of a card --------------------------------------------------------------------------------

_COLUMNS = ("row", "speedup", "95 % interval", "τ", "tokens/s", "same tokens as plain decoding")


def table(measured: Measurement) -> str:
    """Markdown table of the baselines, then the component's rows."""
    lines = [f"| {' | '.join(_COLUMNS)} |", "|---|---:|---:|---:|---:|---|"]
    lines += [f"| {' | '.join(cells(row))} |" for row in (*measured.baselines, *measured.rows)]
    return "\n".join(lines)


def cells(row: Row) -> list[str]:
    """Cells of a row, in the order of `_COLUMNS`."""
    speedup, tau = row["speedup"], row["mean_accepted_tokens"]
    bounds = speedup["ci95"]
    return [
        plain(row["name"]),
        _number(speedup["micro"], "×"),
        "–" if bounds is None else f"{bounds[0]:.2f}–{bounds[1]:.2f}",
        _number(tau),
        f"{row['tokens_per_second']:.1f}",
        _same(row),
    ]


def _number(value: float | None, unit: str = "") -> str:
    return "–" if value is None else f"{value:.2f}{unit}"


def _same(row: Row) -> str:
    if row["lossless"] is None:
        return "sampled: cannot be compared"
    ties = f", {row['tie_divergences']} at ties" if row["tie_divergences"] else ""
    lossy = "" if row["claims_lossless"] else " (a lossy rule)"
    return f"{row['identical_outputs']} of {row['prompts']}{ties}{lossy}"


def conditions(measured: Measurement) -> str:
    """A paragraph with target, prompts, device and the meaning of the figures."""
    settings, where = measured.settings, measured.environment
    targets = ", ".join(
        plain(f"{target['name']} in {target['dtype']}") for target in measured.targets
    )
    noise = [row["quality"]["noise"] for row in measured.baselines if row["quality"].get("noise")]
    repeatability = (
        ""
        if not noise or noise[0]["micro"] is None
        else (f" Plain decoding measured twice differed from itself by {noise[0]['micro']:.2f}×.")
    )
    tasks = plain(", ".join(settings["tasks"]))
    prompts = f"{measured.rows[0]['prompts']} prompts ({plain(dataset(measured))}: {tasks})"
    limit, device, threads = map(
        plain, (settings["max_new_tokens"], where["device"], settings["threads"])
    )
    return (
        f"Target {targets}; {prompts}, up to {limit} new tokens; {device}, {threads} threads. "
        "Speedup is over `autoregressive`, plain decoding in the same process, with a paired "
        "bootstrap interval; τ is the mean number of tokens per target call, bonus token "
        f"counted.{repeatability}"
    )


def dataset(measured: Measurement) -> str:
    """Names of the prompt files, without folders."""
    return ", ".join(Path(name).stem for name in measured.settings.get("prompts") or ["prompts"])
