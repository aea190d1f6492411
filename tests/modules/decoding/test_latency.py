"""The latency table covers the widths asked for and turns into break-even points."""

import platform

import pytest
import torch

from modules.decoding import latency
from modules.decoding.latency import LatencyTable, measure_latency, processor_name, stock_step, stored_latency
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
    """A cache that machines share must not serve one's times to another of the same architecture."""
    told = tmp_path / "cpuinfo"
    told.write_text("processor\t: 0\nmodel name\t: Vendor Chip 7 @ 3.0GHz\nmodel name\t: Vendor Chip 7 @ 3.0GHz\n")
    assert processor_name(told) == f"{platform.machine()} Vendor Chip 7 @ 3.0GHz"
    assert processor_name(tmp_path / "none").startswith(platform.machine())
    target = tiny_target()
    for name in ("x86_64 One 1/2", "x86_64 Another"):
        monkeypatch.setattr(latency, "processor_name", lambda name=name: name)
        stored_latency(target, tmp_path / "kept", widths=(1,), repeats=1)
    assert len(list((tmp_path / "kept").iterdir())) == 2
