"""Aligned drafting: the preference loss of DPO on a drafter, at the first token where it leaves the
target.

Of a drafted chain only the tokens before the first rejection count. There the target's likeliest
token is preferred over the drafter's: y_w and y_l are single tokens behind the same prefix, and the
reference is the drafter as training found it.

Shape legend: M training rows, A rows still alive at one depth, P those of them that diverge, Q flat
positions of a batch, H hidden size, D draft vocabulary.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, Protocol, cast

import torch
from torch import Tensor
from torch.nn import functional as F

from modules.contracts.batches import TextBatch
from modules.contracts.losses import Losses, Mean
from modules.contracts.trainable import Objective, Trainable
from modules.drafters.trained import final_states
from modules.losses.averages import divisor
from modules.losses.chunked import (
    IGNORED,
    Head,
    cross_entropy,
    draft_labels,
    greedy_tokens,
    next_token_rows,
)

if TYPE_CHECKING:
    from modules.contracts.target import Target


class DraftedStep(Protocol):
    """One draft step over the training rows, given the data's own tokens."""

    depth: int
    feature_MH: Tensor
    labels_M: Tensor
    valid_M: Tensor
    flat_M: Tensor


class StepwiseDrafter(Protocol):
    """What heads and feature drafters have in common."""

    training: bool

    @property
    def draft_size(self) -> int:
        """D."""
        ...

    @property
    def vocabulary_D(self) -> Tensor | None:
        """Target ids that can be drafted [D]; None: all of them."""
        ...

    def steps(self, batch: TextBatch, target: Target) -> Iterator[DraftedStep]:
        """Every draft step over the batch's training rows."""
        ...

    def head(self, depth: int, target: Target) -> Head:
        """Features [..., H] of step `depth` -> logits [..., D]."""
        ...


class AlignedDrafting(Objective):
    """L = mean over rows of −log σ(β (m_θ − m_ref)) + anchor · the drafter's own loss.

    m = log q(y) − log q(x̂) at the first depth where the drafter's best token x̂ is not y, the
    target's own most likely token behind the text so far. Sampled text says something else than y
    here and there: a row goes no deeper than that, because a draft would leave the text. Rows whose
    drafts are all accepted add nothing, nor those whose y cannot be drafted. Both models see the
    same noise and dropout.

    Args:
        beta: strength of the preference.
        anchor: weight of the drafter's own loss.
    """

    reference: Trainable

    def __init__(self, beta: float = 0.5, anchor: float = 1.0) -> None:
        super().__init__()
        if beta <= 0:
            raise ValueError(f"objective.beta must be above 0, got {beta}")
        if anchor < 0:
            raise ValueError(f"objective.anchor must be 0 or above, got {anchor}")
        self.beta, self.anchor = beta, anchor

    def begin(self, drafter: Trainable) -> None:
        """Keep a frozen copy of the drafter as the reference. ValueError: a component without draft
        steps.
        """
        if not hasattr(drafter, "steps") or not hasattr(drafter, "head"):
            raise ValueError(
                f"objective: {type(drafter).__name__} does not draft step by step: AlignedDrafting "
                "needs heads or a feature drafter"
            )
        self.reference = copy.deepcopy(drafter).requires_grad_(False).eval()

    def loss(self, drafter: Trainable, batch: TextBatch, target: Target, progress: float) -> Losses:
        """The preference loss, anchored; how often the drafter leaves the target, and by which
        margin.
        """
        own = (
            drafter.loss(batch, target, progress)
            if self.anchor
            else Losses(torch.zeros((), device=target.device))
        )
        losses_M, margins_M = self.preferences(cast(Any, drafter), batch, target)
        count = torch.as_tensor(len(losses_M), device=losses_M.device)
        metrics = {
            "alignment": Mean(losses_M.detach().sum(), count),
            "margin": Mean(margins_M.sum(), count),
        }
        total = losses_M.sum() / divisor(count) + self.anchor * own.total
        return Losses(total, {**own.metrics, **metrics})

    def preferences(
        self, drafter: StepwiseDrafter, batch: TextBatch, target: Target
    ) -> tuple[Tensor, Tensor]:
        """Losses and margins m_θ (detached) of all rows that diverge, depth by depth."""
        references = self._references(drafter, batch, target)
        greedy_Q = draft_labels(greedy_table(batch, target), drafter.vocabulary_D)
        alive_M: Tensor | None = None
        losses, margins = [], []
        for step, reference in zip(drafter.steps(batch, target), references, strict=True):
            better_M, head = greedy_Q[step.flat_M], drafter.head(step.depth, target)
            alive_M = (step.valid_M if alive_M is None else alive_M & step.valid_M) & (
                better_M != IGNORED
            )
            rows_A = alive_M.nonzero()[:, 0]
            with torch.no_grad():
                drafted_A = greedy_tokens(head, step.feature_MH[rows_A], drafter.draft_size)
            apart_A = drafted_A != better_M[rows_A]
            rows_P, drafted_P = rows_A[apart_A], drafted_A[apart_A]
            margin_P = _margin(
                step.feature_MH[rows_P], head, better_M[rows_P], drafted_P, drafter.draft_size
            )
            with torch.no_grad():
                base_P = _margin(
                    reference.feature_MH[rows_P],
                    cast(Any, self.reference).head(step.depth, target),
                    better_M[rows_P],
                    drafted_P,
                    drafter.draft_size,
                )
            losses.append(-F.logsigmoid(self.beta * (margin_P - base_P)))
            margins.append(margin_P.detach())
            alive_M = (alive_M & (step.labels_M == better_M)).index_fill(0, rows_P, False)
        return torch.cat(losses), torch.cat(margins)

    @torch.no_grad()
    def _references(
        self, drafter: StepwiseDrafter, batch: TextBatch, target: Target
    ) -> list[DraftedStep]:
        """The reference's steps, on the random numbers that the drafter's steps draw next."""
        self.reference.train(drafter.training)
        device = batch.input_ids.device
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            return list(cast(Any, self.reference).steps(batch, target))


@torch.no_grad()
def greedy_table(batch: TextBatch, target: Target) -> Tensor:
    """The target's most likely next token at every flat position [Q] that an assistant token
    follows, 0 elsewhere.
    """
    flat_M = next_token_rows(batch)[0]
    found_M = greedy_tokens(
        target.logits, final_states(batch, target).flatten(0, 1)[flat_M], target.shape.vocab_size
    )
    return found_M.new_zeros(batch.input_ids.numel()).index_put((flat_M,), found_M)


def _margin(
    features_PH: Tensor, head: Head, better_P: Tensor, worse_P: Tensor, width: int
) -> Tensor:
    """log q(better) − log q(worse) of each row [P]."""
    return (
        cross_entropy(features_PH, head, worse_P, width)[0]
        - cross_entropy(features_PH, head, better_P, width)[0]
    )
