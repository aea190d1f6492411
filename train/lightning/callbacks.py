"""What happens around the training loop: the acceptance probe, the progress bar, the
checkpoints.
"""

from __future__ import annotations

import logging
import os
import signal
import threading
import time
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint, RichProgressBar

from configs.command_line.endings import ONE_SIGNAL, Stopped, signal_name
from modules.contracts.drafter import Drafter
from modules.contracts.sampling import Sampling
from modules.decoding.decoder import SpeculativeDecoder
from train.lightning.deepspeed import unsharded
from train.lightning.module import TrainableModule
from train.settings import CheckpointSettings, ProbeSettings

logger = logging.getLogger(__name__)

PROBE = "probe/tau"


class AcceptanceProbe(Callback):
    """After each validation, decodes held-out prompts greedily with the drafter as it stands, and
    logs τ (`probe/tau`).

    τ = tokens kept of target calls ÷ those calls, bonus token counted, pooled over the prompts.

    It runs on every rank, because parameters may be sharded, on a whole copy of them.

    Args:
        prompts: token ids of held-out prompts.
        settings: how many tokens, with what budget.
    """

    def __init__(self, prompts: list[list[int]], settings: ProbeSettings) -> None:
        self.prompts, self.settings = prompts, settings

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Decode, and log."""
        assert isinstance(pl_module, TrainableModule) and isinstance(pl_module.trainable, Drafter)
        pl_module.log(PROBE, self.measure(pl_module), prog_bar=True, sync_dist=True)

    def measure(self, module: TrainableModule) -> float:
        """τ of the current weights."""
        drafter = unsharded(module.trainable)
        assert isinstance(drafter, Drafter)
        decoder = SpeculativeDecoder(
            drafter.adapt_sharing(module.target), drafter, budget=self.settings.budget
        )
        emitted = calls = 0
        for prompt in self.prompts:
            trace = decoder.decode([prompt], Sampling(), self.settings.max_new_tokens)[0]
            emitted, calls = emitted + sum(trace.accepted), calls + len(trace.accepted)
        return emitted / max(1, calls)


class RunProgress(RichProgressBar):
    """A progress bar, and one line per validation that stays.

    Epochs are counted from 1, and the batches of one end where `max_steps` ends the training.
    """

    @property
    def total_train_batches(self) -> int | float:
        """Batches of this epoch that are taken."""
        trainer, every = self.trainer, self.trainer.num_training_batches
        if trainer.max_steps < 0:
            return every
        together = trainer.accumulate_grad_batches
        taken = trainer.fit_loop.epoch_loop.batch_progress.current.completed
        if taken >= every:
            # Still those of the epoch before.
            taken = 0
        left = (trainer.max_steps - trainer.global_step) * together
        return min(every, taken - taken % together + left)

    def _get_train_description(self, current_epoch: int) -> str:
        last = self.trainer.max_epochs
        return f"epoch {current_epoch + 1}" + (f" of {last}" if last and last > 0 else "")

    def get_metrics(self, trainer: Trainer, pl_module: LightningModule) -> dict[str, Any]:
        """Without the run's version number."""
        return {
            name: value
            for name, value in super().get_metrics(trainer, pl_module).items()
            if name != "v_num"
        }

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Say what was measured."""
        super().on_validation_end(trainer, pl_module)
        shown = {
            name: float(value)
            for name, value in trainer.callback_metrics.items()
            if name in ("val/loss", PROBE)
        }
        if trainer.is_global_zero and shown:
            figures = "  ".join(f"{name} {value:.4f}" for name, value in sorted(shown.items()))
            _console(self).print(f"step {trainer.global_step}  {figures}")


def _console(bar: RichProgressBar) -> Any:
    return bar.progress.console if bar.progress is not None else bar._console


class Terminated(Stopped):
    """A signal ended a training between two steps; `last.ckpt` holds all of it."""


class LastCheckpoint(ModelCheckpoint):
    """Keeps `last.ckpt`, between two optimiser steps only; at the end, on SIGTERM and Ctrl-C too.

    A checkpoint holds no gradients, so one in the middle of an accumulation would lose those of the
    batches before it. SIGTERM (of a scheduler) or Ctrl-C to any of the processes ends the training
    after the optimiser step under way on all of them, with everything saved: one more all-reduce of
    a flag per optimiser step. A second signal ends the process at once, and
    `configs.command_line.endings.GRACE` one that hangs.
    """

    _signalled, _since = 0, 0.0
    _due = False
    _between_steps, _step = True, 0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """From now on signals are remembered; Lightning restores earlier handlers at the end."""
        super().on_train_start(trainer, pl_module)
        self._step = trainer.global_step
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, signal.SIGINT):
                if signal.getsignal(number) != signal.SIG_IGN:
                    signal.signal(number, self._remember)

    def _remember(self, number: int, _: Any) -> None:
        if not self._signalled:
            self._signalled, self._since = number, time.monotonic()
            os.write(2, b"\nending after this step, saved; a second signal ends at once\n")
        elif time.monotonic() - self._since > ONE_SIGNAL:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Save when it is time to, and for the last time when the process is to end."""
        self._between_steps, self._step = trainer.global_step > self._step, trainer.global_step
        if not self._between_steps:
            return
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)
        if self._due:
            self._due = False
            super().on_validation_end(trainer, pl_module)
        if trainer.strategy.reduce_boolean_decision(bool(self._signalled), all=False):
            assert self.dirpath is not None
            trainer.save_checkpoint(Path(self.dirpath) / "last.ckpt")
            number = self._signalled or signal.SIGTERM
            where = f"after step {trainer.global_step}, all of it saved"
            raise Terminated(number, f"stopped by {signal_name(number)} {where}")

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save, or do so after the optimiser step under way."""
        if self._between_steps:
            super().on_validation_end(trainer, pl_module)
        else:
            self._due = True

    def on_save_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Tell where it stands, of `best.ckpt` too, which holds the weights that were validated,
        whenever that was.
        """
        checkpoint["between_steps"] = self._between_steps

    def on_load_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Say so where gradients are missing."""
        if not checkpoint.get("between_steps", True) and trainer.is_global_zero:
            logger.warning(
                "the checkpoint is of step %d, in the middle of an accumulation: the gradients of "
                "the batches since that step are lost",
                checkpoint["global_step"],
            )

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """The weights that training ended on."""
        assert self.dirpath is not None
        trainer.save_checkpoint(Path(self.dirpath) / "last.ckpt")


def checkpoint_callbacks(folder: Path, settings: CheckpointSettings) -> list[ModelCheckpoint]:
    """Writers of `last.ckpt` and `best.ckpt`."""
    mode = "max" if settings.best_by == PROBE else "min"
    common: dict[str, Any] = {
        "dirpath": folder,
        "save_on_train_epoch_end": False,
        "enable_version_counter": False,
    }
    best = ModelCheckpoint(filename="best", monitor=settings.best_by, mode=mode, **common)
    last = LastCheckpoint(filename="last", every_n_train_steps=settings.every_n_steps, **common)
    return [best, last]
