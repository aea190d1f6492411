"""`python -m eval.rules`: acceptance rules and tree builders on the same contexts of the real
models, without tossing.

At every context each trial draws the same number of trees; what its rule would accept of a tree in
expectation follows from the tree (`node_chances`), so that only the draws of the trees are left to
chance. Nothing is timed.

Shape legend: B draws, N nodes, V vocabulary, P prompts.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jsonargparse import ArgumentParser
from torch import Tensor

from checkpoints.pretrained import find_folder, read_config
from configs.command_line.loading import exit_with, parse
from data.conversations import prompt_ids
from data.generation.answering import chats_of, prompt_rows
from data.reading.files import Tally
from data.reading.rows import Message
from eval.cli import quieten
from eval.methods.rows import TRAINING_PROMPTS, load_drafter
from eval.methods.templates import chat_arguments
from eval.metrics.bootstrap import mean_interval
from eval.tasks.task_files import HELD_OUT
from modules.acceptance.rejection import node_chances, recursive_rounds
from modules.acceptance.rules import (
    Draws,
    KSequentialRule,
    MultiRoundRule,
    PointRule,
    RatioRule,
    check_pairing,
)
from modules.contracts.drafter import Context, Drafter, DraftState, Frontier, TreeBuilder
from modules.contracts.losses import Losses
from modules.contracts.sampling import Sampling
from modules.contracts.target import Session, Target
from modules.contracts.token_tree import TokenTree
from modules.contracts.verification import Verified
from modules.cost_model.latency_table import LatencyTable, stored_latency
from modules.decoding.decoder import SpeculativeDecoder
from modules.decoding.translation import in_target_ids
from modules.drafters.small_models.s2d import S2D
from modules.runtime.phase_timer import now
from modules.target.loading import load_target
from modules.trees.reranked import RerankedTree
from modules.trees.sampled.branching import branching_tree, chains
from modules.trees.sampled.chain import SampledChain
from modules.trees.sampled.draws import check_temperature, draft_probs
from modules.trees.sampled.dyspec import DySpecTree
from modules.trees.sampled.sequoia import best_paths, best_shape, expected_tokens, sequoia_tree
from modules.trees.sampled.stochastic_beam import StochasticBeamTree
from modules.trees.static import StaticTree

SIBLINGS = 4
NODES, DEEPEST = 15, 6
LEVEL_DRAWS = 8
"""Times as many draws for trees of one level, which need no model once the distributions are
recorded.
"""
SAMPLES = 4000
"""Of the bootstrap."""
CALIBRATION_SIBLINGS = 8
DEEPEST_SHAPE = 16
Rule = RatioRule | PointRule


@dataclass(frozen=True)
class Comparison:
    """What is compared on what.

    Args:
        target: Hub id, folder, .gguf file or smollm2-135m.
        drafter: run folder, drafter folder or Hub id; by default the target's own first `layers`
            layers.
        layers: of the target that draft, under its own norm and LM head, without training.
        prompts: JSONL file of rows with `prompt`, `question`, `messages` or `turns`; by default the
            embedded held-out prompts.
        limit: prompts.
        contexts: of each prompt, evenly spaced over an answer that the target samples.
        max_new_tokens: of that answer.
        draws: trees per trial and context; eight times as many of one level.
        temperature: of target and draft; at 0 every rule is greedy and drawn trees are drawn at
            DySpec's 0.6.
        draft_temperature: of whole trees that are drawn, instead.
        fastest: also time this device, on which nothing else should run, and say which size and
            depth of Sequoia's tree promise most here.
        only: names of the trials to run; by default all.
        seed: of everything that is drawn.
        device: a torch device; by default the GPU if there is one.
        output: Markdown file to append to as well.
    """

    target: str = "smollm2-135m"
    drafter: str | None = None
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
    device: str | None = None
    output: str | None = None

    def __post_init__(self) -> None:
        """Refuse what cannot be compared."""
        for name in ("layers", "limit", "contexts", "max_new_tokens", "draws"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.temperature < 0:
            raise ValueError(f"temperature must be 0 (greedy) or above, got {self.temperature}")
        check_temperature(self.draft_temperature)
        known = {**level_trials(), **tree_trials([0.5])}
        if unknown := sorted(set(self.only or ()) - set(known)):
            raise ValueError(f"only {unknown[0]!r} is no trial: use some of {', '.join(known)}")
        if not Path(self.prompts).is_file():
            raise ValueError(
                f"prompts {self.prompts!r} does not exist: give a .jsonl or .jsonl.gz file"
            )


@dataclass(frozen=True)
class Trial:
    """A builder and the rule that verifies its trees; `nodes` are drafted."""

    builder: TreeBuilder
    rule: Rule
    nodes: int

    def __post_init__(self) -> None:
        """Refuse a wrong pairing."""
        check_pairing(self.rule, self.builder.sibling_draw)


def level_trials() -> dict[str, Trial]:
    """One level of K siblings: every rule against the optimum of one draft, which is `ratio 1`."""
    trials = {"ratio 1": Trial(SampledChain(1), RatioRule(), 1)}
    for count in range(2, SIBLINGS + 1):
        trials[f"multi_round {count}"] = Trial(chains(count, 1), MultiRoundRule(), count)
        trials[f"k_seq {count}"] = Trial(chains(count, 1), KSequentialRule(), count)
        trials[f"recursive {count}"] = Trial(branching_tree([count]), RatioRule(), count)
        trials[f"point {count}"] = Trial(
            StaticTree([(i,) for i in range(count)]), PointRule(), count
        )
    return trials


def tree_trials(acceptance: Sequence[float], heat: float | None = None) -> dict[str, Trial]:
    """Whole trees of 15 nodes, and one chain as deep as the five chains; `heat` is the drawn trees'
    temperature.
    """
    independent = branching_tree([3, 2, 1], "independent", heat)
    static = best_paths([acceptance], NODES, DEEPEST)
    return {
        "chain of 3, ratio": Trial(SampledChain(3), RatioRule(), 3),
        "5 chains of 3, multi_round": Trial(chains(5, 3, heat), MultiRoundRule(), NODES),
        "5 chains of 3, k_seq": Trial(chains(5, 3, heat), KSequentialRule(), NODES),
        "3-2-1 independent, multi_round": Trial(independent, MultiRoundRule(), NODES),
        "3-2-1 independent, k_seq": Trial(independent, KSequentialRule(), NODES),
        "RSD-C 3-2-1": Trial(branching_tree([3, 2, 1], temperature=heat), RatioRule(), NODES),
        "RSD-S 5 wide, 3 deep": Trial(StochasticBeamTree(5, 3, heat), RatioRule(), NODES),
        "Sequoia": Trial(
            sequoia_tree([acceptance], NODES, DEEPEST, temperature=heat), RatioRule(), NODES
        ),
        "Sequoia's shape, top-k by value": Trial(StaticTree(static), PointRule(), NODES),
        "DySpec": Trial(DySpecTree(DEEPEST, temperature=heat), RatioRule(), NODES),
        "EAGLE-2's rerank, top-k by value": Trial(RerankedTree(DEEPEST, 5), PointRule(), NODES),
    }


ORDERS = [
    *((f"recursive {k}", f"multi_round {k}") for k in range(2, SIBLINGS + 1)),
    ("RSD-C 3-2-1", "3-2-1 independent, multi_round"),
    ("RSD-S 5 wide, 3 deep", "3-2-1 independent, multi_round"),
    ("RSD-S 5 wide, 3 deep", "5 chains of 3, multi_round"),
    *((f"k_seq {k}", "ratio 1") for k in range(2, SIBLINGS + 1)),
    ("5 chains of 3, k_seq", "chain of 3, ratio"),
    *((f"k_seq {k}", f"multi_round {k}") for k in range(2, SIBLINGS + 1)),
    ("5 chains of 3, k_seq", "5 chains of 3, multi_round"),
    ("DySpec", "RSD-C 3-2-1"),
    ("DySpec", "Sequoia"),
    ("DySpec", "Sequoia's shape, top-k by value"),
    ("DySpec", "EAGLE-2's rerank, top-k by value"),
]
"""Pairs in the order that their papers claim: the first accepts at least as much."""


class Recorded(Drafter):
    """Drafts from the recorded logits [V] of one context, whatever it is asked."""

    def __init__(self, logits_D: Tensor, vocabulary_D: Tensor | None) -> None:
        super().__init__()
        self.logits_D, self._vocabulary_D = logits_D, vocabulary_D

    @property
    def vocabulary_D(self) -> Tensor | None:
        """The recorded drafter's."""
        return self._vocabulary_D

    def loss(self, batch: Any, target: Target, progress: float) -> Losses:
        """Nothing to learn."""
        raise ValueError("a recorded drafter does not train")

    def start(self, context: Context) -> DraftState:
        """Nothing but the context."""
        return DraftState(context, context.newest_B, context.lengths_B)

    def expand(self, state: DraftState, frontier: Frontier) -> Tensor:
        """The same logits for every node."""
        return self.logits_D.expand(*frontier.tokens_BW.shape, -1)


@dataclass(frozen=True)
class Spot:
    """One context: the models behind it, and their logits right there.

    state: of the drafter, one sequence. target_logits_V, draft_logits_D: of the next token.
    level_seconds: of drafting them. seed: of its draws.
    """

    session: Session
    drafter: Drafter
    state: DraftState
    sampling: Sampling
    target_logits_V: Tensor
    draft_logits_D: Tensor
    level_seconds: float
    seed: int

    def first_draw(self, heat: float | None = None) -> tuple[float, float]:
        """How likely a first draw is accepted, Σ min(p, q), and how likely DySpec takes it to be, Σ
        q².
        """
        target_V = Draws(self.sampling, []).probs(self.target_logits_V)
        draft_V, known = torch.zeros_like(target_V), self.drafter.vocabulary_D
        draft_V[slice(None) if known is None else known] = draft_probs(
            self.draft_logits_D, self.state.context, heat
        )
        return float(torch.minimum(target_V, draft_V).sum()), float((draft_V**2).sum())

    @torch.no_grad()
    def chances(self, trial: Trial, draws: int) -> list[list[float]]:
        """How likely each node of every drawn tree is accepted [B][N]; every trial has the same
        generators.
        """
        device = self.session.target.device
        generators = [torch.Generator(device).manual_seed(self.seed + i) for i in range(draws)]
        state = self.state.select(torch.zeros(draws, dtype=torch.long, device=device))
        state.context = replace(state.context, generators=tuple(generators))
        if trial.builder.depth == 1:
            tree = trial.builder.build(
                Recorded(self.draft_logits_D, self.drafter.vocabulary_D), state, trial.nodes
            )
            verified = Verified(tree, self.target_logits_V.expand(*tree.tokens_BN.shape, -1))
        else:
            tree = trial.builder.build(self.drafter, state, trial.nodes)
            verified = self.session.verify(tree)
        drawn_by = Draws(self.sampling, generators)
        rounds = trial.rule.rounds if self.sampling.temperature else recursive_rounds
        return [
            node_chances(tree, b, drawn_by.probs(verified.logits_BNV[b]), rounds)
            for b in range(draws)
        ]


@torch.no_grad()
def opened(
    target: Target, drafter: Drafter, text: list[int], sampling: Sampling, draws: int, seed: int
) -> Spot:
    """The context after `text`; its session then holds it `draws` times."""
    ids_BT, newest_B, lengths_B = (
        torch.tensor(each, device=target.device)
        for each in ([text[:-1]], [text[-1]], [len(text) - 1])
    )
    session = target.open(1, len(text) + NODES + 1)
    _, states = session.prefill(ids_BT, lengths_B, drafter.decoding_states)
    generators = (torch.Generator(target.device),)
    context = Context(target, ids_BT, lengths_B, newest_B, states, sampling, generators, session)
    state, root_B1 = drafter.start(context), newest_B[:, None]
    target_logits_V = session.verify(TokenTree.root(newest_B)).logits_BNV[0, 0]
    before = now(target.device)
    draft_logits_D = drafter.expand(state, Frontier(root_B1, torch.full_like(root_B1, -1), 0))[0, 0]
    level_seconds = now(target.device) - before
    session.keep([0] * draws)
    return Spot(
        session, drafter, state, sampling, target_logits_V, draft_logits_D, level_seconds, seed
    )


def spots(
    target: Target, drafter: Drafter, prompts: Sequence[list[int]], asked: Comparison
) -> Iterator[tuple[int, Spot]]:
    """Prompt number and context, one after the other."""
    for index, prompt in enumerate(prompts):
        sampling = Sampling(asked.temperature, seed=asked.seed + index)
        answer = SpeculativeDecoder(target).decode([prompt], sampling, asked.max_new_tokens)[0].ids
        for place in np.unique(np.linspace(1, len(answer), asked.contexts).astype(int)).tolist():
            seed = (asked.seed * 1000 + index) * 1_000_000 + place * 1000
            yield (
                index,
                opened(target, drafter, [*prompt, *answer[:place]], sampling, asked.draws, seed),
            )


def calibrate(
    found: Iterator[tuple[int, Spot]], draws: int, heat: float | None = None
) -> tuple[list[float], float]:
    """Over contexts: how often the k-th sibling without replacement is accepted (Sequoia's P[k]),
    and the median seconds of drafting a level."""
    trial = Trial(
        branching_tree([CALIBRATION_SIBLINGS], temperature=heat), RatioRule(), CALIBRATION_SIBLINGS
    )
    each = [
        (np.mean(spot.chances(trial, draws), axis=0)[1:], spot.level_seconds) for _, spot in found
    ]
    return np.mean([chances for chances, _ in each], axis=0).tolist(), float(
        np.median([taken for _, taken in each])
    )


def fastest_shape(acceptance: list[float], latency: LatencyTable, level_seconds: float) -> str:
    """Size and depth of Sequoia's tree that promise most on this device, in a sentence (Chen et al.
    2024, section 3.3).

    Args:
        acceptance: by sibling. latency: of the target. level_seconds: of drafting one level.
    """
    seconds = [latency.at(rows) for rows in range(1, max(latency.seconds) + 1)]
    draws, levels = best_shape([acceptance], seconds, level_seconds, DEEPEST_SHAPE)
    if not draws:
        return "On this device no tree of Sequoia's promises more than plain decoding."
    tokens = expected_tokens([acceptance], draws, levels)[-1]
    speedup = tokens * seconds[0] / (seconds[draws] + levels * level_seconds)
    return (
        f"On this device Sequoia's tree promises most with `nodes: {draws}, depth: {levels}`: "
        f"{tokens:.2f} tokens a call, {speedup:.2f}x plain decoding (a level takes "
        f"{1000 * level_seconds:.1f} ms, a call {1000 * seconds[0]:.1f} ms, of this tree "
        f"{1000 * seconds[draws]:.1f} ms)."
    )


def measure(
    found: Iterator[tuple[int, Spot]], trials: Mapping[str, Trial], asked: Comparison
) -> tuple[dict[str, list[float]], list[tuple[float, float]]]:
    """Expected accepted drafts of every trial, a value per prompt, and what `Spot.first_draw` says
    of each context.
    """
    values: dict[str, dict[int, list[float]]] = {name: {} for name in trials}
    firsts: list[tuple[float, float]] = []
    for index, spot in found:
        firsts.append(spot.first_draw(asked.draft_temperature))
        for name, trial in trials.items():
            draws = asked.draws * (LEVEL_DRAWS if trial.builder.depth == 1 else 1)
            accepted = [sum(chances) - 1 for chances in spot.chances(trial, draws)]
            values[name].setdefault(index, []).append(float(np.mean(accepted)))
        print(f"{len(firsts)} contexts", end="\r", file=sys.stderr)
    return {
        name: [float(np.mean(each)) for each in per.values()] for name, per in values.items()
    }, firsts


def verdict(low: float, high: float) -> str:
    """What an interval of a difference says of an order."""
    return "holds" if low > 0 else "reversed" if high < 0 else "tie"


def tables(values: Mapping[str, Sequence[float]]) -> list[str]:
    """Two Markdown tables: every trial, and every pair that a paper orders."""
    lines = ["| trial | expected accepted drafts | 95 % interval |", "|---|---:|---:|"]
    for name, per_prompt in values.items():
        low, high = mean_interval(per_prompt, SAMPLES)
        lines.append(f"| {name} | {np.mean(per_prompt):.3f} | {low:.3f} to {high:.3f} |")
    lines += [
        "",
        "| claimed to accept more | than | difference | 95 % interval, paired | |",
        "|---|---|---:|---:|---|",
    ]
    for better, worse in ((one, other) for one, other in ORDERS if {one, other} <= set(values)):
        difference = [one - other for one, other in zip(values[better], values[worse], strict=True)]
        low, high = mean_interval(difference, SAMPLES)
        lines.append(
            f"| {better} | {worse} | {np.mean(difference):+.4f} | {low:+.4f} to {high:+.4f} | "
            f"{verdict(low, high)} |"
        )
    return lines


def compare(asked: Comparison) -> str:
    """Measure everything that is asked and describe it in Markdown.

    Raises:
        ValueError: no such drafter or target, more layers than the target has, prompts without a
            question.
    """
    questions = first_questions(asked.prompts, asked.limit)
    calibration = first_questions(str(TRAINING_PROMPTS), max(2, asked.limit // 2))
    target, drafter, name = models(asked)
    prompts, others = (
        [prompt_ids(each, target.tokenizer) for each in part] for part in (questions, calibration)
    )
    acceptance, level_seconds = calibrate(
        spots(target, drafter, others, asked), asked.draws, asked.draft_temperature
    )
    every = {**level_trials(), **tree_trials(acceptance, asked.draft_temperature)}
    trials = {
        name: trial for name, trial in every.items() if asked.only is None or name in asked.only
    }
    values, firsts = measure(spots(target, drafter, prompts, asked), trials, asked)
    accepted, believed = np.mean(firsts, axis=0)
    drawn = (
        "" if asked.draft_temperature is None else f", trees drawn at {asked.draft_temperature:g}"
    )
    head = [
        f"## Temperature {asked.temperature:g}{drawn}",
        "",
        f"{asked.target}, drafted by {name}: {len(firsts)} contexts of {len(prompts)} prompts, "
        f"{asked.draws} trees of {NODES} nodes each ({asked.draws * LEVEL_DRAWS} of one level), "
        f"seed {asked.seed}. A first draw is accepted with {accepted:.3f} on average, and DySpec "
        f"takes it to be {believed:.3f}. Acceptance by sibling on {len(others)} other prompts, "
        f"from which Sequoia's tree is made: {', '.join(f'{share:.3f}' for share in acceptance)}.",
        "",
    ]
    shape = (
        [fastest_shape(acceptance, stored_latency(target), level_seconds), ""]
        if asked.fastest
        else []
    )
    return "\n".join([*head, *shape, *tables(values), ""])


def first_questions(prompts: str, limit: int) -> list[list[Message]]:
    """The first question of each prompt of a file; those that cannot be read are counted and
    logged.
    """
    tally = Tally("prompt")
    found = [chat.questions[0] for chat in chats_of(prompt_rows(prompts, limit, tally), tally)]
    tally.log()
    return found


def models(asked: Comparison) -> tuple[Target, Drafter, str]:
    """Target, drafter and what to call it."""
    if asked.drafter is not None:
        target = load_target(
            asked.target, "float32", asked.device, chat_arguments(None, [asked.drafter])
        )
        drafter = load_drafter(asked.drafter, target)
        served, name = drafter.adapt(target), read_config(find_folder(asked.drafter))["class"]
        return served, in_target_ids(drafter, served), name
    target = load_target(asked.target, "float32", asked.device)
    drafter = S2D(target.shape, [asked.layers], adaptive=False)
    drafter.initialise(target)
    drafter = drafter.to(target.device, target.dtype).eval()
    return target, drafter, f"its own first {asked.layers} of {target.shape.num_layers} layers"


def command(arguments: Sequence[str]) -> int:
    """Parse, compare, print; append to the output file."""
    parser = ArgumentParser(
        prog="python -m eval.rules",
        exit_on_error=False,
        description="Compare acceptance rules and tree builders on recorded contexts.",
    )
    parser.add_class_arguments(Comparison, fail_untyped=True)
    asked = Comparison(**vars(parse(parser, arguments)))
    quieten()
    text = compare(asked)
    print(text)
    if asked.output is not None:
        with Path(asked.output).open("a", encoding="utf-8") as file:
            file.write(text + "\n")
    return 0


if __name__ == "__main__":
    exit_with(command)
