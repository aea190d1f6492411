"""`python -m eval.latency`: what verification costs by tree width here, and the τ that each width needs to win."""

from __future__ import annotations

from collections.abc import Callable

import torch
from jsonargparse import auto_cli

from modules.core.loading import load_target
from modules.decoding.latency import LatencyTable, interleaved_medians, stock_call, verification_calls
from modules.decoding.roofline import Roofline, measure_roofline

STOCK = "stock"
"""Key of the library's own step among the calls that are timed."""


def table(latency: LatencyTable, roofline: Roofline, stock: float) -> str:
    """A Markdown table: rows per call, milliseconds, the least they could be, cost against one row and against the
    library's own step of one row (`stock` seconds), τ to break even with drafting at 0, 10, 20 % of a one-row call."""
    lines = ["| rows | ms | limit, ms | × one row | × stock one row | τ needed, free drafting | drafting 10 % | 20 % |",
             "|---:|---:|---:|---:|---:|---:|---:|---:|"]
    one = latency.seconds[1]
    for rows, seconds in latency.seconds.items():
        needed = " | ".join(f"{latency.break_even(rows, share * one):.2f}" for share in (0.0, 0.1, 0.2))
        limit = roofline.seconds(rows) * 1e3
        lines.append(f"| {rows} | {seconds * 1e3:.1f} | {limit:.1f} | {seconds / one:.2f} | {seconds / stock:.2f} "
                     f"| {needed} |")
    return "\n".join(lines)


def main(target: str = "smollm2-135m", context: int = 256, repeats: int = 15, dtype: str = "float32") -> None:
    """Measure t(rows) of a target on this device and print the break-even table.

    Args:
        target: Hub id, folder, .gguf file or smollm2-135m.
        context: committed tokens behind which the rows stand.
        repeats: passes; the table holds medians.
        dtype: of the target.
    """
    loaded = load_target(target, dtype)
    limits = measure_roofline(loaded)
    print(f"{target}, {dtype}, context {context}, {torch.get_num_threads()} threads, medians of {repeats}. "
          f"Measured limits: {limits.bytes_per_second / 1e9:.1f} GB/s, {limits.flops_per_second / 1e9:.0f} GFLOP/s; "
          f"a call reads {limits.weight_bytes / 1e6:.0f} MB of weights.\n")
    calls: dict[int | str, Callable[[], object]] = {**verification_calls(loaded, context=context),
                                                    STOCK: stock_call(loaded, context)}
    seconds = interleaved_medians(calls, repeats)
    stock = seconds.pop(STOCK)
    print(f"Hugging Face's own step of one row, in turn with the others: {stock * 1e3:.1f} ms.\n")
    print(table(LatencyTable(context, {int(rows): taken for rows, taken in seconds.items()}), limits, stock))


if __name__ == "__main__":
    auto_cli(main)
