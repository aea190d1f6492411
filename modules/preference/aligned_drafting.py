"""Aligned drafting: DPO's preference loss on a drafter, at the first token where it disagrees with
the target.

Of a drafted chain only the tokens before the first rejection are useful. At that position the
target's most likely token is preferred over the drafter's: y_w and y_l are single tokens after the
same prefix, and the reference is a copy of the drafter before this training.

Shape legend: M training rows, A rows that still agree at one depth, P those of them that diverge, Q
flat positions of a batch, H hidden size, D draft vocabulary.
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
from modules.losses.averages import SharedCount
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
    """One draft step over the training rows, with the data's tokens as context."""

    depth: int
    feature_MH: Tensor
    labels_M: Tensor
    valid_M: Tensor
    flat_M: Tensor


class StepwiseDrafter(Protocol):
    """Interface of drafters that are trained step by step: heads and feature drafters."""

    training: bool

    @property
    def draft_size(self) -> int:
        """D: how many tokens can be drafted."""
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
    target's most likely token after the text so far. A row also ends where the text's own token
    differs from y (sampled text), because drafts would no longer follow the text. Rows whose drafts
    are all accepted contribute nothing, nor do rows whose y cannot be drafted. Both models see the
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
        """Store a frozen copy of the drafter as the reference.

        Raises ValueError for a component without draft steps.
        """
        if not hasattr(drafter, "steps") or not hasattr(drafter, "head"):
            raise ValueError(
                f"objective: {type(drafter).__name__} does not draft step by step: AlignedDrafting "
                "needs heads or a feature drafter"
            )
        self.reference = copy.deepcopy(drafter).requires_grad_(False).eval()

    def loss(self, drafter: Trainable, batch: TextBatch, target: Target, progress: float) -> Losses:
        """The preference loss plus the anchor; metrics are its mean and the margin at the positions
        that diverge.
        """
        # How many rows diverge depends on the drafts, and is shared with the anchor's own counts.
        losses_M, margins_M = self.preferences(cast(Any, drafter), batch, target)
        count = SharedCount(torch.as_tensor(len(losses_M), device=losses_M.device))
        anchor = (
            drafter.loss(batch, target, progress)
            if self.anchor
            else Losses(torch.zeros((), device=target.device))
        )
        metrics = {
            "alignment": Mean(losses_M.detach().sum(), count.local),
            "margin": Mean(margins_M.sum(), count.local),
        }
        total = losses_M.sum() / count.divisor() + self.anchor * anchor.total
        return Losses(total, {**anchor.metrics, **metrics})

    def preferences(
        self, drafter: StepwiseDrafter, batch: TextBatch, target: Target
    ) -> tuple[Tensor, Tensor]:
        """Losses and margins m_θ (detached) of all rows that diverge, depth by depth."""
        # 1. Steps of the reference, and the target's greedy token at every position.
        references = self._references(drafter, batch, target)
        greedy_Q = draft_labels(greedy_table(batch, target), drafter.vocabulary_D)
        alive_M: Tensor | None = None
        losses, margins = [], []
        # 2. Depth by depth: a row stays as long as drafter, target and text agree.
        for step, reference in zip(drafter.steps(batch, target), references, strict=True):
            better_M, head = greedy_Q[step.flat_M], drafter.head(step.depth, target)
            alive_M = (step.valid_M if alive_M is None else alive_M & step.valid_M) & (
                better_M != IGNORED
            )
            rows_A = alive_M.nonzero()[:, 0]
            with torch.no_grad():
                drafted_A = greedy_tokens(head, step.feature_MH[rows_A], drafter.draft_size)
            # Rows whose drafted token is not the target's: the pair of the preference loss.
            diverged_A = drafted_A != better_M[rows_A]
            rows_P, drafted_P = rows_A[diverged_A], drafted_A[diverged_A]
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
        """The reference's steps, with the same random numbers as the drafter's next steps."""
        self.reference.train(drafter.training)
        device = batch.input_ids.device
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            return list(cast(Any, self.reference).steps(batch, target))


@torch.no_grad()
def greedy_table(batch: TextBatch, target: Target) -> Tensor:
    """The target's most likely next token at every flat position [Q] before an assistant token, 0
    elsewhere.
    """
    flat_M = next_token_rows(batch)[0]
    greedy_M = greedy_tokens(
        target.logits, final_states(batch, target).flatten(0, 1)[flat_M], target.shape.vocab_size
    )
    return greedy_M.new_zeros(batch.input_ids.numel()).index_put((flat_M,), greedy_M)


def _margin(
    features_PH: Tensor, head: Head, better_P: Tensor, worse_P: Tensor, width: int
) -> Tensor:
    """log q(better) − log q(worse) of each row [P]."""
    return (
        cross_entropy(features_PH, head, worse_P, width)[0]
        - cross_entropy(features_PH, head, better_P, width)[0]
    )
