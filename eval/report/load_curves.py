"""Table and plots of a load test (`eval.py --engine openai`)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.axes import Axes

from eval.report.plots import COLOURS, figure_of, svg

Figures = Mapping[str, Any]
TITLE = "Load"
READING = (
    "Throughput is tokens per second of all requests together. First token and token are medians "
    "and 99th percentiles over requests: the time to the first piece of text, and the mean time of "
    "an answer's later tokens (a piece of a speculating server has several). Speedup above is of "
    "one request's later tokens; gain is of throughput, under the same load. τ is what the "
    "server's metrics, or its answers, say; every server rounds batches in its own way, so that "
    "texts of equal models may differ"
)
LATENCIES = {
    "inter_token_latency": "median milliseconds per token of a request",
    "time_to_first_token": "median milliseconds to the first token",
}


def loaded(methods: Sequence[Figures]) -> list[Figures]:
    """The rows of a load test."""
    return [method for method in methods if method.get("serving")]


def load_table(methods: Sequence[Figures]) -> tuple[list[str], list[list[str]]]:
    """Header and lines of the rows of a load test; no lines without any."""
    header = ["method", "throughput", "gain", "first token", "p99", "token", "p99", "τ",
              "requests", "failed", "same text"]  # fmt: skip
    rows = loaded(methods)
    return header, [_line(method, _beside(method, rows)) for method in rows]


def _beside(method: Figures, rows: Sequence[Figures]) -> Figures | None:
    """The row without a drafter under the same load."""
    keys = ("concurrency", "request_rate")
    return next(
        (
            row
            for row in rows
            if row["name"].startswith("autoregressive")
            and all(row["serving"][key] == method["serving"][key] for key in keys)
        ),
        None,
    )


def _line(method: Figures, plain: Figures | None) -> list[str]:
    serving = method["serving"]
    rate = serving["tokens_per_second"]
    gain = "–" if plain is None else f"{rate / plain['serving']['tokens_per_second']:.2f}×"
    tau, same = method["mean_accepted_tokens"], serving["same_text"]
    return [
        method["name"],
        f"{rate:.1f}",
        gain,
        *(_milliseconds(serving["time_to_first_token"], level) for level in ("p50", "p99")),
        *(_milliseconds(serving["inter_token_latency"], level) for level in ("p50", "p99")),
        "–" if tau is None else f"{tau:.2f}",
        str(serving["requests"]),
        str(serving["failed"]),
        "–" if same is None else f"{same}/{serving['compared']}",
    ]


def _milliseconds(spread: Mapping[str, float] | None, level: str) -> str:
    return "–" if spread is None else f"{1000 * spread[level]:.1f} ms"


def curves(methods: Sequence[Figures]) -> dict[str, list[Figures]]:
    """Rows of each server's sweep by concurrency or rate, in its order; only sweeps of two or more
    points.
    """
    groups: dict[str, list[Figures]] = {}
    for method in loaded(methods):
        serving = method["serving"]
        kind = "requests in flight" if serving["request_rate"] is None else "requests/s"
        groups.setdefault(f"{serving['server']}, by {kind}", []).append(method)
    return {name: rows for name, rows in groups.items() if len(rows) > 1}


def latency_by_throughput(methods: Sequence[Figures], key: str) -> str:
    """A latency (of `LATENCIES`) over throughput: a curve a server, a point a load."""
    lines = curves(methods)

    def draw(axes: Axes) -> None:
        for index, (name, rows) in enumerate(lines.items()):
            colour = COLOURS[index % len(COLOURS)]
            shown = [row["serving"] for row in rows if row["serving"][key] is not None]
            places = [serving["tokens_per_second"] for serving in shown]
            heights = [1000 * serving[key]["p50"] for serving in shown]
            axes.plot(places, heights, marker="o", markersize=3, label=name, color=colour)
            for serving, place, height in zip(shown, places, heights, strict=True):
                load = serving["concurrency"] or serving["request_rate"]
                axes.annotate(
                    f"{load:g}",
                    (place, height),
                    (3, 3),
                    textcoords="offset points",
                    fontsize=7,
                    color=colour,
                )
        axes.set_ylim(bottom=0)
        axes.set_xlabel("tokens per second of all requests (numbers: load)")
        axes.set_ylabel(LATENCIES[key])
        axes.grid(color="#e3e7ee")
        figure_of(axes).legend(loc="outside upper left", ncols=2)

    return svg(draw, 5.6, 3.6, f"load {key}")
