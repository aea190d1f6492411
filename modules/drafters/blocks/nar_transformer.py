"""A non-autoregressive transformer: an encoder of sources, and a decoder that fills the masked
block after a prefix (the drafter of Xia et al. 2022, arXiv 2203.16487).

Shape legend: B sequences, S source tokens, L tokens of a prefix (padded), N decoder rows, K slots
of the block, H hidden size.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from modules.contracts.rows import rows_at

BERT_STD = 0.02
"""Standard deviation of BERT's initial weights."""


@dataclass(frozen=True)
class Memory:
    """What an encoder made of the sources. states_BSH; padding_BS: bool, true where there is no
    token.
    """

    states_BSH: Tensor
    padding_BS: Tensor

    def select(self, sequences_S: Tensor) -> Memory:
        """The same of these sequences alone (int64 [S]), which may repeat."""
        return Memory(self.states_BSH[sequences_S], self.padding_BS[sequences_S])


class Layers(nn.Module):
    """Settings of the layers of encoder and decoder.

    Args:
        size: H.
        layers: their number in each.
        heads: attention heads.
        inner: width of the feed-forward layers.
        dropout: in training.
        norm_first: normalise the inputs of sublayers, not their sums.
    """

    def __init__(
        self, size: int, layers: int, heads: int, inner: int, dropout: float, norm_first: bool
    ) -> None:
        super().__init__()
        options: dict[str, Any] = {"batch_first": True, "norm_first": norm_first}
        options |= {"activation": "gelu", "dropout": dropout}
        decoder = nn.TransformerDecoderLayer(size, heads, inner, **options)
        encoder = nn.TransformerEncoderLayer(size, heads, inner, **options)
        self.decoder = nn.TransformerDecoder(decoder, layers, nn.LayerNorm(size))
        self.encoder: nn.TransformerEncoder | None = nn.TransformerEncoder(
            encoder, layers, nn.LayerNorm(size), enable_nested_tensor=False
        )
        self.drop = nn.Dropout(dropout)
        for parameter in self.parameters():
            if parameter.dim() > 1:
                nn.init.normal_(parameter, 0, BERT_STD)


@contextmanager
def _without_fast_path() -> Iterator[None]:
    """Keep torch's layers from their fused inference: to decide on it they read weights of other
    modules, which DeepSpeed's stage 3 then gathers in another order than before.
    """
    enabled = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(enabled)


class NarTransformer(nn.Module):
    """Bidirectional attention over prefix and block, so nothing is cached between blocks.

    The decoder's rows are a start vector, the embedded prefix and a mask vector for each of the K
    slots, in which revealed tokens may stand, all with learned positions. The embedding of tokens
    is an argument of the passes, since it may be a part of another encoder.

    Args:
        size: H.
        layers: of encoder and decoder.
        block: K.
        positions: rows of the table of positions; later ones share its last row.
    """

    def __init__(self, size: int, layers: Layers, block: int, positions: int) -> None:
        super().__init__()
        self.layers, self.block = layers, block
        self.positions = nn.Embedding(positions, size)
        self.start, self.mask = (nn.Parameter(torch.empty(size)) for _ in range(2))
        for weight in (self.positions.weight, self.start, self.mask):
            nn.init.normal_(weight, 0, BERT_STD)

    def place(self, hidden_BNH: Tensor) -> Tensor:
        """The rows with their positions, counted from the first one."""
        order = torch.arange(hidden_BNH.shape[1], device=hidden_BNH.device)
        rows_NH = self.positions(order.clamp(max=self.positions.num_embeddings - 1))
        return self.layers.drop(hidden_BNH + rows_NH)

    def encode(self, embed: nn.Module, ids_BS: Tensor, padding_BS: Tensor) -> Tensor:
        """The own encoder's states [B,S,H] of padded sources."""
        assert self.layers.encoder is not None, "the encoder is a copy of the target's"
        with _without_fast_path():
            return self.layers.encoder(self.place(embed(ids_BS)), src_key_padding_mask=padding_BS)

    def fill(
        self,
        embed: nn.Module,
        memory: Memory,
        prefix_BL: Tensor,
        counts_B: Tensor,
        revealed_BK: Tensor | None = None,
    ) -> Tensor:
        """The decoder's states [B,K,H] in the block after each prefix. Reads the device.

        Args:
            embed: int64 [...] -> [...,H].
            memory: of the sources.
            prefix_BL: int64, right-padded answers so far, at least one column.
            counts_B: tokens of each.
            revealed_BK: int64, tokens that stand in the block instead of masks; -1 for masks.
        """
        # 1. The slot of each row: below 0 in the prefix, from K on in the padding.
        order = torch.arange(1 + int(counts_B.max()) + self.block, device=prefix_BL.device)
        slots_BN = order - 1 - counts_B[:, None]
        inside_BN1 = ((slots_BN >= 0) & (slots_BN < self.block))[..., None]
        # 2. The start, the tokens of the prefix, and the block's masks and tokens.
        rows_BNH = embed(prefix_BL[:, (order - 1).clamp(0, prefix_BL.shape[1] - 1)])
        block_BKH = self.mask.expand(len(prefix_BL), self.block, -1)
        if revealed_BK is not None:
            seen_BK1 = (revealed_BK >= 0)[..., None]
            block_BKH = torch.where(seen_BK1, embed(revealed_BK.clamp(min=0)), block_BKH)
        filled_BNH = rows_at(block_BKH, slots_BN.clamp(0, self.block - 1))
        rows_BNH = torch.where(inside_BN1, filled_BNH, rows_BNH)
        rows_BNH = torch.where((order == 0)[:, None], self.start, rows_BNH)
        # 3. All rows see each other; only the block's are read.
        states_BNH = self.layers.decoder(
            self.place(rows_BNH),
            memory.states_BSH,
            tgt_key_padding_mask=slots_BN >= self.block,
            memory_key_padding_mask=memory.padding_BS,
        )
        block = torch.arange(self.block, device=order.device)
        return rows_at(states_BNH, 1 + counts_B[:, None] + block)
