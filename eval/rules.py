"""`python -m eval.rules`: acceptance rules and tree builders on the same contexts of the real
models.

At every context each trial draws the same number of trees. The expected number of accepted drafts
of a tree is computed exactly (`node_chances`), so the draws of the trees are the only randomness.
Nothing is timed.

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
"""Factor on the draws of one-level trees, which need no model once distributions are recorded."""
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
        only: names of the trials to run; by default all.
        seed: of all random draws.
        device: a torch device; by default the GPU if there is one.
        output: Markdown file to append the result to.
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
        """Refuse settings that cannot run."""
        for name in ("layers", "limit", "contexts", "max_new_tokens", "draws"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.temperature < 0:
            raise ValueError(f"temperature must be 0 (greedy) or above, got {self.temperature}")
        check_temperature(self.draft_temperature)
        trials = {**level_trials(), **tree_trials([0.5])}
        if unknown := sorted(set(self.only or ()) - set(trials)):
            raise ValueError(f"only {unknown[0]!r} is no trial: use some of {', '.join(trials)}")
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
        """Refuse a rule that does not fit the builder's draws."""
        check_pairing(self.rule, self.builder.sibling_draw)


def level_trials() -> dict[str, Trial]:
    """One level of K siblings: every rule against the optimum of one draft, which is `ratio 1`."""
    # Each rule on trees drawn the way it requires.
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
    # Chains, independent branches, draws without replacement, optimised shapes, trees by value.
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
    """Drafts from the recorded logits [V] of one context, at every node."""

    def __init__(self, logits_D: Tensor, vocabulary_D: Tensor | None) -> None:
        super().__init__()
        self.logits_D, self._vocabulary_D = logits_D, vocabulary_D

    @property
    def vocabulary_D(self) -> Tensor | None:
        """The recorded drafter's vocabulary."""
        return self._vocabulary_D

    def loss(self, batch: Any, target: Target, progress: float) -> Losses:
        """Recorded logits cannot be trained: always raises ValueError."""
        raise ValueError("a recorded drafter does not train")

    def start(self, context: Context) -> DraftState:
        """A state that holds only the context."""
        return DraftState(context, context.newest_B, context.lengths_B)

    def expand(self, state: DraftState, frontier: Frontier) -> Tensor:
        """The same logits for every node."""
        return self.logits_D.expand(*frontier.tokens_BW.shape, -1)


@dataclass(frozen=True)
class Spot:
    """One context: the models, their states, and their logits at this position.

    state: of the drafter, one sequence. target_logits_V, draft_logits_D: of the next token.
    level_seconds: time of drafting one level. seed: of its draws.
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
        """Acceptance probability of a first draw, Σ min(p, q), and DySpec's estimate Σ q² of it."""
        target_V = Draws(self.sampling, []).probs(self.target_logits_V)
        draft_V, vocabulary_D = torch.zeros_like(target_V), self.drafter.vocabulary_D
        draft_V[slice(None) if vocabulary_D is None else vocabulary_D] = draft_probs(
            self.draft_logits_D, self.state.context, heat
        )
        return float(torch.minimum(target_V, draft_V).sum()), float((draft_V**2).sum())

    @torch.no_grad()
    def chances(self, trial: Trial, draws: int) -> list[list[float]]:
        """Acceptance probability of each node of every drawn tree [B][N]; every trial has the same
        generators.
        """
        # 1. The same seeds in every trial.
        device = self.session.target.device
        generators = [torch.Generator(device).manual_seed(self.seed + i) for i in range(draws)]
        state = self.state.select(torch.zeros(draws, dtype=torch.long, device=device))
        state.context = replace(state.context, generators=tuple(generators))
        # 2. One level needs only the recorded logits; deeper trees run both models.
        if trial.builder.depth == 1:
            tree = trial.builder.build(
                Recorded(self.draft_logits_D, self.drafter.vocabulary_D), state, trial.nodes
            )
            verified = Verified(tree, self.target_logits_V.expand(*tree.tokens_BN.shape, -1))
        else:
            tree = trial.builder.build(self.drafter, state, trial.nodes)
            verified = self.session.verify(tree)
        # 3. Sum the rule's rounds instead of drawing from them.
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
    """The context after `text`; afterwards its session holds `draws` copies of it."""
    # 1. Prefill all but the newest token.
    ids_BT, newest_B, lengths_B = (
        torch.tensor(each, device=target.device)
        for each in ([text[:-1]], [text[-1]], [len(text) - 1])
    )
    session = target.open(1, len(text) + NODES + 1)
    _, states = session.prefill(ids_BT, lengths_B, drafter.decoding_states)
    generators = (torch.Generator(target.device),)
    context = Context(target, ids_BT, lengths_B, newest_B, states, sampling, generators, session)
    # 2. Logits of the next token from both models, the drafter timed.
    state, root_B1 = drafter.start(context), newest_B[:, None]
    target_logits_V = session.verify(TokenTree.root(newest_B)).logits_BNV[0, 0]
    before = now(target.device)
    draft_logits_D = drafter.expand(state, Frontier(root_B1, torch.full_like(root_B1, -1), 0))[0, 0]
    level_seconds = now(target.device) - before
    # 3. One copy of the cache per tree.
    session.keep([0] * draws)
    return Spot(
        session, drafter, state, sampling, target_logits_V, draft_logits_D, level_seconds, seed
    )


def spots(
    target: Target, drafter: Drafter, prompts: Sequence[list[int]], comparison: Comparison
) -> Iterator[tuple[int, Spot]]:
    """Yield the index of the prompt and one context at a time."""
    for index, prompt in enumerate(prompts):
        # The target's own answer, cut at evenly spaced places.
        sampling = Sampling(comparison.temperature, seed=comparison.seed + index)
        answer = (
            SpeculativeDecoder(target).decode([prompt], sampling, comparison.max_new_tokens)[0].ids
        )
        for place in np.unique(
            np.linspace(1, len(answer), comparison.contexts).astype(int)
        ).tolist():
            seed = (comparison.seed * 1000 + index) * 1_000_000 + place * 1000
            yield (
                index,
                opened(
                    target, drafter, [*prompt, *answer[:place]], sampling, comparison.draws, seed
                ),
            )


def calibrate(
    contexts: Iterator[tuple[int, Spot]], draws: int, heat: float | None = None
) -> tuple[list[float], float]:
    """Acceptance rate of the k-th sibling without replacement (Sequoia's P[k]) over all contexts,
    and the median seconds of drafting a level."""
    trial = Trial(
        branching_tree([CALIBRATION_SIBLINGS], temperature=heat), RatioRule(), CALIBRATION_SIBLINGS
    )
    results = [
        (np.mean(spot.chances(trial, draws), axis=0)[1:], spot.level_seconds)
        for _, spot in contexts
    ]
    return np.mean([chances for chances, _ in results], axis=0).tolist(), float(
        np.median([taken for _, taken in results])
    )


def fastest_shape(acceptance: list[float], latency: LatencyTable, level_seconds: float) -> str:
    """A sentence with the size and depth of Sequoia's tree of the highest predicted speedup on this
    device (Chen et al. 2024, section 3.3).

    Args:
        acceptance: acceptance rate by sibling.
        latency: of the target's calls.
        level_seconds: time of drafting one level.
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
    contexts: Iterator[tuple[int, Spot]], trials: Mapping[str, Trial], comparison: Comparison
) -> tuple[dict[str, list[float]], list[tuple[float, float]]]:
    """Expected accepted drafts of every trial, one value per prompt, and `Spot.first_draw` of each
    context.
    """
    values: dict[str, dict[int, list[float]]] = {name: {} for name in trials}
    firsts: list[tuple[float, float]] = []
    for index, spot in contexts:
        firsts.append(spot.first_draw(comparison.draft_temperature))
        # Every trial on the same context; its root node is no draft.
        for name, trial in trials.items():
            draws = comparison.draws * (LEVEL_DRAWS if trial.builder.depth == 1 else 1)
            accepted = [sum(chances) - 1 for chances in spot.chances(trial, draws)]
            values[name].setdefault(index, []).append(float(np.mean(accepted)))
        print(f"{len(firsts)} contexts", end="\r", file=sys.stderr)
    # Contexts of a prompt depend on each other: one mean per prompt.
    return {
        name: [float(np.mean(each)) for each in per.values()] for name, per in values.items()
    }, firsts


def verdict(low: float, high: float) -> str:
    """Whether an interval of a difference confirms a claimed order."""
    return "holds" if low > 0 else "reversed" if high < 0 else "tie"


def tables(values: Mapping[str, Sequence[float]]) -> list[str]:
    """Two Markdown tables: every trial, and every pair that a paper orders."""
    # 1. Expected accepted drafts by trial.
    lines = ["| trial | expected accepted drafts | 95 % interval |", "|---|---:|---:|"]
    for name, per_prompt in values.items():
        low, high = mean_interval(per_prompt, SAMPLES)
        lines.append(f"| {name} | {np.mean(per_prompt):.3f} | {low:.3f} to {high:.3f} |")
    # 2. Paired differences in the order that papers claim.
    lines += [
        "",
        "| claimed to accept more | than | difference | 95 % interval, paired | |",
        "|---|---|---:|---:|---|",
    ]
    for better, worse in (
        (first, second) for first, second in ORDERS if {first, second} <= set(values)
    ):
        difference = [
            left - right for left, right in zip(values[better], values[worse], strict=True)
        ]
        low, high = mean_interval(difference, SAMPLES)
        lines.append(
            f"| {better} | {worse} | {np.mean(difference):+.4f} | {low:+.4f} to {high:+.4f} | "
            f"{verdict(low, high)} |"
        )
    return lines


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
        spots(target, drafter, others, comparison), comparison.draws, comparison.draft_temperature
    )
    # 3. All trials on the same contexts.
    every = {**level_trials(), **tree_trials(acceptance, comparison.draft_temperature)}
    trials = {
        name: trial
        for name, trial in every.items()
        if comparison.only is None or name in comparison.only
    }
    values, firsts = measure(spots(target, drafter, prompts, comparison), trials, comparison)
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
    if comparison.drafter is not None:
        target = load_target(
            comparison.target,
            "float32",
            comparison.device,
            chat_arguments(None, [comparison.drafter]),
        )
        drafter = load_drafter(comparison.drafter, target)
        served, name = drafter.adapt(target), read_config(find_folder(comparison.drafter))["class"]
        return served, in_target_ids(drafter, served), name
    # No drafter given: the target's own first layers.
    target = load_target(comparison.target, "float32", comparison.device)
    drafter = S2D(target.shape, [comparison.layers], adaptive=False)
    drafter.initialise(target)
    drafter = drafter.to(target.device, target.dtype).eval()
    return target, drafter, f"its own first {comparison.layers} of {target.shape.num_layers} layers"


def command(arguments: Sequence[str]) -> int:
    """Parse, compare and print; also append to the output file."""
    parser = ArgumentParser(
        prog="python -m eval.rules",
        exit_on_error=False,
        description="Compare acceptance rules and tree builders on recorded contexts.",
    )
    parser.add_class_arguments(Comparison, fail_untyped=True)
    comparison = Comparison(**vars(parse(parser, arguments)))
    quieten()
    text = compare(comparison)
    print(text)
    if comparison.output is not None:
        with Path(comparison.output).open("a", encoding="utf-8") as file:
            file.write(text + "\n")
    return 0


if __name__ == "__main__":
    exit_with(command)
