"""The LightningModule that trains any `Trainable` with a frozen target."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.strategies import DeepSpeedStrategy
from torch import Tensor, nn
from torch.autograd.graph import increment_version
from torch.nn.utils import get_total_norm
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from modules.contracts.batches import AnyBatch, TextBatch
from modules.contracts.losses import Losses, Mean
from modules.contracts.trainable import Objective, Trainable
from modules.losses.averages import SharedCount, shared_counts
from modules.target.target import Target
from train.lightning.collectives import any_process, total
from train.lightning.optimizers import adamw, decay_groups, split_hidden, with_muon
from train.settings import OptimizerSettings

logger = logging.getLogger(__name__)

MOST_SKIPPED = 12
"""Updates in a row that may be skipped because their gradient is not finite: after so many halvings
float16's loss scale has fallen from 65,536 to 16."""


class NonFinite(ValueError):
    """Losses, gradients or weights became NaN or infinite. Training stops; the last checkpoint is
    from before.
    """


class RunningMeans:
    """Sums and counts of metrics, so that means over batches and ranks have correct weights."""

    def __init__(self) -> None:
        self.sums: dict[str, Tensor] = {}

    def add(self, metrics: Mapping[str, Mean]) -> None:
        """Add the metrics of a batch."""
        for name, mean in metrics.items():
            pair = torch.stack([mean.total.detach().double(), mean.count.detach().double()])
            self.sums[name] = self.sums[name] + pair if name in self.sums else pair

    def take(self, reduce: Any) -> dict[str, float]:
        """The means since the last call, without metrics that counted nothing; `reduce` sums a
        tensor over the ranks.
        """
        # One reduction for all metrics, in an order that all ranks share.
        names = sorted(self.sums)
        if not names:
            return {}
        sums = reduce(torch.stack([self.sums[name] for name in names]))
        self.sums = {}
        return {
            name: total / count
            for name, (total, count) in zip(names, sums.tolist(), strict=True)
            if count
        }


class TrainableModule(LightningModule):
    """Trains `trainable`. The target is not part of the module's parameters and checkpoints.

    Args:
        trainable: the component to train.
        target: the frozen target; moved to the training device, never changed.
        optimizer: learning rate, schedule and decay.
        log_every: optimiser steps between two logged training means.
        objective: a loss on the component instead of its own; `begin` has been called.
    """

    def __init__(
        self,
        trainable: Trainable,
        target: Target,
        optimizer: OptimizerSettings,
        log_every: int = 10,
        objective: Objective | None = None,
    ) -> None:
        super().__init__()
        self.trainable, self.objective = trainable, objective
        self.settings, self.log_every = optimizer, log_every
        # A tuple hides the target from nn.Module.
        self._target = (target,)
        self.means = {"train": RunningMeans(), "val": RunningMeans()}
        self._logged_step = 0
        self.validated_step = -1
        self._random_state: dict[str, Any] | None = None
        self.optimised: list[nn.Parameter] = []
        """The optimised parameters in the optimiser's order, however a strategy stores them."""
        self.group_sizes: list[int] = []
        """Number of parameters in each of the optimiser's groups."""
        self.skipped = self.skipped_in_a_row = 0
        """Updates of this process that were skipped because their gradient was not finite."""

    @property
    def target(self) -> Target:
        """The frozen target on this process's device."""
        return self._target[0]

    def setup(self, stage: str) -> None:
        """Move the target to this rank's device."""
        self.target.to(self.trainer.strategy.root_device)

    # -- steps -------------------------------------------------------------------------------------

    def training_step(self, batch: AnyBatch, batch_idx: int) -> Tensor:
        """The loss of a training batch."""
        return self._step(batch, "train")

    def validation_step(self, batch: AnyBatch, batch_idx: int) -> None:
        """Add the metrics of a validation batch."""
        self._step(batch, "val")

    def _step(self, batch: AnyBatch, stage: str) -> Tensor:
        self.fill_states(batch)
        # Divisors of means are averaged over processes, so that gradients are those of one batch;
        # one collective for all of them, and for what the logged loss is weighted by.
        with shared_counts(self._mean_over_processes if self.trainer.world_size > 1 else None):
            labels = torch.stack([text.loss_mask.sum() for text in batch.texts()])
            shared = SharedCount(labels.sum())
            # Validations are compared with each other, so all use the final value of a schedule.
            losses = self._losses(batch, self.progress if stage == "train" else 1.0)
            count = shared.divisor()
        if not torch.isfinite(losses.total):
            raise self._not_finite(f"the {stage} loss is {losses.total.item()}")
        self.means[stage].add(
            {"loss": Mean(losses.total.detach() * count, count), **losses.metrics}
        )
        return losses.total

    def _mean_over_processes(self, counts: Tensor) -> Tensor:
        return total(counts, self.trainer) / self.trainer.world_size

    def _losses(self, batch: AnyBatch, progress: float) -> Losses:
        if self.objective is None:
            return self.trainable.loss(batch, self.target, progress)
        assert isinstance(batch, TextBatch), "drafters are trained on text"
        return self.objective.loss(self.trainable, batch, self.target, progress)

    def fill_states(self, batch: AnyBatch) -> None:
        """Compute the states that the loss reads and the feature cache lacks, at the target's own
        precision.
        """
        if self.trainable.online:
            return
        dtype = next(
            (parameter.dtype for parameter in self.trainable.parameters()), self.target.dtype
        )
        # Autocast would lower the target's precision; the component gets its own dtype.
        for text in batch.texts():
            wanted = [name for name in self.trainable.training_states if name not in text.states]
            if wanted:
                with torch.autocast(self.device.type, enabled=False):
                    text.states |= self.target.features(text, wanted)
            text.states |= {name: state.to(dtype) for name, state in text.states.items()}

    @property
    def progress(self) -> float:
        """Progress of the training, from 0 to 1."""
        return min(1.0, self.global_step / max(1, self.trainer.estimated_stepping_batches))

    # -- non-finite values -------------------------------------------------------------------------

    def on_before_optimizer_step(self, optimizer: Optimizer) -> None:
        """Skip an update if its gradient is not finite on any process.

        DeepSpeed does the same internally (`train.lightning.deepspeed` counts its skipped updates),
        and so does a loss scaler, which also lowers its scale.
        """
        if isinstance(self.trainer.strategy, DeepSpeedStrategy):
            return
        parameters = [
            parameter for group in optimizer.param_groups for parameter in group["params"]
        ]
        norm = get_total_norm(
            [parameter.grad for parameter in parameters if parameter.grad is not None]
        )
        # All processes skip the same updates, or their weights would differ.
        finite = not any_process(not bool(torch.isfinite(norm)), self.trainer)
        if not finite:
            for parameter in parameters:
                parameter.grad = None
        self.count_update(finite)

    def optimizer_step(self, *args: Any, **options: Any) -> None:
        """Increment the weights' version counters after a step.

        Fused AdamW and DeepSpeed do not, and decoding would then reuse copies of weights (packed,
        or of some rows) from an earlier validation.
        """
        super().optimizer_step(*args, **options)
        for parameter in self.trainable.parameters():
            increment_version(parameter)

    def count_update(self, applied: bool) -> None:
        """Count and log skipped updates; raises NonFinite after `MOST_SKIPPED` in a row."""
        self.skipped_in_a_row = 0 if applied else self.skipped_in_a_row + 1
        if applied:
            return
        # Every process counts; the first one logs.
        self.skipped += 1
        if self.trainer.is_global_zero:
            logger.warning(
                "step %d: the gradient is not finite, so its update is skipped (%d in a row; %d "
                "end the training)",
                self.global_step,
                self.skipped_in_a_row,
                MOST_SKIPPED,
            )
        if self.skipped_in_a_row == MOST_SKIPPED:
            raise self._not_finite(f"{MOST_SKIPPED} gradients in a row are not finite")

    def _not_finite(self, what: str) -> NonFinite:
        return NonFinite(
            f"{what} at step {self.global_step}: lower optimizer.lr (now {self.settings.lr}) or "
            "trainer.gradient_clip_val, then continue with --resume last or start again"
        )

    # -- logging -----------------------------------------------------------------------------------

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Log the means of the last steps."""
        step = self.global_step
        if step == self._logged_step or step % self.log_every:
            return
        self._logged_step = step
        # Loggers get means over the steps since the last time.
        means = self._take("train")
        learning_rate = self.trainer.optimizers[0].param_groups[0]["lr"]
        for each in self.loggers:
            each.log_metrics(
                {
                    **means,
                    "lr": learning_rate,
                    "epoch": self.current_epoch,
                    "skipped_updates": self.skipped,
                },
                step=step,
            )
        self.log("loss", means["train/loss"], prog_bar=True, logger=False)

    def on_validation_epoch_end(self) -> None:
        """Log the means of the whole validation set."""
        self.validated_step = self.global_step
        # They are of all processes already: `sync_dist` would share them once more, one by one.
        self.log_dict(self._take("val"))

    def _take(self, stage: str) -> dict[str, float]:
        means = self.means[stage].take(partial(total, trainer=self.trainer))
        return {f"{stage}/{name}": value for name, value in means.items()}

    # -- optimiser ---------------------------------------------------------------------------------

    def configure_optimizers(self) -> Any:
        """AdamW over the declared parameter groups, or Muon and AdamW, with the schedule per
        step.
        """
        settings, declared = self.settings, self.trainable.parameter_groups()
        hidden = []
        if settings.muon_lr is not None:
            declared, hidden = split_hidden(declared, self.trainable)
        groups = [group for each in declared for group in decay_groups(each, settings)]
        # Strategies that flatten parameters need their order and their groups.
        self.optimised = [parameter for group in groups for parameter in group["params"]]
        self.group_sizes = [len(group["params"]) for group in groups]
        optimizer = with_muon(hidden, groups, settings) if hidden else adamw(groups, settings)
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": self._schedule(optimizer), "interval": "step"},
        }

    def _schedule(self, optimizer: Optimizer) -> LambdaLR:
        total = int(self.trainer.estimated_stepping_batches)
        warmup = self.settings.warmup_steps
        if warmup is None:
            warmup = round(self.settings.warmup_ratio * total)
        return LambdaLR(
            optimizer, lambda step: learning_rate_share(step, total, warmup, self.settings.floor)
        )

    # -- resuming ----------------------------------------------------------------------------------

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Save the random state, so that a resumed training draws the same numbers.

        Raises NonFinite for a weight that is not finite; then no process saves anything.
        """
        names, state = {name for name, _ in self.named_parameters()}, checkpoint["state_dict"]
        finite = all(
            bool(torch.isfinite(tensor).all()) for name, tensor in state.items() if name in names
        )
        if any_process(not finite, self.trainer):
            raise self._not_finite("weights are not finite, so they are not saved,")
        cuda = torch.cuda.get_rng_state() if self.device.type == "cuda" else None
        checkpoint["random_state"] = {"cpu": torch.get_rng_state(), "cuda": cuda}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Store the random state until training continues."""
        self._random_state = checkpoint.get("random_state")

    def on_train_start(self) -> None:
        """Restore the saved random state."""
        self._logged_step = self.global_step
        if self._random_state is not None:
            torch.set_rng_state(self._random_state["cpu"].cpu())
            if self._random_state["cuda"] is not None and self.device.type == "cuda":
                torch.cuda.set_rng_state(self._random_state["cuda"].cpu())


def learning_rate_share(step: int, total: int, warmup: int, floor: float) -> float:
    """Share of the peak learning rate at optimiser step `step` (0-based): linear warm-up, then a
    cosine to `floor`.
    """
    if step < warmup:
        return (step + 1) / (warmup + 1)
    done = min(1.0, (step - warmup) / max(1, total - warmup))
    return floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * done))
