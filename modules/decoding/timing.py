"""Wall-clock time per phase of a decoding step."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from modules.runtime.phase_timer import now

PHASES = ("prefill", "draft", "verify", "accept", "commit", "other")


class Clock:
    """Sums seconds per phase; `other` is time outside all phases.

    On a CUDA device the boundaries of phases are events in the device's stream, read only by
    `snapshot`: no step waits for the device because of the clock, and a phase is charged for its
    kernels.
    """

    def __init__(self, device: torch.device) -> None:
        self._device, self._cuda = device, device.type == "cuda"
        self._seconds: dict[str, float] = {phase: 0.0 for phase in PHASES}
        self._marks: list[tuple[str, Any, Any]] = []
        self._began = now(device)

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Charge the time inside to one phase."""
        began = self._mark()
        try:
            yield
        finally:
            self._charge(name, began, self._mark())

    def _mark(self) -> Any:
        """A point in time: seconds on the CPU, an event on a GPU."""
        if not self._cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self._device))
        return event

    def _charge(self, name: str, began: Any, ended: Any) -> None:
        if self._cuda:
            self._marks.append((name, began, ended))
        else:
            self._seconds[name] += ended - began

    def elapsed(self) -> float:
        """Seconds since the clock was made; waits for a GPU."""
        return now(self._device) - self._began

    def snapshot(self) -> dict[str, float]:
        """Seconds per phase so far, `other` filled in; waits for a GPU."""
        total = self.elapsed()
        for name, began, ended in self._marks:
            self._seconds[name] += began.elapsed_time(ended) / 1000
        self._marks.clear()
        # Whatever no phase was charged with.
        claimed = sum(seconds for phase, seconds in self._seconds.items() if phase != "other")
        return {**self._seconds, "other": max(0.0, total - claimed)}
