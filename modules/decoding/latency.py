"""How long the target takes to verify trees of each width on this device, and what a drafter must give to win.

Shape legend: N rows of a call.
"""

from __future__ import annotations

import json
import os
import platform
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor
from transformers import DynamicCache

from modules.core.loading import cache_folder
from modules.core.target import Target
from modules.trees.tree import TokenTree

Key = TypeVar("Key")
WIDTHS = (1, 2, 3, 4, 5, 6, 8, 12, 16, 24, 32, 48, 64)


@dataclass(frozen=True)
class LatencyTable:
    """Median seconds of one target call by rows in it (the newest token's row included), behind `context` tokens."""

    context: int
    seconds: dict[int, float]

    def save(self, file: Path) -> None:
        """Write it as JSON."""
        file.parent.mkdir(parents=True, exist_ok=True)
        scratch = file.with_suffix(f".{os.getpid()}.partial")
        scratch.write_text(json.dumps({"context": self.context, "seconds": self.seconds}))
        os.replace(scratch, file)

    @staticmethod
    def load(file: Path) -> LatencyTable:
        """Read what `save` wrote."""
        stored = json.loads(file.read_text())
        return LatencyTable(stored["context"], {int(rows): taken for rows, taken in stored["seconds"].items()})

    def at(self, rows: float) -> float:
        """Seconds of a call of `rows` rows; between measured widths by linear interpolation.

        Raises:
            ValueError: more rows than the widest call measured.
        """
        widths = sorted(self.seconds)
        if rows > widths[-1]:
            raise ValueError(f"latency table ends at {widths[-1]} rows, a call of {rows:g} was asked for: measure "
                             "wider calls")
        return float(np.interp(rows, widths, [self.seconds[width] for width in widths]))

    def break_even(self, rows: int, draft_seconds: float = 0.0) -> float:
        """Tokens per call that a tree of this many rows must give to be as fast as plain decoding.

        One call costs t(rows) + draft_seconds and gives tau tokens; plain decoding gives one per t(1).
        """
        return (self.seconds[rows] + draft_seconds) / self.seconds[1]


def measure_latency(target: Target, widths: Sequence[int] = WIDTHS, context: int = 256, repeats: int = 15,
                    batch: int = 1) -> LatencyTable:
    """Time verification of random chains of every width, widths interleaved, medians over `repeats` passes.

    A call holds `batch` sequences with as many rows each; the seconds are the whole call's.
    """
    return LatencyTable(context, interleaved_medians(verification_calls(target, widths, context, batch), repeats))


@torch.no_grad()
def verification_calls(target: Target, widths: Sequence[int] = WIDTHS, context: int = 256, batch: int = 1
                       ) -> dict[int, Callable[[], object]]:
    """By width: a call that verifies a random chain of so many rows behind `context` tokens, and commits nothing."""
    ids = _random_ids(target, batch, context)
    target.open(batch, context + max(widths))
    target.prefill(ids, torch.full((batch,), context, device=target.device))
    trees = {width: TokenTree.chain(ids[:, :1].expand(batch, width).contiguous()) for width in widths}
    return {width: _finished(target, partial(target.verify, tree)) for width, tree in trees.items()}


@torch.no_grad()
def stock_call(target: Target, context: int = 256) -> Callable[[], object]:
    """The library's own step of one token behind `context` others, with its own kernels and growing cache."""
    ids, cache, stock = _random_ids(target, 1, context), DynamicCache(), target.stock
    stock(input_ids=ids, past_key_values=cache)

    @torch.no_grad()
    def step() -> None:
        stock(input_ids=ids[:, :1], past_key_values=cache)
        cache.crop(-1)
    return _finished(target, step)


def interleaved_medians(calls: Mapping[Key, Callable[[], object]], repeats: int) -> dict[Key, float]:
    """Median seconds of each call over `repeats` passes of all of them in turn, after one pass that does not count."""
    samples: dict[Key, list[float]] = {key: [] for key in calls}
    for _ in range(repeats + 1):
        for key, call in calls.items():
            began = time.perf_counter()
            call()
            samples[key].append(time.perf_counter() - began)
    return {key: statistics.median(taken[1:]) for key, taken in samples.items()}


def _random_ids(target: Target, batch: int, context: int) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(target.shape.vocab_size, (batch, context), generator=generator).to(target.device)


def stored_latency(target: Target, folder: Path | None = None, widths: Sequence[int] = WIDTHS, repeats: int = 7
                   ) -> LatencyTable:
    """The table of this target on this device with as many threads: measured once, then read.

    Args:
        folder: where tables are kept; by default `latency` in `SLIPSTREAM_CACHE` or ~/.cache/slipstream.
        widths, repeats: see `measure_latency`; a stored table without one of the widths is measured anew.
    """
    folder = folder or cache_folder() / "latency"
    on_gpu = target.device.type == "cuda"
    device = torch.cuda.get_device_name(target.device) if on_gpu else platform.machine()
    parts = (target.fingerprint(), str(target.dtype).removeprefix("torch."), device, str(torch.get_num_threads()))
    file = folder / ("-".join(parts).replace(" ", "_").replace("/", "_") + ".json")
    if file.is_file() and set(widths) <= set((table := LatencyTable.load(file)).seconds):
        return table
    table = measure_latency(target, widths, repeats=repeats)
    table.save(file)
    return table


def _finished(target: Target, call: Callable[[], object]) -> Callable[[], object]:
    """A call that returns when the device has done it."""
    def wait() -> None:
        call()
        if target.device.type == "cuda":
            torch.cuda.synchronize()
    return wait
