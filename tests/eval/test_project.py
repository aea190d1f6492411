"""A projection by hand, its label, every shipped hardware file, mistakes in one line."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from eval.project import (
    HARDWARE,
    LABEL,
    Hardware,
    load_hardware,
    main,
    projected_speedup,
    projection,
    read_hardware,
)
from tests.eval.report.test_pages import method, report

TOY = Hardware("toy", 1e9, 1e12, 0.1)
KNOWN = {
    "target": "tiny",
    "batch_size": 1,
    "speed_model": {"rows_per_call": 5.0},
    "drafter_parameters": 0,
}


def heads(**other: Any) -> dict[str, Any]:
    return method("heads", **{**KNOWN, **other})


def test_by_hand_while_memory_is_the_limit() -> None:
    one = 2 * 5e8 / 1e9 + 0.1
    assert projected_speedup(heads(), 500_000_000, TOY) == pytest.approx(2.2)
    drafting = 2 * (2 * 5e7 / 1e9 + 0.1)
    assert projected_speedup(
        heads(drafter_parameters=50_000_000), 500_000_000, TOY
    ) == pytest.approx(2.2 * one / (one + drafting))


def test_rows_cost_where_arithmetic_is_the_limit() -> None:
    slow = Hardware("slow", 1e12, 1e9, 1e-9)
    assert projected_speedup(heads(), 1_000_000, slow) == pytest.approx(2.2 / 5, rel=1e-3)
    assert projected_speedup(heads(batch_size=16), 1_000_000, slow) == pytest.approx(
        2.2 / 5, rel=1e-3
    )


def test_methods_whose_calls_are_unknown_are_not_projected() -> None:
    assert projected_speedup(heads(speed_model=None), 1_000_000, TOY) is None
    assert projected_speedup(heads(mean_accepted_tokens=None), 1_000_000, TOY) is None
    older = heads(quality={"drafted_nodes_per_call": 4.0})
    del older["speed_model"]
    assert projected_speedup(older, 1_000_000, TOY) == projected_speedup(heads(), 1_000_000, TOY)


@pytest.mark.parametrize("name", sorted(path.stem for path in HARDWARE.glob("*.yaml")))
def test_shipped_files_are_plausible_and_the_page_is_labelled(name: str) -> None:
    hardware = load_hardware(name)
    assert 5e11 < hardware.bytes_per_second < 1e13 and 1e14 < hardware.flops_per_second < 1e16
    plain = method("autoregressive", 1.0, quality={"noise": {"micro": 1.0, "ci95": None}}, **KNOWN)
    text = "\n".join(projection(report(plain, heads()), hardware))
    assert (
        text.startswith(f"# {LABEL}: {hardware.name}") and "| heads | 2.20 | 5.0 | 2.20× |" in text
    )
    assert "autoregressive" not in text and "1.50×" not in text


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"name": "x"}, "is missing"),
        ({**asdict(TOY), "y": 1}, "y is unknown"),
        ({**asdict(TOY), "bytes_per_second": "1e12"}, "no number above zero"),
    ],
)
def test_files_that_cannot_be_read(values: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        read_hardware(values, "x.yaml")


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "report.json"
    file.write_text(json.dumps(report(heads())))
    before = file.read_bytes()
    for name, status in (("h100", 0), ("abacus", 2)):
        with pytest.raises(SystemExit) as caught:
            main([str(tmp_path), "--hardware", name])
        assert caught.value.code == status
    shown = capsys.readouterr()
    assert LABEL in shown.out and "use one of a100_80gb, h100, rtx_4090" in shown.err
    assert shown.err.count("\n") == 1 and file.read_bytes() == before


def test_a_method_on_a_target_that_the_report_does_not_describe_is_named() -> None:
    forged = report(method("clover", **{**KNOWN, "target": "another"}))
    with pytest.raises(ValueError, match="'clover' ran on 'another', which is not among its targ"):
        list(projection(forged, TOY))


def test_names_of_methods_are_one_cell() -> None:
    *_, line = projection(report(method("a | b\n# c", **KNOWN)), TOY)
    assert line.startswith("| a \\| b # c |") and "\n" not in line
