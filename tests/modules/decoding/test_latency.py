"""The latency table covers the widths asked for and turns into break-even points."""

import pytest

from modules.decoding.latency import LatencyTable, interleaved_medians, measure_latency, stock_call
from tests.fakes import tiny_target


def test_every_width_is_measured():
    table = measure_latency(tiny_target(), widths=(1, 4), context=8, repeats=2)
    assert set(table.seconds) == {1, 4} and all(seconds > 0 for seconds in table.seconds.values())


def test_break_even_counts_drafting():
    table = LatencyTable(256, {1: 0.05, 4: 0.06})
    assert table.break_even(4) == pytest.approx(1.2)
    assert table.break_even(4, draft_seconds=0.015) == pytest.approx(1.5)


def test_the_library_s_step_stands_behind_the_same_context_every_time():
    target, seen = tiny_target(), []
    target.stock.register_forward_hook(lambda module, args, out: seen.append(out.past_key_values.get_seq_length()))
    call = stock_call(target, context=8)
    call()
    call()
    assert seen == [8, 9, 9]


def test_calls_take_turns():
    order: list[str] = []
    calls = {name: lambda name=name: order.append(name) for name in "ab"}
    assert set(interleaved_medians(calls, repeats=2)) == {"a", "b"} and "".join(order) == "ababab"
