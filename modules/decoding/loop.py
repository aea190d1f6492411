"""The speculative loop over one batch: propose, verify, accept, commit.

Shape legend: B sequences still running, T prompt tokens, N nodes, A accepted rows, H hidden size,
V target vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from modules.acceptance.processors import StopStrings, node_paths, prefix_processors
from modules.acceptance.rules import AcceptanceRule, Draws, default_rule
from modules.constraints.forced import constrained_proposal
from modules.constraints.masking import ConstraintProcessor, States, allows
from modules.contracts.drafter import Context, Drafter, DraftState, TreeBuilder, proposal
from modules.contracts.sampling import Prefixes, Sampling
from modules.contracts.shapes import StateName
from modules.contracts.target import Session, Target
from modules.contracts.token_tree import SiblingDraw, TokenTree
from modules.contracts.verification import Accepted, Verified
from modules.decoding.timing import Clock

ENDS = ("whole", "cut", "dead")
"""Ends of answers under a constraint: with an end token that it allows; at the limit or a stop
string, so that nobody knows whether it could have become whole; where it allowed no token."""


@dataclass
class Trace:
    """The result of decoding one prompt.

    ids: new tokens, cut at the end-of-sequence token (kept) and at the limit. drafted: per id,
    whether it was an accepted draft. accepted: tokens of each target call in the answer, which with
    the prefill's add up to `ids`. offered: depth of each call's tree, no deeper than where the
    answer was cut off.
    nodes: drafted candidates of each call. seconds: per phase, for the whole batch.
    time_to_first_token: seconds.
    rows: what each call really computes for this sequence: the newest token, the candidates, rows
    that only compute, and padding to the widest tree of the batch.
    entropies: in bits, of the model's distribution of each id, where a decoder uses them (entropy
    adaptive decoding).
    layers: that ran before each id was chosen, where a decoder leaves some out.
    kv_bytes: of the target's keys and values that each step read for this sequence, drafting with
    the target included (`SlotCache.bytes_read`).
    answers: of a decoder that gives several, best first; `ids` is the first of them.
    figures: measured while decoding, by the names that the decoder's `quality_of` has for them.
    log_weight: of the answer among particles (`modules.decoding.particles`).
    forced: accepted drafts that a constraint forced. masks: of its constraint, one per node of
    every tree, and mask_seconds, what they cost.
    end: how an answer under a constraint ended, one of `ENDS`; empty without one.
    """

    prompt_tokens: int
    ids: list[int] = field(default_factory=list)
    drafted: list[bool] = field(default_factory=list)
    accepted: list[int] = field(default_factory=list)
    offered: list[int] = field(default_factory=list)
    nodes: list[int] = field(default_factory=list)
    seconds: dict[str, float] = field(default_factory=dict)
    time_to_first_token: float = 0.0
    rows: list[int] = field(default_factory=list)
    entropies: list[float] = field(default_factory=list)
    layers: list[int] = field(default_factory=list)
    kv_bytes: list[int] = field(default_factory=list)
    answers: list[list[int]] = field(default_factory=list)
    figures: dict[str, list[float]] = field(default_factory=dict)
    log_weight: float = 0.0
    forced: int = 0
    masks: int = 0
    mask_seconds: float = 0.0
    end: str = ""

    @property
    def decode_seconds(self) -> float:
        """Seconds of all phases but prefill."""
        return sum(seconds for phase, seconds in self.seconds.items() if phase != "prefill")


class Observer(Protocol):
    """Reads what the target computes during decoding, and changes nothing.

    states: target states that it reads besides those of drafter and rule.
    """

    states: tuple[StateName, ...]

    def begin(self, logits_BV: Tensor, states: dict[StateName, Tensor]) -> None:
        """The logits of the first token of each sequence, and the prompts' states [B,T,H]."""
        ...

    def step(self, sequences: list[int], verified: Verified, accepted: Accepted) -> None:
        """One call of the target; `sequences` are the numbers of those still running."""
        ...


class StepResult(NamedTuple):
    """The result of one call for one sequence, on the host: emitted tokens, depth of the tree and
    number of drafted candidates.
    """

    tokens: list[int]
    depth: int
    nodes: int


def read_to_host(tree: TokenTree, accepted: Accepted) -> tuple[Accepted, list[StepResult]]:
    """The acceptance without padding, and each sequence's result, in one read of the device."""
    # 1. One tensor, so that there is one copy to the host.
    width, counts_B2 = accepted.path_BA.shape[1], tree.counts_B2.expand(len(tree.tokens_BN), -1)
    figures = [accepted.lengths_B[:, None], counts_B2, accepted.path_BA, accepted.emitted(tree)]
    rows = torch.cat(figures, 1).tolist()
    # 2. Split each row again; its first figure is the number of accepted rows.
    accepted = replace(accepted, host_paths=[row[3 : 3 + row[0]] for row in rows])
    return accepted.trimmed(), [
        StepResult(row[3 + width : 3 + width + row[0]], row[1], row[2]) for row in rows
    ]


def check_limit(limit: int) -> None:
    """ValueError for an answer without room for a token."""
    if limit < 1:
        raise ValueError(f"limit must be at least 1 new token, got {limit}: raise max_new_tokens")


def check_context(target: Target, length: int, limit: int, whose: str = "the target") -> None:
    """ValueError for a prompt of `length` tokens that leaves no room for an answer; `whose` names
    the model."""
    if length + limit > target.max_positions:
        raise ValueError(
            f"a prompt of {length} tokens and {limit} new ones exceed {whose}'s context of "
            f"{target.max_positions}: shorten the prompt or lower max_new_tokens"
        )


def kept_calls(emitted: Sequence[int], tokens: int) -> list[int]:
    """Tokens of each call among the first `tokens`; calls without one are left out."""
    counts = []
    for count in emitted:
        share = min(count, tokens - sum(counts))
        counts += [share] if share > 0 else []
    return counts


@dataclass
class Run:
    """One batch being decoded; iterating over it runs the steps (the first iteration is the
    prefill).

    draws: what chooses tokens; may be replaced before the first step.
    """

    target: Target
    drafter: Drafter | None
    rule: AcceptanceRule
    builder: TreeBuilder | None
    budget: int
    stop_ids: frozenset[int]
    prompts: list[list[int]]
    sampling: Sampling
    limit: int
    generators: list[torch.Generator]
    clock: Clock
    observer: Observer | None = None
    images: Sequence[Mapping[str, Any] | None] = ()
    """What a vision-language target's processor gives beside each prompt's ids, or None."""
    traces: list[Trace] = field(init=False)
    draws: Draws = field(init=False)

    def __post_init__(self) -> None:
        """Set up the state; nothing is computed yet."""
        self.traces = [Trace(len(prompt)) for prompt in self.prompts]
        self._alive = list(range(len(self.prompts)))
        self.draws = Draws(self.sampling, self.generators)
        self._processors = prefix_processors(self.sampling, self.stop_ids, self.target.device)
        constraints = [self.sampling.constraint_of(i) for i in range(len(self.prompts))]
        self._states = States(constraints, self.stop_ids)
        self._mask = ConstraintProcessor(self._states, self.stop_ids)
        self._constrained = any(constraint is not None for constraint in constraints)
        self._processors += [self._mask] if self._constrained else []
        self._stop_strings = StopStrings.of(self.sampling.stop_strings, self.target.tokenizer)
        self._stopped: set[int] = set()
        """Sequences that ended with a stop string."""
        self._state: DraftState | None = None
        self._newest_B: Tensor
        self._session: Session

    @property
    def states(self) -> tuple[StateName, ...]:
        """Target states that drafter, rule and observer read."""
        drafted = self.drafter.decoding_states if self.drafter else ()
        observed = self.observer.states if self.observer else ()
        return tuple(dict.fromkeys((*drafted, *self.rule.states, *observed)))

    @torch.no_grad()
    def __iter__(self) -> Iterator[None]:
        """Prefill, then step until every sequence has ended."""
        self._prefill()
        yield
        while self._alive:
            self._step()
            yield

    def _prefill(self) -> None:
        # 1. Prompts, padded on the right.
        device = self.target.device
        lengths = [len(prompt) for prompt in self.prompts]
        padded = [prompt + [0] * (max(lengths) - len(prompt)) for prompt in self.prompts]
        ids_BT, lengths_B = (
            torch.tensor(padded, device=device),
            torch.tensor(lengths, device=device),
        )
        # 2. The target reads them and gives the first token.
        with self.clock.phase("prefill"):
            capacity = max(lengths) + self.limit + self.budget + 1
            self._session = self.target.open(len(lengths), capacity)
            logits_BV, states = self._read(ids_BT, lengths_B)
            self._newest_B = self._first(self._processed(logits_BV[:, None], None))
        if self.observer is not None:
            self.observer.begin(logits_BV, states)
        # 3. The drafter starts from its target states.
        first = self.clock.elapsed()
        if self.drafter is not None:
            with self.clock.phase("draft"):
                self._state = self.drafter.start(
                    Context(
                        self.target,
                        ids_BT,
                        lengths_B,
                        self._newest_B,
                        states,
                        self.sampling,
                        tuple(self.generators),
                        self._session,
                    )
                )
        # 4. Record the first token.
        for sequence, token in enumerate(self._newest_B.tolist()):
            trace = self.traces[sequence]
            trace.time_to_first_token = first
            trace.ids.append(token)
            trace.drafted.append(False)
            self._cut(sequence, 0)
        self._drop_finished()

    def _read(self, ids_BT: Tensor, lengths_B: Tensor) -> tuple[Tensor, dict[StateName, Tensor]]:
        """Logits [B,V] and states of the prompts."""
        if not any(self.images):
            return self._session.prefill(ids_BT, lengths_B, self.states)
        return self._session.prefill_with_images(ids_BT, lengths_B, self.states, self.images)

    def _step(self) -> None:
        before = self._session.cache.bytes_read
        with self.clock.phase("draft"):
            tree, forced = self._propose()
        with self.clock.phase("verify"):
            verified = self._session.verify(tree, self.states)
        with self.clock.phase("accept"):
            judged = replace(verified, logits_BNV=self._processed(verified.logits_BNV, tree))
            accepted, results = read_to_host(tree, self._accept(judged, any(forced)))
        if self.observer is not None:
            self.observer.step(self._alive, verified, accepted)
        with self.clock.phase("commit"):
            self._session.commit(accepted)
        self._absorb(verified, accepted)
        read = (self._session.cache.bytes_read - before) // len(self._alive)
        self._record(results, tree.computed, read, forced)
        self._drop_finished()

    def _processed(self, logits_BNV: Tensor, tree: TokenTree | None) -> Tensor:
        """The logits of the distributions that text is drawn from: after every node of a tree, or
        after the prompts. Drafters and observers see the model's own."""
        if not self._processors:
            return logits_BNV
        paths = [[[]]] * len(self._alive) if tree is None else node_paths(tree)
        prefixes = [
            # The newest token is node 0.
            Prefixes(sequence, self.prompts[sequence], self.traces[sequence].ids[:-1], nodes)
            for sequence, nodes in zip(self._alive, paths, strict=True)
        ]
        for processor in self._processors:
            logits_BNV = processor(logits_BNV, prefixes)
        return logits_BNV

    def _propose(self) -> tuple[TokenTree, list[int]]:
        """The next tree, and how many tokens of each sequence a constraint forces in it."""
        unforced = [0] * len(self._alive)
        if self.drafter is None or self._state is None:
            return TokenTree.root(self._newest_B), unforced
        if not self._constrained:
            return proposal(self.drafter, self._state, self.budget, self.builder), unforced
        for sequence in self._alive:
            self._states.follow(sequence, self.traces[sequence].ids)
        return constrained_proposal(
            self.drafter,
            self._state,
            self.budget,
            self.builder,
            self._states,
            self._alive,
            [self.limit - len(self.traces[sequence].ids) for sequence in self._alive],
        )

    def _first(self, logits_B1V: Tensor) -> Tensor:
        """The first token of each answer, int64 [B]."""
        return self.draws.choose(logits_B1V)[:, 0]

    def _accept(self, verified: Verified, forced: bool) -> Accepted:
        """What the rule accepts. Forced tokens are not drawn: where the rule refuses trees chosen
        by value, the one for these judges them."""
        rule = self.rule
        if forced and SiblingDraw.BY_VALUE not in rule.sibling_draws:
            rule = default_rule(SiblingDraw.BY_VALUE, self.sampling)
        return rule(verified.tree, verified, self.draws)

    def _absorb(self, verified: Verified, accepted: Accepted) -> None:
        self._newest_B = accepted.next_B
        if self.drafter is not None and self._state is not None:
            with self.clock.phase("draft"):
                self._state = self.drafter.absorb(self._state, verified, accepted)

    def _record(
        self, results: list[StepResult], rows: int, kv_bytes: int, forced: list[int]
    ) -> None:
        for sequence, call, most in zip(self._alive, results, forced, strict=True):
            trace = self.traces[sequence]
            # 1. What was drafted.
            trace.nodes.append(call.nodes)
            trace.rows.append(rows)
            trace.kv_bytes.append(kv_bytes)
            # 2. What was emitted, cut at the end of the answer.
            earlier = len(trace.ids)
            trace.ids += call.tokens
            trace.drafted += [True] * (len(call.tokens) - 1) + [False]
            self._cut(sequence, earlier)
            # After a cut nothing was accepted or rejected.
            emitted = len(trace.ids) - earlier
            trace.forced += min(emitted, len(call.tokens) - 1, most)
            trace.accepted.append(emitted)
            trace.offered.append(call.depth if emitted == len(call.tokens) else emitted - 1)

    def _cut(self, sequence: int, earlier: int) -> None:
        """End the answer at its first stop token or stop string or at the limit, always after
        verification. Tokens before `earlier` have been looked at."""
        trace = self.traces[sequence]
        fresh = enumerate(trace.ids[earlier:], earlier + 1)
        end = min(next((n for n, token in fresh if token in self.stop_ids), self.limit), self.limit)
        if self._stop_strings is not None:
            text_end = self._stop_strings.end(trace.ids[:end], earlier)
            if text_end is not None:
                end = text_end
                self._stopped.add(sequence)
        del trace.ids[end:], trace.drafted[end:]

    def _finished(self, sequence: int) -> bool:
        trace = self.traces[sequence]
        return (
            len(trace.ids) >= self.limit
            or trace.ids[-1] in self.stop_ids
            or sequence in self._stopped
        )

    def _end_of(self, sequence: int) -> str:
        """How an answer ended under its constraint, one of `ENDS`; empty without one."""
        *before, last = self.traces[sequence].ids
        if self._states.follow(sequence, before) is None:
            return ""
        if last not in self.stop_ids:
            return "cut"
        return "whole" if allows(self._states.after(sequence, ()), last) else "dead"

    def _drop_finished(self) -> None:
        """Remove ended sequences from the cache, the drafter's state and the generators."""
        # 1. Rows of the batch that go on.
        running = [row for row, sequence in enumerate(self._alive) if not self._finished(sequence)]
        if len(running) == len(self._alive):
            return
        # 2. Times of the ended ones.
        for sequence in self._alive:
            if self._finished(sequence):
                trace = self.traces[sequence]
                trace.seconds = self.clock.snapshot()
                trace.masks = self._mask.masks[sequence]
                trace.mask_seconds = self._mask.seconds[sequence]
                trace.end = self._end_of(sequence)
        # 3. Shrink cache, drafter state and generators.
        self._alive = [self._alive[row] for row in running]
        if self._alive:
            rows_B = torch.tensor(running, device=self._newest_B.device)
            self._session.keep(running)
            self._newest_B, self.draws = self._newest_B[rows_B], self.draws.select(running)
            self._state = None if self._state is None else self._state.select(rows_B)
