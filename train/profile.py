"""`python train.py --profile`: time of an optimiser step by phase, measured on this machine.

A few steps of the recipe are trained with its strategy and precision, in a temporary folder. All
time between the first and the last measured step is assigned to one phase; on CUDA each boundary
waits for the device, which removes some of the overlap of a normal training.
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
"""Optimiser steps before the clock starts (buffers, compilation), and measured steps."""
PHASES = {
    "data": "batches from the loader, and what is logged between steps",
    "target states": "what the feature cache did not bring, by the frozen target",
    "forward": "the drafter, up to what its LM head reads",
    "loss": "logits and their losses; of a frozen head the features' gradient too",
    "backward": "gradients, and their exchange between processes",
    "optimiser": "clipping and AdamW",
}
"""Phases and their content, in the order of a step."""


class StepProfile(Callback):
    """Measures the phases of the steps after the warm-up.

    Args:
        clock: adds up the time of each phase.
    """

    def __init__(self, clock: PhaseClock) -> None:
        self.clock = clock

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """The batch is loaded: the forward pass begins."""
        self.clock.enter("forward")

    def on_before_backward(
        self, trainer: Trainer, pl_module: LightningModule, loss: torch.Tensor
    ) -> None:
        """The loss is computed: the backward pass begins."""
        self.clock.enter("backward")

    def on_after_backward(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """The gradients are computed: the optimiser's step begins."""
        self.clock.enter("optimiser")

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """The step is done: start the clock after the warm-up, and stop it after the last step."""
        self.clock.enter("data")
        if trainer.global_step == WARM_UP + MEASURED:
            self.clock.stop()
        elif trainer.global_step == WARM_UP and not self.clock.running:
            self.clock.start()


def profile(recipe: Recipe, target: Target) -> dict[str, float]:
    """Seconds of one optimiser step by phase, mean over the measured steps, of this process."""
    # A short training without validation, logs and checkpoints.
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
    """Print the phases as a table."""
    total = sum(seconds.values())
    print(f"{'phase':<14} {'ms':>10} {'share':>6}  what it is")
    for name, what in PHASES.items():
        print(f"{name:<14} {seconds[name] * 1e3:>10.1f} {seconds[name] / total:>6.1%}  {what}")
    print(
        f"{'step':<14} {total * 1e3:>10.1f} {1:>6.1%}  mean of {MEASURED} optimiser steps after "
        f"{WARM_UP}"
    )
