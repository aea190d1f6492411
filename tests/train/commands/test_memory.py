"""The memory measurement: figures of fresh processes, and a recipe's beside its plan."""

from __future__ import annotations

import mmap
import sys

import pytest

from train import memory


def test_a_table_row_compares_two_kinds_of_fresh_processes(monkeypatch):
    asked = []

    def fresh(arguments):
        asked.append(arguments)
        return {"bytes": 400 * 2**20 if arguments[2] == "naive" else 100 * 2**20, "seconds": 2.0}

    monkeypatch.setattr(memory, "_fresh", fresh)
    monkeypatch.setattr(memory, "ROWS", (64,))
    assert memory.head_table()[-1].split() == ["64", "400", "100", "4.0x", "2.0", "2.0"]
    assert [arguments[1:] for arguments in asked] == [["64", "naive"], ["64", "chunked"]]


def touched(size: int) -> mmap.mmap:
    """Fresh pages of the system, all of them in use: an allocator's may be resident already."""
    held = mmap.mmap(-1, size)
    for place in range(0, size, mmap.PAGESIZE):
        held[place] = 1
    return held


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the peak is Linux's")
def test_a_peak_is_forgotten_and_found_again():
    size = 64 * 2**20
    with touched(size):
        pass
    before = memory.forget_peak()
    assert memory.resident("VmHWM") < before + size // 2
    with touched(size):
        assert memory.resident("VmHWM") > before + size // 2


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the allocator is glibc's")
def test_freed_memory_is_given_back():
    """A block behind it keeps an allocator from doing so by itself."""
    pieces = [bytearray(4096) for _ in range(40_000)]
    kept = pieces.pop()
    full = memory.resident("VmRSS")
    del pieces
    memory.give_back()
    assert memory.resident("VmRSS") < full - 100 * 2**20 and kept is not None


def test_a_failed_measurement_is_one_line():
    with pytest.raises(ValueError, match="measuring --of-head x naive failed: .*invalid literal"):
        memory._fresh(["--of-head", "x", "naive"])


def test_a_learning_head_is_asked_for_by_name_and_gets_gradients(monkeypatch):
    asked = []
    monkeypatch.setattr(
        memory,
        "_fresh",
        lambda arguments: asked.append(arguments) or {"bytes": 1.0, "seconds": 1.0},
    )
    monkeypatch.setattr(memory, "ROWS", (64,))
    assert memory.head_table(learning=True)[0].startswith("learning LM head")
    assert [arguments[1:] for arguments in asked] == [
        ["64", "naive", "learning"],
        ["64", "chunked", "learning"],
    ]


def test_lengths_are_measured_one_by_one_beside_the_plan(monkeypatch, capsys):
    asked = []

    def fresh(arguments):
        asked.append(arguments[1:])
        return {"measured": 2.0 * 2**30, "planned": 2.2 * 2**30}

    monkeypatch.setattr(memory, "_fresh", fresh)
    given = [
        "--config",
        "clover.yaml",
        "--lengths",
        "[1024,2048]",
        "--trainer.activation_checkpointing",
        "true",
    ]
    assert memory.command(given) == 0
    assert capsys.readouterr().out.splitlines()[2:] == [
        f"| {length} | 2.00 | 2.20 | +10% |" for length in ("1,024", "2,048")
    ]
    kept = [
        "--config",
        "clover.yaml",
        "--trainer.activation_checkpointing",
        "true",
        "--data.max_length",
    ]
    assert asked == [[*kept, "1024"], [*kept, "2048"]]


@pytest.mark.parametrize("given", ["1024", "[]", "[0]", "[a]", "[1.5]"])
def test_lengths_that_are_none_are_refused(given):
    with pytest.raises(ValueError, match="give tokens of a row as a list"):
        memory.split_lengths(["--config", "clover.yaml", "--lengths", given])


def test_help_is_the_modules_own_text(capsys):
    assert memory.command(["--help"]) == 0 and "--lengths" in capsys.readouterr().out
