"""Trainings of a number of steps, whose end is all that is kept."""

from __future__ import annotations

import time
from typing import Any, Literal

from lightning.pytorch import Callback, LightningModule, Trainer
from rich.console import Console
from torch.utils.data import DataLoader

from configs.command_line.progress import EVERY
from train.lightning.callbacks import RunProgress

Precision = Literal["32-true", "bf16-mixed"]


class StepLines(Callback):
    """Where no bar can be drawn: a line with the step and the bar's figures every `EVERY` seconds,
    and one at the end.
    """

    _last = 0.0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Count the seconds from here."""
        self._last = time.monotonic()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Print a line that is due."""
        now, ended = time.monotonic(), trainer.global_step >= trainer.max_steps
        if not trainer.is_global_zero or (now - self._last < EVERY and not ended):
            return
        self._last = now
        figures = (f"{name} {value:.3f}" for name, value in trainer.progress_bar_metrics.items())
        print(f"step {trainer.global_step} of {trainer.max_steps}", *figures, sep="  ", flush=True)


def fit_steps(
    module: LightningModule,
    loader: DataLoader,
    steps: int,
    clip: float = 1.0,
    precision: Precision = "32-true",
) -> None:
    """Train, with a bar on a terminal and `StepLines` elsewhere.

    Args:
        module: logs its loss to the bar.
        loader: read again until the steps are done.
        steps: of the optimiser.
        clip: largest norm of the gradients.
        precision: as Lightning names it.
    """
    terminal = Console().is_terminal
    trainer = Trainer(
        callbacks=[RunProgress() if terminal else StepLines()],
        max_steps=steps,
        max_epochs=-1,
        gradient_clip_val=clip,
        precision=precision,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=terminal,
        enable_model_summary=False,
    )
    trainer.fit(module, loader)
