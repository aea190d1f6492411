"""`python train.py`: the command line and the YAML have the keys of `train.run.Recipe`."""

from __future__ import annotations

import inspect
import json
import logging
import textwrap
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import torch
import yaml
from jsonargparse import ArgumentParser, Namespace
from lightning.pytorch.utilities import rank_zero_only

from checkpoints.checks import strange_values
from checkpoints.hub import check_token
from checkpoints.pretrained import PROVENANCE, find_folder, read_config
from configs.command_line.class_paths import Kind, named_class
from configs.command_line.loading import exit_with, first_config, parse
from configs.command_line.outputs import write_whole
from configs.command_line.redaction import redact
from data.datamodule import ConversationData
from modules.contracts.drafter import Drafter
from modules.contracts.trainable import Trainable
from modules.target.loading import AUTO, check_room, chosen_dtype, load_target, outline
from train.lightning.deepspeed import check_shards
from train.plan import print_plan
from train.profile import print_profile, profile
from train.resuming import same_run
from train.run import CONFIG, Place, Recipe, claim, steps_of, train
from train.settings import check_rate, chosen_precision, training_device

_LASTING = ("target", "dtype", "chat_template", "drafter", "data", "seed", "objective")
"""Keys that a resumed run may not change."""
_ABOUT_THE_RUN = (
    "config",
    "output",
    "resume",
    "init_from",
    "overwrite",
    "plan",
    "plan_gib",
    "profile",
)
"""Flags that are no part of the recipe."""
_FLAGS = (
    "config",
    "drafter",
    "target",
    "dtype",
    "chat_template",
    "seed",
    "objective",
    "output",
    "resume",
    "init_from",
    "overwrite",
    "plan",
    "plan_gib",
    "profile",
)
_SECTIONS = ("data", "optimizer", "trainer", "probe", "checkpoint", "publish")
_SHOWN = ("val/loss", "probe/tau", "val/preference_accuracy", "val/reward_margin")
"""Figures in the last line of a training, besides those of the held-out data."""
_EXAMPLE = "python train.py --config clover.yaml --config budget/demo.yaml --drafter.heads 4"


class TrainParser(ArgumentParser):
    """A parser whose help fits on one screen: a section is a few lines of keys, not a paragraph per
    key.
    """

    def format_help(self) -> str:
        """Help text: single flags, then the sections with their keys and defaults."""
        if not any(action.dest == "config" for action in self._actions):
            return super().format_help()
        flags = [_flag(action) for action in self._actions if action.dest in _FLAGS]
        sections = [_section(name, _defaults(self, name)) for name in _SECTIONS]
        return "\n".join(
            [
                f"usage: {self.prog} --config NAME [--config NAME ...] [--KEY VALUE ...]",
                "",
                str(self.description),
                f"For example: {_EXAMPLE}",
                "",
                *flags,
                "",
                *sections,
                "",
                _row("--drafter.help CLASS", "what a drafter's keys mean"),
                _row("--allow_package NAME", "let class_path name classes of this package too"),
                _row("--print_config", "print the merged config, every key, and stop"),
                "",
            ]
        )


def _row(left: str, right: str) -> str:
    return f"  {left:<22}  " + ("\n" + " " * 26).join(
        textwrap.wrap(right, 92, break_on_hyphens=False)
    )


def _flag(action: Any) -> str:
    default = (
        f" [{action.default}]" if isinstance(action.default, str) or action.dest == "seed" else ""
    )
    return _row(
        f"--{action.dest}", str(action.help).split(" (type:")[0].split(" (required")[0] + default
    )


def _section(name: str, defaults: Mapping[str, Any]) -> str:
    return _row(
        f"--{name}.KEY", ", ".join(f"{key}={_written(value)}" for key, value in defaults.items())
    )


def _written(value: Any) -> str:
    return yaml.safe_dump(
        list(value) if isinstance(value, tuple) else value, default_flow_style=True
    ).split("\n")[0]


def _defaults(parser: ArgumentParser, name: str) -> dict[str, Any]:
    if name == "data":
        parameters = list(inspect.signature(ConversationData.__init__).parameters.values())[1:]
        return {parameter.name: parameter.default for parameter in parameters}
    return {
        action.dest.split(".", 1)[1]: action.default
        for action in parser._actions
        if action.dest.startswith(f"{name}.") and not action.dest.endswith(".help")
    }


def make_parser() -> TrainParser:
    """The parser of `python train.py`: the keys of `Recipe`, and the flags of one run."""
    parser = TrainParser(
        prog="python train.py",
        exit_on_error=False,
        description="Train a decoding accelerator for a frozen target.",
    )
    parser.add_argument(
        "--config", action="config", help="a path, or a file under configs/; several merge"
    )
    parser.add_class_arguments(Recipe, fail_untyped=True)
    parser.set_defaults({"data": {"class_path": "data.datamodule.ConversationData"}})
    parser.add_argument(
        "--output", type=str | None, help="folder of the run [runs/NAME of the first config]"
    )
    parser.add_argument(
        "--resume", type=str | None, help="`last` or a checkpoint: go on with the same batches"
    )
    parser.add_argument(
        "--init_from", type=str | None, help="run, drafter or Hub id whose weights to start from"
    )
    parser.add_argument(
        "--overwrite", action="store_true", help="replace an earlier run in the same output"
    )
    parser.add_argument(
        "--plan", action="store_true", help="print what it needs, refuse what cannot fit, and stop"
    )
    parser.add_argument(
        "--plan_gib",
        type=float | None,
        help="with --plan: GiB of each GPU of another machine, which is planned for",
    )
    parser.add_argument(
        "--profile", action="store_true", help="print where the time of a step goes, and stop"
    )
    return parser


def prepare(parser: ArgumentParser, config: Namespace) -> tuple[Recipe, Place]:
    """Recipe and place of a command line. Nothing is loaded or written; mistakes raise here.

    Raises:
        ValueError: a value out of range, also of the component's own arguments; nothing to start
            from, no token to publish with, a strategy that cannot train the component.
    """
    # 1. Output, and the weights to start from, which `--overwrite` must not remove.
    settings = recipe_settings(parser, config)
    output = Path(config.output or f"runs/{_stem(config)}")
    if config.init_from is not None:
        folder = find_folder(config.init_from)
        read_config(folder)
        if config.overwrite and folder.resolve().is_relative_to(output.resolve()):
            raise ValueError(
                f"--init_from {config.init_from}: --overwrite would remove it first: "
                "give another --output"
            )
    # 2. The recipe and its component.
    recipe = recipe_of(parser, config)
    trainable = check_component(recipe, config)
    if recipe.probe.prompts and isinstance(trainable, Drafter):
        check_room(config.target, recipe.probe.max_new_tokens, "probe.max_new_tokens")
    # 3. What is missing to start, or to publish at the end.
    if recipe.objective is not None and config.init_from is None and config.resume is None:
        raise ValueError(
            "objective: it continues a trained drafter: name its run or folder with --init_from"
        )
    if recipe.publish.repo is not None and rank_zero_only.rank == 0:
        check_token()
    return recipe, Place(output, None, config.init_from, settings)


def check_component(recipe: Recipe, config: Namespace) -> Trainable:
    """The component on the meta device, whose constructor checks its arguments.

    Raises:
        ValueError: an argument that its constructor refuses, or a strategy or rate that cannot
            train it.
    """
    # A GGUF target may be converted here for the first time, which needs a device with numbers.
    shape = outline(config.target, config.dtype).shape
    with torch.device("meta"), strange_values("drafter: its arguments do not fit"):
        trainable = recipe.drafter(shape)
        check_shards(recipe.trainer.strategy, trainable)
    for stage in trainable.stages:
        check_rate(f"drafter: the learning rate of {stage.name}", stage.lr)
    return trainable


def recipe_of(parser: ArgumentParser, config: Namespace) -> Recipe:
    """The recipe of a command line.

    Raises:
        ValueError: a value out of range, or a drafter whose class cannot be trained.
    """
    named = getattr(config.drafter, "class_path", None)
    if named is None:
        raise ValueError("drafter: give a class_path (package.module.Class) and perhaps init_args")
    named_class(str(named), Kind.TRAINABLE, "drafter")
    with strange_values("the config cannot be read"):
        built = vars(parser.instantiate(config))
    return Recipe(**{key.name: built[key.name] for key in fields(Recipe)})


def recipe_settings(parser: ArgumentParser, config: Namespace) -> dict[str, Any]:
    """The config as plain values, nulls too, without credentials and without the flags of a single
    run.
    """
    whole = yaml.safe_load(parser.dump(config, skip_unset=False, skip_validation=True))
    return redact({name: value for name, value in whole.items() if name not in _ABOUT_THE_RUN})


def _stem(config: Namespace) -> str:
    if config.config:
        return first_config(config.config).stem
    return str(getattr(config.drafter, "class_path", "run")).rsplit(".", 1)[-1].lower()


def command(arguments: Sequence[str]) -> int:
    """Parse, write the run's config, train, and print where the result is."""
    parser = make_parser()
    if not any(
        word.startswith(("--config", "--drafter", "--print_config", "--help", "-h"))
        for word in arguments
    ):
        raise ValueError(
            "--config is missing: name a recipe of configs/, such as --config clover.yaml"
        )
    # 1. `--plan` and `--profile` print and stop.
    config = settled(parse(parser, arguments))
    if config.plan:
        print_plan(
            recipe_of(parser, config),
            outline(config.target, config.dtype, config.chat_template),
            config.plan_gib,
        )
        return 0
    quieten()
    if config.profile:
        recipe = recipe_of(parser, config)
        check_component(recipe, config)
        place = training_device(recipe.trainer.accelerator)
        print_profile(
            profile(recipe, load_target(recipe.target, recipe.dtype, place, recipe.chat_template))
        )
        return 0
    # 2. Train in a locked output folder, and report the figures.
    recipe, place = prepare(parser, config)
    with claim(place.output, config.resume, config.overwrite) as resume:
        place = replace(place, resume=resume)
        if resume is not None:
            same_run(place.output / CONFIG, place.settings, _LASTING)
        write_config(place)
        began = steps_of(resume)
        folder, ended = train(recipe, place)
        report(folder, used_up(recipe, ended) if began == ended else "")
    return 0


@rank_zero_only
def _print_chosen(config: Namespace) -> None:
    print(
        f"target in {config.dtype}, training in {config.trainer.precision}: chosen for "
        f"{training_device(config.trainer.accelerator)}",
        flush=True,
    )


def settled(config: Namespace) -> Namespace:
    """The config with `auto` replaced by what this machine chooses, so that config.yaml records
    it.
    """
    if AUTO in (config.dtype, config.trainer.precision):
        accelerator = config.trainer.accelerator
        config.dtype = chosen_dtype(config.dtype, training_device(accelerator))
        config.trainer.precision = chosen_precision(config.trainer.precision, accelerator)
        _print_chosen(config)
    return config


def quieten() -> None:
    """Suppress messages of libraries about themselves."""
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    for message in (
        ".*LeafSpec.*",
        "Checkpoint directory .* exists and is not empty",
        "It is recommended to use .self.log",
    ):
        warnings.filterwarnings("ignore", message=message)
    # DeepSpeed sets the level of its logger when it is imported: a filter stays.
    logging.getLogger("DeepSpeed").addFilter(_not_about_devices)


def _not_about_devices(record: logging.LogRecord) -> bool:
    """False for DeepSpeed's message about the device, which this program prints itself."""
    return not record.getMessage().startswith("Setting accelerator to ")


@rank_zero_only
def write_config(place: Place) -> None:
    """Write `DIR/config.yaml`, which repeats the training."""
    write_whole({place.output / CONFIG: yaml.safe_dump(dict(place.settings), sort_keys=False)})


def used_up(recipe: Recipe, step: int) -> str:
    """The message of a resumed run that has no steps left after this one."""
    most = recipe.trainer.max_steps
    limit = f"max_steps {most}" if 0 <= most <= step else f"max_epochs {recipe.trainer.max_epochs}"
    used = f"trainer.{limit} is used up after step {step}"
    return f"nothing was left to train: {used}, raise it to go on"


@rank_zero_only
def report(folder: Path, untrained: str = "") -> None:
    """Print the last lines of a training, or of a run with nothing left to train."""
    measured = json.loads((folder / PROVENANCE).read_text())["measured"]
    names = [*_SHOWN, *(name for name in measured if name.startswith("held_out/"))]
    shown = [f"{name} {measured[name]:.4f}" for name in names if name in measured]
    if untrained:
        print(untrained)
    print(f"{'exported' if untrained else 'trained'}: {folder}  {'  '.join(shown)}")


def main() -> None:
    """Entry point; exit status 2 after a user's mistake."""
    exit_with(command)
