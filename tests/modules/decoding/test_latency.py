"""The latency table covers the widths asked for and turns into break-even points."""

import pytest

from modules.decoding.latency import LatencyTable, measure_latency
from tests.fakes import tiny_target


def test_every_width_is_measured():
    table = measure_latency(tiny_target(), widths=(1, 4), context=8, repeats=2)
    assert set(table.seconds) == {1, 4} and all(seconds > 0 for seconds in table.seconds.values())


def test_break_even_counts_drafting():
    table = LatencyTable(256, {1: 0.05, 4: 0.06})
    assert table.break_even(4) == pytest.approx(1.2)
    assert table.break_even(4, draft_seconds=0.015) == pytest.approx(1.5)
