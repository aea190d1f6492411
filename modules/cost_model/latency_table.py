"""How long the target takes to verify trees of each width on this device, and how many tokens a
drafter must yield to be faster.

Shape legend: N rows of a call.
"""

from __future__ import annotations

import functools
import json
import logging
import platform
import re
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from weakref import WeakKeyDictionary

import numpy as np
import torch
from torch import Tensor
from transformers import DynamicCache

from modules.contracts.target import Session, Target
from modules.contracts.token_tree import TokenTree
from modules.runtime.files import whole_file
from modules.runtime.phase_timer import now
from modules.target.loading import cache_folder

logger = logging.getLogger(__name__)

WIDTHS = (1, 2, 3, 4, 5, 6, 8, 12, 16, 24, 32, 48, 64)
STEADY = 0.25
"""A stored table is measured again when t(1) has changed by more than this share, or varied so
much."""
_STOCK, _CHECKS = 0, 5
_current: WeakKeyDictionary[Target, dict[Path, LatencyTable]] = WeakKeyDictionary()
"""Tables that this process has checked or measured."""


@dataclass(frozen=True)
class LatencyTable:
    """Median seconds of one target call by its number of rows (the newest token's included), after
    `context` tokens.

    stock: of Hugging Face's own call of one row after as many tokens, interleaved with the others;
    None: not measured.
    spread: seconds between the quartiles of each width's repeats; empty in tables without it.
    """

    context: int
    seconds: dict[int, float]
    stock: float | None = None
    spread: dict[int, float] = field(default_factory=dict)

    @property
    def noise(self) -> float:
        """The spread of t(1), as a share of it; 0 in tables without it."""
        return self.spread.get(1, 0.0) / self.seconds[1]

    def save(self, file: Path) -> None:
        """Write the table as JSON."""
        file.parent.mkdir(parents=True, exist_ok=True)
        stored = {"context": self.context, "seconds": self.seconds, "spread": self.spread}
        with whole_file(file) as partial:
            partial.write_text(json.dumps(stored))

    @staticmethod
    def load(file: Path) -> LatencyTable:
        """Read what `save` wrote, now or before tables had a spread.

        Raises:
            ValueError: the file is damaged.
        """
        try:
            stored = json.loads(file.read_text())
            # JSON keys are text.
            seconds, spread = (
                {int(rows): float(taken) for rows, taken in stored.get(key, {}).items()}
                for key in ("seconds", "spread")
            )
            table = LatencyTable(int(stored["context"]), seconds, spread=spread)
        except (AttributeError, KeyError, TypeError, ValueError, RecursionError) as error:
            raise ValueError(f"{file} is no latency table: delete it") from error
        if not min(seconds.values(), default=0.0) > 0:
            raise ValueError(f"{file} is no latency table: delete it")
        return table

    def at(self, rows: float) -> float:
        """Seconds of a call of `rows` rows; between measured widths by linear interpolation.

        Raises:
            ValueError: more rows than the widest call measured.
        """
        # Beyond the widest call there is nothing to extrapolate from.
        widths = sorted(self.seconds)
        if rows > widths[-1]:
            raise ValueError(
                f"latency table ends at {widths[-1]} rows, a call of {rows:g} was asked for: "
                "measure wider calls"
            )
        return float(np.interp(rows, widths, [self.seconds[width] for width in widths]))

    def break_even(self, rows: int, draft_seconds: float = 0.0) -> float:
        """Tokens per call that a tree of this many rows must yield to be as fast as plain decoding.

        One call takes t(rows) + draft_seconds and yields tau tokens; plain decoding yields one per
        t(1).
        """
        return (self.seconds[rows] + draft_seconds) / self.seconds[1]


@torch.no_grad()
def measure_latency(
    target: Target,
    widths: Sequence[int] = WIDTHS,
    context: int = 256,
    repeats: int = 15,
    batch: int = 1,
    stock: bool = False,
) -> LatencyTable:
    """Time verification of random chains of every width, widths interleaved, medians over `repeats`
    passes.

    A call holds `batch` sequences with as many rows each; the seconds are the whole call's. `stock`
    also times the model as its library runs it.
    """
    # 1. A context of random tokens.
    ids, session = _random_context(target, batch, context, max(widths))
    # 2. The calls to be timed, by width.
    calls: dict[int, Callable[[], object]] = {
        width: _verification(session, ids, width) for width in widths
    }
    calls |= {_STOCK: stock_step(target, ids)} if stock else {}
    # 3. Interleaved, so that a change of load hits all widths alike; the first pass warms up.
    samples: dict[int, list[float]] = {key: [] for key in calls}
    for _ in range(repeats + 1):
        for key, call in calls.items():
            samples[key].append(_seconds(target, call))
    # 4. Medians, without the first pass.
    medians = {key: statistics.median(taken[1:]) for key, taken in samples.items()}
    return LatencyTable(
        context,
        {width: medians[width] for width in widths},
        medians.get(_STOCK),
        {width: _spread(samples[width][1:]) for width in widths},
    )


def verification_call(target: Target, rows: int, context: int) -> Callable[[], object]:
    """A call of so many rows after a context of random tokens; it can be repeated."""
    ids, session = _random_context(target, 1, context, rows)
    return _verification(session, ids, rows)


def _random_context(target: Target, batch: int, context: int, rows: int) -> tuple[Tensor, Session]:
    """Random ids [B,T], and a session that has read them, with room for calls of so many rows."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(target.shape.vocab_size, (batch, context), generator=generator).to(
        target.device
    )
    session = target.open(batch, context + rows)
    session.prefill(ids, torch.full((batch,), context, device=target.device))
    return ids, session


def _verification(session: Session, ids_BT: Tensor, rows: int) -> Callable[[], object]:
    chain = TokenTree.chain(ids_BT[:, :1].expand(-1, rows).contiguous())
    return functools.partial(session.verify, chain)


def _spread(samples: Sequence[float]) -> float:
    """Distance between the quartiles, in seconds."""
    low, high = np.quantile(samples, [0.25, 0.75])
    return float(high - low)


@torch.no_grad()
def stock_step(target: Target, ids_BT: Tensor) -> Callable[[], object]:
    """Hugging Face's own call of one row after these tokens, with its own cache and kernels; it can
    be repeated.
    """
    model, cache = target.stock, DynamicCache()
    model(input_ids=ids_BT, past_key_values=cache)

    def step() -> None:
        model(input_ids=ids_BT[:, :1], past_key_values=cache)
        cache.crop(-1)

    return step


def stored_latency(
    target: Target,
    folder: Path | None = None,
    widths: Sequence[int] = WIDTHS,
    repeats: int = 7,
    batch: int = 1,
) -> LatencyTable:
    """The table of this target on this device with as many threads: measured once, then read.

    A process times t(1) again before it uses a stored table. One that was measured under another
    load (`STEADY`), or on a busy machine, is replaced.

    Args:
        folder: where tables are stored; by default `latency` in `SLIPSTREAM_CACHE` or
            ~/.cache/slipstream.
        widths, repeats, batch: see `measure_latency`; a stored table without one of the widths is
            measured anew.
    """
    # 1. One file per target, precision, device, threads, kind of call and batch size.
    folder = folder or cache_folder() / "latency"
    on_gpu = target.device.type == "cuda"
    device = torch.cuda.get_device_name(target.device) if on_gpu else processor_name()
    parts = (
        target.fingerprint(),
        str(target.dtype).removeprefix("torch."),
        device,
        str(torch.get_num_threads()),
        *(("compiled",) if target.compiled is not None else ()),
        *((f"{batch}at-once",) if batch > 1 else ()),
    )
    file = folder / (re.sub(r"[^\w.()@-]", "_", "-".join(parts)) + ".json")
    # 2. Checked once per process.
    current = _current.setdefault(target, {})
    if file not in current or not set(widths) <= set(current[file].seconds):
        current[file] = _reusable(target, file, widths, batch) or _fresh(
            target, file, widths, repeats, batch
        )
    return current[file]


def _reusable(target: Target, file: Path, widths: Sequence[int], batch: int) -> LatencyTable | None:
    """The stored table, if there is one for these widths and it is still valid."""
    # 1. A table for these widths.
    if not file.is_file():
        return None
    try:
        table = LatencyTable.load(file)
    except ValueError as error:
        logger.warning("%s: measured again", error)
        return None
    if not {1, *widths} <= set(table.seconds):
        return None
    # 2. Measured in the same state of the machine.
    again = measure_latency(target, (1,), table.context, _CHECKS, batch)
    moved = again.seconds[1] / table.seconds[1]
    if table.noise > STEADY or not 1 - STEADY <= moved <= 1 / (1 - STEADY):
        logger.warning(
            "stored t(rows) are measured again: t(1) is %.2f times what it was, its "
            "repeats spread by %.0f%%",
            moved,
            100 * table.noise,
        )
        return None
    return table


def _fresh(
    target: Target, file: Path, widths: Sequence[int], repeats: int, batch: int
) -> LatencyTable:
    table = measure_latency(target, sorted({1, *widths}), repeats=repeats, batch=batch)
    if table.noise > STEADY:
        logger.warning(
            "t(rows) were measured while the machine was busy: the repeats of t(1) "
            "spread by %.0f%%",
            100 * table.noise,
        )
    table.save(file)
    return table


@functools.cache
def processor_name(cpuinfo: Path = Path("/proc/cpuinfo")) -> str:
    """The CPU's architecture and model; Python's name of the model where the system reports
    none."""
    parts = (platform.machine(), processor_model(cpuinfo) or platform.processor())
    return " ".join(dict.fromkeys(parts)).strip()


def processor_model(cpuinfo: Path = Path("/proc/cpuinfo")) -> str:
    """The CPU's model as in Linux' /proc/cpuinfo; empty without one."""
    if not cpuinfo.is_file():
        return ""
    listing = cpuinfo.read_text(errors="replace")
    named = re.search(r"^(?:model name|Model)\s*:\s*(\S.*)$", listing, re.MULTILINE)
    return "" if named is None else named[1].strip()


def _seconds(target: Target, call: Callable[[], object]) -> float:
    began = now(target.device)
    call()
    return now(target.device) - began
