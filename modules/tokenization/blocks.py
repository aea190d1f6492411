"""Transformers that the models of this folder are made of: stock ones of PyTorch and Hugging Face.

Shape legend: N sequences, L positions, H width.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaModel

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


def backbone(width: int, layers: int, heads: int) -> LlamaModel:
    """A causal transformer of Llama's type, which reads embeddings; its table has a single row."""
    check_sizes(width, layers, heads)
    return LlamaModel(
        LlamaConfig(
            vocab_size=1,
            hidden_size=width,
            intermediate_size=-(-8 * width // 3 // 16) * 16,
            num_hidden_layers=layers,
            num_attention_heads=heads,
            num_key_value_heads=heads,
            max_position_embeddings=1 << 16,
            pad_token_id=None,
            bos_token_id=None,
            eos_token_id=None,
        )
    )


def check_sizes(width: int, layers: int, heads: int) -> None:
    """ValueError for sizes that no transformer of these blocks has."""
    for name, value in (("width", width), ("layers", layers), ("heads", heads)):
        if value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")
    if width % heads or (width // heads) % 2:
        raise ValueError(f"width {width} must be an even multiple of heads, got {heads} heads")
    if layers > MOST_LAYERS:
        raise ValueError(f"layers must be at most {MOST_LAYERS}, got {layers}")
