"""The memory measurement: figures of fresh processes, and a recipe's beside its plan."""

from __future__ import annotations

import sys

import pytest

from train import memory


def test_a_table_row_compares_two_kinds_of_fresh_processes(monkeypatch):
    asked = []

    def fresh(arguments):
        asked.append(arguments)
        return {"bytes": 400 * 2 ** 20 if arguments[2] == "naive" else 100 * 2 ** 20, "seconds": 2.0}

    monkeypatch.setattr(memory, "_fresh", fresh)
    monkeypatch.setattr(memory, "ROWS", (64,))
    assert memory.head_table()[-1].split() == ["64", "400", "100", "4.0x", "2.0", "2.0"]
    assert [arguments[1:] for arguments in asked] == [["64", "naive"], ["64", "chunked"]]


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the peak is Linux's")
def test_a_peak_is_forgotten_and_found_again():
    size = 64 * 2 ** 20
    held = bytearray(size)
    del held
    before = memory.forget_peak()
    assert memory.resident("VmHWM") < before + size // 2
    held = bytearray(size)
    held[::4096] = b"1" * len(held[::4096])
    assert memory.resident("VmHWM") > before + size // 2


def test_a_failed_measurement_is_one_line():
    with pytest.raises(ValueError, match="measuring --of-head x naive failed: .*invalid literal"):
        memory._fresh(["--of-head", "x", "naive"])
