"""Attention of packed texts without a mask of all pairs of tokens.

On a CPU rows are computed in parts, each under the mask of its own rows and recomputed in the
backward pass; on a GPU FlexAttention skips the blocks of its mask that are empty (Dong et al. 2024,
arXiv 2412.05496; not run on a GPU here).

Shape legend: B sequences, T tokens of a packed row, N rows of a part, S tokens that they may see, Q
query heads, K key/value heads, D head size.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from modules.contracts.rows import DocumentRows, Rows
from modules.layers.activation_checkpointing import recomputed

WHOLE_ROWS = 4096
"""Up to so many tokens, rows attend under one mask of all of them."""
PART_ROWS = 512
"""Rows of a part."""


def in_parts(rows: Rows) -> bool:
    """Whether these rows are too long for one mask."""
    return isinstance(rows, DocumentRows) and rows.document_ids_BT.shape[1] > WHOLE_ROWS


def document_attention(
    query_BQTD: Tensor,
    key_BKTD: Tensor,
    value_BKTD: Tensor,
    rows: DocumentRows,
    scaling: float | None = None,
    window: int | None = None,
) -> Tensor:
    """Attention [B,Q,T,D] of every token to earlier ones of its document.

    Args:
        query_BQTD, key_BKTD, value_BKTD: of all tokens.
        rows: which document each token is of.
        scaling: of the scores; by default 1/sqrt(D).
        window: positions that a token reaches back, itself included; None: all of them.
    """
    if query_BQTD.device.type == "cuda":
        return _in_blocks(query_BQTD, key_BKTD, value_BKTD, rows, scaling, window)
    grouped = query_BQTD.shape[1] != key_BKTD.shape[1]
    firsts_T = _first_seen(rows, window)

    def part(query: Tensor, key: Tensor, value: Tensor, first: int, start: int) -> Tensor:
        mask = rows.visible(start, start + query.shape[2], first, window)[:, None]
        return F.scaled_dot_product_attention(
            query, key, value, attn_mask=mask, scale=scaling, enable_gqa=grouped
        )

    parts = []
    for start in range(0, query_BQTD.shape[2], PART_ROWS):
        stop = min(start + PART_ROWS, query_BQTD.shape[2])
        # Tokens before the first one that some row sees are left out.
        first = int(firsts_T[start:stop].min())
        query, seen = query_BQTD[:, :, start:stop], slice(first, stop)
        key, value = key_BKTD[:, :, seen], value_BKTD[:, :, seen]
        parts.append(recomputed(True, part, query, key, value, first, start))
    return torch.cat(parts, 2)


def _first_seen(rows: DocumentRows, window: int | None) -> Tensor:
    """int64 [T], on the host: no sequence's token sees one before it."""
    places = torch.arange(rows.document_ids_BT.shape[1], device=rows.document_ids_BT.device)
    back_BT = rows.position_ids_BN.expand_as(rows.document_ids_BT)
    if window is not None:
        back_BT = back_BT.clamp(max=window - 1)
    return (places - back_BT).clamp(min=0).amin(0).cpu()


def block_mask(rows: DocumentRows, window: int | None) -> Any:
    """FlexAttention's mask of the rows, made once for all layers of a pass."""
    from torch.nn.attention.flex_attention import create_block_mask

    if window not in rows.block_masks:
        batch, length = rows.document_ids_BT.shape
        rows.block_masks[window] = create_block_mask(
            _mask_function(rows, window), batch, None, length, length, rows.document_ids_BT.device
        )
    return rows.block_masks[window]


def _mask_function(rows: DocumentRows, window: int | None) -> Callable[..., Tensor]:
    documents, real = rows.document_ids_BT, rows.real_BT

    def seen(b: Tensor, h: Tensor, row: Tensor, slot: Tensor) -> Tensor:
        same = (documents[b, row] == documents[b, slot]) & (row >= slot) & real[b, row]
        near = same if window is None else same & (row - slot < window)
        return near | (row == slot)

    return seen


def _in_blocks(
    query_BQTD: Tensor,
    key_BKTD: Tensor,
    value_BKTD: Tensor,
    rows: DocumentRows,
    scaling: float | None,
    window: int | None,
) -> Tensor:
    return _compiled_flex()(
        query_BQTD,
        key_BKTD,
        value_BKTD,
        block_mask=block_mask(rows, window),
        scale=scaling,
        enable_gqa=query_BQTD.shape[1] != key_BKTD.shape[1],
    )


@cache
def _compiled_flex() -> Callable[..., Any]:
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention, dynamic=False)
