"""Vectors of three consecutive tokens, which stand in for a target's first layers, and a memo of
them (Chimera's trigram encoder, Zeng et al. 2024, arXiv 2402.15758).

Shape legend: B sequences, T tokens of a packed row, M trigrams, C entries of the memo, H hidden
size.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from modules.contracts.batches import TextBatch
from modules.layers.decoder_layer import ResBlock

MOST_ENTRIES = 2**20
"""Limit on a memo's entries, each of which holds a vector."""
_MIX = 1_000_003
"""Multiplier of the hash of three ids."""

Encode = Callable[[Tensor], Tensor]
"""Trigrams, int64 [M,3] -> vectors [M,H]."""


def trigram_encoder(hidden_size: int) -> nn.Sequential:
    """W_o (c + SiLU(W c + b)), [..., 3H] -> [..., H], of three embeddings c side by side; W starts
    at 0.
    """
    width = 3 * hidden_size
    return nn.Sequential(ResBlock(width), nn.Linear(width, hidden_size, bias=False))


def document_trigrams(batch: TextBatch) -> Tensor:
    """int64 [B,T,3]: tokens j-2, j-1 and j at every position; before a document its first token is
    repeated.
    """
    here = torch.arange(batch.input_ids.shape[1], device=batch.input_ids.device)
    before = torch.arange(2, -1, -1, device=here.device)
    # Positions restart at 0 with each document.
    index_BT3 = here[:, None] - torch.minimum(before, batch.position_ids[..., None])
    return batch.input_ids.gather(1, index_BT3.clamp(min=0).flatten(1)).view_as(index_BT3)


class TrigramMemo:
    """Vectors of trigrams that were computed before, in this step or an earlier request.

    A table of `entries` slots. The ids of a trigram give its slot, where a new one replaces the
    old. What is recalled is exact: the ids are compared. The table is emptied when the encoder's
    weights or the target change; copies begin empty. Reads the device.
    """

    def __init__(self, entries: int) -> None:
        self._entries = entries
        self._source: Any = None
        self._ids_C3 = self._vectors_CH = torch.empty(0)

    def __reduce__(self) -> tuple[type[TrigramMemo], tuple[int]]:
        """A copy is an empty memo of the same size."""
        return TrigramMemo, (self._entries,)

    def vectors(self, ids_M3: Tensor, encode: Encode, weights: nn.Module, target: Any) -> Tensor:
        """Vectors [M,H] of int64 trigrams [M,3]; only unknown ones are computed, by `encode`.

        Args:
            ids_M3: the trigrams.
            encode: computes vectors.
            weights: what `encode` computes with.
            target: whose embeddings it reads.
        """
        # 1. Which of them are in the table.
        self._check_source(weights, target, ids_M3.device)
        slots_M = ((ids_M3[:, 0] * _MIX + ids_M3[:, 1]) * _MIX + ids_M3[:, 2]) % self._entries
        unknown_M = (self._ids_C3[slots_M] != ids_M3).any(-1)
        if not unknown_M.any():
            return self._vectors_CH[slots_M]
        # 2. Compute the others.
        new_ids, new_slots = ids_M3[unknown_M], slots_M[unknown_M]
        made = encode(new_ids)
        if not len(self._vectors_CH):
            self._vectors_CH = made.new_empty(self._entries, made.shape[-1])
        vectors_MH = self._vectors_CH[slots_M]
        vectors_MH[unknown_M] = made
        # 3. Of several new ones in a slot, one is kept, by ids and vectors alike.
        winner_C = torch.zeros(self._entries, dtype=torch.long, device=slots_M.device)
        winner_C[new_slots] = torch.arange(len(new_slots), device=slots_M.device)
        winners = winner_C[new_slots]
        self._ids_C3[new_slots], self._vectors_CH[new_slots] = new_ids[winners], made[winners]
        return vectors_MH

    def _check_source(self, weights: nn.Module, target: Any, device: torch.device) -> None:
        """Empty the table unless it is of these weights, as they are now, and of this target."""
        state = tuple((p.data_ptr(), p.dtype, p._version) for p in weights.parameters())
        source = (weakref.ref(target), device, state)
        if self._source != source:
            self._source = source
            self._ids_C3 = torch.full((self._entries, 3), -1, device=device)
            self._vectors_CH = torch.empty(0)
