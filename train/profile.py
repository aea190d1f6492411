"""`python train.py --profile`: where the time of an optimiser step goes, measured on this machine.

A few steps of the recipe are trained for real, with its strategy and precision, in a folder that is
thrown away. Every moment between the first and the last of the measured steps is charged to one
phase; on CUDA each boundary waits for the device, which costs some of the overlap that an unwatched
training has.
"""

from __future__ import annotations

import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import torch
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from lightning.pytorch.utilities import rank_zero_only

from modules.runtime.phase_timer import PhaseClock, watched
from modules.target.target import Target
from train.run import Recipe, build, lightning_trainer, training_module

WARM_UP, MEASURED = 2, 5
"""Optimiser steps before the clock starts (buffers, compilation), and those that count."""
PHASES = {
    "data": "batches from the loader, and what is logged between steps",
    "target states": "what the feature cache did not bring, by the frozen target",
    "forward": "the drafter, up to what its LM head reads",
    "loss": "logits and their losses; of a frozen head the features' gradient too",
    "backward": "gradients, and their exchange between processes",
    "optimiser": "clipping and AdamW",
}
"""What each phase holds, in the order of a step."""


class StepProfile(Callback):
    """Charges the time of the steps behind the warm-up to phases.

    Args:
        clock: that is charged.
    """

    def __init__(self, clock: PhaseClock) -> None:
        self.clock = clock

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """The batch is there; what follows is the module's."""
        self.clock.enter("forward")

    def on_before_backward(
        self, trainer: Trainer, pl_module: LightningModule, loss: torch.Tensor
    ) -> None:
        """The loss is known."""
        self.clock.enter("backward")

    def on_after_backward(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """The gradients are there."""
        self.clock.enter("optimiser")

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """The weights have changed: begin to measure after the warm-up, and stop with the last
        step.
        """
        self.clock.enter("data")
        if trainer.global_step == WARM_UP + MEASURED:
            self.clock.stop()
        elif trainer.global_step == WARM_UP and not self.clock.running:
            self.clock.start()


def profile(recipe: Recipe, target: Target) -> dict[str, float]:
    """Seconds of one optimiser step by phase, mean over the measured ones, on this process."""
    recipe.trainer = replace(
        recipe.trainer,
        max_steps=WARM_UP + MEASURED,
        max_epochs=-1,
        val_check_interval=1 << 30,
        logger=[],
    )
    seed_everything(recipe.seed, verbose=False)
    with tempfile.TemporaryDirectory() as folder:
        trainer = lightning_trainer(recipe, Path(folder), keep=False)
        module = training_module(recipe, build(recipe, target), target)
        clock = PhaseClock(trainer.strategy.root_device)
        cast(Any, trainer).callbacks.append(StepProfile(clock))
        with watched(clock):
            trainer.fit(module, datamodule=recipe.data)
    return {name: clock.seconds.get(name, 0.0) / MEASURED for name in PHASES}


@rank_zero_only
def print_profile(seconds: dict[str, float]) -> None:
    """The phases as a table."""
    total = sum(seconds.values())
    print(f"{'phase':<14} {'ms':>10} {'share':>6}  what it is")
    for name, what in PHASES.items():
        print(f"{name:<14} {seconds[name] * 1e3:>10.1f} {seconds[name] / total:>6.1%}  {what}")
    print(
        f"{'step':<14} {total * 1e3:>10.1f} {1:>6.1%}  mean of {MEASURED} optimiser steps after "
        f"{WARM_UP}"
    )
