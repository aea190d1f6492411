"""The report's plots, as inline SVG."""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

Figures = Mapping[str, Any]
COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#8C6BB1", "#7F7F7F")
"""Okabe and Ito's palette, which colour-blind readers can distinguish."""
PHASE_COLOURS = {
    "draft": "#E69F00",
    "verify": "#0072B2",
    "accept": "#009E73",
    "commit": "#CC79A7",
    "other": "#B8BDC6",
}
_STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",
    "text.parse_math": False,
    "font.family": "sans-serif",
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "#8a93a3",
    "axes.axisbelow": True,
    "legend.frameon": False,
}


def svg(draw: Callable[[Axes], None], width: float, height: float, name: str) -> str:
    """An SVG element of what `draw` plots on one pair of axes; text is not turned into paths."""
    # A fixed salt and no date, so that equal reports give equal files.
    with matplotlib.rc_context({**_STYLE, "svg.hashsalt": name}):
        figure = Figure(figsize=(width, height), layout="constrained")
        draw(figure.add_subplot())
        stream = io.StringIO()
        figure.savefig(
            stream, format="svg", transparent=True, metadata={"Date": None, "Creator": None}
        )
    text = stream.getvalue()
    return text[text.index("<svg") :]


def figure_of(axes: Axes) -> Figure:
    """The figure that contains the axes."""
    figure = axes.figure
    assert isinstance(figure, Figure)
    return figure


def palette(methods: Sequence[Figures]) -> dict[str, str]:
    """One colour per method, the same in every picture."""
    return {method["name"]: COLOURS[index % len(COLOURS)] for index, method in enumerate(methods)}


def fastest(methods: Sequence[Figures], most: int = len(COLOURS)) -> list[Figures]:
    """The methods in their order; of more than `most`, only those with the greatest speedups."""
    ranked = sorted(methods, key=lambda method: method["speedup"]["micro"] or 0.0, reverse=True)
    fastest_names = {method["name"] for method in ranked[:most]}
    return [method for method in methods if method["name"] in fastest_names]


def speedup_by_task(methods: Sequence[Figures]) -> str:
    """Grouped bars with 95% intervals; the first group is all tasks together."""
    groups, colours = ["all", *methods[0]["by_task"]], palette(methods)

    def draw(axes: Axes) -> None:
        # Bars of one group stand side by side around its centre.
        width = 0.8 / len(methods)
        for index, method in enumerate(methods):
            heights, errors = _bars(method, groups)
            places = np.arange(len(groups)) + (index - (len(methods) - 1) / 2) * width
            axes.bar(
                places,
                heights,
                width * 0.92,
                yerr=errors,
                label=method["name"],
                color=colours[method["name"]],
                error_kw={"elinewidth": 0.8, "ecolor": "#39404d"},
            )
        # The line of plain decoding, and a label for each group.
        axes.axhline(1.0, color="#39404d", linewidth=0.9, linestyle=(0, (4, 3)))
        axes.set_xticks(
            range(len(groups)),
            groups,
            rotation=30 if len(groups) > 6 else 0,
            ha="right" if len(groups) > 6 else "center",
        )
        axes.set_ylabel("speedup over autoregressive")
        figure_of(axes).legend(loc="outside upper left", ncols=4)

    return svg(draw, min(14.0, 3.0 + 0.32 * len(groups) * max(2, len(methods))), 3.6, "speedup")


def _bars(method: Figures, groups: Sequence[str]) -> tuple[list[float], np.ndarray]:
    entries = [(method["speedup"]["micro"], method["speedup"]["ci95"])]
    entries += [
        (method["by_task"][task]["speedup"], method["by_task"][task]["ci95"]) for task in groups[1:]
    ]
    heights = [value or 0.0 for value, _ in entries]
    return heights, _errors(heights, [interval for _, interval in entries])


def _errors(heights: Sequence[float], intervals: Sequence[Any]) -> np.ndarray:
    """Distances from the heights to both ends of their intervals [2, N]; 0 without an interval."""
    bounds = [bounds or (height, height) for height, bounds in zip(heights, intervals)]
    errors = [[max(0.0, h - low), max(0.0, high - h)] for h, (low, high) in zip(heights, bounds)]
    return np.array(errors).T


def _shares_by_count(axes: Axes, across: str, up: str) -> None:
    """Axes of shares (0 to 1) over whole numbers."""
    axes.set_ylim(0, 1)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_xlabel(across)
    axes.set_ylabel(up)
    axes.grid(axis="y", color="#e3e7ee")
    axes.legend(loc="upper right")


def acceptance_by_depth(methods: Sequence[Figures]) -> str:
    """Marginal (solid) and conditional (dashed) acceptance of the methods that report it."""
    colours = palette(methods)

    def draw(axes: Axes) -> None:
        # Two curves per method in its colour.
        for method in (method for method in methods if method["acceptance_by_depth"]):
            for key, style, label in (
                ("acceptance_by_depth", "-", method["name"]),
                ("conditional_acceptance_by_depth", "--", None),
            ):
                shares = method[key]
                axes.plot(
                    range(1, len(shares) + 1),
                    shares,
                    style,
                    marker="o",
                    markersize=3,
                    label=label,
                    color=colours[method["name"]],
                )
        across = "draft depth (solid: of all calls; dashed: of calls that got there)"
        _shares_by_count(axes, across, "accepted")

    return svg(draw, 5.6, 3.4, "acceptance")


def accepted_lengths(methods: Sequence[Figures]) -> str:
    """Share of calls that accepted 0, 1, 2, … drafts, for the methods that accepted any."""
    colours = palette(methods)

    def draw(axes: Axes) -> None:
        # Methods that never accepted a draft have no curve.
        for method in (
            method for method in methods if len(method["accepted_length_histogram"] or ()) > 1
        ):
            counts = np.array(method["accepted_length_histogram"])
            axes.plot(
                range(len(counts)),
                counts / counts.sum(),
                marker="o",
                markersize=3,
                drawstyle="steps-mid",
                label=method["name"],
                color=colours[method["name"]],
            )
        _shares_by_count(axes, "drafts accepted by a call", "share of calls")

    return svg(draw, 5.6, 3.4, "lengths")


SUFFIXES = {"batch_size": ", {:g} at once", "temperature": " at {:g}"}
"""Suffix of a row's name in another variant."""


def series(methods: Sequence[Figures], key: str) -> dict[str, list[Figures]]:
    """Rows that differ only in `key` (of `SUFFIXES`), by their common name; only those with several
    values.
    """
    groups: dict[str, list[Figures]] = {}
    for method in methods:
        name = method["name"].replace(SUFFIXES[key].format(method[key] or 0), "")
        groups.setdefault(name, []).append(method)
    return {
        name: sorted(rows, key=lambda row: row[key])
        for name, rows in groups.items()
        if len(rows) > 1
    }


def speedup_against(methods: Sequence[Figures], key: str) -> str:
    """Speedup with 95% intervals over the batch size or the temperature."""
    curves = series(methods, key)

    def draw(axes: Axes) -> None:
        # One curve per method over its variants.
        for index, (name, rows) in enumerate(curves.items()):
            heights = [row["speedup"]["micro"] or 0.0 for row in rows]
            axes.errorbar(
                [row[key] for row in rows],
                heights,
                _errors(heights, [row["speedup"]["ci95"] for row in rows]),
                marker="o",
                markersize=3,
                elinewidth=0.8,
                label=name,
                color=COLOURS[index % len(COLOURS)],
            )
        # The line of plain decoding, and a tick for each value that was measured.
        axes.axhline(1.0, color="#39404d", linewidth=0.9, linestyle=(0, (4, 3)))
        axes.set_xticks(sorted({row[key] for rows in curves.values() for row in rows}))
        axes.set_xlabel("prompts decoded together" if key == "batch_size" else "temperature")
        axes.set_ylabel("speedup over autoregressive")
        figure_of(axes).legend(loc="outside upper left", ncols=3)

    return svg(draw, 5.6, 3.4, key)


def against_length(methods: Sequence[Figures], key: str, words: str) -> str:
    """A figure of every method over the length of the context, in tokens."""
    colours = palette(methods)

    def draw(axes: Axes) -> None:
        for method in methods:
            entries = [entry for entry in method["by_length"] if entry.get(key) is not None]
            axes.plot(
                [entry["context"] for entry in entries],
                [entry[key] for entry in entries],
                marker="o",
                markersize=3,
                label=method["name"],
                color=colours[method["name"]],
            )
        # A tick for each length.
        places = sorted({entry["context"] for m in methods for entry in m["by_length"]})
        axes.set_xscale("log", base=2)
        axes.set_xticks(places, [f"{place / 1024:g}k" for place in places])
        axes.minorticks_off()
        axes.set_ylim(bottom=0)
        axes.set_xlabel("context, tokens")
        axes.set_ylabel(words)
        figure_of(axes).legend(loc="outside upper left", ncols=3)

    return svg(draw, 5.6, 3.4, f"length {key}")


GAINS = {
    "mean_accepted_tokens": "tokens per target call (τ)",
    "speedup": "speedup over autoregressive",
}
"""What a relaxed rule gains, by key of a method."""


def relaxed(methods: Sequence[Figures]) -> dict[str, list[Figures]]:
    """Lossy rows whose quality was measured, by kind of rule and tree, in order of gain."""
    curves: dict[str, list[Figures]] = {}
    for method in methods:
        if not method["claims_lossless"] and method["quality"].get("likelihood_against_plain"):
            curves.setdefault(
                f"{(method['rule'] or method['name']).split()[0]}, {method['builder']}", []
            ).append(method)
    return {
        name: sorted(rows, key=lambda row: _gain(row, "mean_accepted_tokens"))
        for name, rows in curves.items()
    }


def trade_off(methods: Sequence[Figures], key: str) -> str:
    """Log likelihood per token against plain decoding, over a gain (of `GAINS`): a curve for each
    kind of rule over its settings, lossless rows at zero."""
    curves = relaxed(methods)

    def draw(axes: Axes) -> None:
        # Lossy rows: a curve for each kind of rule.
        for index, (name, rows) in enumerate(curves.items()):
            _curve(axes, name, rows, key, COLOURS[index % len(COLOURS)])
        # Lossless rows: stars at zero.
        for method in methods:
            if method["claims_lossless"] and method["builder"]:
                axes.plot(_gain(method, key), 0.0, marker="*", markersize=9, color="#39404d")
                axes.annotate(
                    method["name"],
                    (_gain(method, key), 0.0),
                    (3, 4),
                    textcoords="offset points",
                    fontsize=7,
                )
        axes.axhline(0.0, color="#39404d", linewidth=0.9, linestyle=(0, (4, 3)))
        axes.set_xlabel(GAINS[key])
        axes.set_ylabel("log likelihood per token,\nagainst plain decoding")
        figure_of(axes).legend(loc="outside upper left", ncols=2)

    return svg(draw, 5.6, 3.8, f"trade-off {key}")


def _curve(axes: Axes, name: str, rows: Sequence[Figures], key: str, colour: str) -> None:
    # Differences with their intervals; without an interval the bar has no length.
    entries = [row["quality"]["likelihood_against_plain"] for row in rows]
    places, heights = [_gain(row, key) for row in rows], [entry["difference"] for entry in entries]
    bounds = [entry["ci95"] or (height, height) for entry, height in zip(entries, heights)]
    errors = [
        [h - low for h, (low, _) in zip(heights, bounds)],
        [high - h for h, (_, high) in zip(heights, bounds)],
    ]
    axes.errorbar(
        places,
        heights,
        np.maximum(errors, 0),
        marker="o",
        markersize=3,
        elinewidth=0.8,
        label=name,
        color=colour,
    )
    # Every point carries its row's name.
    for row, place, height in zip(rows, places, heights):
        axes.annotate(
            row["name"],
            (place, height),
            (3, 3),
            textcoords="offset points",
            fontsize=7,
            color=colour,
        )


def _gain(method: Figures, key: str) -> float:
    value = method[key]
    return float((value["micro"] if isinstance(value, Mapping) else value) or 0.0)


def time_per_phase(methods: Sequence[Figures]) -> str:
    """Milliseconds of decoding per new token, by phase."""

    def draw(axes: Axes) -> None:
        # Bars are stacked from phase to phase.
        names = [method["name"] for method in methods]
        left = np.zeros(len(methods))
        for phase, colour in PHASE_COLOURS.items():
            lengths = np.array([_milliseconds(method, phase) for method in methods])
            axes.barh(names, lengths, left=left, height=0.62, color=colour, label=phase)
            left += lengths
        axes.invert_yaxis()
        axes.set_xlabel("milliseconds per token")
        figure_of(axes).legend(loc="outside upper left", ncols=5)

    return svg(draw, 5.6, 1.2 + 0.36 * len(methods), "phases")


def _milliseconds(method: Figures, phase: str) -> float:
    tokens = method["new_tokens"] - method["prompts"]
    return 1000 * method["seconds_by_phase"][phase] / tokens if tokens > 0 else 0.0
