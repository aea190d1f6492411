import os
import signal
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lightning.pytorch import Trainer
from torch.utils.data import DataLoader

from tests.fakes import ScriptedDrafter, tiny_batch, tiny_target
from tests.train.lightning.test_module import NextToken
from train.lightning.callbacks import (
    AcceptanceProbe,
    LastCheckpoint,
    RunProgress,
    Terminated,
    checkpoint_callbacks,
)
from train.lightning.module import TrainableModule
from train.settings import CheckpointSettings, OptimizerSettings, ProbeSettings


@pytest.mark.parametrize(("right", "tau"), [(1.0, 4.0), (0.0, 1.0)])
def test_the_probe_measures_tokens_per_call_with_the_bonus_counted(right, tau, monkeypatch):
    target = tiny_target()
    monkeypatch.setattr(type(target), "eos_ids", frozenset())
    drafter = ScriptedDrafter(target.shape, right=right, depth=3)
    # One token of the prefill and three calls of four: no call is cut at the limit.
    probe = AcceptanceProbe([[7, 8, 9], [10, 11]], ProbeSettings(max_new_tokens=13))
    assert probe.measure(TrainableModule(drafter, target, OptimizerSettings())) == tau


def test_best_is_the_highest_tau_or_the_lowest_loss(tmp_path):
    best, last = checkpoint_callbacks(
        tmp_path, CheckpointSettings(best_by="probe/tau", every_n_steps=3)
    )
    assert (best.monitor, best.mode, last.monitor) == ("probe/tau", "max", None)
    assert checkpoint_callbacks(tmp_path, CheckpointSettings(best_by="val/loss"))[0].mode == "min"


class Watched(LastCheckpoint):
    """Sends itself SIGTERM in a batch, and notes the optimiser step and the batch of every save."""

    def __init__(self, folder, at, **options):
        super().__init__(
            folder,
            filename="last",
            save_on_train_epoch_end=False,
            enable_version_counter=False,
            **options,
        )
        self.at, self.batches, self.saved = at, 0, []

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.batches += 1
        if self.batches == self.at:
            os.kill(os.getpid(), signal.SIGTERM)

    def on_save_checkpoint(self, trainer, pl_module, checkpoint):
        super().on_save_checkpoint(trainer, pl_module, checkpoint)
        self.saved.append((trainer.global_step, self.batches))


def accumulate(callbacks, **options):
    """Batches of 5 an epoch, two to an optimiser step: steps end with batches 2, 4, 5, 7, 9, 10."""
    target = tiny_target(dtype=torch.float32)
    module = TrainableModule(NextToken(target.shape), target, OptimizerSettings())
    items: Any = [tiny_batch(target, seed=i) for i in range(5)]
    batches: Any = DataLoader(items, batch_size=None)
    settings: dict[str, Any] = {
        "max_epochs": 2,
        "accelerator": "cpu",
        "devices": 1,
        "logger": False,
        "inference_mode": False,
        "callbacks": callbacks,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "num_sanity_val_steps": 0,
        "accumulate_grad_batches": 2,
        "check_val_every_n_epoch": None,
    }
    trainer = Trainer(**{**settings, **options})
    trainer.fit(module, batches, batches)


class Seen(RunProgress):
    """Notes what the bar shows of each epoch, which stays so to its last batch."""

    def __init__(self):
        super().__init__()
        self.shown = []

    def on_train_epoch_start(self, trainer, pl_module):
        super().on_train_epoch_start(trainer, pl_module)
        self.note(trainer)

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        assert self.total_train_batches == self.shown[-1][1]

    def note(self, trainer):
        description = self._get_train_description(trainer.current_epoch)
        self.shown.append((description, self.total_train_batches))


@pytest.mark.parametrize(
    ("limits", "shown"),
    [
        ({"max_epochs": 2}, [("epoch 1 of 2", 5), ("epoch 2 of 2", 5)]),
        ({"max_epochs": -1, "max_steps": 4}, [("epoch 1", 5), ("epoch 2", 2)]),
        ({"max_epochs": 9, "max_steps": 2}, [("epoch 1 of 9", 4)]),
    ],
)
def test_the_bar_counts_epochs_from_one_and_batches_to_the_last_step(limits, shown):
    bar = Seen()
    accumulate([bar], enable_progress_bar=True, enable_checkpointing=False, **limits)
    assert bar.shown == shown


@pytest.mark.parametrize(("at", "step", "batches"), [(3, 2, 4), (4, 2, 4), (5, 3, 5), (6, 4, 7)])
def test_sigterm_waits_for_the_end_of_the_accumulation(at, step, batches, tmp_path):
    last = Watched(tmp_path, at)
    with pytest.raises(Terminated, match=f"after step {step}, all of it saved"):
        accumulate([last])
    assert last.saved[-1] == (step, batches)
    assert torch.load(tmp_path / "last.ckpt", weights_only=False)["global_step"] == step


def test_last_is_saved_between_optimiser_steps_only(tmp_path):
    """Validations after batches 3, 6 and 9: the first two fall into an accumulation and are saved a
    batch later.
    """
    last = Watched(tmp_path, None)
    accumulate([last], val_check_interval=3)
    assert last.saved == [(2, 4), (4, 7), (5, 9), (6, 10)]
    every = Watched(tmp_path, None, every_n_train_steps=2)
    accumulate([every])
    assert every.saved[:3] == [(2, 4), (4, 7), (6, 10)]


def test_a_best_checkpoint_from_within_an_accumulation_says_so(tmp_path, caplog):
    last, state = LastCheckpoint(tmp_path), {"global_step": 4}
    last._between_steps = False
    trainer: Any = SimpleNamespace(is_global_zero=True)
    last.on_save_checkpoint(trainer, None, state)  # pyright: ignore
    last.on_load_checkpoint(trainer, None, state)  # pyright: ignore
    assert "step 4, in the middle of an accumulation" in caplog.text
