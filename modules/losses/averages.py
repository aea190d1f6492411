"""The counts that losses divide by, averaged over all processes of a training.

Gradients are averaged over W processes. A process that divides its sum S_r by its own count N_r
weights its labels by 1 / N_r. Dividing by the mean count instead gives the mean over processes of
S_r · W / Σ N, which is Σ S / Σ N, the loss of one process on all batches together.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch
from torch import Tensor

MeanOverProcesses = Callable[[Tensor], Tensor]
"""A tensor -> its mean over the processes; a collective, so all processes call it equally often.
"""

_MEAN: ContextVar[MeanOverProcesses | None] = ContextVar("mean over processes", default=None)


def divisor(count: Tensor) -> Tensor:
    """The divisor of a sum: the count, or inside `shared_counts` its mean over the processes; 1
    where that is 0.

    Whether it is called must not depend on the batch, since processes wait for each other here.
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
    """Losses computed inside divide by counts of all processes."""
    token = _MEAN.set(mean)
    try:
        yield
    finally:
        _MEAN.reset(token)
