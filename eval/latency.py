"""`python -m eval.latency`: cost of verification by tree width on this device, and the τ at which
each width breaks even.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from configs.command_line.loading import called, exit_with
from modules.cost_model.call_profile import BETWEEN, KINDS, OTHER, CallProfile, profile_call
from modules.cost_model.latency_table import WIDTHS, LatencyTable, measure_latency
from modules.cost_model.roofline import Roofline, measure_roofline
from modules.target.loading import AUTO, load_target

PROFILED = (1, 8, 16)
"""Rows of the calls that are profiled."""


def table(latency: LatencyTable, roofline: Roofline) -> str:
    """A Markdown table: rows per call, milliseconds, the roofline's limit, cost against one row and
    against Hugging Face's (where that was measured), τ to break even with drafting at 0, 10 and
    20 % of a one-row call."""
    theirs = " × Hugging Face's one row |" if latency.stock else ""
    lines = [
        f"| rows | ms | limit, ms | × one row |{theirs} τ needed, free drafting | drafting 10 % | "
        "drafting 20 % |",
        "|---:|---:|---:|---:|---:|---:|---:|" + ("---:|" if latency.stock else ""),
    ]
    single_row = latency.seconds[1]
    # Every width against one row, the roofline and the stock model.
    for rows, seconds in latency.seconds.items():
        needed = " | ".join(
            f"{latency.break_even(rows, share * single_row):.2f}" for share in (0.0, 0.1, 0.2)
        )
        limit = roofline.seconds(rows) * 1e3
        against = f" {seconds / latency.stock:.2f} |" if latency.stock else ""
        lines.append(
            f"| {rows} | {seconds * 1e3:.1f} | {limit:.1f} | {seconds / single_row:.2f} |{against} "
            f"{needed} |"
        )
    return "\n".join(lines)


def profile_table(profiles: Mapping[int, CallProfile]) -> str:
    """A Markdown table: milliseconds of a call by kind of operator, a column for each number of
    rows."""
    columns = list(profiles.values())
    lines = [
        "| ms of a call | "
        + " | ".join(f"{rows} row" + "s" * (rows > 1) for rows in profiles)
        + " |",
        "|---|" + "---:|" * len(columns),
    ]
    for kind in (*KINDS, OTHER, BETWEEN):
        cells = " | ".join(f"{column.kinds.get(kind, 0.0):.1f}" for column in columns)
        lines.append(f"| {kind} | {cells} |")
    return "\n".join(
        [
            *lines,
            "| whole call | " + " | ".join(f"{column.wall:.1f}" for column in columns) + " |",
            "| operators | " + " | ".join(str(column.operators) for column in columns) + " |",
        ]
    )


def measure(
    target: str = "smollm2-135m",
    context: int = 256,
    repeats: int = 15,
    dtype: str = AUTO,
    compile: bool = False,
    device: str | None = None,
    profile: bool = False,
) -> None:
    """Measure t(rows) of a target on this device and print the break-even table.

    Args:
        target: Hub id, folder, .gguf file or smollm2-135m.
        context: committed tokens before the rows.
        repeats: passes; the table holds medians.
        dtype: of the target: float32, bfloat16, float16 or float64; auto is bfloat16 on a GPU that
            multiplies it and float32 elsewhere.
        compile: let calls go through torch.compile.
        device: a torch device; by default the GPU if there is one.
        profile: print where the time of calls of 1, 8 and 16 rows goes instead (on a CPU).

    Raises:
        ValueError: a count below 1, no such target, or a context that its own does not hold.
    """
    # 1. Load, and measure what bounds a call.
    for name, value in (("context", context), ("repeats", repeats)):
        if value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")
    loaded = load_target(target, dtype, device, chats=False)
    widest = max(PROFILED if profile else WIDTHS)
    if context + widest > loaded.max_positions:
        raise ValueError(
            f"context {context} and {widest} rows exceed the target's context of "
            f"{loaded.max_positions}: lower it"
        )
    if compile:
        loaded.compile_calls()
    limits = measure_roofline(loaded)
    precision = str(loaded.dtype).removeprefix("torch.")
    print(
        f"{target}, {precision}, {loaded.device}, context {context}, {torch.get_num_threads()} "
        f"threads, medians of {repeats}. Measured limits: {limits.bytes_per_second / 1e9:.1f} "
        f"GB/s, {limits.flops_per_second / 1e9:.0f} GFLOP/s; a call reads "
        f"{limits.weight_bytes / 1e6:.0f} MB of weights.\n"
    )
    if profile:
        widths = {rows: profile_call(loaded, rows, context, repeats) for rows in PROFILED}
        print(profile_table(widths))
        return
    # 2. Time calls by width, interleaved.
    measured = measure_latency(loaded, context=context, repeats=repeats, stock=True)
    print(table(measured, limits))
    # 3. How far the figures can be trusted.
    spread = max(measured.spread[rows] / seconds for rows, seconds in measured.seconds.items())
    print(f"\nThe quartiles of the passes are at most {spread:.0%} of a row's time apart.")
    if measured.stock:
        print(
            f"\nHugging Face's own call of one row, in turn with these: {measured.stock * 1e3:.1f} "
            "ms."
        )


def command(arguments: Sequence[str]) -> int:
    """Parse the command line and measure; returns the exit status."""
    return called(
        measure,
        arguments,
        "eval.latency",
        "Cost of verification by tree width, and the τ at which each breaks even.",
    )


if __name__ == "__main__":
    exit_with(command)
