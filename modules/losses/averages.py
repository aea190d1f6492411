"""The counts that losses divide by, averaged over all processes of a training.

Gradients are averaged over W processes. A process that divides its sum S_r by its own count N_r
weights its labels by 1 / N_r. Dividing by the mean count instead gives the mean over processes of
S_r · W / Σ N, which is Σ S / Σ N, the loss of one process on all batches together.

A collective makes the processes wait for each other, so a batch has one: a loss makes all its
`SharedCount`s before it reads the first of them, where possible before the drafter's forward pass.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch
from torch import Tensor

MeanOverProcesses = Callable[[Tensor], Tensor]
"""A vector -> its mean over the processes; a collective, so all processes call it equally often.
"""


class _Batch:
    """The counts of one batch that wait for the next collective."""

    def __init__(self, mean: MeanOverProcesses) -> None:
        self.mean = mean
        self.waiting: list[SharedCount] = []

    def share(self) -> None:
        """Average all that wait, in one vector of float64, which holds every count exactly."""
        waiting, self.waiting = self.waiting, []
        device = waiting[0].local.device
        flat = [each.local.detach().to(device, torch.float64).flatten() for each in waiting]
        means = self.mean(torch.cat(flat)).split([len(each) for each in flat])
        for each, mean in zip(waiting, means, strict=True):
            local = each.local
            dtype = local.dtype if local.is_floating_point() else torch.float32
            each.shared = mean.view(local.shape).to(local.device, dtype)


_BATCH: ContextVar[_Batch | None] = ContextVar("counts of a batch", default=None)


class SharedCount:
    """A number of this process, or a tensor of them, and its mean over the processes.

    Inside `shared_counts` the first that is read shares all that were made since the last
    collective. Whether one is made or read must not depend on the batch, since processes wait for
    each other there.

    Args:
        local: of this process [...], not learnt.
    """

    def __init__(self, local: Tensor) -> None:
        self.local = local
        self.shared: Tensor | None = None
        self._divisor: Tensor | None = None
        self._batch = _BATCH.get()
        if self._batch is not None:
            self._batch.waiting.append(self)

    def mean(self) -> Tensor:
        """Its mean over the processes [...]; outside of `shared_counts` the number itself."""
        if self._batch is None:
            return self.local
        if self.shared is None:
            self._batch.share()
        assert self.shared is not None
        return self.shared

    def divisor(self) -> Tensor:
        """What a sum is divided by: the mean, 1 where that is 0."""
        if self._divisor is None:
            mean = self.mean()
            self._divisor = torch.where(mean > 0, mean, torch.ones_like(mean))
        return self._divisor


def divisor(count: Tensor) -> Tensor:
    """The divisor of a sum, for a loss of a single mean: a collective of its own, unless other
    counts wait for one.
    """
    return SharedCount(count).divisor()


@contextmanager
def shared_counts(mean: MeanOverProcesses | None) -> Iterator[None]:
    """The loss of one batch, computed inside, divides by counts of all processes; None: there is
    one process.
    """
    token = _BATCH.set(None if mean is None else _Batch(mean))
    try:
        yield
    finally:
        _BATCH.reset(token)
