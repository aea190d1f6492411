"""How processes share the work: by name, DeepSpeed's ZeRO stages on GPUs and on CPUs too."""

from __future__ import annotations

import re
from typing import Any

import torch
from lightning.fabric.utilities.seed import reset_seed
from lightning.pytorch.strategies import DDPStrategy, DeepSpeedStrategy, Strategy

_DEEPSPEED = re.compile(r"deepspeed_([123])")


class CpuDeepSpeedStrategy(DeepSpeedStrategy):
    """DeepSpeed over gloo. Lightning's own refuses CPUs; the rest of it runs on them unchanged."""

    def setup_environment(self) -> None:
        """What the parent does, without asking for a GPU."""
        DDPStrategy.setup_environment(self)

    def setup_distributed(self) -> None:
        """What the parent does, without comparing GPU indices."""
        reset_seed()
        self.set_world_ranks()
        self._init_deepspeed_distributed()

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
    options: dict[str, Any] = {"stage": int(found[1]), "logging_batch_size_per_gpu": 1}
    if accelerator != "cpu" and torch.cuda.is_available():
        return DeepSpeedStrategy(**options)
    return CpuDeepSpeedStrategy(**options, process_group_backend="gloo")
