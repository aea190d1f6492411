"""`python -m eval.rules`: acceptance rules and tree builders on the same contexts of the real
models.

At every context each trial draws the same number of trees. The expected number of accepted drafts
of a tree is computed exactly (`node_chances`), so the draws of the trees are the only randomness.
Nothing is timed.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from checkpoints.pretrained import find_folder, read_config
from configs.command_line.loading import exit_with, flags
from configs.command_line.outputs import append_lines, claimed_file
from data.conversations import prompt_ids
from data.generation.answering import chats_of, prompt_rows
from data.reading.files import Tally
from data.reading.rows import Message
from eval.methods.rows import TRAINING_PROMPTS, Method, load_drafter
from eval.methods.templates import chat_arguments
from eval.rule_comparison.contexts import LEVEL_DRAWS, Grid, calibrate, measure, spots
from eval.rule_comparison.tables import fastest_shape, tables
from eval.rule_comparison.trials import NODES, level_trials, tree_trials
from eval.tasks.task_files import HELD_OUT
from modules.contracts.drafter import Drafter
from modules.contracts.target import Target
from modules.cost_model.latency_table import stored_latency
from modules.decoding.translation import in_target_ids
from modules.drafters.small_models.s2d import S2D
from modules.target.loading import check_room, load_target
from modules.trees.sampled.draws import check_temperature


@dataclass(frozen=True)
class Comparison:
    """What is compared on what.

    Args:
        target: Hub id, folder, .gguf file or smollm2-135m.
        drafter: run folder, drafter folder or Hub id, or a class `{class_path, init_args}` that
            needs no training, such as `Independent` with a small `model`; by default the target's
            own first `layers` layers.
        layers: number of the target's layers that draft, with its norm and LM head, without
            training.
        prompts: JSONL file of rows with `prompt`, `question`, `messages` or `turns`; by default the
            embedded held-out prompts.
        limit: prompts.
        contexts: of each prompt, evenly spaced over an answer that the target samples.
        max_new_tokens: of that answer.
        draws: trees per trial and context; eight times as many of one level.
        temperature: of target and draft; at 0 every rule is greedy and drawn trees are drawn at
            DySpec's 0.6.
        draft_temperature: of whole trees that are drawn, instead.
        fastest: also time this device, which should be idle, and report the size and depth of
            Sequoia's tree with the highest predicted speedup.
        only: names of the trials to run, in quotes where they have a comma:
            `--only '["chain of 3, ratio", DySpec]'`; by default all.
        seed: of all random draws.
        dtype: of target and draft: float32, float64, bfloat16 or float16. Distributions are made of
            their logits in float64.
        device: a torch device; by default the GPU if there is one.
        output: Markdown file to append the result to.
    """

    target: str = "smollm2-135m"
    drafter: str | dict[str, Any] | None = None
    layers: int = 28
    prompts: str = str(HELD_OUT)
    limit: int = 12
    contexts: int = 3
    max_new_tokens: int = 48
    draws: int = 8
    temperature: float = 1.0
    draft_temperature: float | None = None
    fastest: bool = False
    only: list[str] | None = None
    seed: int = 0
    dtype: str = "float32"
    device: str | None = None
    output: str | None = None

    def __post_init__(self) -> None:
        """Refuse settings that cannot run."""
        for name in ("layers", "limit", "contexts", "max_new_tokens", "draws"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.drafter is not None:
            Method("drafter", self.drafter).check()
        if self.temperature < 0:
            raise ValueError(f"temperature must be 0 (greedy) or above, got {self.temperature}")
        check_temperature(self.draft_temperature)
        trials = {**level_trials(), **tree_trials([0.5])}
        if unknown := sorted(set(self.only or ()) - set(trials)):
            raise ValueError(
                f"only {unknown[0]!r} is no trial: use some of {', '.join(map(repr, trials))}"
            )
        if not Path(self.prompts).is_file():
            raise ValueError(
                f"prompts {self.prompts!r} does not exist: give a .jsonl or .jsonl.gz file"
            )

    @property
    def grid(self) -> Grid:
        """The settings of contexts and draws."""
        return Grid(
            self.contexts,
            self.max_new_tokens,
            self.draws,
            self.temperature,
            self.draft_temperature,
            self.seed,
        )


def compare(comparison: Comparison) -> str:
    """Measure all trials; returns the result in Markdown.

    Raises:
        ValueError: no such drafter or target, more layers than the target has, prompts without a
            question.
    """
    # 1. Prompts to measure, and others to calibrate Sequoia's tree.
    questions = first_questions(comparison.prompts, comparison.limit)
    calibration = first_questions(str(TRAINING_PROMPTS), max(2, comparison.limit // 2))
    target, drafter, name = models(comparison)
    prompts, others = (
        [prompt_ids(each, target.tokenizer) for each in part] for part in (questions, calibration)
    )
    # 2. Acceptance by sibling, which shapes Sequoia's tree.
    acceptance, level_seconds = calibrate(
        spots(target, drafter, others, comparison.grid),
        comparison.draws,
        comparison.draft_temperature,
    )
    # 3. All trials on the same contexts.
    every = {**level_trials(), **tree_trials(acceptance, comparison.draft_temperature)}
    trials = {
        name: trial
        for name, trial in every.items()
        if comparison.only is None or name in comparison.only
    }
    values, firsts = measure(
        spots(target, drafter, prompts, comparison.grid), trials, comparison.grid
    )
    # 4. Describe.
    accepted, believed = np.mean(firsts, axis=0)
    drawn = (
        ""
        if comparison.draft_temperature is None
        else f", trees drawn at {comparison.draft_temperature:g}"
    )
    head = [
        f"## Temperature {comparison.temperature:g}{drawn}",
        "",
        f"{comparison.target}, drafted by {name}: {len(firsts)} contexts of {len(prompts)} "
        f"prompts, {comparison.draws} trees of {NODES} nodes each "
        f"({comparison.draws * LEVEL_DRAWS} of one level), seed {comparison.seed}. A first draw is "
        f"accepted with {accepted:.3f} on average, and DySpec takes it to be {believed:.3f}. "
        f"Acceptance by sibling on {len(others)} other prompts, "
        f"from which Sequoia's tree is made: {', '.join(f'{share:.3f}' for share in acceptance)}.",
        "",
    ]
    shape = (
        [fastest_shape(acceptance, stored_latency(target), level_seconds), ""]
        if comparison.fastest
        else []
    )
    return "\n".join([*head, *shape, *tables(values), ""])


def first_questions(prompts: str, limit: int) -> list[list[Message]]:
    """The first question of each prompt of a file; unreadable prompts are counted and logged."""
    tally = Tally("prompt")
    questions = [chat.questions[0] for chat in chats_of(prompt_rows(prompts, limit, tally), tally)]
    tally.log()
    return questions


def models(comparison: Comparison) -> tuple[Target, Drafter, str]:
    """The target, the drafter and its name in the report."""
    # A saved drafter, with the target that it was trained for.
    if isinstance(comparison.drafter, str):
        target = load_target(
            comparison.target,
            comparison.dtype,
            comparison.device,
            chat_arguments(None, [comparison.drafter]),
        )
        drafter = load_drafter(comparison.drafter, target)
        served, name = drafter.adapt(target), read_config(find_folder(comparison.drafter))["class"]
        return served, in_target_ids(drafter, served), name
    check_room(comparison.target, comparison.max_new_tokens)
    target = load_target(comparison.target, comparison.dtype, comparison.device)
    # A class that needs no training.
    if comparison.drafter is not None:
        drafter = load_drafter(comparison.drafter, target)
        return target, in_target_ids(drafter, target), Method("", comparison.drafter).label
    # None given: the target's own first layers.
    if comparison.layers > target.shape.num_layers:
        raise ValueError(
            f"layers {comparison.layers} is more than the target's {target.shape.num_layers}: "
            "lower it"
        )
    drafter = S2D(target.shape, [comparison.layers], adaptive=False)
    drafter.initialise(target)
    drafter = drafter.to(target.device, target.dtype).eval()
    return target, drafter, f"its own first {comparison.layers} of {target.shape.num_layers} layers"


def command(arguments: Sequence[str]) -> int:
    """Parse, compare and print; also append to the output file."""
    title = "Compare acceptance rules and tree builders on recorded contexts."
    comparison = Comparison(**flags(Comparison, arguments, "eval.rules", title))
    output = None if comparison.output is None else Path(comparison.output)
    # A place that cannot be written to is refused before anything is measured.
    with nullcontext() if output is None else claimed_file(output):
        text = compare(comparison)
        print(text)
        if output is not None:
            append_lines(output, [text])
    return 0


if __name__ == "__main__":
    exit_with(command)
