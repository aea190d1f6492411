"""Locks on outputs, with real processes; texts that are written whole."""

from __future__ import annotations

import fcntl
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from configs.command_line import outputs
from configs.command_line.outputs import LOCK, claimed, write_whole

ROOT = Path(__file__).resolve().parents[2]
HOLD = """
import os, sys, time
from pathlib import Path
from configs.command_line.outputs import claimed
with claimed(Path(sys.argv[1])):
    if len(sys.argv) == 2 or os.fork() == 0:
        print("held", flush=True)
    time.sleep(60)
"""
Holder = Callable[..., "subprocess.Popen[str]"]


@pytest.fixture
def holder() -> Iterator[Holder]:
    """Starts processes that hold an output until they are killed."""
    started: list[subprocess.Popen[str]] = []

    def start(output: Path, *more: str) -> subprocess.Popen[str]:
        process = subprocess.Popen(
            [sys.executable, "-c", HOLD, str(output), *more],
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
            start_new_session=True,
        )
        started.append(process)
        assert process.stdout is not None and process.stdout.readline() == "held\n"
        return process

    yield start
    for process in started:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate()


def refused(output: Path, words: str) -> None:
    with pytest.raises(ValueError, match=words) as caught, claimed(output):
        pass
    assert "\n" not in str(caught.value)


def test_an_output_has_one_run_and_is_free_when_that_is_killed(
    tmp_path: Path, holder: Holder
) -> None:
    process = holder(tmp_path / "run")
    refused(
        tmp_path / "run",
        rf"another run is writing there \(process {process.pid} on .*\): wait, or give",
    )
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    with claimed(tmp_path / "run"):
        assert str(os.getpid()) in (tmp_path / "run" / LOCK).read_text()


def test_a_run_keeps_others_out_of_what_is_around_and_inside(
    tmp_path: Path, holder: Holder
) -> None:
    """A training into X and an evaluation into X/eval: whoever comes second is refused."""
    for name in ("run", "run/eval/deep"):
        with claimed(tmp_path / name):
            pass
    training = holder(tmp_path / "run")
    refused(tmp_path / "run" / "eval" / "deep", "is writing to '.*/run' around it .process")
    os.kill(training.pid, signal.SIGKILL)
    training.wait()
    holder(tmp_path / "run" / "eval" / "deep")
    refused(tmp_path / "run", "is writing to '.*/run/eval/deep' inside it .process")
    with claimed(tmp_path / "run" / "other"), claimed(tmp_path / "elsewhere"):
        pass


def test_a_worker_that_outlives_its_run_does_not_hold_the_output(
    tmp_path: Path, holder: Holder
) -> None:
    process = holder(tmp_path, "fork")
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    with claimed(tmp_path):
        pass


def test_a_run_may_claim_inside_of_what_it_holds(tmp_path: Path) -> None:
    with claimed(tmp_path), claimed(tmp_path / "part"):
        pass
    assert outputs._held == {}


def test_what_an_earlier_run_left_half_written_is_removed(tmp_path: Path) -> None:
    (tmp_path / ".report.json.partial").write_text("{")
    (tmp_path / "report.json").write_text("{}")
    with claimed(tmp_path):
        assert sorted(path.name for path in tmp_path.iterdir()) == [LOCK, "report.json"]


@pytest.mark.parametrize("place", ["file/run", "file", "/sys/slipstream", "/proc/slipstream"])
def test_an_output_that_cannot_be_written_is_refused_in_a_line(tmp_path: Path, place: str) -> None:
    (tmp_path / "file").write_text("in the way")
    refused(tmp_path / place, "^output .* cannot be written .*: give another --output")


def test_a_full_disk_is_found_when_the_output_is_claimed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    refused(tmp_path, r"cannot be written \(No space left on device\)")


def test_a_file_system_without_locks_is_said_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def unsupported(*_: object) -> None:
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(fcntl, "flock", unsupported)
    with claimed(tmp_path):
        pass
    assert "has no flock, so a second run in one output is not noticed" in caplog.text


def test_a_run_that_is_refused_leaves_neither_lock_nor_folders(tmp_path: Path) -> None:
    (tmp_path / "there").mkdir()
    for place in ("new/run", "there", "there/inside"):
        with pytest.raises(ValueError, match="refused"), claimed(tmp_path / place):
            raise ValueError("refused")
    assert [path.name for path in tmp_path.rglob("*")] == ["there"]
    with pytest.raises(ValueError, match="refused"), claimed(tmp_path / "new" / "run"):
        (tmp_path / "new" / "run" / "journal").write_text("")
        raise ValueError("refused")
    assert [path.name for path in (tmp_path / "new" / "run").iterdir()] == ["journal"]
    with claimed(tmp_path / "there"):
        pass
    assert (tmp_path / "there" / LOCK).is_file()


def test_a_lock_that_its_run_has_removed_holds_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between opening and locking, the run that was there is refused and takes its file away."""
    locks = outputs._locks

    def late(lock: Any, kind: int) -> bool:
        (tmp_path / LOCK).unlink(missing_ok=True)
        return locks(lock, kind)

    monkeypatch.setattr(outputs, "_locks", late)
    refused(tmp_path, "another run is writing there: wait, or give another --output")


def test_texts_are_written_all_or_none(tmp_path: Path) -> None:
    first, second = tmp_path / "a.json", tmp_path / "b.md"
    write_whole({first: "one", second: "zwei ü"})
    assert (first.read_text(), second.read_bytes()) == ("one", "zwei ü".encode())
    with pytest.raises(UnicodeEncodeError):
        write_whole({first: "two", second: "\ud800"})
    with pytest.raises(OSError):
        write_whole({first: "two", tmp_path / "nowhere" / "c": "three"})
    assert first.read_text() == "one" and sorted(path.name for path in tmp_path.iterdir()) == [
        "a.json",
        "b.md",
    ]


def test_a_file_that_may_not_be_written_is_refused_and_left_as_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "table.md"
    output.write_text("earlier")
    monkeypatch.setattr(outputs.os, "access", lambda *_: False)
    refused = pytest.raises(ValueError, match="cannot be written .Permission denied")
    with refused, outputs.claimed_file(output):
        pytest.fail("it was claimed")
    assert output.read_text() == "earlier" and list(tmp_path.iterdir()) == [output]
