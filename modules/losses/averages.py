"""The counts that losses divide by, one for all processes of a training.

Gradients are averaged over W processes. One that divides its sum S_r by its own count N_r weighs
its labels by 1 / N_r; dividing by the mean count instead gives the mean over processes of S_r · W /
Σ N, and that is Σ S / Σ N, what one process says of all their batches together.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch
from torch import Tensor

MeanOverProcesses = Callable[[Tensor], Tensor]
"""A tensor -> its mean over the processes; a collective, so every process calls it as often as the
others.
"""

_MEAN: ContextVar[MeanOverProcesses | None] = ContextVar("mean over processes", default=None)


def divisor(count: Tensor) -> Tensor:
    """What a sum is divided by: the count, or inside `shared_counts` its mean over the processes; 1
    where that is 0.

    Calls must not depend on the batch: the processes meet here.
    """
    count = over_processes(count)
    return torch.where(count > 0, count, torch.ones_like(count))


def over_processes(tensor: Tensor) -> Tensor:
    """Inside `shared_counts` a tensor's mean over the processes, else the tensor itself; a
    collective, as `divisor`.
    """
    mean = _MEAN.get()
    return (
        tensor if mean is None else mean(tensor if tensor.is_floating_point() else tensor.float())
    )


@contextmanager
def shared_counts(mean: MeanOverProcesses) -> Iterator[None]:
    """Let losses computed inside divide by counts of all processes."""
    token = _MEAN.set(mean)
    try:
        yield
    finally:
        _MEAN.reset(token)
