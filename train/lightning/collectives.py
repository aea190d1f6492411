"""Sums and decisions over the processes of a training, one collective each.

Lightning's own begin with a barrier, for which a GPU finishes all its work.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from lightning.pytorch import Trainer
from torch import Tensor


def total(tensor: Tensor, trainer: Trainer) -> Tensor:
    """The sum over the processes, on this one's device: no process waits on its host."""
    if trainer.world_size == 1:
        return tensor
    summed = tensor.detach().clone().to(trainer.strategy.root_device)
    dist.all_reduce(summed)
    return summed


def any_process(flag: bool, trainer: Trainer) -> bool:
    """Whether it holds on any process; each waits for the answer."""
    return bool(total(torch.tensor(float(flag)), trainer))


def no_broadcast(trainer: Trainer) -> None:
    """Keep Lightning from broadcasting before every batch whether its own handler saw SIGTERM, and
    waiting for that; for a training that handles signals otherwise.
    """
    loop: Any = trainer.fit_loop.epoch_loop
    loop._broadcast_sigterm_tensor = lambda: None
