"""Where the time of a call goes: kinds of operators, and the rest of the wall time."""

from __future__ import annotations

import pytest

from eval.latency import profile_table
from modules.cost_model.call_profile import (
    BETWEEN,
    KINDS,
    OTHER,
    CallProfile,
    kind_of,
    profile_call,
)
from tests.fakes import tiny_target


@pytest.mark.parametrize(
    ("operator", "kind"),
    [
        ("mkldnn::_linear_pointwise", "linear layers"),
        ("aten::addmm", "linear layers"),
        ("aten::_scaled_dot_product_flash_attention_for_cpu", "attention"),
        ("aten::scatter_", "KV cache"),
        ("aten::rsqrt", "norms"),
        ("aten::silu", OTHER),
    ],
)
def test_operators_belong_to_the_parts_of_a_layer(operator, kind):
    assert kind_of(operator) == kind


def test_a_call_is_its_operators_and_what_is_between_them():
    measured = profile_call(tiny_target(), rows=3, context=8, repeats=2)
    assert {"linear layers", "attention", BETWEEN} <= set(measured.kinds)
    assert measured.kinds["linear layers"] > 0 and measured.operators > 50
    assert sum(measured.kinds.values()) >= measured.wall * 0.999


def test_the_table_has_a_column_for_each_width():
    kinds = {"linear layers": 20.0, BETWEEN: 5.25}
    lines = profile_table({1: CallProfile(25.25, kinds, 900), 8: CallProfile(30.0, {}, 950)})
    rows = {
        cells[0].strip(): cells[1:]
        for cells in (line[2:-2].split(" | ") for line in lines.splitlines())
    }
    assert rows["ms of a call"] == ["1 row", "8 rows"]
    assert rows["linear layers"] == ["20.0", "0.0"] and rows["whole call"] == ["25.2", "30.0"]
    assert [kind for kind in KINDS if kind not in rows] == []
