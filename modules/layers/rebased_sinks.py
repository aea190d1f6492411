"""Attention sinks at rebased positions: the first tokens are read as if they stood right before the
window, so that no distance is greater than the window and the sinks (StreamingLLM, Xiao et al.
2024, arXiv 2309.17453, section 3.2).

A product of rotated vectors depends on the distance alone. Instead of turning the sinks' keys to
their new places, the query reads them from a place nearer to them: queries and keys have a second
half for sinks, which is zero in all other keys.

Shape legend: N rows or slots of any leading dimensions, Q query heads, G key/value heads, D head
size.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def sink_positions(positions: Tensor, window: int, sinks: int) -> Tensor:
    """Where a row stands when it reads the sinks: at its own position, or as far from them as the
    window allows.
    """
    return positions.clamp(max=window + sinks - 1)


def wide_queries(near_NQD: Tensor, far_NQD: Tensor) -> Tensor:
    """Queries [..., Q, 2 D] for the window and for the sinks."""
    return torch.cat([near_NQD, far_NQD], -1)


def wide_keys(keys_NGD: Tensor, sinks_N: Tensor) -> Tensor:
    """Keys [..., G, 2 D], those of sinks in the second half."""
    sinks = sinks_N[..., None, None]
    return torch.cat([keys_NGD.masked_fill(sinks, 0.0), keys_NGD.masked_fill(~sinks, 0.0)], -1)


def wide_row(keys_NGD: Tensor) -> Tensor:
    """Keys [..., G, 2 D] of rows that are no sinks."""
    return F.pad(keys_NGD, (0, keys_NGD.shape[-1]))
