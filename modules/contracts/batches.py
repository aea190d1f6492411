"""What training and the target consume: batches of text and the rows that layers run over.

Shape legend: B sequences, T tokens of a packed row, N rows of one call, H hidden size.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from modules.contracts.rows import Rows
from modules.contracts.shapes import StateName

PADDING_DOCUMENT = -1


@dataclass
class TextBatch:
    """Packed token rows. A padding token has document id -1, sees only itself and is never in the
    loss mask.

    input_ids: int64 [B,T].
    loss_mask: bool [B,T], true on assistant tokens (as *labels*: a token is trained on when it is
    to be predicted).
    position_ids: int64 [B,T], restarting at 0 with each document.
    document_ids: int64 [B,T], distinct per document within a row.
    states: `{name: [B,T,H]}` of the frozen target, read from the feature cache or filled in online.
    """

    input_ids: Tensor
    loss_mask: Tensor
    position_ids: Tensor
    document_ids: Tensor
    states: dict[StateName, Tensor] = field(default_factory=dict)

    def texts(self) -> tuple[TextBatch, ...]:
        """The text batches in it: this one alone."""
        return (self,)

    def rows(self) -> Rows:
        """Causal attention inside each document."""
        length = self.input_ids.shape[1]
        # 1. A token sees earlier tokens of its own document.
        causal = torch.ones(length, length, dtype=torch.bool, device=self.input_ids.device).tril()
        same = self.document_ids[:, :, None] == self.document_ids[:, None, :]
        real = (self.document_ids != PADDING_DOCUMENT)[:, :, None]
        # 2. Padding sees itself, so that no softmax is empty.
        itself = torch.eye(length, dtype=torch.bool, device=self.input_ids.device)
        return Rows(self.position_ids, (same & causal & real) | itself)


@dataclass
class PreferenceBatch:
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
class LabelledBatch:
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
