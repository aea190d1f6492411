"""The counts that losses divide by, one for all processes of a training.

Gradients are averaged over W processes. One that divides its sum S_r by its own count N_r weighs its labels by 1 / N_r;
dividing by the mean count instead gives the mean over processes of S_r · W / Σ N, and that is Σ S / Σ N, what one
process says of all their batches together.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch
from torch import Tensor

MeanOverProcesses = Callable[[Tensor], Tensor]
"""A scalar -> its mean over the processes; a collective, so every process calls it as often as the others."""

_MEAN: ContextVar[MeanOverProcesses | None] = ContextVar("mean over processes", default=None)


def divisor(count: Tensor) -> Tensor:
    """What a sum is divided by: the count, or inside `shared_counts` its mean over the processes; 1 where that is 0.

    Calls must not depend on the batch: the processes meet here.
    """
    mean = _MEAN.get()
    if mean is not None:
        count = mean(count if count.is_floating_point() else count.float())
    return torch.where(count > 0, count, torch.ones_like(count))


@contextmanager
def shared_counts(mean: MeanOverProcesses) -> Iterator[None]:
    """Let losses computed inside divide by counts of all processes."""
    token = _MEAN.set(mean)
    try:
        yield
    finally:
        _MEAN.reset(token)
