"""Wall-clock time per phase of a decoding step."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch

PHASES = ("prefill", "draft", "verify", "accept", "commit", "other")


class Clock:
    """Adds up seconds per phase; `other` is what no phase claimed.

    On a CUDA device every phase boundary waits for the device, so that phases own their kernels.
    """

    def __init__(self, device: torch.device) -> None:
        self.seconds: dict[str, float] = {phase: 0.0 for phase in PHASES}
        self._cuda = device.type == "cuda"
        self._began = self._now()

    def _now(self) -> float:
        if self._cuda:
            torch.cuda.synchronize()
        return time.perf_counter()

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Charge the time inside to one phase."""
        began = self._now()
        try:
            yield
        finally:
            self.seconds[name] += self._now() - began

    def elapsed(self) -> float:
        """Seconds since the clock was made."""
        return self._now() - self._began

    def snapshot(self) -> dict[str, float]:
        """Seconds per phase so far, `other` filled in."""
        claimed = sum(seconds for phase, seconds in self.seconds.items() if phase != "other")
        return {**self.seconds, "other": max(0.0, self.elapsed() - claimed)}
