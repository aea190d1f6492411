"""One of two processes that train with DeepSpeed over gloo: `python -m
tests.train.lightning.deepspeed_worker FOLDER`.

It trains every case of `CASES` to its end, asks rank 1 to end (SIGTERM) in the middle of a step, at
every stage in turn, goes on with what that left, and one process, at other stages, and in the end
loses rank 1 (kill -9). One launch, as starting two processes takes longer than ten cases.
"""

from __future__ import annotations

import itertools
import math
import os
import signal
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.callbacks import Callback

import train.run
from data.datamodule import ConversationData
from modules.contracts.shapes import TargetShape
from modules.contracts.trainable import Trainable
from modules.drafters.feature.eagle3 import Eagle3
from modules.drafters.heads.clover import Clover
from modules.drafters.heads.medusa import Medusa
from tests.fakes import tiny_target
from train.lightning.callbacks import Terminated
from train.run import Place, Recipe, resume_point
from train.settings import CheckpointSettings, OptimizerSettings, ProbeSettings, TrainerSettings

STEPS = 4
WHOLE = "everything but the last run went well"


def clover(shape: TargetShape) -> Trainable:
    """StepResult two tokens."""
    return Clover(shape, 2)


def eagle3(shape: TargetShape) -> Trainable:
    """With its unrolled training."""
    return Eagle3(shape, steps=2)


def medusa(shape: TargetShape) -> Trainable:
    """With LM heads of its own."""
    return Medusa(shape, 2)


def torn(shape: TargetShape) -> Trainable:
    """A Clover whose gradient is not finite in step 2, on the last process."""
    drafter, calls = clover(shape), itertools.count()
    spoilt = os.environ.get("RANK", "1") == "1"
    next(drafter.parameters()).register_hook(
        lambda grad: grad * math.nan if spoilt and next(calls) == 1 else grad
    )
    return drafter


CASES = {
    **{
        f"deepspeed_{stage}_{kind.__name__}": (f"deepspeed_{stage}", kind)
        for stage in (1, 2, 3)
        for kind in (clover, eagle3)
    },
    "deepspeed_3_medusa": ("deepspeed_3", medusa),
    **{f"deepspeed_{stage}_torn": (f"deepspeed_{stage}", torn) for stage in (1, 3)},
    **{f"deepspeed_{stage}_accumulated": (f"deepspeed_{stage}", clover) for stage in (1, 2, 3)},
    **{f"ddp_{kind.__name__}": ("ddp", kind) for kind in (clover, eagle3)},
    "ddp_accumulated": ("ddp", clover),
}
"""Runs, their strategies and what they train. `accumulated`: 4 batches a step, for two epochs
of 9.
"""
RESUMED = {"terminated_2": "deepspeed_3", "one": "deepspeed_1"}
"""Runs of Clover that ended early, and the strategies they go on with."""


def recipe(
    folder: Path, strategy: str, drafter: Any, devices: int, rows: int, accumulated: bool = False
) -> Recipe:
    """A few steps on conversations of different lengths, one to a row."""
    data = ConversationData(
        str(folder / "conversations.jsonl"),
        max_length=48,
        rows=rows,
        validation_fraction=0.2 if accumulated else 0.1,
    )
    settings = TrainerSettings(
        max_steps=STEPS,
        max_epochs=-1,
        accelerator="cpu",
        devices=devices,
        strategy=strategy,
        log_every_n_steps=1,
        val_check_interval=STEPS,
    )
    if accumulated:
        settings = replace(
            settings, max_steps=-1, max_epochs=2, accumulate_grad_batches=4, val_check_interval=1.0
        )
    return Recipe(
        drafter,
        data,
        optimizer=OptimizerSettings(lr=5e-3),
        trainer=settings,
        probe=ProbeSettings(prompts=1, max_new_tokens=3),
        checkpoint=CheckpointSettings(every_n_steps=1, export="last"),
    )


class Signal(Callback):
    """One rank is sent a signal while it computes a step.

    Args:
        number: of the signal. step: the optimiser step, from 0. rank: whose.
    """

    def __init__(self, number: int, step: int, rank: int) -> None:
        self.number, self.step, self.rank = number, step, rank

    def on_train_batch_start(
        self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int
    ) -> None:
        """As a lost machine would, or a scheduler."""
        if trainer.global_step == self.step and trainer.global_rank == self.rank:
            os.kill(os.getpid(), self.number)


SIGNALS = {
    "killed": lambda: Signal(signal.SIGKILL, 3, 1),
    "terminated": lambda: Signal(signal.SIGTERM, 1, 1),
}


def broken(folder: Path, mode: str) -> None:
    """Clover, ended early: killed at stage 2, or asked to end at every stage."""
    progress = train.run.RunProgress
    setattr(train.run, "RunProgress", SIGNALS[mode])  # noqa: B010
    for name, stage in (
        [("killed", 2)]
        if mode == "killed"
        else [(f"terminated_{stage}", stage) for stage in (1, 2, 3)]
    ):
        try:
            run(folder, name, f"deepspeed_{stage}", clover)
        except Terminated as stopped:
            print(f"{name} {stopped}", file=sys.stderr)
    setattr(train.run, "RunProgress", progress)  # noqa: B010


def run(folder: Path, name: str, strategy: str, drafter: Any, resume: Path | None = None) -> None:
    """Two processes, one row each."""
    place = Place(folder / name, resume=resume)
    what = recipe(folder, strategy, drafter, 2, 1, name.endswith("accumulated"))
    train.run.train(what, place, tiny_target(dtype=torch.float32))


def main(folder: Path) -> None:
    """Train."""
    torch.set_num_threads(1)
    for name, (strategy, drafter) in CASES.items():
        run(folder, name, strategy, drafter)
    broken(folder, "terminated")
    for name, strategy in RESUMED.items():
        run(folder, name, strategy, clover, resume_point(folder / name, "last"))
    print(WHOLE, file=sys.stderr, flush=True)
    broken(folder, "killed")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
