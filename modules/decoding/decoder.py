"""The interface of every decoder, and the speculative decoder.

Shape legend: B sequences, T prompt tokens.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Iterator, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Protocol, runtime_checkable

import torch

from modules.acceptance.processors import check_constraints, check_ids
from modules.acceptance.rules import AcceptanceRule, check_pairing, default_rule
from modules.contracts.drafter import Drafter, Part, TreeBuilder, check_depth
from modules.contracts.sampling import Sampling
from modules.contracts.target import Target
from modules.contracts.token_tree import SiblingDraw
from modules.decoding.loop import ENDS, Observer, Run, Trace, check_context, check_limit
from modules.decoding.timing import Clock
from modules.decoding.translation import in_target_ids
from modules.target.kernels.cpu_kernels import use_narrow_kernels

logger = logging.getLogger(__name__)

__all__ = ["Decoder", "SpeculativeDecoder", "Trace"]


@functools.cache
def _warn_beyond(name: str, trained: int) -> None:
    """Warn, once, that a drafter reads positions it has never seen."""
    logger.warning(
        "%s was trained on rows of %d tokens (data.max_length) and drafts after longer contexts: "
        "fewer drafts may be accepted",
        name,
        trained,
    )


class Decoder(Protocol):
    """The interface that the harness measures."""

    name: str

    def decode(self, prompts: list[list[int]], sampling: Sampling, limit: int) -> list[Trace]:
        """Continue every prompt by at most `limit` tokens, as one batch."""
        ...


@runtime_checkable
class Composite(Protocol):
    """A decoder that names its components besides its target."""

    def parts(self) -> Mapping[str, Part]:
        """Drafters, and folders of trained components, by name."""
        ...


@dataclass
class SpeculativeDecoder:
    """Propose, verify, accept, commit, until every sequence has ended.

    Args:
        target: the model whose distribution the text has.
        drafter: None is plain autoregressive decoding, through the same loop with a one-node tree.
        rule: None chooses the lossless rule that fits the drafter's trees and the temperature.
        builder: replaces the drafter's own builder.
        budget: drafted nodes per step at most; None is the drafter's own, 0 drafts nothing.
        name: what reports call it.
        stop_ids: tokens that end an answer; None: the target's end-of-sequence tokens; an empty set
            ends none, so that every answer is as long as its limit.

    Raises:
        ValueError: a rule that may not verify this drafter's trees; a drafter of another tokenizer
            that cannot be translated; a prompt that leaves no room for an answer.
    """

    target: Target
    drafter: Drafter | None = None
    rule: AcceptanceRule | None = None
    builder: TreeBuilder | None = None
    budget: int | None = None
    name: str = ""
    stop_ids: frozenset[int] | None = None
    run_type: ClassVar[type[Run]] = Run
    _translated: Drafter | None = field(init=False, repr=False, compare=False, default=None)
    """The drafter in the target's ids."""

    def __post_init__(self) -> None:
        """Check the pairing of rule and trees, and translate a drafter of another tokenizer."""
        # 1. Rule, builder and drafter must fit.
        if self.rule is not None and self.drafter is not None:
            check_pairing(self.rule, self.sibling_draw)
        if self.builder is not None and self.drafter is not None:
            check_depth(self.builder, self.drafter)
        # 2. Defaults.
        if not self.name:
            self.name = (
                "autoregressive" if self.drafter is None else type(self.drafter).__name__.lower()
            )
        if self.drafter is not None:
            self._translated = in_target_ids(self.drafter, self.target)
        # 3. Kernels for few rows, as the target has them.
        if self.drafter is not None and self.target.device.type == "cpu":
            use_narrow_kernels(self.drafter)
        self.stop_ids = self.target.eos_ids if self.stop_ids is None else self.stop_ids

    @property
    def sibling_draw(self) -> SiblingDraw:
        """How the siblings of the trees are drawn."""
        if self.builder is not None:
            return self.builder.sibling_draw
        return SiblingDraw.BY_VALUE if self.drafter is None else self.drafter.sibling_draw

    @property
    def nodes(self) -> int:
        """Drafted nodes per step at most."""
        if self.drafter is None:
            return 0
        return self.drafter.default_budget if self.budget is None else self.budget

    def parts(self) -> Mapping[str, Part]:
        """The drafter, if there is one."""
        return {} if self.drafter is None else {"drafter": self.drafter}

    def rule_for(self, sampling: Sampling) -> AcceptanceRule:
        """The acceptance rule used at this temperature."""
        return self.rule or default_rule(self.sibling_draw, sampling)

    def fresh(self) -> SpeculativeDecoder:
        """The same decoder; a drafter that learns is copied, so that neither sees what the other
        decodes.
        """
        learns = self.drafter is not None and self.drafter.learns
        return replace(self, drafter=deepcopy(self.drafter)) if learns else self

    def quality_of(self, traces: Sequence[Trace]) -> dict[str, float]:
        """Figures of constrained answers for a report, empty without a constraint: the shares of
        answers that ended so (`ENDS`); the share of tokens that were drafted because a constraint
        forced them, masks, and the milliseconds of masking, per token."""
        tokens, masks = sum(len(trace.ids) for trace in traces), sum(t.masks for t in traces)
        ends = [trace.end for trace in traces if trace.end]
        figures = {f"{end}_share": ends.count(end) / len(ends) for end in ENDS if ends}
        if not masks or not tokens:
            return figures
        seconds = sum(trace.mask_seconds for trace in traces)
        return figures | {
            "forced_share": sum(trace.forced for trace in traces) / tokens,
            "masks_per_token": masks / tokens,
            "mask_ms_per_token": seconds / tokens * 1e3,
        }

    def decode(
        self,
        prompts: list[list[int]],
        sampling: Sampling,
        limit: int,
        observer: Observer | None = None,
        images: Sequence[Mapping[str, Any] | None] = (),
    ) -> list[Trace]:
        """Continue every prompt by at most `limit` tokens, as one batch.

        `images` are what a vision-language target's processor gives beside the ids of each prompt
        (`pixel_values`, …), or None.
        """
        run = self.begin(prompts, sampling, limit, observer, images)
        for _ in run:
            pass
        return run.traces

    def stream(
        self, prompt: list[int], sampling: Sampling, limit: int
    ) -> Iterator[tuple[int, bool]]:
        """The tokens of one answer as they come, each with whether it was drafted."""
        run, shown = self.begin([prompt], sampling, limit), 0
        for _ in run:
            trace = run.traces[0]
            yield from zip(trace.ids[shown:], trace.drafted[shown:], strict=True)
            shown = len(trace.ids)

    def begin(
        self,
        prompts: Sequence[list[int]],
        sampling: Sampling,
        limit: int,
        observer: Observer | None = None,
        images: Sequence[Mapping[str, Any] | None] = (),
    ) -> Run:
        """One batch before its first step; iterate over it to decode."""
        # 1. Refuse what cannot be decoded.
        longest = max(map(len, prompts))
        check_limit(limit)
        assert self.stop_ids is not None
        if min(map(len, prompts)) == 0:
            raise ValueError("a prompt has no tokens: give at least one")
        size = self.target.shape.vocab_size
        if (largest := max(map(max, prompts))) >= size:
            raise ValueError(
                f"a prompt has token {largest}, beyond the vocabulary of {size} of "
                f"{self.target.name!r}: its tokenizer was given tokens that the model was not"
            )
        check_ids(sampling, size)
        check_constraints(sampling, len(prompts))
        check_context(self.target, longest, limit)
        # 2. Warn about contexts that the drafter was not trained on.
        trained = None if self.drafter is None else self.drafter.trained_length
        if trained is not None and longest + limit > trained:
            _warn_beyond(self.name, trained)
        # 3. One generator per sequence: no sequence takes another's draws. How many a call takes
        # follows the widest tree of the batch, so trees of varying size give other samples there.
        generators = [
            torch.Generator(self.target.device).manual_seed(sampling.seed + i)
            for i in range(len(prompts))
        ]
        return self.run_type(
            target=self.target,
            # A budget of 0 is plain decoding: nothing is drafted, and there is no state.
            drafter=self._translated if self.nodes else None,
            rule=self.rule_for(sampling),
            builder=self.builder,
            budget=self.nodes,
            stop_ids=self.stop_ids,
            prompts=list(prompts),
            sampling=sampling,
            limit=limit,
            generators=generators,
            clock=Clock(self.target.device),
            observer=observer,
            images=images,
        )
