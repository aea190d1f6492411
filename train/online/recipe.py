"""The recipe of an online run, and what it is built into."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch

from checkpoints.pretrained import warm_start
from configs.command_line.class_paths import Kind
from data.generation.answering import Chat, chats_of, prompt_rows
from data.reading.files import Tally
from eval.methods.rows import TRAINING_PROMPTS, construct
from modules.contracts.drafter import Drafter, TreeBuilder
from modules.contracts.shapes import TargetShape
from modules.contracts.trainable import Trainable
from modules.target.loading import AUTO, check_unquantised, chosen_dtype
from modules.target.target import Target
from train.online.router import Router
from train.online.service import Request, Service, Watch
from train.online.settings import (
    EMBEDDED,
    ONLINE,
    DecodingSettings,
    LearningSettings,
    RoutingSettings,
    ServerSettings,
    StreamSettings,
)
from train.online.update import Learner
from train.settings import chosen_precision, training_device


@dataclass
class Recipe:
    """What learns, from which requests and how: every key of a config.

    Args:
        drafter: the component that drafts and learns: class_path and init_args.
        target: Hub id, folder, .gguf file or smollm2-135m.
        dtype: of the target and of the weights that draft: float32, bfloat16, float16 or float64;
            auto is bfloat16 on a GPU that multiplies it and float32 elsewhere.
        chat_template: arguments of the target's chat template.
        seed: of weights, sampling, dropout and replay.
        accelerator: `auto`, `cpu` or `cuda`.
        precision: of updates: `32-true` or `bf16-mixed`; auto is bf16-mixed on a GPU that
            multiplies bfloat16.
        stream: see train/online/settings.py.
        decoding: see train/online/settings.py.
        learning: see train/online/settings.py.
        routing: see train/online/settings.py.
        server: see train/online/settings.py.
    """

    drafter: Callable[[TargetShape], Trainable]
    target: str = "smollm2-135m"
    dtype: str = AUTO
    chat_template: dict[str, Any] = field(default_factory=dict)
    seed: int = 0
    accelerator: str = "auto"
    precision: Literal["auto", "32-true", "bf16-mixed"] = "auto"
    stream: StreamSettings = field(default_factory=StreamSettings)
    decoding: DecodingSettings = field(default_factory=DecodingSettings)
    learning: LearningSettings = field(default_factory=LearningSettings)
    routing: RoutingSettings = field(default_factory=RoutingSettings)
    server: ServerSettings = field(default_factory=ServerSettings)

    def __post_init__(self) -> None:
        """Refuse a target that cannot be trained on; resolve `auto`."""
        check_unquantised(self.dtype)
        self.dtype = chosen_dtype(self.dtype, training_device(self.accelerator))

    @property
    def mixed(self) -> bool:
        """Whether updates multiply in bfloat16."""
        return chosen_precision(self.precision, self.accelerator) == "bf16-mixed"


def build_drafter(recipe: Recipe, target: Target, init_from: str | None) -> Drafter:
    """The drafter with the weights that it begins with.

    Raises:
        ValueError: a component that does not draft, that changes the target's text while it learns,
            or whose draft vocabulary has not been chosen.
    """
    torch.manual_seed(recipe.seed)
    drafter = recipe.drafter(target.shape)
    if not isinstance(drafter, Drafter):
        raise ValueError(f"drafter: {type(drafter).__name__} does not draft: name a drafter")
    drafter.initialise(target)
    if init_from is not None:
        warm_start(drafter, init_from)
    elif drafter.arguments.get("draft_vocabulary") is not None and drafter.vocabulary_D is not None:
        raise ValueError(
            f"drafter.draft_vocabulary is {drafter.arguments['draft_vocabulary']}, and its tokens "
            "are chosen in training: set it to null, or name a trained drafter with --init_from"
        )
    drafter = drafter.to(target.device)
    if drafter.adapt_sharing(target) is not target:
        raise ValueError(
            f"drafter: {type(drafter).__name__} changes its target, whose text would then depend "
            "on updates: name another"
        )
    return drafter


def build_tree(recipe: Recipe) -> TreeBuilder | None:
    """The tree builder that the recipe names."""
    spec = recipe.decoding.builder
    return None if spec is None else construct(spec, "decoding.builder", Kind.BUILDER)


def service_of(
    recipe: Recipe, target: Target, output: Path, init_from: str | None, watch: Watch | None = None
) -> Service:
    """The service of a recipe, before its first request."""
    drafter, route = build_drafter(recipe, target, init_from), Router(recipe.routing)
    if recipe.server.port is not None and drafter.online:
        raise ValueError(
            f"server.port: the loss of {type(drafter).__name__} runs the target itself, for which "
            "requests would have to wait: serve a file, or name another drafter"
        )
    learners = {
        name: Learner(
            copy.deepcopy(drafter),
            target,
            recipe.learning,
            output / ONLINE / name,
            recipe.seed,
            recipe.mixed,
        )
        for name in route.names
    }
    builder = build_tree(recipe)
    return Service(target, learners, recipe.decoding, builder, output, route, watch, recipe.seed)


# -- streams of a file -----------------------------------------------------------------------------


def chats(settings: StreamSettings, tally: Tally) -> list[Chat]:
    """The chats of a stream's file; ValueError without one that can be asked."""
    return chats_of(prompt_rows(requests_file(settings.requests), settings.limit, tally), tally)


def requests_file(name: str) -> str:
    """The file that `stream.requests` names."""
    return str(TRAINING_PROMPTS) if name == EMBEDDED else name


def requests(
    stream: Sequence[Chat], service: Service, label: str, tally: Tally
) -> Iterator[Request]:
    """The questions of all chats in their order that are not answered yet. Each follows the answers
    to the earlier ones of its chat; a chat ends at a question that leaves no room for an answer.
    """
    place, lines = 0, {line["place"]: line for line in service.lines}
    for chat in stream:
        answers: list[dict[str, Any]] = []
        labels = {key: value for key, value in chat.row.content.items() if key in ("topic", label)}
        for turn in range(len(chat.questions)):
            if place not in lines:
                request = Request(chat.before(answers), labels=labels, place=place)
                try:
                    service.prompt(request)
                except ValueError as error:
                    tally.skip(str(error), chat.row.place)
                    place += len(chat.questions) - turn
                    break
                yield request
                lines[place] = service.lines[-1]
            answers.append(lines[place])
            place += 1
