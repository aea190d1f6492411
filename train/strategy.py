"""How processes share the work: by name, DeepSpeed's ZeRO stages on GPUs and on CPUs too."""

from __future__ import annotations

import re

import torch
from lightning.pytorch.strategies import DDPStrategy, DeepSpeedStrategy, Strategy

_DEEPSPEED = re.compile(r"deepspeed_([123])")


class CpuDeepSpeedStrategy(DeepSpeedStrategy):
    """DeepSpeed over gloo. Lightning's own refuses CPUs; the rest of it runs on them unchanged."""

    def setup_environment(self) -> None:
        """What the parent does, without asking for a GPU."""
        DDPStrategy.setup_environment(self)

    @property
    def root_device(self) -> torch.device:
        """DeepSpeed asks for an index."""
        return torch.device("cpu", 0)


def strategy_named(name: str, accelerator: str) -> str | Strategy:
    """A strategy for Lightning's Trainer.

    Args:
        name: `deepspeed_1`, `deepspeed_2`, `deepspeed_3` (ZeRO stages), or one of Lightning's own names.
        accelerator: `auto`, `cpu` or `cuda`.
    """
    found = _DEEPSPEED.fullmatch(name)
    if found is None:
        return name
    on_gpu = accelerator != "cpu" and torch.cuda.is_available()
    if on_gpu:
        return DeepSpeedStrategy(stage=int(found[1]))
    return CpuDeepSpeedStrategy(stage=int(found[1]), process_group_backend="gloo")
