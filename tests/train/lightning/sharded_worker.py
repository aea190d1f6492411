"""Recipes at ZeRO-3 as at scale: `python -m tests.train.lightning.sharded_worker FOLDER CASE ...`,
one of two processes, trains the cases in turn.

DeepSpeed leaves weights of fewer than 100,000 numbers whole, and tiny batches are one chunk of
logits. Here all weights are in shards, and a batch is several chunks, not as many on either
process.
"""

from __future__ import annotations

import faulthandler
import gc
import inspect
import json
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.callbacks import Callback

import modules.losses.chunked as losses
import modules.preference.sparsepo as sparsepo
import train.run
from configs.command_line.loading import parse, recipes
from modules.drafters.blocks.documents import Documents
from modules.layers import hanging_attention
from modules.preference.aligned_drafting import AlignedDrafting
from tests.fakes import tiny_target
from train.cli import make_parser, recipe_of
from train.run import Place, Recipe

STEPS = 3
"""Optimiser steps of a case."""
ROWS_PER_CHUNK, VOCABULARY = 24, 128
QUIET = {
    "dropout": 0.0,
    "noise": 0.0,
    "glancing": 0.0,
    "glancing_end": 0.0,
    "random_phase": False,
    "estimator_dropout": 0.0,
    "groups": 512,
    "anchors": 512,
    "anchor_share": 1.0,
    "units": 512,
    "outside": 1.0,
}
"""Arguments of drafters that draw random numbers, of which two processes draw others than one; with
so many groups, anchors and units every token has one."""
TIED = {
    "model_type": "llama",
    "vocab_size": VOCABULARY,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 512,
    "tie_word_embeddings": True,
}


SOURCES = {
    "data.datamodule.ConversationData": "conversations",
    "data.preferences.PreferenceData": "pairs",
    "data.labelled.labelled.LabelledData": "labelled",
}
"""Files of a class of data."""


@dataclass(frozen=True)
class Case:
    """What is trained, and how.

    recipe: a YAML's stem. flags: besides. strategy, precision: of the trainer. drawn: whether
    random numbers are drawn.
    aligned: with the preference loss on the drafter.
    """

    recipe: str
    flags: tuple[str, ...] = ()
    strategy: str = "deepspeed_3"
    precision: str = "32-true"
    drawn: bool = False
    aligned: bool = False


FLAGS = {"independent": ("--drafter.layers", "1"), "peagle": ("--drafter.ratio", "1.0")}
"""What a recipe needs: of a tiny target all layers would be the target itself, with nothing to
learn; slots of P-EAGLE are dropped out at random.
"""
TRIMMED = (
    *FLAGS["independent"],
    "--drafter.draft_vocabulary",
    "48",
    "--trainer.val_check_interval",
    "1",
)
CASES = {
    **{path.stem: Case(path.stem, FLAGS.get(path.stem, ())) for path in recipes()},
    "medusa_aligned": Case("medusa", aligned=True),
    "medusa_recomputed": Case("medusa", ("--trainer.activation_checkpointing", "true")),
    "independent_tied": Case(
        "independent", ("--drafter.model", json.dumps(TIED), "--drafter.frozen_embedding", "true")
    ),
    **{
        f"independent_trimmed_{stage}": Case("independent", TRIMMED, f"deepspeed_{stage}")
        for stage in (2, 3)
    },
    "falcon_drawn": Case("falcon", drawn=True),
    # It always draws where the block of a document begins.
    "gad": Case("gad", drawn=True),
    **{
        f"medusa_bf16_{stage}": Case("medusa", (), f"deepspeed_{stage}", "bf16-mixed")
        for stage in (1, 2, 3)
    },
}


PARSER = make_parser()


@cache
def as_shipped(recipe: str) -> Any:
    """The settings of a recipe's YAML."""
    return parse(PARSER, ["--config", f"{recipe}.yaml"])


def case_recipe(case: Case, folder: Path, world: int) -> Recipe:
    """A few steps of a shipped recipe on the tiny target: two rows a step, on one process or one on
    each of two.
    """
    known = as_shipped(case.recipe)
    source = SOURCES[known.data.class_path]
    settings = {
        "data.train": folder / f"{source}.jsonl",
        "data.validation_fraction": 0.2,
        "data.max_length": 192,
        "data.rows": 2 // world,
        "optimizer.lr": 5e-3,
        "optimizer.warmup_steps": 0,
        "trainer.max_steps": STEPS,
        "trainer.max_epochs": -1,
        "trainer.val_check_interval": STEPS,
        "trainer.accelerator": "cpu",
        "trainer.devices": world,
        "trainer.log_every_n_steps": 1,
        "trainer.strategy": case.strategy if world > 1 else "auto",
        "trainer.accumulate_grad_batches": 1,
        "trainer.precision": case.precision if world > 1 else "32-true",
        "trainer.gradient_clip_algorithm": "norm",
        "probe.prompts": 1,
        "probe.max_new_tokens": 8,
        "checkpoint.export": "last",
    }
    if source == "labelled":
        settings["data.features"] = "null"
    flags = [word for key, value in settings.items() for word in (f"--{key}", str(value))]
    arguments = inspect.signature(_class(known.drafter.class_path)).parameters
    for key, value in () if case.drawn else QUIET.items():
        flags += [f"--drafter.{key}", json.dumps(value)] if key in arguments else []
    flags = ["--config", f"{case.recipe}.yaml", *flags, *case.flags]
    recipe = recipe_of(PARSER, parse(PARSER, flags))
    recipe.objective = AlignedDrafting() if case.aligned else None
    return recipe


def _class(path: str) -> Any:
    module, name = path.rsplit(".", 1)
    return getattr(import_module(module), name)


class Shards(Callback):
    """Counts the numbers of all weights that are here when training begins.

    Args:
        seen: where to.
    """

    def __init__(self, seen: dict[str, Any]) -> None:
        self.seen = seen

    def on_train_batch_start(
        self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int
    ) -> None:
        """No module has been called yet."""
        self.seen.setdefault("here", sum(parameter.numel() for parameter in pl_module.parameters()))


def counted(
    function: Callable[..., Iterator[Any]], into: list[int]
) -> Callable[..., Iterator[Any]]:
    """The function, whose items are counted."""

    def counting(*given: Any) -> Iterator[Any]:
        items = list(function(*given))
        into.append(len(items))
        return iter(items)

    return counting


def at_scale(name: str, accelerator: str) -> Any:
    """A strategy that leaves nothing whole, and gathers nothing ahead of its use."""
    strategy: Any = STRATEGY_NAMED(name, accelerator)
    if name == "deepspeed_3":
        strategy.config["zero_optimization"] |= {
            "stage3_param_persistence_threshold": 0,
            "stage3_max_reuse_distance": 0,
            "stage3_max_live_parameters": 0,
        }
    return strategy


STRATEGY_NAMED = train.run.strategy_named


def train_case(name: str, folder: Path, world: int, seen: dict[str, Any]) -> None:
    """Train a case; what is seen of its shards and chunks goes to `seen`."""
    sparsepo.MASK_DROPOUT = 0.0
    train.run.RunProgress = lambda: Shards(seen)  # type: ignore[misc, assignment]
    run = folder / ("alone" if world == 1 else "two") / name
    train.run.train(
        case_recipe(CASES[name], folder, world), Place(run), tiny_target(dtype=torch.float32)
    )


def limit(names: Sequence[str]) -> float:
    """Seconds that so many cases may take."""
    return 60 + 15 * len(names)


def main(folder: Path, names: list[str]) -> None:
    """One of two processes."""
    torch.set_num_threads(1)
    gc.freeze()  # What is imported is no garbage, and DeepSpeed looks for some in every case.
    faulthandler.dump_traceback_later(limit(names) - 5, exit=True)
    losses.MAX_LOGITS = hanging_attention.MAX_SCORES = ROWS_PER_CHUNK * VOCABULARY
    train.run.strategy_named = at_scale
    chunks, groups = losses._slices, Documents.groups
    for name in names:
        seen: dict[str, Any] = {"chunks": [], "groups": []}
        losses._slices = counted(chunks, seen["chunks"])
        documents: Any = Documents
        documents.groups = counted(groups, seen["groups"])
        train_case(name, folder, 2, seen)
        (folder / f"{name}-{os.environ['RANK']}.json").write_text(json.dumps(seen))


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
