"""One training run, from a checked config to `DIR/drafter/`."""

from __future__ import annotations

import copy
import logging
import shutil
import zipfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback, Trainer, seed_everything
from lightning.pytorch.loggers import CSVLogger, Logger, TensorBoardLogger
from lightning.pytorch.utilities import rank_zero_only
from torch import Tensor

from checkpoints.hub import publish
from checkpoints.pretrained import Provenance, assign_weights, save_pretrained, warm_start
from configs.command_line.endings import resumable
from configs.command_line.outputs import claimed, write_whole
from data.datamodule import ConversationData
from modules.contracts.drafter import Drafter
from modules.contracts.shapes import TargetShape
from modules.contracts.trainable import Objective, Trainable, TrainingResult
from modules.layers.activation_checkpointing import use_activation_checkpointing
from modules.runtime.files import clear_scratch
from modules.target.kernels.compiled_calls import compile_blocks
from modules.target.loading import AUTO, check_unquantised, chosen_dtype, load_target
from modules.target.target import Target
from train.lightning.callbacks import PROBE, AcceptanceProbe, RunProgress, checkpoint_callbacks
from train.lightning.checkpoint_io import SiblingCheckpointIO, remove_leftovers
from train.lightning.deepspeed import check_shards, strategy_named, whole_weights
from train.lightning.head_only import on_head
from train.lightning.module import TrainableModule
from train.settings import (
    CheckpointSettings,
    OptimizerSettings,
    ProbeSettings,
    PublishSettings,
    TrainerSettings,
    chosen_precision,
    training_device,
)

logger = logging.getLogger(__name__)

LIGHTNING, CHECKPOINTS, DRAFTER, CONFIG = (
    "lightning",
    "lightning/checkpoints",
    "drafter",
    "config.yaml",
)


@dataclass
class Recipe:
    """What to train, on what and how: every key of a config.

    Args:
        drafter: the component to train: class_path and init_args; `--drafter.heads 4` sets one of
            the latter.
        data: the training data, see data/datamodule.py.
        target: Hub id, folder, .gguf file or smollm2-135m.
        dtype: of the target: float32, bfloat16, float16 or float64; auto is bfloat16 on a GPU that
            multiplies it and float32 elsewhere.
        chat_template: arguments of the target's chat template, for instance {enable_thinking:
            false}.
        seed: of weights, order and dropout.
        objective: a loss instead of the component's own, for instance
            modules.preference.aligned_drafting.AlignedDrafting.
        optimizer: see train/settings.py.
        trainer: see train/settings.py.
        probe: see train/settings.py.
        checkpoint: see train/settings.py.
        publish: see train/settings.py.
    """

    drafter: Callable[[TargetShape], Trainable]
    data: ConversationData
    target: str = "smollm2-135m"
    dtype: str = AUTO
    chat_template: dict[str, Any] = field(default_factory=dict)
    seed: int = 0
    objective: Objective | None = None
    optimizer: OptimizerSettings = field(default_factory=OptimizerSettings)
    trainer: TrainerSettings = field(default_factory=TrainerSettings)
    probe: ProbeSettings = field(default_factory=ProbeSettings)
    checkpoint: CheckpointSettings = field(default_factory=CheckpointSettings)
    publish: PublishSettings = field(default_factory=PublishSettings)

    def __post_init__(self) -> None:
        """Refuse a figure that is not measured, Muon with DeepSpeed, and a target that cannot be
        trained on; resolve `auto`.
        """
        if self.checkpoint.best_by == PROBE and not self.probe.prompts:
            raise ValueError(
                f"checkpoint.best_by is {PROBE}, but probe.prompts is 0: give some, or choose by "
                "val/loss"
            )
        if self.optimizer.muon_lr is not None and self.trainer.strategy.startswith("deepspeed"):
            raise ValueError(
                f"optimizer.muon_lr is {self.optimizer.muon_lr}, but trainer.strategy "
                f"{self.trainer.strategy} cuts matrices into shards, and Muon needs them whole: "
                "set optimizer.muon_lr to null, or use trainer.strategy ddp"
            )
        check_unquantised(self.dtype)
        self.dtype = chosen_dtype(self.dtype, training_device(self.trainer.accelerator))
        precision = chosen_precision(self.trainer.precision, self.trainer.accelerator)
        self.trainer = replace(self.trainer, precision=precision)


@dataclass
class Place:
    """Where a recipe runs and what it starts from.

    Args:
        output: folder of the run.
        resume: checkpoint to continue from.
        init_from: run, drafter folder or Hub id whose weights to start from.
        settings: the recipe as plain values, for provenance.
    """

    output: Path
    resume: Path | None = None
    init_from: str | None = None
    settings: Mapping[str, Any] = field(default_factory=dict)


class Trained(NamedTuple):
    """Result of a training: the component's folder, and the number of optimiser steps."""

    folder: Path
    steps: int


def train(
    recipe: Recipe,
    place: Place,
    target: Target | None = None,
    progress: Callback | None = None,
) -> Trained:
    """Train, and write the component to `DIR/drafter/`.

    Args:
        recipe: what to train.
        place: output folder and starting point.
        target: an already loaded target; None loads `recipe.target`.
        progress: a callback in place of the progress bar.
    """
    # 1. Trainer, target and component.
    seed_everything(recipe.seed, verbose=False)
    if (
        device := training_device(recipe.trainer.accelerator)
    ) != "cpu" and "mixed" in recipe.trainer.precision:
        torch.set_float32_matmul_precision("high")
    trainer = lightning_trainer(recipe, place.output, True, progress)
    made = None
    if target is None:
        made = on_head(recipe, device, lambda head: build(recipe, head, place.init_from))
    if made is None:
        target = target or load_target(recipe.target, recipe.dtype, device, recipe.chat_template)
        made = target, build(recipe, target, place.init_from)
    target, trainable = made
    module = training_module(recipe, trainable, target)
    for log in trainer.loggers:
        log.log_hyperparams(dict(place.settings))
    # 2. Earlier stages, which a checkpoint already contains, then the whole.
    if place.resume is None:
        train_stages(recipe, place, trainable, target, progress)
    if recipe.probe.prompts and isinstance(trainable, Drafter):
        cast(Any, trainer).callbacks.insert(
            0, AcceptanceProbe(probe_prompts(recipe, target), recipe.probe)
        )
    trainer.fit(module, datamodule=recipe.data, ckpt_path=place.resume)
    # 3. Write the best weights, and publish them where configured.
    folder = export(recipe, place, trainer, module)
    publish_run(recipe.publish, place.output)
    return Trained(folder, trainer.global_step)


def build(recipe: Recipe, target: Target, init_from: str | None = None) -> Trainable:
    """The component, with initial weights from the target or from an earlier run."""
    trainable = recipe.drafter(target.shape)
    refuse_projected(trainable, target)
    check_shards(recipe.trainer.strategy, trainable)
    recipe.data.bind(target, () if trainable.online else trainable.training_states)
    choose_vocabulary(trainable, recipe.data)
    trainable.initialise(target)
    if init_from is not None:
        warm_start(trainable, init_from)
    return trainable


def refuse_projected(trainable: Trainable, target: Target) -> None:
    """Raise ValueError for a drafter on the states of a target whose embedding is narrower than its
    layers (OPT-350m).
    """
    width, size = target.architecture.head.in_features, target.shape.hidden_size
    if isinstance(trainable, Drafter) and not trainable.own_model and width != size:
        raise ValueError(
            f"target {target.name!r} projects states of {size} dimensions to an LM head of "
            f"{width}: {type(trainable).__name__} does not support that, train independent.yaml"
        )


def training_module(recipe: Recipe, trainable: Trainable, target: Target) -> TrainableModule:
    """The Lightning module of a component.

    Raises ValueError where the recipe recomputes or compiles blocks and the component has none.
    """
    if recipe.trainer.activation_checkpointing:
        use_activation_checkpointing(trainable)
    if recipe.trainer.compile:
        compile_blocks(trainable)
    if recipe.objective is not None:
        recipe.objective.begin(trainable)
    return TrainableModule(
        trainable, target, recipe.optimizer, recipe.trainer.log_every_n_steps, recipe.objective
    )


def train_stages(
    recipe: Recipe,
    place: Place,
    trainable: Trainable,
    target: Target,
    progress: Callback | None = None,
) -> None:
    """Train copies of the parts that are trained before the whole (`Trainable.stages`).

    A resumed run has their weights in its checkpoint.
    """
    # Each stage has its own epochs and learning rate; the copy may be sharded, the part is not.
    for stage in trainable.stages:
        settings = replace(recipe.trainer, max_epochs=stage.epochs, max_steps=-1)
        logs = f"{LIGHTNING}/{stage.name}"
        trainer = _lightning_trainer(settings, None, place.output, logs, progress)
        optimizer = replace(recipe.optimizer, lr=stage.lr, muon_lr=None)
        part = copy.deepcopy(stage.part).requires_grad_(True)
        module = TrainableModule(part, target, optimizer, settings.log_every_n_steps)
        trainer.fit(module, datamodule=recipe.data.for_stages())
        stage.part.load_state_dict(whole_weights(part))


def choose_vocabulary(trainable: Trainable, data: ConversationData) -> None:
    """Give a component with a trimmed draft vocabulary the most frequent assistant tokens of the
    training data.
    """
    size = trainable.arguments.get("draft_vocabulary")
    if size is not None and isinstance(trainable, Drafter) and trainable.vocabulary_D is not None:
        cast(Any, trainable).set_vocabulary(data.vocabulary(size))


def probe_prompts(recipe: Recipe, target: Target) -> list[list[int]]:
    """The held-out prompts that leave room for an answer in the target's context."""
    prompts = recipe.data.probe_prompts(recipe.probe.prompts)
    fitting = [
        ids for ids in prompts if len(ids) + recipe.probe.max_new_tokens <= target.max_positions
    ]
    if not fitting:
        raise ValueError(
            f"probe.max_new_tokens is {recipe.probe.max_new_tokens}: no held-out prompt leaves "
            f"room for that in the target's context of {target.max_positions} tokens, lower it"
        )
    return fitting


def lightning_trainer(
    recipe: Recipe, folder: Path, keep: bool = True, progress: Callback | None = None
) -> Trainer:
    """Lightning's Trainer for a recipe; `keep` False writes no checkpoints, `progress` replaces the
    progress bar.

    Raises:
        ValueError: a strategy, precision or device that Lightning does not know or this machine
            does not have.
    """
    try:
        checkpoint = recipe.checkpoint if keep else None
        return _lightning_trainer(recipe.trainer, checkpoint, folder, LIGHTNING, progress)
    except (MisconfigurationException, ValueError, RuntimeError) as error:
        raise ValueError(f"trainer: {error}") from error


def _lightning_trainer(
    settings: TrainerSettings,
    checkpoint: CheckpointSettings | None,
    folder: Path,
    logs: str = LIGHTNING,
    progress: Callback | None = None,
) -> Trainer:
    """`checkpoint` None writes no checkpoints; `logs` is the folder of the default loggers,
    LIGHTNING or a folder in it; `progress` None is a progress bar.
    """
    # Checkpoints are whole or absent, and metrics are logged by the module, every step.
    savers = [] if checkpoint is None else checkpoint_callbacks(folder / CHECKPOINTS, checkpoint)
    return Trainer(
        default_root_dir=folder,
        logger=loggers(settings, folder, logs),
        callbacks=[progress or RunProgress(), *savers],
        enable_checkpointing=checkpoint is not None,
        accelerator=settings.accelerator,
        devices=settings.devices,
        num_nodes=settings.num_nodes,
        precision=cast(Any, settings.precision),
        plugins=[SiblingCheckpointIO()],
        strategy=strategy_named(settings.strategy, settings.accelerator),
        max_steps=settings.max_steps,
        max_epochs=settings.max_epochs,
        accumulate_grad_batches=settings.accumulate_grad_batches,
        gradient_clip_val=settings.gradient_clip_val or None,
        gradient_clip_algorithm=settings.gradient_clip_algorithm,
        val_check_interval=settings.val_check_interval,
        check_val_every_n_epoch=None if isinstance(settings.val_check_interval, int) else 1,
        log_every_n_steps=1,
        num_sanity_val_steps=0,
        inference_mode=False,
        enable_model_summary=False,
    )


def loggers(settings: TrainerSettings, folder: Path, logs: str = LIGHTNING) -> list[Logger]:
    """The configured loggers, or CSV and TensorBoard files under `DIR/{logs}/version_N`."""
    if settings.logger is not None:
        return settings.logger
    csv = CSVLogger(folder, name=logs)
    return [csv, TensorBoardLogger(folder, name=logs, version=csv.version, default_hp_metric=False)]


# -- export ----------------------------------------------------------------------------------------


def export(recipe: Recipe, place: Place, trainer: Trainer, module: TrainableModule) -> Path:
    """Validate the chosen weights and write them, with their figures, to `DIR/drafter/`."""
    checkpoint, measured = chosen(recipe, place.output / CHECKPOINTS, trainer, module)
    folder = place.output / DRAFTER
    # The first process writes the component, its provenance and its pages.
    if trainer.is_global_zero:
        trainable = restored(module.trainable, checkpoint)
        outcome = finish(recipe, module, trainable)
        provenance = Provenance.of(
            module.target,
            data=recipe.data.summary(),
            measured={**measured, **outcome.figures},
            settings=place.settings,
        )
        save_pretrained(trainable, folder, provenance)
        write_whole({place.output / name: text for name, text in outcome.pages.items()})
    trainer.strategy.barrier()
    return folder


@rank_zero_only
def publish_run(settings: PublishSettings, run: Path) -> None:
    """Publish the trained component, if `publish.repo` is set.

    Raises:
        ValueError: the cause; the run is complete and can be published later.
    """
    if settings.repo is None:
        return
    try:
        print(
            f"published: {publish(run, settings.repo, settings.private, license=settings.license)}"
        )
    except ValueError as error:
        # The error message holds the command that publishes later.
        flags = f"--repo {settings.repo}" + ("" if settings.private else " --public")
        flags += f" --license {settings.license}" if settings.license else ""
        raise ValueError(
            f"{error}. {run} is trained and whole, and can be published later: python -m "
            f"checkpoints.publish {run} {flags}"
        ) from None


def finish(recipe: Recipe, module: TrainableModule, trainable: Trainable) -> TrainingResult:
    """The component's `finish`, over all held-out batches with their states; on one process."""
    # A module of its own computes the states of the batches.
    ready = TrainableModule(
        trainable.to(module.target.device).eval(), module.target, recipe.optimizer
    )

    def batches() -> Iterator[Any]:
        for batch in recipe.data.held_out_batches():
            batch = recipe.data.transfer_batch_to_device(batch, module.target.device, 0)
            ready.fill_states(batch)
            yield batch

    with torch.no_grad():
        return trainable.finish(batches(), module.target)


def chosen(
    recipe: Recipe, folder: Path, trainer: Trainer, module: TrainableModule
) -> tuple[Path, dict[str, float]]:
    """The checkpoint to export and its figures.

    Final weights that no validation has seen are compared too.
    """
    # 1. Candidates: the last weights, the best ones, or both.
    last, best, key = folder / "last.ckpt", folder / "best.ckpt", recipe.checkpoint.best_by
    candidates = [last]
    if recipe.checkpoint.export == "best" and best.exists():
        whole = zipfile.is_zipfile(last) and module.validated_step != trainer.global_step
        candidates = [best, last] if whole else [best]
    # 2. Validate each and take the best by the configured figure.
    measured = {path: _validated(trainer, module, recipe, path) for path in candidates}
    worth = {
        path: figures.get(key, 0.0) * (-1 if key == "val/loss" else 1)
        for path, figures in measured.items()
    }
    winner = max(candidates, key=lambda path: worth[path])
    return winner, measured[winner]


def _validated(
    trainer: Trainer, module: TrainableModule, recipe: Recipe, checkpoint: Path
) -> dict[str, float]:
    fresh = TrainableModule(
        restored(module.trainable, checkpoint),
        module.target,
        recipe.optimizer,
        objective=recipe.objective,
    )
    figures = trainer.validate(fresh, datamodule=recipe.data, verbose=False)[0]
    return {name: float(value) for name, value in figures.items()}


def restored(trainable: Trainable, checkpoint: Path) -> Trainable:
    """A new copy of a component with the weights of a checkpoint (the original may be sharded)."""
    fresh = type(trainable)(**trainable.arguments)
    assign_weights(fresh, component_weights(checkpoint), str(checkpoint))
    return fresh


def component_weights(checkpoint: Path) -> dict[str, Tensor]:
    """The component's tensors in a Lightning checkpoint."""
    state = torch.load(checkpoint, map_location="cpu", weights_only=True)["state_dict"]
    prefix = "trainable."
    return {
        name.removeprefix(prefix): tensor
        for name, tensor in state.items()
        if name.startswith(prefix)
    }


# -- the run's folder ------------------------------------------------------------------------------


@contextmanager
def claim(output: Path, resume: str | None, overwrite: bool) -> Iterator[Path | None]:
    """Lock `output` for one run during the block; yields the checkpoint to continue from, if any.

    Partial files of killed processes are removed, and with `overwrite` also an existing run. A run
    that ends before training begins leaves nothing.

    Raises:
        ValueError: another run writes there, or the folder is not writable; it holds a run that is
            neither resumed nor overwritten; or there is nothing to resume.
    """
    if resume is not None and overwrite:
        raise ValueError("--resume and --overwrite contradict each other: give one")
    # 1. Other processes only look the checkpoint up.
    if rank_zero_only.rank != 0:
        yield None if resume is None else resume_point(output, resume)
        return
    if resume is not None and not output.is_dir():
        resume_point(output, resume)
    # 2. The first process locks, cleans and, where allowed, empties the folder.
    with claimed(output):
        _clean(output)
        if resume is None:
            _vacate(output, overwrite)
        with _without_config_of_nothing(output), resumable(lambda: _ways_on(output)):
            yield None if resume is None else resume_point(output, resume)


def _ways_on(output: Path) -> str:
    """How to continue after an interruption."""
    if _whole_checkpoint(output):
        return "go on with --resume last"
    return "begin again with --overwrite (no checkpoint is there yet)"


@contextmanager
def _without_config_of_nothing(output: Path) -> Iterator[None]:
    """Remove the run's config again if the block fails before training has begun."""
    config = output / CONFIG
    earlier = config.exists()
    try:
        yield
    except BaseException:
        if not earlier and not (output / LIGHTNING).exists():
            config.unlink(missing_ok=True)
        raise


def _clean(output: Path) -> None:
    """Remove partial files of killed exports and checkpoints; a drafter that was being replaced is
    restored.
    """
    clear_scratch(output / DRAFTER)
    remove_leftovers(output / CHECKPOINTS)


def _vacate(output: Path, overwrite: bool) -> None:
    """Raise ValueError if there is a run, or remove it with `overwrite`."""
    if (output / LIGHTNING).exists() and not overwrite:
        ways = (
            "add --resume last, --overwrite"
            if _whole_checkpoint(output)
            else ("it has no whole checkpoint to resume, so add --overwrite")
        )
        raise ValueError(
            f"output {str(output)!r} already holds a run: {ways}, or give another --output"
        )
    for name in (LIGHTNING, DRAFTER):
        shutil.rmtree(output / name, ignore_errors=True)


def _whole_checkpoint(output: Path) -> bool:
    """Whether `--resume last` finds a checkpoint."""
    folder = output / CHECKPOINTS
    return any(zipfile.is_zipfile(folder / name) for name in ("last.ckpt", "best.ckpt"))


def resume_point(output: Path, resume: str) -> Path:
    """The checkpoint that `--resume` means: the last whole one of this output, or a path."""
    folder = output / CHECKPOINTS
    paths = [folder / "last.ckpt", folder / "best.ckpt"] if resume == "last" else [Path(resume)]
    for path in paths:
        if zipfile.is_zipfile(path):
            return path
        if path.exists():
            logger.warning("%s is not a whole checkpoint: skipped", path)
    # Nothing is whole: name the way out.
    begun = (output / LIGHTNING).exists()
    begin = "begin again with --overwrite" if begun else "start without --resume"
    raise ValueError(
        f"--resume {resume}: {paths[0]} does not exist or is not whole: {begin}, or "
        "name the run's --output"
    )


def steps_of(checkpoint: Path | None) -> int | None:
    """Optimiser steps of a checkpoint; None without one."""
    if checkpoint is None:
        return None
    return torch.load(checkpoint, map_location="cpu", weights_only=True, mmap=True)["global_step"]
