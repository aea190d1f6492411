"""`python -m train.online --config online.yaml`: serve a stream of requests with a drafter that
learns from the drafts that its target rejects.
"""

from __future__ import annotations

import importlib.util
import socket
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path
from shutil import rmtree
from typing import Any

import torch
import yaml
from jsonargparse import ArgumentParser, Namespace

from checkpoints.checks import strange_values
from checkpoints.pretrained import Provenance, find_folder, read_config, save_pretrained
from configs.command_line.bounded_yaml import load_yaml
from configs.command_line.class_paths import Kind, named_class
from configs.command_line.endings import Stopped, resumable
from configs.command_line.loading import config_parser, exit_with, first_config, parse
from configs.command_line.outputs import claimed, write_whole
from configs.command_line.redaction import redact
from data.reading.files import Tally
from modules.target.loading import load_target, outline
from train.cli import quieten
from train.online.recipe import (
    Recipe,
    build_tree,
    chats,
    requests,
    requests_file,
    service_of,
)
from train.online.report import PAGE, Curve, summary, table
from train.online.service import ANSWERS, Request, Service
from train.online.settings import ONLINE, ServerSettings
from train.resuming import same_run
from train.settings import training_device

CONFIG = "config.yaml"
_RUN = ("config", "output", "resume", "overwrite")
"""Flags that are no part of the recipe."""
_FREE = ("accelerator", "server")
"""Keys that a resumed run may change."""


def make_parser() -> ArgumentParser:
    """The keys of `Recipe`, and the flags of one run."""
    parser = config_parser("python -m train.online", "Serve requests, and learn from them.")
    parser.add_class_arguments(Recipe, fail_untyped=True)
    parser.add_argument(
        "--output", type=str | None, help="folder of the run [runs/NAME of the first config]"
    )
    parser.add_argument(
        "--resume", action="store_true", help="go on where a run in the same output was"
    )
    parser.add_argument(
        "--init_from", type=str | None, help="run, drafter or Hub id whose weights to start from"
    )
    parser.add_argument(
        "--overwrite", action="store_true", help="replace an earlier run in the same output"
    )
    return parser


def recipe_of(parser: ArgumentParser, config: Namespace) -> Recipe:
    """The recipe of a command line. ValueError: a value out of range, or no trainable drafter."""
    path = getattr(config.drafter, "class_path", None)
    if path is None:
        raise ValueError("drafter: give a class_path (package.module.Class) and perhaps init_args")
    named_class(str(path), Kind.DRAFTER, "drafter")
    with strange_values("the config cannot be read"):
        built = vars(parser.instantiate(config))
    return Recipe(**{key.name: built[key.name] for key in fields(Recipe)})


@contextmanager
def claim(output: Path, resume: bool, overwrite: bool) -> Iterator[None]:
    """Lock `output` for one run in the block.

    Raises:
        ValueError: another run writes there; it holds a run that is neither resumed nor
            overwritten; there is none to resume.
    """
    if resume and overwrite:
        raise ValueError("--resume and --overwrite contradict each other: give one")
    if resume and not (output / CONFIG).exists():
        raise ValueError(f"--resume: {output} holds no run: start without it")
    with claimed(output), resumable(lambda: "go on with --resume"):
        if (output / ONLINE).exists() and not resume:
            if not overwrite:
                raise ValueError(
                    f"output {str(output)!r} already holds a run: add --resume or --overwrite, or "
                    "give another --output"
                )
            rmtree(output / ONLINE)
            (output / ANSWERS).unlink(missing_ok=True)
        yield


def command(arguments: Sequence[str]) -> int:
    """Parse, serve all requests, and write the drafter as it is then."""
    parser = make_parser()
    config = parse(parser, arguments)
    if not config.config:
        raise ValueError("--config is missing: name a recipe, such as --config online.yaml")
    # 1. Everything that can be refused before the target is loaded.
    recipe = recipe_of(parser, config)
    build_tree(recipe)
    output = Path(config.output or f"runs/{first_config(config.config).stem}")
    if config.resume and config.init_from is None:
        config.init_from = begun_from(output)
    settings = _settings(parser, config)
    tally = Tally("request")
    stream = chats(recipe.stream, tally) if recipe.server.port is None else []
    shape = outline(recipe.target, recipe.dtype).shape
    with torch.device("meta"), strange_values("drafter: its arguments do not fit"):
        recipe.drafter(shape)
    if config.init_from is not None:
        read_config(find_folder(config.init_from))
    # 2. Serve.
    quieten()
    with reserved(recipe.server) as place, claim(output, config.resume, config.overwrite):
        if config.resume:
            same_run(output / CONFIG, settings, [key for key in settings if key not in _FREE])
        device = training_device(recipe.accelerator)
        target = load_target(recipe.target, recipe.dtype, device, recipe.chat_template)
        curve = Curve(output, "Acceptance over requests")
        service = service_of(recipe, target, output, config.init_from, curve)
        write_whole({output / CONFIG: yaml.safe_dump(settings, sort_keys=False)})
        service.load()
        try:
            if place is None:
                answer_all(service, requests(stream, service, recipe.routing.label, tally))
            else:
                listen(service, recipe, place)
        except Stopped:
            # A signal is how an endpoint ends; a file's requests go on with --resume.
            if place is not None:
                finish(service, output, recipe, settings)
            raise
        finally:
            curve.write()
        finish(service, output, recipe, settings)
    print("\n".join([*tally.lines(), table(summary(service.lines)), f"report: {output / PAGE}"]))
    return 0


def answer_all(service: Service, stream: Iterable[Request]) -> None:
    """Answer requests in their order, with updates between them."""
    for request in stream:
        service.answer(request)
        service.learn()


def listen(service: Service, recipe: Recipe, place: socket.socket) -> None:
    """Serve the endpoint until a signal; what was accepted is answered.

    Raises:
        Exception: of an update, where one failed.
    """
    from train.online.server import Endpoint, serve

    endpoint = Endpoint(service, recipe.target)
    try:
        serve(endpoint, recipe.server, place)
    finally:
        endpoint.close()
    if endpoint.trouble is not None:
        raise endpoint.trouble


@contextmanager
def reserved(settings: ServerSettings) -> Iterator[socket.socket | None]:
    """The endpoint's address, held in the block; None without an endpoint.

    Raises:
        ValueError: its libraries are missing, or the address cannot be had.
    """
    if settings.port is None:
        yield None
        return
    for library in ("starlette", "uvicorn"):
        if importlib.util.find_spec(library) is None:
            raise ValueError(
                f"server.port needs {library}, which is not installed: run `pip install -e "
                "'.[serve]'`"
            )
    try:
        place = socket.create_server((settings.host, settings.port))
    except OSError as error:
        raise ValueError(
            f"server.port {settings.port} of {settings.host} cannot be had ({error.strerror}): "
            "give another"
        ) from None
    with place:
        yield place


def finish(service: Service, output: Path, recipe: Recipe, settings: dict[str, Any]) -> None:
    """Save the states, and write every drafter as `train.py` does."""
    service.save()
    for name, learner in service.learners.items():
        folder = output if len(service.learners) == 1 else output / name
        learnt: dict[str, Any] = {
            "requests": sum(line["drafter"] == name for line in service.lines)
        }
        if recipe.server.port is None:
            learnt["train"] = requests_file(recipe.stream.requests)
        provenance = Provenance.of(service.target, data=learnt, settings=settings)
        save_pretrained(learner.student, folder / "drafter", provenance)


def _settings(parser: ArgumentParser, config: Namespace) -> dict[str, Any]:
    whole = yaml.safe_load(parser.dump(config, skip_unset=False, skip_validation=True))
    return redact({name: value for name, value in whole.items() if name not in _RUN})


def begun_from(output: Path) -> str | None:
    """The weights that a run in this output started from."""
    file = output / CONFIG
    saved = load_yaml(file) if file.is_file() else None
    return saved.get("init_from") if isinstance(saved, Mapping) else None


def main() -> None:
    """Entry point; exit status 2 after a user's mistake."""
    exit_with(command)


if __name__ == "__main__":
    main()
