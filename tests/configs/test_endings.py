"""Signals and disks end a command in one line with the exit status that shells expect."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from configs.command_line.endings import Stopped, disk_trouble, resumable
from configs.command_line.loading import run

ROOT = Path(__file__).resolve().parents[2]


def ask(number: int) -> None:
    os.kill(os.getpid(), number)


@pytest.mark.parametrize(
    ("number", "name", "status"), [(signal.SIGTERM, "SIGTERM", 143), (signal.SIGINT, "Ctrl-C", 130)]
)
def test_a_signal_ends_a_command_in_a_line(
    number: int, name: str, status: int, capsys: pytest.CaptureFixture[str]
) -> None:
    # A shell that starts tests in the background makes them ignore Ctrl-C.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    before = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    assert run(lambda _: ask(number) or 0, []) == status
    assert capsys.readouterr().err == f"stopped by {name}: run the same command again\n"
    assert (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)) == before


def test_what_was_begun_says_how_it_goes_on(capsys: pytest.CaptureFixture[str]) -> None:
    def command(_: object) -> int:
        with resumable(lambda: "go on with --resume"):
            ask(signal.SIGTERM)
        return 0

    assert run(command, []) == 143
    assert capsys.readouterr().err == "stopped by SIGTERM: go on with --resume\n"


def test_an_ignored_signal_stays_ignored() -> None:
    """As nohup and a script's background jobs have it."""
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        assert run(lambda _: ask(signal.SIGINT) or 0, []) == 0
    finally:
        signal.signal(signal.SIGINT, before)


STUBBORN = """
import sys, time
from configs.command_line.loading import run
def command(_):
    try:
        print("ready", flush=True)
        time.sleep(60)
    finally:
        print("cleaning", flush=True)
        time.sleep(60)
sys.exit(run(command, []))
"""


def test_a_second_signal_ends_at_once() -> None:
    process = subprocess.Popen(
        [sys.executable, "-c", STUBBORN],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert process.stdout is not None
    for line, number in (("ready\n", signal.SIGINT), ("cleaning\n", signal.SIGTERM)):
        assert process.stdout.readline() == line
        process.send_signal(number)
    assert process.wait(timeout=30) == -signal.SIGTERM
    process.communicate()


WAITING = """
import ctypes, signal, sys, threading, time
from configs.command_line import endings
from configs.command_line.loading import run
def command(_):
    lock, library = ctypes.create_string_buffer(64), ctypes.CDLL(None)
    if "slow" in sys.argv:
        signal.signal(signal.SIGTERM, lambda *_: None)
    threading.Timer(1.0, print, ["ready"], {"flush": True}).start()
    for _ in range(40 if "slow" in sys.argv else 0):
        time.sleep(0.1)
    for _ in range(0 if "slow" in sys.argv else 2):
        library.pthread_mutex_lock(lock)
    return 0
endings.GRACE = float(sys.argv[1])
sys.exit(run(command, []))
"""


def waiting(*arguments: str) -> subprocess.Popen[str]:
    """A process that waits for another one, in a call that no signal interrupts."""
    process = subprocess.Popen(
        [sys.executable, "-c", WAITING, *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert process.stdout is not None and process.stdout.readline() == "ready\n"
    return process


def ended(process: subprocess.Popen[str]) -> tuple[int, str]:
    """Exit status and stderr; a process that does not end is killed."""
    try:
        said = process.communicate(timeout=40)[1]
    except subprocess.TimeoutExpired:
        process.kill()
        said = process.communicate()[1]
    return process.returncode, said


def test_a_process_that_waits_for_another_ends_after_a_grace() -> None:
    process = waiting("2")
    process.send_signal(signal.SIGTERM)
    status, said = ended(process)
    assert status == 143
    assert said == "\nstopped by SIGTERM in the middle: no sign of life for 2 s\n"


def test_a_process_that_waits_for_another_ends_at_a_second_signal() -> None:
    process = waiting("1000")
    process.send_signal(signal.SIGTERM)
    time.sleep(1.5)
    process.send_signal(signal.SIGINT)
    assert ended(process) == (130, "\nstopped by Ctrl-C in the middle: a second signal\n")


def test_a_process_that_is_slow_to_end_is_let_be() -> None:
    """It answers the signal by itself, and runs Python meanwhile."""
    process = waiting("2", "slow")
    process.send_signal(signal.SIGTERM)
    assert ended(process) == (0, "")


def limited(tmp_path: Path) -> None:
    """In a process whose files may have 100 kB: `save_file` of safetensors."""
    import resource

    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, resource.RLIM_INFINITY))
    save_file({"a": torch.zeros(100_000)}, tmp_path / "a.safetensors")


def test_what_disks_refuse_is_told_from_other_errors(tmp_path: Path) -> None:
    assert disk_trouble(OSError(errno.ENOSPC, "", "a/b")) == "No space left on device (a/b)"
    assert disk_trouble(OSError(errno.EROFS, "")) == "Read-only file system"
    assert (
        disk_trouble(FileNotFoundError(errno.ENOENT, "no", "a")) is None
        and disk_trouble(KeyError("a")) is None
    )
    wrapped = RuntimeError("in a library")
    wrapped.__cause__ = OSError(errno.EDQUOT, "")
    assert disk_trouble(wrapped) == "Disk quota exceeded"
    unrelated = RuntimeError("a bug in a handler")
    unrelated.__context__ = OSError(errno.EACCES, "")
    assert disk_trouble(unrelated) is None
    pid = os.fork()
    if not pid:
        try:
            limited(tmp_path)
        except SafetensorError as error:
            os._exit(0 if disk_trouble(error) == "File too large" else 1)
        os._exit(2)
    assert os.waitpid(pid, 0)[1] == 0


def test_a_disk_ends_a_command_in_a_line_and_a_bug_does_not(
    capsys: pytest.CaptureFixture[str],
) -> None:
    def full(_: object) -> int:
        raise OSError(errno.ENOSPC, "no", "x.ckpt")

    def resumed(_: object) -> int:
        with resumable(lambda: "go on with --resume"):
            return full(_)

    assert run(full, []) == 2 and run(resumed, []) == 2
    lines = capsys.readouterr().err.splitlines()
    assert lines == [
        "error: No space left on device (x.ckpt): what was written whole is kept; make room or "
        f"give another place, then {again}"
        for again in ("run the same command again", "go on with --resume")
    ]
    with pytest.raises(KeyError):
        run(lambda _: {}["a"], [])


def test_other_processes_of_a_run_stop_silently(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert run(lambda _: ask(signal.SIGTERM) or 0, []) == 143
    assert capsys.readouterr().err == "" and str(Stopped(15)).startswith("stopped by SIGTERM")
