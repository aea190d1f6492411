"""Transformers that the models of this folder are made of: stock ones of PyTorch and Hugging Face.

Shape legend: N sequences, L positions, H width.
"""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaModel
from transformers.models.llama.modeling_llama import LlamaAttention

from modules.tokenization.contract import MOST_LENGTH

MOST_LAYERS = 256


class Blocks(nn.Module):
    """A short transformer with learned positions, pre-norm and GELU.

    Args:
        width: H.
        layers: blocks.
        heads: of attention.
        length: positions at most.
        causal: a position reads itself and those before it; else all valid ones.
    """

    def __init__(self, width: int, layers: int, heads: int, length: int, causal: bool) -> None:
        super().__init__()
        check_sizes(width, layers, heads)
        self.causal = causal
        self.positions_LH = nn.Parameter(torch.randn(length, width) * 0.02)
        block = nn.TransformerEncoderLayer(
            width, heads, 4 * width, 0.0, "gelu", batch_first=True, norm_first=True
        )
        self.blocks = nn.TransformerEncoder(
            block, layers, nn.LayerNorm(width), enable_nested_tensor=False
        )
        # Copies of a block begin equal otherwise.
        for weights in self.blocks.parameters():
            if weights.dim() > 1:
                nn.init.xavier_uniform_(weights)

    def forward(self, inputs_NLH: Tensor, valid_NL: Tensor | None = None) -> Tensor:
        """States [N,L,H]; positions that are not valid are read by none."""
        length = inputs_NLH.shape[1]
        mask = (
            torch.ones(length, length, dtype=torch.bool, device=inputs_NLH.device).triu(1)
            if self.causal
            else None
        )
        return self.blocks(
            inputs_NLH + self.positions_LH[:length],
            mask=mask,
            src_key_padding_mask=None if valid_NL is None else ~valid_NL,
        )


class SmearedKeys(nn.Module):
    """A projection to keys that are mixed with those of the position before, by a learned share
    per head: s·k_t + (1 - s)·k_(t-1), s from 0 to 1 (Olsson et al. 2022, arXiv 2209.11895,
    "smeared keys"). A single layer can then find what followed a token before. Whole rows only:
    with a KV cache the key before the first new position would be taken as 0.

    Args:
        keys: the projection, H to all heads' keys.
        heads: of the attention.
    """

    def __init__(self, keys: nn.Linear, heads: int) -> None:
        super().__init__()
        self.keys, self.heads = keys, heads
        self.shares = nn.Parameter(torch.zeros(heads))
        """Logits of s, one per head; 0 is a half."""

    def forward(self, states_NLH: Tensor) -> Tensor:
        """Keys [N,L,heads * width of a head]; at the first position k_(t-1) is 0."""
        keys = self.keys(states_NLH).unflatten(-1, (self.heads, -1))
        before = nn.functional.pad(keys[:, :-1], (0, 0, 0, 0, 1, 0))
        share = self.shares.sigmoid()[:, None].to(keys.dtype)
        return (share * keys + (1 - share) * before).flatten(-2)


def backbone(width: int, layers: int, heads: int, induction: bool = False) -> LlamaModel:
    """A causal transformer of Llama's type, which reads embeddings; its table has a single row.

    Args:
        width: H. layers: of it. heads: of its attention.
        induction: for learning to copy what followed a token before: `SmearedKeys`, and value and
            output maps that begin as half the identity.
    """
    check_sizes(width, layers, heads)
    model = LlamaModel(
        LlamaConfig(
            vocab_size=1,
            hidden_size=width,
            intermediate_size=-(-8 * width // 3 // 16) * 16,
            num_hidden_layers=layers,
            num_attention_heads=heads,
            num_key_value_heads=heads,
            max_position_embeddings=MOST_LENGTH,
            pad_token_id=None,
            bos_token_id=None,
            eos_token_id=None,
        )
    )
    for layer in model.layers if induction else ():
        attention = cast(LlamaAttention, cast(nn.Module, layer).self_attn)
        attention.k_proj = SmearedKeys(attention.k_proj, heads)  # type: ignore[assignment]
        for projection in (attention.v_proj, attention.o_proj):
            projection.weight.data = torch.eye(width) / 2
    return model


def check_sizes(width: int, layers: int, heads: int) -> None:
    """ValueError for sizes that no transformer of these blocks has."""
    for name, value in (("width", width), ("layers", layers), ("heads", heads)):
        if value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")
    if width % heads or (width // heads) % 2:
        raise ValueError(f"width {width} must be an even multiple of heads, got {heads} heads")
    if layers > MOST_LAYERS:
        raise ValueError(f"layers must be at most {MOST_LAYERS}, got {layers}")
