"""Contexts of real text, and the expected accepted drafts of trials in them.

Shape legend: B draws, N nodes, V vocabulary, D draft vocabulary.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from eval.rule_comparison.trials import NODES, Trial
from modules.acceptance.rejection import node_chances, recursive_rounds
from modules.acceptance.rules import Draws, RatioRule
from modules.contracts.drafter import Context, Drafter, DraftState, Frontier
from modules.contracts.losses import Losses
from modules.contracts.sampling import Sampling
from modules.contracts.target import Session, Target
from modules.contracts.token_tree import TokenTree
from modules.contracts.verification import Verified
from modules.decoding.decoder import SpeculativeDecoder
from modules.runtime.phase_timer import now
from modules.trees.sampled.branching import branching_tree
from modules.trees.sampled.draws import draft_probs

LEVEL_DRAWS = 8
"""Factor on the draws of one-level trees, which need no model once distributions are recorded."""
CALIBRATION_SIBLINGS = 8
"""Siblings of the tree that measures acceptance by sibling."""


@dataclass(frozen=True)
class Grid:
    """Settings of the contexts and draws of a comparison.

    contexts: of each prompt, evenly spaced over an answer of `max_new_tokens` that the target
    samples. draws: trees per trial and context. temperature: of target and draft.
    draft_temperature: for drawing whole trees, if another one. seed: of all random draws.
    """

    contexts: int
    max_new_tokens: int
    draws: int
    temperature: float
    draft_temperature: float | None
    seed: int


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
    target: Target, drafter: Drafter, prompts: Sequence[list[int]], grid: Grid
) -> Iterator[tuple[int, Spot]]:
    """Yield the index of the prompt and one context at a time."""
    for index, prompt in enumerate(prompts):
        # The target's own answer, cut at evenly spaced places.
        sampling = Sampling(grid.temperature, seed=grid.seed + index)
        answer = SpeculativeDecoder(target).decode([prompt], sampling, grid.max_new_tokens)[0].ids
        for place in np.unique(np.linspace(1, len(answer), grid.contexts).astype(int)).tolist():
            seed = (grid.seed * 1000 + index) * 1_000_000 + place * 1000
            yield (
                index,
                opened(target, drafter, [*prompt, *answer[:place]], sampling, grid.draws, seed),
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


def measure(
    contexts: Iterator[tuple[int, Spot]], trials: Mapping[str, Trial], grid: Grid
) -> tuple[dict[str, list[float]], list[tuple[float, float]]]:
    """Expected accepted drafts of every trial, one value per prompt, and `Spot.first_draw` of each
    context.
    """
    values: dict[str, dict[int, list[float]]] = {name: {} for name in trials}
    firsts: list[tuple[float, float]] = []
    for index, spot in contexts:
        firsts.append(spot.first_draw(grid.draft_temperature))
        # Every trial on the same context; its root node is no draft.
        for name, trial in trials.items():
            draws = grid.draws * (LEVEL_DRAWS if trial.builder.depth == 1 else 1)
            accepted = [sum(chances) - 1 for chances in spot.chances(trial, draws)]
            values[name].setdefault(index, []).append(float(np.mean(accepted)))
        print(f"{len(firsts)} contexts", end="\r", file=sys.stderr)
    # Contexts of a prompt depend on each other: one mean per prompt.
    return {
        name: [float(np.mean(each)) for each in per.values()] for name, per in values.items()
    }, firsts
