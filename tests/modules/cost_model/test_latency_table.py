"""The latency table covers the widths asked for and turns into break-even points."""

import platform
from weakref import WeakKeyDictionary

import pytest
import torch

from modules.cost_model import latency_table as latency
from modules.cost_model.latency_table import (
    LatencyTable,
    measure_latency,
    processor_name,
    stock_step,
    stored_latency,
)
from tests.fakes import tiny_target


def test_every_width_is_measured():
    table = measure_latency(tiny_target(), widths=(1, 4), context=8, repeats=2)
    assert set(table.seconds) == {1, 4} and all(seconds > 0 for seconds in table.seconds.values())


def test_hugging_faces_own_call_is_measured_in_turn_and_leaves_its_cache_as_it_was():
    target = tiny_target()
    assert measure_latency(target, widths=(1,), context=8, repeats=2).stock is None
    found = measure_latency(target, widths=(1, 4), context=8, repeats=2, stock=True)
    assert found.stock is not None and found.stock > 0 and set(found.seconds) == {1, 4}
    ids, seen = torch.tensor([[7, 8, 9]]), []
    target.stock.register_forward_hook(lambda *hooked: seen.append(hooked[-1].logits[0, -1]))
    step = stock_step(target, ids)
    step()
    step()
    with torch.no_grad():
        expected = target.model(input_ids=torch.tensor([[7, 8, 9, 7]])).logits[0, -1]
    for logits in seen[1:]:
        torch.testing.assert_close(logits, expected)


def test_break_even_counts_drafting():
    table = LatencyTable(256, {1: 0.05, 4: 0.06})
    assert table.break_even(4) == pytest.approx(1.2)
    assert table.break_even(4, draft_seconds=0.015) == pytest.approx(1.5)


def test_stored_times_belong_to_the_processors_model(tmp_path, monkeypatch):
    """A cache that machines share must not serve one's times to another of the same
    architecture.
    """
    told = tmp_path / "cpuinfo"
    told.write_text(
        "processor\t: 0\nmodel name\t: Vendor Chip 7 @ 3.0GHz\nmodel name\t: Vendor Chip 7 @ "
        "3.0GHz\n"
    )
    assert processor_name(told) == f"{platform.machine()} Vendor Chip 7 @ 3.0GHz"
    assert processor_name(tmp_path / "none").startswith(platform.machine())
    target = tiny_target()
    for name in ("x86_64 One 1/2", "x86_64 Another"):
        monkeypatch.setattr(latency, "processor_name", lambda name=name: name)
        stored_latency(target, tmp_path / "kept", widths=(1,), repeats=1)
    assert len(list((tmp_path / "kept").iterdir())) == 2


class Machine:
    """Stands in for `measure_latency`: a call takes `second` times its rows; notes the widths."""

    def __init__(self, second=0.1, spread=0.0):
        self.second, self.spread, self.asked = second, spread, []

    def __call__(self, target, widths, context=256, repeats=7, batch=1):
        self.asked.append(tuple(widths))
        seconds = {width: self.second * width for width in widths}
        spread = dict.fromkeys(widths, self.spread * self.second)
        return LatencyTable(context, seconds, spread=spread)


def stored(monkeypatch, folder, machine, target=None):
    """The table that a new process would get."""
    monkeypatch.setattr(latency, "measure_latency", machine)
    monkeypatch.setattr(latency, "_current", WeakKeyDictionary())
    return stored_latency(target or tiny_target(), folder, widths=(1, 4))


@pytest.mark.parametrize(
    ("second", "anew"), [(0.1, False), (0.12, False), (0.08, False), (0.2, True), (0.05, True)]
)
def test_a_stored_table_is_measured_again_when_t1_is_far_off(tmp_path, monkeypatch, second, anew):
    stored(monkeypatch, tmp_path, Machine(0.1))
    later = Machine(second)
    table = stored(monkeypatch, tmp_path, later)
    assert later.asked == [(1,), (1, 4)][: 1 + anew]
    assert table.seconds[4] == 4 * (second if anew else 0.1)
    assert LatencyTable.load(next(tmp_path.iterdir())) == table


def test_a_table_of_a_busy_machine_is_said_so_and_not_kept(tmp_path, monkeypatch, caplog):
    assert stored(monkeypatch, tmp_path, Machine(0.1, spread=0.4)).noise == pytest.approx(0.4)
    assert "while the machine was busy: the repeats of t(1) spread by 40%" in caplog.text
    quiet = Machine(0.1)
    assert stored(monkeypatch, tmp_path, quiet).noise == 0.0 and quiet.asked == [(1,), (1, 4)]


def test_a_process_checks_a_table_once(tmp_path, monkeypatch):
    machine, target = Machine(), tiny_target()
    first = stored(monkeypatch, tmp_path, machine, target)
    machine.second = 9.0
    assert stored_latency(target, tmp_path, widths=(1, 4)) is first and machine.asked == [(1, 4)]
    assert stored_latency(target, tmp_path, widths=(1, 5)).seconds[5] == 45.0


def test_older_tables_are_read_and_damaged_ones_measured_again(tmp_path, monkeypatch, caplog):
    stored(monkeypatch, tmp_path, Machine())
    file = next(tmp_path.iterdir())
    file.write_text('{"context": 256, "seconds": {"1": 0.1, "4": 0.3}}')
    assert stored(monkeypatch, tmp_path, Machine()).seconds[4] == 0.3
    for damage in (
        "",
        "[]",
        '{"context": 256}',
        '{"context": 256, "seconds": {"1": "x"}}',
        '{"context": 256, "seconds": {"1": -1, "4": 1}}',
    ):
        file.write_text(damage)
        assert stored(monkeypatch, tmp_path, Machine()).seconds[4] == 0.4
        assert f"{file} is no latency table: delete it: measured again" in caplog.text


def test_the_spread_is_that_of_the_repeats(monkeypatch):
    """Of the passes that count (the first does not): 1, 2, 3, 4, 5 seconds."""
    clock = iter([100.0, 1.0, 2.0, 3.0, 4.0, 5.0])
    monkeypatch.setattr(latency, "_seconds", lambda *_: next(clock))
    table = measure_latency(tiny_target(), widths=(1,), context=8, repeats=5)
    assert (table.seconds[1], table.spread[1]) == (3.0, 2.0) and table.noise == pytest.approx(2 / 3)
