"""What training and the target consume: batches of text and the rows that layers run over.

Shape legend: B sequences, T tokens of a packed row, N rows of one call, H hidden size, M rows of a
loss, P positions whose distribution is stored, K tokens of each, V target vocabulary, D draft
vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields, is_dataclass, replace
from typing import Any

import torch
from torch import Tensor

from modules.contracts.rows import DocumentRows
from modules.contracts.shapes import StateName

PADDING_DOCUMENT = -1


@dataclass(frozen=True)
class TeacherProbs:
    """The target's distributions at some positions of a batch, computed earlier: K probabilities
    each, and the remainder spread evenly over all other tokens.

    flat_P: int64 [P], ascending: positions b * T + t. There the distribution is that of token
    t + 1.
    tokens_PK: int64 [P,K]. probs_PK: float [P,K], of a sum of at most 1.
    size: V.
    """

    flat_P: Tensor
    tokens_PK: Tensor
    probs_PK: Tensor
    size: int

    def over(self, flat_M: Tensor, vocabulary_D: Tensor | None = None) -> Tensor:
        """The probabilities [M,V] at flat positions, or [M,D] of some tokens, not renormalised. A
        position that is not stored gets those of another one: it must not count.
        """
        index = torch.searchsorted(self.flat_P, flat_M).clamp(max=len(self.flat_P) - 1)
        probs = self.probs_PK[index]
        rest_M1 = (1 - probs.sum(-1, keepdim=True)).clamp(min=0)
        each_M1 = rest_M1 / max(1, self.size - probs.shape[1])
        whole = each_M1.expand(-1, self.size).scatter(1, self.tokens_PK[index], probs)
        return whole if vocabulary_D is None else whole[:, vocabulary_D]


def pinned(value: Any) -> Any:
    """A value with its tensors in page-locked memory, from where a GPU copies beside its work."""
    if isinstance(value, Tensor):
        return value.pin_memory()
    if isinstance(value, dict):
        return {name: pinned(inner) for name, inner in value.items()}
    if is_dataclass(value) and not isinstance(value, type):
        return replace(
            value, **{each.name: pinned(getattr(value, each.name)) for each in fields(value)}
        )
    return value


class PinnedByLoaders:
    """A batch whose tensors `torch.utils.data.DataLoader` can put into page-locked memory."""

    def pin_memory(self) -> Any:
        """The batch, pinned (`DataLoader` calls this where `pin_memory` is set)."""
        return pinned(self)


@dataclass
class TextBatch(PinnedByLoaders):
    """Packed token rows. A padding token has document id -1, sees only itself and is never in the
    loss mask.

    input_ids: int64 [B,T].
    loss_mask: bool [B,T], true on assistant tokens (as *labels*: a token is trained on when it is
    to be predicted).
    position_ids: int64 [B,T], restarting at 0 with each document.
    document_ids: int64 [B,T], distinct per document within a row.
    states: `{name: [B,T,H]}` of the frozen target, read from the feature cache or filled in online.
    teacher: the target's distributions of all labels, where they are there already: losses that
        learn distributions then read no `final` states for them.
    """

    input_ids: Tensor
    loss_mask: Tensor
    position_ids: Tensor
    document_ids: Tensor
    states: dict[StateName, Tensor] = field(default_factory=dict)
    teacher: TeacherProbs | None = None

    def texts(self) -> tuple[TextBatch, ...]:
        """The text batches in it: this one alone."""
        return (self,)

    def rows(self) -> DocumentRows:
        """Causal attention inside each document."""
        return DocumentRows(self.position_ids, self.document_ids, PADDING_DOCUMENT)


@dataclass
class PreferenceBatch(PinnedByLoaders):
    """Pairs for preference training: `chosen` and `rejected` answers to the same prompts, row by
    row.
    """

    chosen: TextBatch
    rejected: TextBatch
    chosen_reference: Tensor | None = None
    """Cached log-probabilities of the reference model [B,T], if computed."""
    rejected_reference: Tensor | None = None
    errors: Tensor | None = None
    """bool [B,T]: tokens of the rejected answers that are known to be wrong, where any are."""
    inferred: Tensor | None = None
    """bool [B]: rows whose error is only known to lie among the tokens marked in `errors`."""

    def texts(self) -> tuple[TextBatch, ...]:
        """The chosen and the rejected batch."""
        return self.chosen, self.rejected


@dataclass
class LabelledBatch(PinnedByLoaders):
    """Text whose tokens carry a right (1) / wrong (0) label [B,T]; `text.loss_mask` says where
    labels count.
    """

    text: TextBatch
    labels: Tensor
    questions: Tensor | None = None
    """int64 [B,T]: a number of the question that each token's answer belongs to, at random but the
    same everywhere.
    """

    def texts(self) -> tuple[TextBatch, ...]:
        """The text without its labels."""
        return (self.text,)


AnyBatch = TextBatch | PreferenceBatch | LabelledBatch
"""What a `Trainable` may be trained on."""
