"""Text that a drafter generates itself, for on-policy distillation.

Shape legend: B documents, T tokens.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence

from modules.contracts.batches import PADDING_DOCUMENT, TextBatch

if TYPE_CHECKING:
    from modules.contracts.target import Target


def document_prompts(batch: TextBatch) -> list[Tensor]:
    """The tokens before the first answer of every document, where there are any."""
    prompts = []
    # Rows hold several documents; an answer begins at the first token with a loss.
    for ids_T, mask_T, documents_T in zip(
        batch.input_ids, batch.loss_mask, batch.document_ids, strict=True
    ):
        for document in documents_T.unique().tolist():
            answers = ((documents_T == document) & mask_T).nonzero()[:, 0]
            if document != PADDING_DOCUMENT and len(answers):
                prompts.append(ids_T[: answers[0]][documents_T[: answers[0]] == document])
    return [prompt for prompt in prompts if len(prompt)]


@torch.no_grad()
def written(
    model: Target, prompts: list[Tensor], tokens: int, vocabulary_D: Tensor | None = None
) -> TextBatch:
    """Prompts continued by `tokens` tokens each, drawn from the model's distribution at temperature
    1 by torch's own generator.

    One document a row, right-padded; the drawn tokens are the labels.

    Args:
        model: the model that generates, in a new session.
        prompts: int64 [T] each, at least one of them.
        tokens: tokens drawn after each prompt.
        vocabulary_D: ids that may be drawn; None for all.
    """
    lengths_B = torch.tensor([len(prompt) for prompt in prompts], device=model.device)
    prompts_BT = pad_sequence(prompts, batch_first=True)
    # One prefill of the prompts, then one call per token.
    session = model.open(len(prompts), int(lengths_B.max()) + tokens)
    logits_BV, _ = session.prefill(prompts_BT, lengths_B)
    drawn = [_draw(logits_BV, vocabulary_D)]
    for _ in range(tokens - 1):
        logits_BV, _ = session.prefill(drawn[-1], torch.ones_like(lengths_B))
        drawn.append(_draw(logits_BV, vocabulary_D))
    return _batch(prompts_BT, lengths_B, torch.cat(drawn, dim=1))


def _draw(logits_BV: Tensor, vocabulary_D: Tensor | None) -> Tensor:
    """One drawn token per sequence [B,1]."""
    logits = logits_BV if vocabulary_D is None else logits_BV[:, vocabulary_D]
    drawn_B1 = torch.multinomial(logits.softmax(-1), 1)
    return drawn_B1 if vocabulary_D is None else vocabulary_D[drawn_B1]


def _batch(prompts_BT: Tensor, lengths_B: Tensor, drawn_BN: Tensor) -> TextBatch:
    count = drawn_BN.shape[1]
    order = torch.arange(prompts_BT.shape[1] + count, device=prompts_BT.device).expand(
        len(prompts_BT), -1
    )
    answers = lengths_B[:, None] + torch.arange(count, device=prompts_BT.device)
    ids = F.pad(prompts_BT, (0, count)).scatter(1, answers, drawn_BN)
    real = order < lengths_B[:, None] + count
    return TextBatch(
        ids, real & (order >= lengths_B[:, None]), order, torch.where(real, 0, PADDING_DOCUMENT)
    )
