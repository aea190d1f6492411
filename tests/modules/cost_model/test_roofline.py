"""The limits that measured times are set beside."""

from eval.latency import table
from modules.cost_model.latency_table import LatencyTable
from modules.cost_model.roofline import Roofline, measure_roofline
from tests import fakes


def test_memory_bounds_narrow_calls_and_arithmetic_wide_ones():
    roofline = Roofline(
        bytes_per_second=100.0, flops_per_second=1000.0, weight_bytes=200, flops_per_row=500
    )
    assert roofline.seconds(1) == 2.0
    assert roofline.seconds(4) == 2.0
    assert roofline.seconds(8) == 4.0


def test_the_target_is_asked_for_all_its_matrices_once():
    target = fakes.tiny_target()
    roofline = measure_roofline(target, repeats=1)
    expected = sum(p.numel() for p in target.model.parameters() if p.dim() == 2)
    if target.architecture.embedding.get_parameter("weight") is not target.architecture.head.weight:
        expected -= target.architecture.embedding.get_parameter("weight").numel()
    assert roofline.flops_per_row == 2 * expected
    assert roofline.weight_bytes == 8 * expected
    assert roofline.bytes_per_second > 0 and roofline.flops_per_second > 0


def test_the_table_sets_the_limit_beside_the_time():
    roofline = Roofline(
        bytes_per_second=100.0, flops_per_second=1000.0, weight_bytes=2, flops_per_row=5
    )
    rows = table(LatencyTable(256, {1: 0.05, 4: 0.06}), roofline).splitlines()
    assert (
        rows[-1].split("|")[1:5] == [" 4 ", " 60.0 ", " 20.0 ", " 1.20 "]
        and "Hugging" not in rows[0]
    )
    rows = table(LatencyTable(256, {1: 0.05, 4: 0.06}, stock=0.08), roofline).splitlines()
    assert [line.split("|")[5].strip() for line in rows[2:]] == ["0.62", "0.75"]
    assert len({line.count("|") for line in rows}) == 1 and "× Hugging Face's one row" in rows[0]
