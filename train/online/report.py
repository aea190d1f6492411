"""The curve of acceptance over requests, while they come: TensorBoard, `report.json` and a page."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import TensorBoardLogger
from matplotlib.axes import Axes

from configs.command_line.outputs import write_whole
from eval.report import plots
from modules.runtime.html_page import html_page
from train.online.service import Watch
from train.online.update import Update

FIGURES, PAGE = "report.json", "report.html"
SECONDS = 10.0
"""Between two reports of a running service at least."""
WINDOW = 50
"""Requests that are averaged, or a tenth of all if those are fewer."""

POINTS = 1000
"""Of a curve in the picture, about."""

Line = Mapping[str, Any]


class Curve(Watch):
    """Logs every request and every update, and writes the report from time to time.

    Args:
        output: folder of the run.
        title: of the page.
    """

    def __init__(self, output: Path, title: str) -> None:
        self.output, self.title = output, title
        self.lines: list[Line] = []
        self.updates: list[tuple[str, Update]] = []
        self._logger = TensorBoardLogger(output, "online", "tensorboard", default_hp_metric=False)
        self._written = time.monotonic()

    def resumed(self, lines: Sequence[Line]) -> None:
        """Requests of an earlier part of the run, which are logged already."""
        self.lines += lines

    def answered(self, line: Line) -> None:
        """Log a request's acceptance, the mean of the last ones, and its tokens per call."""
        self.lines.append(line)
        name = line["drafter"]
        recent = [each for each in self.lines[-WINDOW:] if each["drafter"] == name]
        figures = {
            f"{name}/acceptance": acceptance([line]),
            f"{name}/acceptance_mean": acceptance(recent),
            f"{name}/tokens_per_call": tokens_per_call([line]),
        }
        shown = {key: value for key, value in figures.items() if value is not None}
        self._logger.log_metrics(shown, line["request"])

    def updated(self, name: str, update: Update) -> None:
        """Log an update, over the drafter's updates."""
        self.updates.append((name, update))
        figures = {f"{name}/loss": update.loss, f"{name}/gradient_norm": update.norm}
        self._logger.log_metrics(figures, update.number)
        if time.monotonic() - self._written > SECONDS:
            self.write()

    def write(self) -> None:
        """Write the report as it is now."""
        lines = list(self.lines)
        figures = summary(lines)
        page = html_page(self.title, [picture(lines), f"<pre>{escape(table(figures))}</pre>"])
        write_whole(
            {
                self.output / FIGURES: json.dumps(figures, indent=1) + "\n",
                self.output / PAGE: page,
            }
        )
        self._logger.save()
        self._written = time.monotonic()


def acceptance(lines: Sequence[Line]) -> float | None:
    """Expected accepted ÷ tested positions; None without any."""
    tested = sum(line["tested"] for line in lines)
    return sum(line["accepted"] for line in lines) / tested if tested else None


def tokens_per_call(lines: Sequence[Line]) -> float | None:
    """Tokens per call of the target, prefills left out; None without a call."""
    calls = sum(line["calls"] for line in lines)
    return sum(line["tokens"] - 1 for line in lines) / calls if calls else None


def window_of(lines: Sequence[Line]) -> int:
    """Requests that are averaged."""
    return min(WINDOW, max(1, len(lines) // 10))


def summary(lines: Sequence[Line]) -> dict[str, Any]:
    """Figures of all requests, and of each drafter's first and last ones."""
    window, drafters = window_of(lines), {}
    measures = {"acceptance": acceptance, "tokens_per_call": tokens_per_call}
    for name in dict.fromkeys(line["drafter"] for line in lines):
        served = [line for line in lines if line["drafter"] == name]
        drafters[name] = {
            "requests": len(served),
            "updates": served[-1]["updates"],
            **{
                key: {"first": measure(served[:window]), "last": measure(served[-window:])}
                for key, measure in measures.items()
            },
        }
    return {"requests": len(lines), "window": window, "drafters": drafters}


def table(figures: Mapping[str, Any]) -> str:
    """The figures as lines of text."""
    rows = [
        f"{name:<16}{each['requests']:>9}{each['updates']:>9}"
        + "".join(
            f"{value:>12.3f}" if value is not None else f"{'–':>12}"
            for key in ("acceptance", "tokens_per_call")
            for value in each[key].values()
        )
        for name, each in figures["drafters"].items()
    ]
    head = f"{'drafter':<16}{'requests':>9}{'updates':>9}{'acceptance':>12}{'at the end':>12}"
    window = f"first and last {figures['window']} requests of each drafter"
    return "\n".join([window, f"{head}{'per call':>12}{'at the end':>12}", *rows])


def picture(lines: Sequence[Line]) -> str:
    """Acceptance of each drafter over requests, averaged over the last ones; lines where the topic
    changes."""
    window = window_of(lines)

    def draw(axes: Axes) -> None:
        # 1. A curve for each drafter, of a limited number of points.
        for index, name in enumerate(dict.fromkeys(line["drafter"] for line in lines)):
            served = [line for line in lines if line["drafter"] == name and line["tested"]]
            ends = range(1, len(served) + 1, 1 + len(served) // POINTS)
            heights = [acceptance(served[max(0, end - window) : end]) or 0.0 for end in ends]
            places = [served[end - 1]["request"] for end in ends]
            colour = plots.COLOURS[index % len(plots.COLOURS)]
            axes.plot(places, heights, color=colour, label=name)
        # 2. Changes of the topic.
        for before, line in zip(lines, lines[1:]):
            if before["labels"].get("topic") != line["labels"].get("topic"):
                axes.axvline(line["request"], color="#39404d", linewidth=0.9, linestyle=(0, (4, 3)))
        axes.set_ylim(0, 1)
        axes.set_xlabel("request")
        axes.set_ylabel(f"acceptance, mean of {window}")
        axes.grid(axis="y", color="#e3e7ee")
        if lines:
            axes.legend(loc="lower right")

    return plots.svg(draw, 7.2, 3.6, "acceptance over requests")
