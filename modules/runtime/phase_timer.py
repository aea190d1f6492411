"""Where the time of a training step goes: every moment is charged to the phase that was entered
last.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch


def now(device: torch.device) -> float:
    """Seconds, after this device has finished all queued work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


class PhaseClock:
    """Sums seconds per phase between `start` and `stop`.

    On a CUDA device every boundary waits for the device, so that phases are charged for their
    kernels.
    """

    def __init__(self, device: torch.device) -> None:
        self.seconds: dict[str, float] = {}
        self.current = ""
        self.running = False
        self._device = device
        self._since = 0.0

    def start(self) -> None:
        """Start charging the current phase."""
        self.running, self._since = True, now(self._device)

    def enter(self, phase: str) -> None:
        """Charge the time so far to the current phase, and from now on to this one."""
        if self.running:
            moment = now(self._device)
            self.seconds[self.current] = self.seconds.get(self.current, 0.0) + moment - self._since
            self._since = moment
        self.current = phase

    def stop(self) -> None:
        """Charge the current phase and stop."""
        self.enter(self.current)
        self.running = False


_WATCHED: ContextVar[PhaseClock | None] = ContextVar("phase clock", default=None)


@contextmanager
def watched(clock: PhaseClock) -> Iterator[None]:
    """Charge the phases of what runs inside to a clock."""
    token = _WATCHED.set(clock)
    try:
        yield
    finally:
        _WATCHED.reset(token)


@contextmanager
def phase(name: str) -> Iterator[None]:
    """Charge what runs inside to a phase, if a clock is watching."""
    clock = _WATCHED.get()
    if clock is None:
        yield
        return
    before = clock.current
    clock.enter(name)
    try:
        yield
    finally:
        clock.enter(before)
