"""How often units stand in texts, and after which ones."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence

from modules.tokenization.transfer.base_units import Unit, UnitRules

Shares = list[tuple[Unit, float]]
"""Units and their shares of all, in descending order."""


class UnitCounts:
    """Counts of the units of texts.

    Args:
        rows: the units of each text, in order.
    """

    def __init__(self, rows: Sequence[Sequence[Unit]]) -> None:
        # 1. Units by what they begin with.
        beginning: dict[Unit, Counter[Unit]] = {}
        units = Counter(unit for row in rows for unit in row)
        for unit, count in units.items():
            for size in range(1, len(unit) + 1):
                beginning.setdefault(unit[:size], Counter())[unit] = count
        # 2. Units by the one before.
        following: dict[Unit, Counter[Unit]] = {}
        for row in rows:
            for unit, follower in zip(row, row[1:], strict=False):
                following.setdefault(unit, Counter())[follower] += 1
        self.longest = max(map(len, units), default=0)
        self._beginning = {start: _shares(counts) for start, counts in beginning.items()}
        self._following = {unit: _shares(counts) for unit, counts in following.items()}

    def __deepcopy__(self, memo: dict) -> UnitCounts:
        """Itself: it does not change."""
        return self

    def beginning(self, tokens: Unit) -> Shares:
        """Units that begin with these tokens, the unit of them alone included."""
        return self._beginning.get(tokens, [])

    def following(self, unit: Unit) -> Shares:
        """Units that stand after this one."""
        return self._following.get(unit, [])


def counted(
    texts: Iterable[Sequence[int]], rules: UnitRules, merges: int, least: int
) -> UnitCounts:
    """Counts of texts in merged units and in base tokens, which the vocabulary keeps: after `new`
    stands `york` as often as both of them together.

    Args:
        texts: ids of base tokens.
        rules: which of them may be joined.
        merges: at most, over all texts. least: times that a pair must occur.
    """
    texts = list(texts)
    single: list[list[Unit]] = [[(i,) for i in text] for text in texts]
    return UnitCounts(rules.merged(texts, merges, least) + single)


def _shares(counts: Counter[Unit]) -> Shares:
    total = counts.total()
    return [(unit, count / total) for unit, count in counts.most_common()]
