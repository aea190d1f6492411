"""Rotary positions of a drafter's own layers.

Shape legend: B sequences, N rows of one call, Q query heads, G key/value heads, D head size, P
positions.
"""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding, apply_rotary_pos_emb

from modules.contracts.shapes import TargetShape

MOST_ANGLES = 1 << 22
"""Tables [P,D] above this size are not kept."""
STEADY = ("default", "linear", "llama3", "yarn")
"""Rotations that depend on nothing but the position."""


class Rotary(LlamaRotaryEmbedding):
    """Hugging Face's rotary embedding; decoding looks its cosines and sines up in a table.

    Args:
        shape: the target's dimensions.
    """

    def __init__(self, shape: TargetShape) -> None:
        super().__init__(rotary_config(shape))
        angles = shape.max_positions * shape.head_dim
        self._tabled = self.rope_type in STEADY and angles <= MOST_ANGLES
        self._tables: dict[tuple[torch.device, torch.dtype], tuple[Tensor, Tensor]] = {}

    def turned(
        self, queries_BNQD: Tensor, keys_BNGD: Tensor, position_ids_BN: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Queries and keys rotated to their positions."""
        if torch.is_grad_enabled() or not self._tabled:
            cosine, sine = self(keys_BNGD, position_ids_BN)
            queries, keys = apply_rotary_pos_emb(
                queries_BNQD, keys_BNGD, cosine, sine, unsqueeze_dim=2
            )
            return queries, keys
        # 1. One row of the table for each position.
        table_P2D = self._table(keys_BNGD)
        angles_BN2D = table_P2D[position_ids_BN.clamp(max=len(table_P2D) - 1)]
        cosine, signed_sine = angles_BN2D[:, :, :1], angles_BN2D[:, :, 1:]
        # 2. Each half is turned by the other one.
        heads = torch.cat([queries_BNQD, keys_BNGD], 2)
        crossed = heads.roll(heads.shape[-1] // 2, -1)
        turned = torch.addcmul(heads * cosine, crossed, signed_sine)
        queries, keys = turned.split((queries_BNQD.shape[2], keys_BNGD.shape[2]), dim=2)
        return queries, keys

    def _table(self, like: Tensor) -> Tensor:
        """Cosines, and sines with the sign that each half has [P,2,D]."""
        key, frequencies = (like.device, like.dtype), self.inv_freq
        entry = self._tables.get(key)
        if entry is None or entry[0] is not frequencies:
            positions = torch.arange(self.max_seq_len_cached, device=like.device)
            cosine, sine = self(like, positions[None])
            sine[..., : sine.shape[-1] // 2] *= -1
            entry = self._tables[key] = (frequencies, torch.stack([cosine[0], sine[0]], 1))
        return entry[1]


def rotary_config(shape: TargetShape) -> LlamaConfig:
    """The configuration that Hugging Face's rotary embedding reads."""
    return LlamaConfig(
        hidden_size=shape.hidden_size,
        num_attention_heads=shape.num_heads,
        head_dim=shape.head_dim,
        max_position_embeddings=shape.max_positions,
        rope_parameters=dict(shape.rope),
    )
