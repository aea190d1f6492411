"""How long the target takes to verify trees of each width on this device, and what a drafter must give to win.

Shape legend: N rows of a call.
"""

from __future__ import annotations

import functools
import json
import os
import platform
import re
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from transformers import DynamicCache

from modules.core.loading import cache_folder
from modules.core.phases import now
from modules.core.target import Target
from modules.trees.tree import TokenTree

WIDTHS = (1, 2, 3, 4, 5, 6, 8, 12, 16, 24, 32, 48, 64)
_STOCK = 0


@dataclass(frozen=True)
class LatencyTable:
    """Median seconds of one target call by rows in it (the newest token's row included), behind `context` tokens.

    stock: of Hugging Face's own call of one row behind as many tokens, in turn with the others; None: not measured.
    """

    context: int
    seconds: dict[int, float]
    stock: float | None = None

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


@torch.no_grad()
def measure_latency(target: Target, widths: Sequence[int] = WIDTHS, context: int = 256, repeats: int = 15,
                    batch: int = 1, stock: bool = False) -> LatencyTable:
    """Time verification of random chains of every width, widths interleaved, medians over `repeats` passes.

    A call holds `batch` sequences with as many rows each; the seconds are the whole call's. `stock` also times the
    model as its library runs it.
    """
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(target.shape.vocab_size, (batch, context), generator=generator).to(target.device)
    target.open(batch, context + max(widths))
    target.prefill(ids, torch.full((batch,), context, device=target.device))
    trees = {width: TokenTree.chain(ids[:, :1].expand(batch, width).contiguous()) for width in widths}
    calls: dict[int, Callable[[], object]] = {width: functools.partial(target.verify, tree)
                                              for width, tree in trees.items()}
    calls |= {_STOCK: stock_step(target, ids)} if stock else {}
    samples: dict[int, list[float]] = {key: [] for key in calls}
    for _ in range(repeats + 1):
        for key, call in calls.items():
            samples[key].append(_seconds(target, call))
    medians = {key: statistics.median(taken[1:]) for key, taken in samples.items()}
    return LatencyTable(context, {width: medians[width] for width in widths}, medians.get(_STOCK))


@torch.no_grad()
def stock_step(target: Target, ids_BT: Tensor) -> Callable[[], object]:
    """Hugging Face's own call of one row behind these tokens, with its own cache and kernels, to be repeated."""
    model, cache = target.stock, DynamicCache()
    model(input_ids=ids_BT, past_key_values=cache)

    def step() -> None:
        model(input_ids=ids_BT[:, :1], past_key_values=cache)
        cache.crop(-1)

    return step


def stored_latency(target: Target, folder: Path | None = None, widths: Sequence[int] = WIDTHS, repeats: int = 7
                   ) -> LatencyTable:
    """The table of this target on this device with as many threads: measured once, then read.

    Args:
        folder: where tables are kept; by default `latency` in `SLIPSTREAM_CACHE` or ~/.cache/slipstream.
        widths, repeats: see `measure_latency`; a stored table without one of the widths is measured anew.
    """
    folder = folder or cache_folder() / "latency"
    on_gpu = target.device.type == "cuda"
    device = torch.cuda.get_device_name(target.device) if on_gpu else processor_name()
    parts = (target.fingerprint(), str(target.dtype).removeprefix("torch."), device, str(torch.get_num_threads()),
             *(("compiled",) if target.compiled is not None else ()))
    file = folder / (re.sub(r"[^\w.()@-]", "_", "-".join(parts)) + ".json")
    if file.is_file() and set(widths) <= set((table := LatencyTable.load(file)).seconds):
        return table
    table = measure_latency(target, widths, repeats=repeats)
    table.save(file)
    return table


@functools.cache
def processor_name(cpuinfo: Path = Path("/proc/cpuinfo")) -> str:
    """The CPU's model; where the system does not tell, what Python knows of it and at least its architecture."""
    if cpuinfo.is_file():
        named = re.search(r"^(?:model name|Model)\s*:\s*(\S.*)$", cpuinfo.read_text(errors="replace"), re.MULTILINE)
        if named is not None:
            return f"{platform.machine()} {named[1].strip()}"
    return " ".join(dict.fromkeys((platform.machine(), platform.processor()))).strip()


def _seconds(target: Target, call: Callable[[], object]) -> float:
    began = now(target.device)
    call()
    return now(target.device) - began
