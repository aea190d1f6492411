"""Sequential Monte Carlo: particles of one prompt as a batch, weighted by what a constraint allows,
with a drafter inside (Lipkin et al. 2025, arXiv 2504.05410; Loula et al. 2025).

Masking token by token draws from a distribution that leads into dead ends as often as elsewhere.
Weighted particles approach the target's own distribution given that the whole answer is allowed.

Shape legend: B sequences still running, N nodes, V vocabulary.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from modules.acceptance.processors import check_constraints
from modules.acceptance.rejection import children_of, families
from modules.acceptance.rules import Draws, accepted_paths
from modules.constraints.awrs import DEAD, Generated, WeightedToken, best_token, weighted_token
from modules.contracts.drafter import proposal
from modules.contracts.sampling import Sampling
from modules.contracts.token_tree import TokenTree
from modules.contracts.verification import Accepted, Verified
from modules.decoding.decoder import SpeculativeDecoder
from modules.decoding.loop import Observer, Run, Trace

logger = logging.getLogger(__name__)


@dataclass
class ParticleRun(Run):
    """A run whose tokens are drawn by adaptive weighted rejection sampling instead of masks.

    A draw does not look at the tree; where a drafted child equals it, the next token is drawn from
    the child's logits without a further call. Particles have advanced differently when they are
    resampled; each is properly weighted by itself, so the estimates stay unbiased.

    particles: of each prompt, one after another in the batch. threshold: share of them below which
    the effective sample size leads to resampling.
    """

    particles: int = 1
    threshold: float = 0.5

    def __post_init__(self) -> None:
        """Set up draws without masks."""
        super().__post_init__()
        self._processors = [each for each in self._processors if each is not self._mask]
        self.log_weights = [0.0] * len(self.prompts)
        # Not the seed of any particle, whose draws it would repeat.
        seed = self.sampling.seed + len(self.prompts)
        self._resampler = torch.Generator().manual_seed(seed)

    def _draw(self, sequence: int, logits_V: Tensor, path: tuple[int, ...]) -> int | None:
        """A token after the answer and a path, its weight multiplied into the particle's; None
        where nothing is allowed."""
        if self._states.follow(sequence, ()) is None:
            draws = Draws(self.sampling, [self.generators[sequence]])
            return int(draws.choose(logits_V[None, None])[0, 0])
        state = self._states.after(sequence, path)
        drawn: WeightedToken = DEAD
        if state is not None and self.sampling.temperature == 0:
            drawn = best_token(logits_V, state.allows)
        elif state is not None:
            randomness = Generated(self.generators[sequence])
            drawn = weighted_token(self.draws.probs(logits_V), state.allows, randomness)
        self.log_weights[sequence] += drawn.log_weight
        return drawn.token

    def _ended(self, sequence: int) -> int:
        """The token that ends a particle without a future."""
        self._stopped.add(sequence)
        return min(self.stop_ids - {-1}, default=0)

    def _end_of(self, sequence: int) -> str:
        """As other runs; a particle without a future is dead, whatever its end token."""
        dead = self.log_weights[sequence] == -math.inf
        return "dead" if dead else super()._end_of(sequence)

    def _ends(self, sequence: int, path: tuple[int, ...]) -> bool:
        """Whether the answer ends with this path. What is drawn later would be cut off, and must
        not weigh."""
        answer = [*self.traces[sequence].ids, *path]
        if len(answer) >= self.limit or path[-1] in self.stop_ids:
            return True
        stops = self._stop_strings
        return stops is not None and stops.end(answer, len(answer) - 1) is not None

    def _first(self, logits_B1V: Tensor) -> Tensor:
        tokens = [self._draw(b, logits_V, ()) for b, logits_V in enumerate(logits_B1V[:, 0])]
        chosen = [self._ended(b) if token is None else token for b, token in enumerate(tokens)]
        return torch.tensor(chosen, device=logits_B1V.device)

    def _propose(self) -> tuple[TokenTree, list[int]]:
        """The drafter's tree as it is: a mask would ask the constraint about all tokens."""
        unforced = [0] * len(self._alive)
        if self.drafter is None or self._state is None:
            return TokenTree.root(self._newest_B), unforced
        return proposal(self.drafter, self._state, self.budget, self.builder), unforced

    def _accept(self, verified: Verified, forced: bool) -> Accepted:
        """Draw at node 0, then at the child that was drawn, as far as there is one."""
        tree, walks = verified.tree, []
        tokens_BN = tree.tokens_BN.tolist()
        for b, sequence in enumerate(self._alive):
            self._states.follow(sequence, self.traces[sequence].ids)
            family, nodes, path = families(tree, b), [0], ()
            while True:
                token = self._draw(sequence, verified.logits_BNV[b, nodes[0]], path)
                if token is None:
                    token, children = self._ended(sequence), []
                else:
                    children = children_of(family, nodes)
                path = (*path, token)
                twins = [node for node in children if tokens_BN[b][node] == token]
                if not twins or self._ends(sequence, path):
                    break
                nodes = twins
            path_N = tree.topology.ancestors[b, nodes[0]]
            walks.append((path_N.nonzero()[:, 0].tolist(), token))
        return accepted_paths(walks, tree.tokens_BN.device)

    def _drop_finished(self) -> None:
        """Remove ended particles from the batch, then resample."""
        super()._drop_finished()
        ancestors, resampled = list(range(len(self.prompts))), False
        for start in range(0, len(self.prompts), self.particles):
            group = list(range(start, start + self.particles))
            weights = torch.tensor([self.log_weights[i] for i in group], dtype=torch.float64)
            running = any(i in self._alive for i in group)
            if not running or not effective(weights) < self.threshold * self.particles:
                continue
            resampled = True
            mean = float(weights.logsumexp(0)) - math.log(self.particles)
            for i, chosen in zip(group, systematic(weights, self._resampler), strict=True):
                ancestors[i], self.log_weights[i] = group[chosen], mean
        if resampled:
            self._copy(ancestors)

    def _copy(self, ancestors: list[int]) -> None:
        """Replace particle i by a copy of particle `ancestors[i]`; its randomness stays its own."""
        row_of = {sequence: row for row, sequence in enumerate(self._alive)}
        self.traces[:] = [deepcopy(self.traces[ancestor]) for ancestor in ancestors]
        self._stopped = {i for i, ancestor in enumerate(ancestors) if ancestor in self._stopped}
        self._states.copy(ancestors)
        self._alive = [i for i, ancestor in enumerate(ancestors) if ancestor in row_of]
        rows = [row_of[ancestors[i]] for i in self._alive]
        if self._alive:
            rows_B = torch.tensor(rows, device=self._newest_B.device)
            self._session.keep(rows)
            self._newest_B = self._newest_B[rows_B]
            self.draws = Draws(self.sampling, [self.generators[i] for i in self._alive])
            self._state = None if self._state is None else self._state.select(rows_B)


def effective(log_weights_P: Tensor) -> float:
    """Effective sample size (Σ w)² / Σ w²; infinite where every weight is 0."""
    if log_weights_P.max() == -math.inf:
        return math.inf
    return float((2 * log_weights_P.logsumexp(0) - (2 * log_weights_P).logsumexp(0)).exp())


def systematic(log_weights_P: Tensor, generator: torch.Generator) -> list[int]:
    """Ancestors of P particles, i on average P w_i / Σ w times (Kitagawa 1996)."""
    count = len(log_weights_P)
    cumulative = log_weights_P.softmax(0).cumsum(0)
    start = torch.rand((), generator=generator, dtype=torch.float64)
    places = (torch.arange(count) + start) / count * cumulative[-1]
    return torch.searchsorted(cumulative, places, right=True).clamp(max=count - 1).tolist()


@dataclass
class ParticleDecoder(SpeculativeDecoder):
    """Answers under a constraint that is too dear to ask about the whole vocabulary.

    With one particle an answer is drawn as under a mask, with few calls of the constraint; at
    temperature 0 it is the same answer. With more, it is drawn from weighted particles, whose
    distribution approaches the target's given that the whole answer is allowed.

    Args:
        target, drafter, builder, budget, name, stop_ids: as in `SpeculativeDecoder`. The rule is
            its own: a draw that equals a drafted child goes on below it.
        particles: of each prompt.
        threshold: effective sample size, as a share of the particles, below which they are
            resampled.

    Raises:
        ValueError: a rule; a number of particles below 1, a threshold outside of [0, 1].
    """

    claims_lossless: ClassVar[bool] = False
    run_type: ClassVar[type[Run]] = ParticleRun
    name: str = "particles"
    particles: int = 8
    threshold: float = 0.5

    def __post_init__(self) -> None:
        """Check the settings of the method and of its parts."""
        if self.rule is not None:
            raise ValueError("particles are verified by draws of their own: leave `rule` out")
        if self.particles < 1 or not 0 <= self.threshold <= 1:
            raise ValueError(
                "particles must be at least 1 and threshold lie in [0, 1], got "
                f"{self.particles} and {self.threshold}"
            )
        super().__post_init__()

    def weighted(
        self,
        prompts: Sequence[list[int]],
        sampling: Sampling,
        limit: int,
        images: Sequence[Mapping[str, Any] | None] = (),
    ) -> list[list[Trace]]:
        """All particles of each prompt, with `log_weight`, -inf of dead ones. The mean of
        exp(log_weight) · f over a prompt's particles has the expectation Σ p · ok · f over answers
        up to the limit; its value for f = 1 estimates the probability that an answer is allowed as
        far as it goes. Only those whose `end` is "whole" are known to be whole."""
        run = self.begin(prompts, sampling, limit, images=images)
        for _ in run:
            pass
        assert isinstance(run, ParticleRun)
        for trace, log_weight in zip(run.traces, run.log_weights, strict=True):
            trace.log_weight = log_weight
        count = self.particles
        return [run.traces[i : i + count] for i in range(0, len(run.traces), count)]

    def decode(
        self,
        prompts: list[list[int]],
        sampling: Sampling,
        limit: int,
        observer: Observer | None = None,
        images: Sequence[Mapping[str, Any] | None] = (),
    ) -> list[Trace]:
        """One answer for every prompt, drawn from its particles by their weights.

        Warns of prompts all of whose particles are dead: their answers are not allowed, and have
        `log_weight` -inf and `end` "dead".
        """
        assert observer is None, "particles are not observed"
        # A seed that neither a particle nor resampling has.
        seed = sampling.seed + len(prompts) * self.particles + 1
        generator = torch.Generator().manual_seed(seed)
        answers = []
        for traces in self.weighted(prompts, sampling, limit, images):
            weights = torch.tensor([trace.log_weight for trace in traces], dtype=torch.float64)
            lost = bool(weights.max() == -math.inf)
            chosen = 0 if lost else int(weights.softmax(0).multinomial(1, generator=generator))
            answers.append(traces[chosen])
        dead = sum(trace.log_weight == -math.inf for trace in answers)
        if dead:
            logger.warning(
                "%s: no particle of %d of %d prompts found an answer that the constraint allows; "
                "theirs are cut where nothing was allowed: raise particles (%d)",
                self.name,
                dead,
                len(answers),
                self.particles,
            )
        return answers

    def stream(
        self, prompt: list[int], sampling: Sampling, limit: int
    ) -> Iterator[tuple[int, bool]]:
        """The tokens of one answer, each with whether it was drafted; which answer it is is known
        when all particles have ended."""
        (trace,) = self.decode([prompt], sampling, limit)
        yield from zip(trace.ids, trace.drafted, strict=True)

    def begin(
        self,
        prompts: Sequence[list[int]],
        sampling: Sampling,
        limit: int,
        observer: Observer | None = None,
        images: Sequence[Mapping[str, Any] | None] = (),
    ) -> Run:
        """The particles of all prompts as one batch, before its first step."""
        check_constraints(sampling, len(prompts))
        count = range(self.particles)
        if isinstance(sampling.constraint, Sequence):
            each = [constraint for constraint in sampling.constraint for _ in count]
            sampling = replace(sampling, constraint=each)
        images = [each for each in images for _ in count]
        batch = [each for each in prompts for _ in count]
        run = super().begin(batch, sampling, limit, observer, images)
        assert isinstance(run, ParticleRun)
        run.particles, run.threshold = self.particles, self.threshold
        return run
