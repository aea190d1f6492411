import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.plugins import MixedPrecision
from torch import nn
from torch.utils.data import DataLoader

from configs.command_line.loading import recipes
from modules.contracts.losses import Losses, Mean
from modules.contracts.shapes import TargetShape
from modules.contracts.trainable import Trainable
from tests.fakes import tiny_batch, tiny_target
from tests.modules.conformance import batch_for
from tests.ports import free_port
from tests.test_conformance import build
from train.lightning.callbacks import LastCheckpoint
from train.lightning.module import (
    MOST_SKIPPED,
    NonFinite,
    RunningMeans,
    TrainableModule,
    learning_rate_share,
)
from train.lightning.optimizers import decay_groups
from train.settings import OptimizerSettings


class NextToken(Trainable):
    """A linear layer that predicts the next token from `reads`."""

    def __init__(self, shape: TargetShape, reads: str = "final", spoil: float = 1.0) -> None:
        super().__init__()
        self.reads, self.spoil = reads, spoil
        self.head = nn.Linear(shape.hidden_size, shape.vocab_size)
        self.seen: list[float] = []

    @property
    def training_states(self):
        return (self.reads,)

    def parameter_groups(self):
        return [{"params": [self.head.weight], "lr_scale": 2.0}, {"params": [self.head.bias]}]

    def loss(self, batch, target, progress):
        self.seen.append(progress)
        mask = batch.loss_mask[:, 1:]
        logits = self.head(batch.states[self.reads][:, :-1])[mask]
        losses = nn.functional.cross_entropy(logits, batch.input_ids[:, 1:][mask], reduction="none")
        hits = (logits.argmax(-1) == batch.input_ids[:, 1:][mask]).sum()
        return Losses(losses.mean() * self.spoil, {"top1": Mean(hits, torch.tensor(len(losses)))})


@pytest.fixture(scope="module")
def target():
    return tiny_target(dtype=torch.float32)


def fit(target, trainable, steps=4, **options):
    batches: Any = [tiny_batch(target, seed=i) for i in range(4)]
    module = TrainableModule(trainable, target, OptimizerSettings(lr=1e-2, warmup_ratio=0.25))
    trainer = Trainer(
        max_steps=steps,
        max_epochs=-1,
        accelerator="cpu",
        devices=1,
        logger=False,
        inference_mode=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        **options,
    )
    trainer.fit(module, DataLoader(batches, batch_size=None), DataLoader(batches, batch_size=None))
    return module, trainer


def test_trains_and_leaves_the_target_alone(target):
    before = target.fingerprint()
    torch.manual_seed(0)
    module, trainer = fit(target, NextToken(target.shape), steps=20)
    assert set(module.state_dict()) == {"trainable.head.weight", "trainable.head.bias"}
    assert not any(
        parameter is kept for kept in target.parameters() for parameter in module.parameters()
    )
    target._fingerprint = None
    assert target.fingerprint() == before and all(p.grad is None for p in target.parameters())
    _, first = fit(target, NextToken(target.shape), steps=4)
    assert trainer.callback_metrics["val/loss"] < first.callback_metrics["val/loss"] - 0.2


def test_progress_runs_from_zero_to_one(target):
    trainable = NextToken(target.shape)
    fit(target, trainable, steps=4, limit_val_batches=0)
    assert trainable.seen == [0, 0.25, 0.5, 0.75]


class Aligned:
    """An objective that notes the progress it is called with."""

    def __init__(self):
        self.seen = []

    def loss(self, drafter, batch, target, progress):
        self.seen.append(progress)
        return drafter.loss(batch, target, progress)


@pytest.mark.parametrize("objective", [None, Aligned()])
def test_validation_counts_what_a_schedule_ends_with(target, objective: Any):
    trainable = NextToken(target.shape)
    module = TrainableModule(trainable, target, OptimizerSettings(), objective=objective)
    batches: Any = [tiny_batch(target, seed=i) for i in range(2)]
    trainer = Trainer(
        max_steps=4,
        max_epochs=-1,
        accelerator="cpu",
        devices=1,
        logger=False,
        inference_mode=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
    )
    trainer.fit(module, DataLoader(batches, batch_size=None), DataLoader(batches, batch_size=None))
    assert trainable.seen == [0, 0.25, 1, 1, 0.5, 0.75, 1, 1]
    assert objective is None or objective.seen == trainable.seen


def test_states_that_are_cached_are_not_computed_again(target, monkeypatch):
    module = TrainableModule(NextToken(target.shape).double(), target, OptimizerSettings())
    batch = tiny_batch(target)
    batch.states = {"final": torch.ones(2, 24, 32)}
    monkeypatch.setattr(target, "features", lambda *_: pytest.fail("computed"))
    module.fill_states(batch)
    assert batch.states["final"].dtype == torch.float64


def test_validation_means_are_weighted_by_their_counts(target):
    module, trainer = fit(target, NextToken(target.shape), steps=4)
    hits = counts = 0
    trainable = module.trainable.eval()
    for seed in range(4):
        batch = tiny_batch(target, seed=seed)
        module.fill_states(batch)
        mean = trainable.loss(batch, target, 1.0).metrics["top1"]
        hits, counts = hits + mean.total, counts + mean.count
    assert trainer.callback_metrics["val/top1"] == pytest.approx(float(hits / counts))


def test_a_loss_that_is_not_a_number_stops_the_training_at_its_step(target):
    trainable = NextToken(target.shape)
    trainable.spoil = math.nan
    with pytest.raises(
        NonFinite, match=r"the train loss is nan at step 0: lower optimizer.lr \(now 0.01\)"
    ):
        fit(target, trainable)


class Torn(NextToken):
    """Of the given steps the loss is finite and its gradient is not."""

    def __init__(self, shape: TargetShape, steps: tuple[int, ...]) -> None:
        super().__init__(shape)
        self.steps = steps

    def loss(self, batch, target, progress):
        losses = super().loss(batch, target, progress)
        if len(self.seen) - 1 not in self.steps:
            return losses
        return Losses(losses.total + (self.head.weight.sum() * 0).sqrt(), losses.metrics)


def test_an_update_whose_gradient_is_not_finite_is_skipped_and_logged(target, caplog):
    weights = []
    for steps in ((), (2,), (1, 2)):
        torch.manual_seed(0)
        module, trainer = fit(
            target, Torn(target.shape, steps), steps=3, limit_val_batches=0, gradient_clip_val=1.0
        )
        weights.append(module.trainable.head.weight.detach().clone())
        assert (module.skipped, module.skipped_in_a_row, trainer.global_step) == (
            len(steps),
            len(steps),
            3,
        )
    assert all(weight.isfinite().all() for weight in weights) and not torch.equal(
        weights[1], weights[2]
    )
    assert [record.message[:42] for record in caplog.records if "gradient" in record.message] == [
        f"step {step}: the gradient is not finite, so its" for step in (2, 1, 2)
    ]


def test_a_scaler_that_skips_is_counted_and_lowers_its_scale(target):
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    plugin = MixedPrecision("bf16-mixed", "cpu")
    plugin.scaler = scaler
    module, _ = fit(
        target, Torn(target.shape, (0, 2)), steps=4, limit_val_batches=0, plugins=[plugin]
    )
    assert (
        module.skipped == 2
        and scaler.get_scale() == 2.0
        and module.trainable.head.weight.isfinite().all()
    )


def test_gradients_that_stay_not_finite_end_the_training(target):
    with pytest.raises(
        NonFinite, match=f"{MOST_SKIPPED} gradients in a row are not finite at step 12: lower optim"
    ):
        fit(target, Torn(target.shape, tuple(range(1, 99))), steps=40, limit_val_batches=0)


def test_weights_that_are_not_finite_are_never_saved(target, tmp_path):
    module, trainer = fit(target, NextToken(target.shape), steps=1)
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    kept = (tmp_path / "last.ckpt").read_bytes()
    with torch.no_grad():
        module.trainable.head.weight[0, 0] = math.inf
    with pytest.raises(
        NonFinite,
        match="weights are not finite, so they are not saved, at step 1: lower optimizer.lr",
    ):
        trainer.save_checkpoint(tmp_path / "last.ckpt")
    assert (tmp_path / "last.ckpt").read_bytes() == kept


def test_running_means_sum_before_they_divide():
    means = RunningMeans()
    means.add(
        {
            "a": Mean(torch.tensor(3.0), torch.tensor(1)),
            "b": Mean(torch.tensor(0.0), torch.tensor(0)),
        }
    )
    means.add({"a": Mean(torch.tensor(1.0), torch.tensor(3))})
    assert means.take(lambda sums: sums * 2) == {"a": 1.0}
    assert means.take(lambda sums: sums) == {}


def test_optimiser_groups_scale_the_rate_and_decay_matrices_only(target):
    settings = OptimizerSettings(lr=0.1, weight_decay=0.5)
    groups = [
        g
        for declared in NextToken(target.shape).parameter_groups()
        for g in decay_groups(declared, settings)
    ]
    assert [(group["lr"], group["weight_decay"]) for group in groups] == [(0.2, 0.5), (0.1, 0.0)]


def test_the_schedule_warms_up_and_ends_at_its_floor():
    shares = [learning_rate_share(step, total=10, warmup=4, floor=0.1) for step in range(11)]
    assert shares[0] == pytest.approx(0.2) and shares[4] == 1.0 and shares[10] == pytest.approx(0.1)
    assert shares[:5] == sorted(shares[:5]) and shares[4:] == sorted(shares[4:], reverse=True)


@pytest.mark.parametrize("changes", [{"lr": 0.0}, {"warmup_ratio": 2.0}, {"floor": -1.0}])
def test_settings_out_of_range_are_refused_by_name(changes):
    with pytest.raises(ValueError, match=f"optimizer.{next(iter(changes))}"):
        OptimizerSettings(**changes)


class Collectives(Callback):
    """Notes what is asked of `torch.distributed` after training began: the length of a sum, else a
    name; DDP shares gradients without it.

    Args:
        monkeypatch: of the test.
        world: processes, all with the same numbers.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch, world: int) -> None:
        self.asked: list[int | str] = []

        def all_reduce(tensor: torch.Tensor, *_: Any, **__: Any) -> None:
            self.asked.append(tensor.numel())
            tensor.mul_(world)

        def note(name: str) -> Callable[..., None]:
            return lambda *_, **__: self.asked.append(name)

        monkeypatch.setattr(torch.distributed, "all_reduce", all_reduce)
        for name in ("barrier", "broadcast", "all_gather", "reduce"):
            monkeypatch.setattr(torch.distributed, name, note(name))
        monkeypatch.setattr(Trainer, "world_size", world)

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.asked.clear()


@pytest.mark.parametrize(("recipe", "counts"), [("medusa", 7), ("eagle3", 7), ("judge", 131)])
def test_a_batch_is_one_collective(target, tmp_path, monkeypatch, recipe: str, counts: int) -> None:
    """Two batches to an optimiser step: of each batch a sum of all counts (2 a draft step, or a
    judge's moments, and 1), of each step two flags, and a sum of all metrics when they are logged.
    """
    path = next(path for path in recipes() if path.stem == recipe)
    trainable = build(path, target).float()
    batches: Any = [batch_for(trainable, target) for _ in range(4)]
    module = TrainableModule(trainable, target, OptimizerSettings(lr=1e-3), log_every=2)
    noted = Collectives(monkeypatch, 2)
    monkeypatch.setenv("MASTER_PORT", str(free_port()))
    trainer = Trainer(
        strategy="ddp_find_unused_parameters_true",
        max_epochs=1,
        accelerator="cpu",
        devices=1,
        accumulate_grad_batches=2,
        logger=False,
        use_distributed_sampler=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        callbacks=[noted, LastCheckpoint(dirpath=tmp_path, every_n_train_steps=0)],
    )
    loader = DataLoader(batches, batch_size=None)
    trainer.fit(module, loader, loader)
    step = [counts, counts, 1, 1]
    metrics = 2 * len(trainer.callback_metrics.keys() - {"loss"})
    assert noted.asked[:9] == [*step, *step, metrics]
    validated = 3 if recipe == "judge" else counts
    assert noted.asked[9:14] == [*[validated] * 4, metrics]
