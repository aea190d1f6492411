"""Where the time of one call goes: operators by kind, and what is between them (Python)."""

from __future__ import annotations

import statistics
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch.profiler import ProfilerActivity, profile

from modules.contracts.target import Target
from modules.cost_model.latency_table import verification_call

BETWEEN = "between operators"
OTHER = "other operators"
KINDS = {
    "linear layers": ("linear", "addmm", "::mm", "matmul", "bmm"),
    "attention": ("scaled_dot_product", "flash_attention"),
    "KV cache": ("scatter", "index", "gather", "copy_"),
    "norms": ("rms_norm", "layer_norm", "rsqrt", "::mean", "::pow"),
}
"""Parts of operators' names, by what they are used for in a decoder layer; the first that fits
counts."""


@dataclass(frozen=True)
class CallProfile:
    """Milliseconds of one call.

    Args:
        wall: of the call without the profiler, the median.
        kinds: by kind, with the profiler; `BETWEEN` is the rest of the wall time.
        operators: number of operators called.
    """

    wall: float
    kinds: dict[str, float]
    operators: int


@torch.no_grad()
def profile_call(target: Target, rows: int, context: int = 256, repeats: int = 15) -> CallProfile:
    """Time calls of so many rows with and without torch's profiler, on a CPU.

    The profiler makes every operator slower, some microseconds each; `BETWEEN` is what the wall
    time without it leaves, so it is a lower limit of Python's share.

    Raises:
        ValueError: a target on another device, whose operators run beside Python.
    """
    if target.device.type != "cpu":
        raise ValueError(f"profile is for calls on the CPU, the target is on {target.device}")
    call = verification_call(target, rows, context)
    # 1. The wall time, as it is.
    call()
    wall = statistics.median(_seconds(call) for _ in range(repeats)) * 1e3
    # 2. The same calls under the profiler.
    with profile(activities=[ProfilerActivity.CPU]) as trace:
        for _ in range(repeats):
            call()
    kinds: Counter[str] = Counter()
    events = [event for event in trace.key_averages() if "::" in event.key]
    for event in events:
        kinds[kind_of(event.key)] += event.self_cpu_time_total / 1e3 / repeats
    return CallProfile(
        wall,
        {**kinds, BETWEEN: max(0.0, wall - sum(kinds.values()))},
        sum(event.count for event in events) // repeats,
    )


def kind_of(operator: str) -> str:
    """What an operator is used for in a decoder layer."""
    return next(
        (kind for kind, parts in KINDS.items() if any(part in operator for part in parts)), OTHER
    )


def _seconds(call: Callable[[], object]) -> float:
    began = time.perf_counter()
    call()
    return time.perf_counter() - began
