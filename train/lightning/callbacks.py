"""Callbacks of the training loop: acceptance probe, progress bar, checkpoints."""

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
from train.lightning.collectives import any_process, no_broadcast
from train.lightning.deepspeed import unsharded
from train.lightning.module import TrainableModule
from train.settings import CheckpointSettings, ProbeSettings

logger = logging.getLogger(__name__)

PROBE = "probe/tau"


class AcceptanceProbe(Callback):
    """After each validation, decodes held-out prompts greedily with the current drafter, and logs τ
    (`probe/tau`).

    τ = tokens emitted by target calls ÷ those calls, bonus token counted, pooled over the prompts.

    It runs on every rank, because parameters may be sharded; sharded ones are gathered into a copy.

    Args:
        prompts: token ids of held-out prompts.
        settings: number of tokens per prompt, and the draft budget.
    """

    def __init__(self, prompts: list[list[int]], settings: ProbeSettings) -> None:
        self.prompts, self.settings = prompts, settings

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Decode the prompts, and log τ."""
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
    """A progress bar, and one permanent line per validation.

    Epochs are counted from 1; an epoch's batches end where `max_steps` ends the training.
    """

    @property
    def total_train_batches(self) -> int | float:
        """Batches of this epoch that will be trained."""
        trainer, every = self.trainer, self.trainer.num_training_batches
        if trainer.max_steps < 0:
            return every
        # `max_steps` counts optimiser steps, the bar counts batches.
        together = trainer.accumulate_grad_batches
        taken = trainer.fit_loop.epoch_loop.batch_progress.current.completed
        if taken >= every:
            # The counter is still that of the previous epoch.
            taken = 0
        left = (trainer.max_steps - trainer.global_step) * together
        return min(every, taken - taken % together + left)

    def _get_train_description(self, current_epoch: int) -> str:
        last = self.trainer.max_epochs
        return f"epoch {current_epoch + 1}" + (f" of {last}" if last and last > 0 else "")

    def get_metrics(self, trainer: Trainer, pl_module: LightningModule) -> dict[str, Any]:
        """The bar's metrics without the run's version number."""
        return {
            name: value
            for name, value in super().get_metrics(trainer, pl_module).items()
            if name != "v_num"
        }

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Print the validation's figures."""
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
    """A signal ended a training between two steps; `last.ckpt` is complete."""


class LastCheckpoint(ModelCheckpoint):
    """Writes `last.ckpt`, only between two optimiser steps; also at the end, on SIGTERM and Ctrl-C.

    A checkpoint holds no gradients, so one in the middle of an accumulation would lose those of
    earlier batches. SIGTERM (from a scheduler) or Ctrl-C to any process ends the training after the
    current optimiser step on all of them, with everything saved; this costs one all-reduce of a
    flag per optimiser step. A second signal ends the process at once, and
    `configs.command_line.endings.GRACE` ends one that hangs.
    """

    _signalled, _since = 0, 0.0
    _due = False
    _between_steps, _step = True, 0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Install signal handlers; Lightning restores the earlier ones at the end."""
        super().on_train_start(trainer, pl_module)
        self._step = trainer.global_step
        if threading.current_thread() is threading.main_thread():
            no_broadcast(trainer)
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
        """Save when due, and a last time after a signal."""
        self._between_steps, self._step = trainer.global_step > self._step, trainer.global_step
        if not self._between_steps:
            return
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)
        # A validation in the middle of an accumulation has postponed its checkpoint.
        if self._due:
            self._due = False
            super().on_validation_end(trainer, pl_module)
        # A signal to any process ends all of them here.
        if any_process(bool(self._signalled), trainer):
            assert self.dirpath is not None
            trainer.save_checkpoint(Path(self.dirpath) / "last.ckpt")
            number = self._signalled or signal.SIGTERM
            where = f"after step {trainer.global_step}, all of it saved"
            raise Terminated(number, f"stopped by {signal_name(number)} {where}")

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save now, or after the current optimiser step."""
        if self._between_steps:
            super().on_validation_end(trainer, pl_module)
        else:
            self._due = True

    def on_save_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Record whether the checkpoint lies between two optimiser steps; `best.ckpt`, written at a
        validation, may not.
        """
        checkpoint["between_steps"] = self._between_steps

    def on_load_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Warn if the checkpoint lacks accumulated gradients."""
        if not checkpoint.get("between_steps", True) and trainer.is_global_zero:
            logger.warning(
                "the checkpoint is of step %d, in the middle of an accumulation: the gradients of "
                "the batches since that step are lost",
                checkpoint["global_step"],
            )

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save the final weights."""
        assert self.dirpath is not None
        trainer.save_checkpoint(Path(self.dirpath) / "last.ckpt")


def checkpoint_callbacks(folder: Path, settings: CheckpointSettings) -> list[ModelCheckpoint]:
    """Callbacks that write `last.ckpt` and `best.ckpt`."""
    mode = "max" if settings.best_by == PROBE else "min"
    common: dict[str, Any] = {
        "dirpath": folder,
        "save_on_train_epoch_end": False,
        "enable_version_counter": False,
    }
    best = ModelCheckpoint(filename="best", monitor=settings.best_by, mode=mode, **common)
    last = LastCheckpoint(filename="last", every_n_train_steps=settings.every_n_steps, **common)
    return [best, last]
