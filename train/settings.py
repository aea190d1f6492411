"""The sections of a training config. Every field is a key of the YAML and a flag: `--optimizer.lr
0.001`.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import Literal

from lightning.pytorch.loggers import Logger
from lightning.pytorch.strategies import StrategyRegistry

from checkpoints.hub import check_repo
from modules.target.loading import AUTO, has_fast_bfloat16, own_device

PRECISIONS = ("32-true", "bf16-mixed", "16-mixed", "64-true")
MOST_NODES = 1 << 16
"""Limit on the nodes of a drafted tree; published trees have fewer than a thousand."""
HIGHEST_RATE = 10.0
"""Highest learning rate; one step of it replaces all weights."""
DEEPSPEED = re.compile(r"deepspeed_([123])(_offload)?")
"""Names of DeepSpeed strategies: the ZeRO stage, and whether optimiser states are offloaded."""


def check_rate(key: str, rate: float) -> None:
    """Raise ValueError for a learning rate at which nothing is learnt: AdamW and Muon move every
    weight by about the rate in each step.
    """
    if not 0 < rate <= HIGHEST_RATE:
        raise ValueError(
            f"{key} must be above 0 and at most {HIGHEST_RATE:g}, got {rate}: published rates of "
            "drafters lie between 1e-5 and 1e-2"
        )


@dataclass
class OptimizerSettings:
    """AdamW, or Muon and AdamW, with linear warm-up, then a cosine down to a floor.

    Args:
        lr: peak learning rate; a component's parameter groups may scale it.
        muon_lr: peak learning rate of Muon, which then trains the matrices of hidden layers
            (embeddings, LM heads, norms and biases stay with AdamW); null: AdamW alone. Its updates
            are as large as AdamW's at the same rate; published for drafters: 1e-3, with an lr of
            1e-4. Parts that are trained before the whole stay with AdamW. Not with DeepSpeed.
        betas: of AdamW.
        weight_decay: on matrices; vectors (norms, biases) are not decayed.
        warmup_ratio: share of the steps that warm up.
        warmup_steps: how many steps warm up; overrides the ratio.
        floor: the learning rate ends at this share of its peak.
    """

    lr: float = 1e-3
    betas: tuple[float, float] = (0.9, 0.95)
    weight_decay: float = 0.0
    warmup_ratio: float = 0.05
    warmup_steps: int | None = None
    floor: float = 0.0
    muon_lr: float | None = None

    def __post_init__(self) -> None:
        """Raise ValueError for values out of range."""
        check_rate("optimizer.lr", self.lr)
        if self.muon_lr is not None:
            check_rate("optimizer.muon_lr", self.muon_lr)
        if not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError(f"optimizer.betas must lie in [0, 1), got {list(self.betas)}")
        if not 0 <= self.weight_decay < math.inf:
            raise ValueError(
                f"optimizer.weight_decay must be at least 0 and finite, got {self.weight_decay}"
            )
        if self.warmup_steps is not None and self.warmup_steps < 0:
            raise ValueError(f"optimizer.warmup_steps must be at least 0, got {self.warmup_steps}")
        for name in ("warmup_ratio", "floor"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"optimizer.{name} must lie in [0, 1], got {getattr(self, name)}")


def training_device(accelerator: str) -> str:
    """The torch device of this process, `cpu` or a GPU."""
    return "cpu" if accelerator == "cpu" else own_device()


def chosen_precision(precision: str, accelerator: str) -> str:
    """The precision: `auto` is bf16-mixed on a GPU that multiplies bfloat16, 32-true elsewhere."""
    if precision != AUTO:
        return precision
    return "bf16-mixed" if has_fast_bfloat16(training_device(accelerator)) else "32-true"


@dataclass
class TrainerSettings:
    """Duration, devices and precision of a training; the names are Lightning's.

    Args:
        max_epochs: passes over the data (-1: as many as max_steps takes).
        max_steps: optimiser steps (-1: as many as max_epochs takes).
        precision: `32-true`, `bf16-mixed`, `16-mixed`, `64-true`; `auto` is bf16-mixed on a GPU
            that multiplies bfloat16 and 32-true elsewhere. Mixed precisions multiply what stays
            float32 in TF32 on a GPU.
        accumulate_grad_batches: batches per optimiser step.
        gradient_clip_val: largest gradient norm (0: no clipping).
        gradient_clip_algorithm: `norm`, or `value` to clip every element.
        activation_checkpointing: recompute activations of the component's own layers instead of
            storing them.
        compile: compile the component's own blocks with torch.compile.
        accelerator: `auto`, `cpu` or `cuda`.
        devices: processes per machine, or `auto` (one per GPU; one on a CPU).
        num_nodes: machines.
        strategy: `auto`, `ddp`, `deepspeed_1`, `deepspeed_2`, `deepspeed_3`, or any other name of
            Lightning's.
        val_check_interval: validate every so many batches, or (0.5) that share of an epoch.
        log_every_n_steps: optimiser steps between two logged training means.
        logger: Lightning loggers by class path; the default writes CSV and TensorBoard files.
    """

    max_epochs: int = 1
    max_steps: int = -1
    precision: str = AUTO
    accumulate_grad_batches: int = 1
    gradient_clip_val: float = 1.0
    gradient_clip_algorithm: Literal["norm", "value"] = "norm"
    activation_checkpointing: bool = False
    compile: bool = False
    accelerator: str = "auto"
    devices: int | str = "auto"
    num_nodes: int = 1
    strategy: str = "auto"
    val_check_interval: int | float = 1.0
    log_every_n_steps: int = 10
    logger: list[Logger] | None = None

    def __post_init__(self) -> None:
        """Raise ValueError for a training without an end, and for values that Lightning would
        accept or ignore.
        """
        # 1. Numbers.
        if not 0 <= self.gradient_clip_val < math.inf:
            raise ValueError(
                "trainer.gradient_clip_val must be at least 0 (no clipping) and finite, got "
                f"{self.gradient_clip_val}"
            )
        if self.accumulate_grad_batches < 1:
            raise ValueError(
                "trainer.accumulate_grad_batches must be at least 1, got "
                f"{self.accumulate_grad_batches}"
            )
        if self.max_steps < 0 and self.max_epochs < 0:
            raise ValueError(
                "trainer.max_steps and trainer.max_epochs are both -1: give one of them"
            )
        # 2. Names.
        if self.precision not in (AUTO, *PRECISIONS):
            raise ValueError(
                f"trainer.precision {self.precision!r} is unknown: use one of "
                f"{', '.join((*PRECISIONS, AUTO))}"
            )
        if (
            self.strategy != "auto"
            and not DEEPSPEED.fullmatch(self.strategy)
            and (self.strategy not in StrategyRegistry)
        ):
            raise ValueError(
                f"trainer.strategy {self.strategy!r} is unknown: use auto, ddp, deepspeed_1, "
                "deepspeed_2, deepspeed_3 (each also with _offload), or a name of Lightning's"
            )
        if (
            # DeepSpeed clips by norm only.
            self.strategy.startswith("deepspeed")
            and self.gradient_clip_algorithm == "value"
            and self.gradient_clip_val
        ):
            raise ValueError(
                "trainer.gradient_clip_algorithm is value, but DeepSpeed clips by norm only: set "
                "it to norm, or use trainer.strategy ddp"
            )


@dataclass
class ProbeSettings:
    """The acceptance probe, which decodes a few held-out prompts after each validation.

    Args:
        prompts: number of prompts (0: no probe).
        max_new_tokens: per prompt.
        budget: drafted nodes per step; null is the drafter's own.
    """

    prompts: int = 4
    max_new_tokens: int = 48
    budget: int | None = None

    def __post_init__(self) -> None:
        """Raise ValueError for numbers out of range."""
        if self.prompts < 0 or self.max_new_tokens < 1:
            raise ValueError(
                "probe.prompts must be at least 0 and probe.max_new_tokens at least 1, got "
                f"{self.prompts} and {self.max_new_tokens}"
            )
        if self.budget is not None and not 1 <= self.budget <= MOST_NODES:
            raise ValueError(f"probe.budget must lie between 1 and {MOST_NODES}, got {self.budget}")


@dataclass
class PublishSettings:
    """Publication on the Hugging Face Hub after training (`python -m checkpoints.publish` does it
    later).

    Args:
        repo: USER/NAME; null: do not publish.
        private: visible to its owner only.
        license: of the component; null is the target's where that is known, else `other`.
    """

    repo: str | None = None
    private: bool = True
    license: str | None = None

    def __post_init__(self) -> None:
        """Raise ValueError for a malformed repository id, before training."""
        if self.repo is not None:
            check_repo(self.repo)


@dataclass
class CheckpointSettings:
    """Which weights are saved during training and which become `drafter/`.

    Args:
        best_by: the figure by which weights are compared.
        export: which weights become `drafter/`.
        every_n_steps: how often `last` is written; null is after each validation.
    """

    best_by: Literal["val/loss", "probe/tau"] = "val/loss"
    export: Literal["best", "last"] = "best"
    every_n_steps: int | None = None
