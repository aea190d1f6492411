"""Attention of training blocks to their document and to themselves.

Shape legend: B sequences, T tokens of a packed row, M blocks, R rows of a block, Q query heads, G
key/value heads, E head size, H hidden size.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from modules.contracts.batches import TextBatch
from modules.layers.activation_checkpointing import recomputed
from modules.layers.decoder_layer import Attention, DecoderLayer
from modules.losses.chunked import TrainingRows

MAX_GATHERED = 2**26
"""Keys of the context above this many numbers are gathered in parts, which are recomputed in the
backward pass."""


@dataclass(frozen=True)
class TrainingBlocks:
    """Where blocks of a batch are.

    sequences_M: int64 [M], the packed row of each. positions_MR: int64 [M,R], of their rows.
    context_MT: bool [M,T], tokens of the packed row before the anchor, in its document.
    """

    sequences_M: Tensor
    positions_MR: Tensor
    context_MT: Tensor

    @staticmethod
    def after(rows: TrainingRows, batch: TextBatch, count: int) -> TrainingBlocks:
        """Blocks of `count` rows that begin one token after each training row."""
        ahead = torch.arange(1, count + 1, device=batch.input_ids.device)
        return TrainingBlocks(
            rows.flat_MK1[:, 0] // batch.input_ids.shape[1],
            rows.take(batch.position_ids)[:, None] + ahead,
            rows.take(batch.rows().visible_BNJ),
        )


def run_block_layer(
    layer: DecoderLayer,
    hidden_MRH: Tensor,
    context_BTH: Tensor,
    position_ids_BT: Tensor,
    blocks: TrainingBlocks,
) -> Tensor:
    """One layer over all blocks [M,R,H]: each sees the context before it and itself."""
    attention = layer.self_attn
    assert attention is not None
    keys, values = attention.keys_values(context_BTH, position_ids_BT)
    block = attention.project(layer.attention_inputs(hidden_MRH), blocks.positions_MR)
    # Each part gathers the context's keys and values for its blocks.
    size = max(1, MAX_GATHERED // keys[0].numel())
    parts = zip(
        *(part.split(size) for part in (*block, blocks.context_MT, blocks.sequences_M)), strict=True
    )
    mixed = [
        recomputed(len(hidden_MRH) > size, _attend, attention, keys, values, *part)
        for part in parts
    ]
    mixed_MRH = attention.o_proj(torch.cat(mixed))
    return layer.after_attention(layer.with_attention(hidden_MRH, mixed_MRH))


def _attend(
    attention: Attention,
    keys_BTGE: Tensor,
    values_BTGE: Tensor,
    queries_MRQE: Tensor,
    keys_MRGE: Tensor,
    values_MRGE: Tensor,
    context_MT: Tensor,
    sequences_M: Tensor,
) -> Tensor:
    """Values mixed by attention [M,R,Q*E]."""
    count = queries_MRQE.shape[1]
    keys = torch.cat([keys_BTGE[sequences_M], keys_MRGE], 1)
    values = torch.cat([values_BTGE[sequences_M], values_MRGE], 1)
    visible = F.pad(context_MT, (0, count), value=True)[:, None].expand(-1, count, -1)
    return attention.attend(queries_MRQE, keys, values, visible)
