"""Units: merged tokens as runs of the base tokens that they were made of (Feher et al. 2024,
arXiv 2411.18553, section 3).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from modules.byte_level.vocabulary import token_bytes
from modules.tokenization.transfer.merging import merge, validity

Unit = tuple[int, ...]
"""Ids of the base tokens of a unit, at least one."""


class UnitRules:
    """Which base tokens may be in one unit.

    Args:
        spelled: bytes of the base tokens; others, such as special ones, are units by themselves.
        boundary: that no unit crosses: `word`, `word_hyphen` or `sentence`; see `validity`.

    Raises:
        ValueError: another boundary.
    """

    def __init__(self, spelled: Mapping[int, bytes], boundary: str) -> None:
        self.spelled, self._valid = spelled, validity(boundary)

    @staticmethod
    def of(tokenizer: Any, boundary: str) -> UnitRules:
        """The rules for a tokenizer's tokens."""
        return UnitRules(token_bytes(tokenizer), boundary)

    def bytes_of(self, unit: Sequence[int]) -> bytes:
        """What base tokens spell; special ones stand for no text."""
        return b"".join(self.spelled.get(i, b"") for i in unit)

    def merged(
        self, rows: Iterable[Sequence[int]], merges: int, least: int = 1
    ) -> list[list[Unit]]:
        """The units of texts of base tokens, after so many merges of pairs that occur at least
        `least` times in all of them.
        """
        batch = [[(i,) if self.spelled.get(i) else i for i in row] for row in rows]
        joined = merge(batch, merges, self._joins, least)
        return [[(unit,) if isinstance(unit, int) else unit for unit in row] for row in joined]

    def _joins(self, left: Unit, right: Unit) -> bool:
        return self._valid(self.bytes_of(left), self.bytes_of(right))
