"""A vocabulary of base tokens and merged ones, with embeddings and rows of the LM head for all
(Feher et al. 2024, arXiv 2411.18553).

Shape legend: V base tokens, M merged ones, U units, L pieces, W width of a row, H hidden size.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from modules.tokenization.contract import PAD
from modules.tokenization.transfer.base_units import Unit
from modules.tokenization.transfer.frozen_base import Base
from modules.tokenization.transfer.hypernetwork import Hypernetwork, mean_of_pieces, pieces_of
from modules.tokenization.transfer.merging import DynamicEmbeddings, Piece


class LargeVocabulary:
    """Units: the V base tokens by their ids, then merged ones. Base tokens keep the model's own
    embeddings and rows.

    Args:
        base: the model.
        network: predicts those of merged tokens; None takes the mean of their base tokens'.
        units: merged tokens; of several that spell the same the first counts, and base tokens and
            strings that are one are left out.
    """

    def __init__(self, base: Base, network: Hypernetwork | None, units: Iterable[Unit]) -> None:
        self.base, self.network = base, network
        self.dynamic = None if network is None else DynamicEmbeddings(network, base)
        # 1. Merged tokens, by what they spell.
        single, merged = set(base.spelled.values()), dict[bytes, Unit]()
        for unit in units:
            data = self.bytes_of(unit)
            if len(unit) > 1 and data not in single:
                merged.setdefault(data, unit)
        self.units: list[Unit] = [(i,) for i in range(len(base.embedding))]
        self.units += merged.values()
        # 2. How to find them.
        self.longest = max(map(len, self.units))
        self._merged = set(merged.values())

    def bytes_of(self, unit: Unit) -> bytes:
        """What a unit spells; special tokens stand for no text."""
        return b"".join(self.base.spelled.get(i, b"") for i in unit)

    def begins_word(self, unit: Unit) -> bool:
        """Whether it is a special token, or begins with a space."""
        data = self.bytes_of(unit)
        return not data or data[:1].isspace()

    def segmented(self, ids: Sequence[int]) -> list[Unit]:
        """Base tokens as units, each the longest that fits."""
        units, start = list[Unit](), 0
        while start < len(ids):
            sizes = range(min(self.longest, len(ids) - start), 1, -1)
            parts = (tuple(ids[start : start + size]) for size in sizes)
            unit = next((part for part in parts if part in self._merged), (ids[start],))
            units.append(unit)
            start += len(unit)
        return units

    @torch.no_grad()
    def rows(self) -> Tensor:
        """float32 [V+M,W], whose inner products with `query` are logits."""
        head_VH = self.base.tables[-1].float()
        merged = self.units[len(head_VH) :]
        if self.network is None:
            rows_MH = mean_of_pieces(head_VH, self._padded(merged))
            return torch.cat([head_VH, rows_MH])
        spelled = map(self.bytes_of, merged)
        pieces_ML = pieces_of(spelled, self.base.target.tokenizer, self.network.length)
        source_VS = self.base.source_TS
        _, rows_MH, bias_M = self.network.all_of(source_VS, pieces_ML.to(source_VS.device))
        rows_UH = torch.cat([head_VH, rows_MH.float()])
        if bias_M is None:
            return rows_UH
        return torch.cat([rows_UH, F.pad(bias_M.float(), (len(head_VH), 0))[:, None]], 1)

    def query(self, state_H: Tensor) -> Tensor:
        """float32 [W] of a final state."""
        biased = self.network is not None and self.network.bias is not None
        return F.pad(state_H.float(), (0, 1), value=1.0) if biased else state_H.float()

    @torch.no_grad()
    def embeddings(self, units: Sequence[Unit]) -> Tensor:
        """Input embeddings [U,H] of units."""
        if self.dynamic is None:
            return mean_of_pieces(self.base.embedding, self._padded(units))
        pieces: list[Piece] = [unit[0] if len(unit) == 1 else self.bytes_of(unit) for unit in units]
        return self.dynamic.vectors(pieces)

    def _padded(self, units: Sequence[Unit]) -> Tensor:
        """Base ids [U,L] of units, padded with `PAD`."""
        longest = max(map(len, units), default=1)
        rows = [[*unit, *[PAD] * (longest - len(unit))] for unit in units]
        ids_UL = torch.tensor(rows, dtype=torch.long, device=self.base.embedding.device)
        return ids_UL.view(-1, longest)
