"""One of two processes that train with DeepSpeed over gloo: `python -m tests.train.deepspeed_worker FOLDER MODE`.

`stages` trains every case of `CASES` to its end; `killed` loses rank 1 in the middle of step 3.
"""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.callbacks import Callback

import train.run
from data.datamodule import ConversationData
from modules.core.trainable import TargetShape, Trainable
from modules.feature_drafters.eagle3 import Eagle3
from modules.heads.clover import Clover
from modules.heads.medusa import Medusa
from tests.fakes import tiny_target
from train.run import Place, Recipe
from train.settings import CheckpointSettings, OptimizerSettings, ProbeSettings, TrainerSettings

STEPS = 4


def clover(shape: TargetShape) -> Trainable:
    """Told two tokens."""
    return Clover(shape, 2)


def eagle3(shape: TargetShape) -> Trainable:
    """With its unrolled training."""
    return Eagle3(shape, steps=2)


def medusa(shape: TargetShape) -> Trainable:
    """With LM heads of its own."""
    return Medusa(shape, 2)


CASES = {"deepspeed_1": ("deepspeed_1", clover), "deepspeed_2": ("deepspeed_2", eagle3),
         "deepspeed_3": ("deepspeed_3", clover), "deepspeed_3_medusa": ("deepspeed_3", medusa)}


def recipe(folder: Path, strategy: str, drafter: Any, devices: int, rows: int) -> Recipe:
    """A few steps on conversations of one length, one to a row."""
    data = ConversationData(str(folder / "conversations.jsonl"), max_length=48, rows=rows, validation_fraction=0.1)
    settings = TrainerSettings(max_steps=STEPS, max_epochs=-1, accelerator="cpu", devices=devices, strategy=strategy,
                               log_every_n_steps=1, val_check_interval=STEPS)
    return Recipe(drafter, data, optimizer=OptimizerSettings(lr=5e-3), trainer=settings,
                  probe=ProbeSettings(prompts=1, max_new_tokens=3),
                  checkpoint=CheckpointSettings(every_n_steps=1, export="last"))


class Vanish(Callback):
    """Rank 1 is killed while it computes its fourth step."""

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        """As a lost machine would."""
        if trainer.global_step == 3 and trainer.global_rank == 1:
            os.kill(os.getpid(), signal.SIGKILL)


def main(folder: Path, mode: str) -> None:
    """Train."""
    torch.set_num_threads(1)
    cases = CASES if mode == "stages" else {"killed": ("deepspeed_2", clover)}
    if mode == "killed":
        setattr(train.run, "RunProgress", Vanish)  # noqa: B010
    for name, (strategy, drafter) in cases.items():
        train.run.train(recipe(folder, strategy, drafter, 2, 1), Place(folder / name), tiny_target(dtype=torch.float32))


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
