"""Prompts and answers of a packed batch, as encoder-decoder models read them.

Shape legend: B rows of a batch, T tokens of a packed row, P answers, S source tokens, N answer
tokens.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from modules.contracts.batches import TextBatch


@dataclass(frozen=True)
class Pairs:
    """Every answer of a batch, and all tokens of its document before it as the source.

    sources_PS, answers_PN: int64, right-padded with 0. source_lengths_P, answer_lengths_P: tokens
    of each, at least 1. places_P: int64, the flat position in the batch of an answer's first token.
    """

    sources_PS: Tensor
    source_lengths_P: Tensor
    answers_PN: Tensor
    answer_lengths_P: Tensor
    places_P: Tensor

    @property
    def real_PN(self) -> Tensor:
        """bool [P,N]: tokens of answers that are not padding."""
        order = torch.arange(self.answers_PN.shape[1], device=self.answers_PN.device)
        return order < self.answer_lengths_P[:, None]

    @staticmethod
    def of(batch: TextBatch) -> Pairs | None:
        """The answers of a batch: runs of the loss mask. Those without a source are left out; None
        if there are no others. Reads the device.
        """
        # 1. First and last tokens of the runs, within documents.
        mask_BT, documents_BT = batch.loss_mask, batch.document_ids
        joined = mask_BT[:, 1:] & mask_BT[:, :-1] & (documents_BT[:, 1:] == documents_BT[:, :-1])
        edge_B1 = torch.zeros_like(mask_BT[:, :1])
        firsts = (mask_BT & ~torch.cat([edge_B1, joined], 1)).flatten().nonzero()[:, 0]
        lasts = (mask_BT & ~torch.cat([joined, edge_B1], 1)).flatten().nonzero()[:, 0]
        # 2. A token's position is the number of tokens before it in its document.
        before = batch.position_ids.flatten()[firsts]
        firsts, lasts, before = (each[before > 0] for each in (firsts, lasts, before))
        if not len(firsts):
            return None
        # 3. Cut the sources and answers out.
        ids = batch.input_ids.flatten()
        spans = list(zip(firsts.tolist(), lasts.tolist(), before.tolist(), strict=True))
        return Pairs(
            pad_sequence([ids[first - count : first] for first, _, count in spans], True),
            before,
            pad_sequence([ids[first : last + 1] for first, last, _ in spans], True),
            lasts - firsts + 1,
            firsts,
        )
