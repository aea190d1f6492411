"""Aligned drafting: the preference loss of DPO on a drafter, at the first token where it leaves the target.

Of a drafted chain only the tokens before the first rejection count. There the target's token is preferred over the
drafter's: y_w and y_l are single tokens behind the same prefix, and the reference is the drafter as training found it.

Shape legend: M training rows, P rows that diverge at one depth, H hidden size, D draft vocabulary.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, Protocol, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from modules.core.batches import TextBatch
from modules.core.counts import divisor
from modules.core.losses import MAX_LOGITS, Head, cross_entropy
from modules.core.trainable import Losses, Mean, Trainable

if TYPE_CHECKING:
    from modules.core.target import Target


class DraftedStep(Protocol):
    """One draft step over the training rows, given the data's own tokens."""

    depth: int
    feature_MH: Tensor
    labels_M: Tensor
    valid_M: Tensor
    ranks_M: Tensor

    @property
    def counted_M(self) -> Tensor:
        """bool [M]: rows with a label to learn."""
        ...


class StepwiseDrafter(Protocol):
    """What heads and feature drafters have in common."""

    draft_size: int

    def steps(self, batch: TextBatch, target: Target) -> Iterator[DraftedStep]:
        """Every draft step over the batch's training rows."""
        ...

    def head(self, depth: int, target: Target) -> Head:
        """Features [..., H] of step `depth` -> logits [..., D]."""
        ...


class AlignedDrafting(nn.Module):
    """L = mean over rows of −log σ(β (m_θ − m_ref)) + anchor · the drafter's own loss.

    m = log q(y) − log q(x̂) at the first depth where the drafter's best token x̂ is not the text's token y. On text that
    the target wrote itself, y is what the target would say. Rows whose drafts are all accepted add nothing.

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
        """Keep a frozen copy of the drafter as the reference. ValueError: a component without draft steps."""
        if not hasattr(drafter, "steps") or not hasattr(drafter, "head"):
            raise ValueError(f"objective: {type(drafter).__name__} does not draft step by step: AlignedDrafting needs "
                             "heads or a feature drafter")
        self.reference = copy.deepcopy(drafter).requires_grad_(False).eval()

    def loss(self, drafter: Trainable, batch: TextBatch, target: Target, progress: float) -> Losses:
        """The preference loss, anchored; how often the drafter leaves the text, and by which margin."""
        own = drafter.loss(batch, target, progress) if self.anchor else Losses(torch.zeros((), device=target.device))
        losses_M, margins_M = self.preferences(cast(Any, drafter), batch, target)
        count = torch.as_tensor(len(losses_M), device=losses_M.device)
        metrics = {"alignment": Mean(losses_M.detach().sum(), count), "margin": Mean(margins_M.sum(), count)}
        total = losses_M.sum() / divisor(count) + self.anchor * own.total
        return Losses(total, {**own.metrics, **metrics})

    def preferences(self, drafter: StepwiseDrafter, batch: TextBatch, target: Target) -> tuple[Tensor, Tensor]:
        """Losses and margins m_θ (detached) of all rows that diverge, depth by depth."""
        with torch.no_grad():
            references = list(cast(Any, self.reference).steps(batch, target))
        together: Tensor | None = None
        losses, margins = [], []
        for step, reference in zip(drafter.steps(batch, target), references, strict=True):
            alive_M = step.counted_M if together is None else together & step.counted_M
            rows_P = (alive_M & (step.ranks_M > 0)).nonzero()[:, 0]
            labels_P, head = step.labels_M[rows_P], drafter.head(step.depth, target)
            drafted_P = best_tokens(step.feature_MH[rows_P], head, drafter.draft_size)
            margin_P = _margin(step.feature_MH[rows_P], head, labels_P, drafted_P, drafter.draft_size)
            with torch.no_grad():
                base_P = _margin(reference.feature_MH[rows_P], cast(Any, self.reference).head(step.depth, target),
                                 labels_P, drafted_P, drafter.draft_size)
            losses.append(-F.logsigmoid(self.beta * (margin_P - base_P)))
            margins.append(margin_P.detach())
            together = alive_M & (step.ranks_M == 0)
        return torch.cat(losses), torch.cat(margins)


@torch.no_grad()
def best_tokens(features_PH: Tensor, head: Head, width: int) -> Tensor:
    """The likeliest draft token of each row, int64 [P]; never more than `MAX_LOGITS` logits at a time."""
    rows = max(1, MAX_LOGITS // width)
    parts = [head(part_PH).argmax(-1) for part_PH in features_PH.split(rows)]
    return torch.cat(parts)


def _margin(features_PH: Tensor, head: Head, better_P: Tensor, worse_P: Tensor, width: int) -> Tensor:
    """log q(better) − log q(worse) of each row [P]."""
    return (cross_entropy(features_PH, head, worse_P, width)[0] - cross_entropy(features_PH, head, better_P, width)[0])
