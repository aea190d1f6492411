"""Decoding with an encoder-decoder target.

Shape legend: B sequences, T prompt tokens, H hidden size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from modules.contracts.shapes import StateName
from modules.target.session import Session


class Seq2SeqSession(Session):
    """Sequences whose prompt the encoder reads, once. Committed tokens are the decoder's: its start
    token and the answer.
    """

    @torch.no_grad()
    def prefill(
        self, ids_BT: Tensor, lengths_B: Tensor, states: Sequence[StateName] = ()
    ) -> tuple[Tensor, dict[StateName, Tensor]]:
        """The first call reads right-padded prompts: logits [B,V] after the decoder's start token,
        and its states at each prompt's last token, zeros at the others [B,T,H]. Later calls append
        tokens of the answers.
        """
        if self.cache.encoded is not None:
            return super().prefill(ids_BT, lengths_B, states)
        # 1. The encoder, then the decoder's first row.
        architecture = self.target.architecture
        self.cache.encoded = architecture.encode(ids_BT, lengths_B)
        start_B1 = torch.full_like(ids_BT[:, :1], architecture.start_id)
        logits_BV, seen = super().prefill(start_B1, torch.ones_like(lengths_B), states)
        # 2. Its states, where a decoder-only target has those of the last prompt token.
        last_BT1 = (torch.arange(ids_BT.shape[1], device=ids_BT.device) == lengths_B[:, None] - 1)[
            ..., None
        ]
        return logits_BV, {name: state * last_BT1 for name, state in seen.items()}
