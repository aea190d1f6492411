"""Byte2Word: a masked language model whose words are pooled bytes (Lotz et al. 2022, arXiv
2211.12677).

The abstract is what is published of its architecture: the number of queries, the slots of the head
and its positions are inferred.

Shape legend: B rows, T words, C bytes of a word, K slots of pieces, N words of all rows, E width of
a byte, H width, V pieces and the end.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from modules.tokenization.blocks import Blocks
from modules.tokenization.contract import PAD, LanguageModel, Score
from modules.tokenization.units import ByteUnits, Units
from modules.tokenization.words import capped, unicode_words


class Byte2Word(LanguageModel):
    """Learned queries attend over a word's bytes and make its vector; a bidirectional encoder reads
    the words; of a masked word the subword pieces are predicted, slot by slot, in one pass.

    Args:
        units: the pieces that are predicted.
        width: H. layers: of the encoder. heads: of its attention.
        byte_width: E. queries: that pool a word's bytes.
        slots: K, pieces of a word at most; longer words are not masked.
        most_bytes: of a word; longer ones are cut.
        length: words of a row.
        share: of the words that are masked.
        read: `bytes`, or `pieces` to pool a word's subwords instead: the table of a subword model.
            Either way a masked word is shown as a mask for each of its bytes, so both are given the
            same of it.
    """

    read_bytes: Tensor

    def __init__(
        self,
        units: Units,
        width: int = 256,
        layers: int = 4,
        heads: int = 4,
        byte_width: int = 64,
        queries: int = 1,
        slots: int = 6,
        most_bytes: int = 20,
        length: int = 128,
        share: float = 0.15,
        read: str = "bytes",
    ) -> None:
        super().__init__(units)
        if read not in ("bytes", "pieces"):
            raise ValueError(f"read {read!r} is unknown: use bytes or pieces")
        if not 0 < share < 1:
            raise ValueError(f"share must be between 0 and 1, got {share}")
        self.slots, self.most_bytes, self.length = slots, most_bytes, length
        self.share, self.reads = share, ByteUnits() if read == "bytes" else units
        # 1. The units that are read, padding counted as no byte; the last id is the mask.
        self.embedding = nn.Embedding(self.reads.size + 1, byte_width)
        self.register_buffer("read_bytes", torch.tensor([*self.reads.widths, 0]), persistent=False)
        self.positions_CE = nn.Parameter(torch.randn(most_bytes, byte_width) * 0.02)
        self.queries_QE = nn.Parameter(torch.randn(queries, byte_width) * 0.02)
        self.pool = nn.MultiheadAttention(byte_width, 1, batch_first=True)
        self.up = nn.Linear(queries * byte_width, width)
        # 2. The encoder over words.
        self.encoder = Blocks(width, layers, heads, length, False)
        # 3. A vector for each slot, and a narrow head over pieces.
        self.slots_KH = nn.Parameter(torch.randn(slots + 1, width) * 0.02)
        self.narrow = nn.Sequential(
            nn.Linear(width, byte_width), nn.GELU(), nn.LayerNorm(byte_width)
        )
        self.head = nn.Linear(byte_width, units.size + 1)
        nn.init.normal_(self.embedding.weight, std=byte_width**-0.5)

    @property
    def table_size(self) -> int:
        """Weights that turn units into word vectors: embedding, positions, pooling."""
        parts = [self.embedding, self.pool, self.up]
        pooled = sum(weights.numel() for part in parts for weights in part.parameters())
        return pooled + self.positions_CE.numel() + self.queries_QE.numel()

    def rows(self, text: str) -> list[Tensor]:
        """Rows [T, C + K + 1]: what is read of a word, then its pieces and their end; the pieces of
        a word with more than the slots hold are `PAD`.
        """
        lines = []
        for word in unicode_words(text):
            for part in capped(word, self.most_bytes):
                read, pieces = self.reads.encode(part), self.units.encode(part)
                said = [*pieces, self.end] if len(pieces) <= self.slots else []
                lines.append(_filled(read, self.most_bytes) + _filled(said, self.slots + 1))
        if not lines:
            return []
        return list(torch.tensor(lines).split(self.length))

    def details(self, held_out: Tensor) -> dict[str, float]:
        """How many weights make word vectors of units."""
        return {"table_size": float(self.table_size)}

    def word_vectors(self, units_NC: Tensor) -> Tensor:
        """Vectors [N,H] of words, each from its own units alone."""
        valid_NC = units_NC != PAD
        valid_NC[:, 0] = True  # padding words attend to something
        embedded_NCE = self.embedding(units_NC.clamp(min=0)) + self.positions_CE
        queries_NQE = self.queries_QE.repeat(len(units_NC), 1, 1)
        pooled_NQE, _ = self.pool(
            queries_NQE, embedded_NCE, embedded_NCE, key_padding_mask=~valid_NC, need_weights=False
        )
        return self.up(pooled_NQE.flatten(1))

    def logits(self, units_BTC: Tensor, chosen_BT: Tensor) -> Tensor:
        """Logits [N,K+1,V] of the pieces of the chosen words."""
        present_BT = units_BTC[:, :, 0] != PAD
        words_BTH = self.word_vectors(units_BTC.flatten(0, 1)).unflatten(0, units_BTC.shape[:2])
        states_NH = self.encoder(words_BTH, present_BT)[chosen_BT]
        return self.head(self.narrow(states_NH[:, None] + self.slots_KH))

    def score(self, rows: Tensor, draws: torch.Generator) -> Score:
        """Of the pieces of masked words in rows [B,T,C+K+1], given all words that are not."""
        # 1. Masks, one for each byte of a chosen word.
        units_BTC, pieces_BTK = rows.split([self.most_bytes, self.slots + 1], 2)
        chances_BT = torch.rand(rows.shape[:2], generator=draws, device=rows.device)
        chosen_BT = (chances_BT < self.share) & (pieces_BTK[:, :, 0] != PAD)
        bytes_BT1 = self.read_bytes[units_BTC].sum(-1, keepdim=True)
        places_C = torch.arange(self.most_bytes, device=rows.device)
        masks_BTC = torch.where(places_C < bytes_BT1, self.reads.size, PAD)
        masked_BTC = torch.where(chosen_BT[..., None], masks_BTC, units_BTC)
        # 2. The pieces of the chosen words.
        logits_NKV, pieces_NK = self.logits(masked_BTC, chosen_BT), pieces_BTK[chosen_BT]
        nll = nn.functional.cross_entropy(
            logits_NKV.flatten(0, 1), pieces_NK.flatten(), ignore_index=PAD, reduction="sum"
        )
        right_N = ((logits_NKV.argmax(-1) == pieces_NK) | (pieces_NK == PAD)).all(1)
        return Score(
            nll,
            int((pieces_NK != PAD).sum()),
            self.spelled(pieces_NK),
            len(pieces_NK),
            int(right_N.sum()),
        )


def _filled(ids: list[int], size: int) -> list[int]:
    return [*ids, *[PAD] * (size - len(ids))]
