"""One evaluation writes to an output at a time; signals and disks lose nothing of it."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from configs.command_line.outputs import claimed
from eval import evaluation
from eval.evaluation import Evaluation
from eval.metrics import speed_model
from tests.eval.run.test_identity import JOURNAL, evaluated, refused
from tests.eval.run.test_processes import ROOT
from tests.eval.test_cli import config, methods, report, run, tiny

__all__ = ["tiny"]


def test_an_evaluation_that_is_there_is_resumed_or_overwritten(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = evaluated(tmp_path, "--limit", "1")
    before = JOURNAL.read_bytes()
    arguments = ["--config", path, "--output", "out", "--limit", "1"]
    assert "already holds an evaluation (journal.jsonl): add --resume, --overwrite" in refused(
        capsys, *arguments
    )
    assert "contradict each other" in refused(capsys, *arguments, "--resume", "--overwrite")
    Path("out/journal.0of2.jsonl").write_bytes(before)
    assert run(*arguments, "--overwrite") == 0
    assert (
        Path("out/journal.previous.jsonl").read_bytes() == before and JOURNAL.read_bytes() != before
    )
    assert not Path("out/journal.0of2.jsonl").exists()
    JOURNAL.unlink()
    assert "already holds an evaluation (report.json)" in refused(capsys, *arguments)
    assert run(*arguments, "--resume") == 0


def test_one_evaluation_at_a_time_and_sigterm_keeps_what_was_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = config(tmp_path, ["Slow"])
    arguments = ["--config", path, "--output", "run/eval"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        [sys.executable, "-m", "tests.eval.run.shares_worker", *arguments],
        env=environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    journal = Path("run/eval/journal.jsonl")
    while not journal.exists() or journal.read_bytes().count(b"\n") < 2:
        assert process.poll() is None, process.communicate()[1]
        time.sleep(0.1)
    for more in ((), ("--resume",), ("--overwrite",)):
        said = refused(capsys, *arguments, *more)
        assert f"another run is writing there (process {process.pid} on" in said
    with (
        pytest.raises(
            ValueError, match="^output 'run': another run is writing to '.*/run/eval' inside it"
        ),
        claimed(Path("run")),
    ):
        pass
    process.terminate()
    assert (
        process.communicate()[1] == "stopped by SIGTERM: go on with --resume\n"
        and process.returncode == 143
    )
    measured = journal.read_bytes()
    monkeypatch.setattr(time, "sleep", lambda _: None)
    assert not Path("run/eval/report.json").exists() and run(*arguments, "--resume") == 0
    assert (
        journal.read_bytes().startswith(measured)
        and methods(Path("run/eval"))["slow"]["prompts"] == 6
    )


@pytest.mark.parametrize("place", ["file", "file/out", "/sys/out", "folders"])
def test_an_output_that_cannot_be_written_is_found_before_the_target_loads(
    tmp_path: Path, place: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("file").write_text("in the way")
    Path("folders/report.html").mkdir(parents=True)
    monkeypatch.setattr(evaluation, "load_target", lambda *_: pytest.fail("the target was loaded"))
    said = refused(capsys, "--config", config(tmp_path, ["AlwaysRight"]), "--output", place)
    assert f"output '{place}' cannot be written (" in said


def test_a_full_disk_keeps_what_is_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--config", config(tmp_path, ["AlwaysRight"]), "--output", "out"]
    fsync = os.fsync

    def fails(after: int, *more: str) -> str:
        calls = iter(range(100))

        def full(file: int) -> None:
            if next(calls) >= after:
                raise OSError(errno.ENOSPC, "No space left on device")
            fsync(file)

        with monkeypatch.context() as patch:
            patch.setattr(os, "fsync", full)
            return refused(capsys, *arguments, *more)

    assert "error: No space left on device (out/journal.jsonl): what was" in fails(4)
    assert not list(Path("out").glob("report*")) and run(*arguments, "--resume") == 0
    said = fails(2, "--resume")
    assert "device (out/report.md): " in said and "then go on with --resume" in said
    assert json.loads(Path("out/report.json").read_text())["schema"] == 1
    assert not list(Path("out").glob("*.partial"))


def test_batches_that_no_task_fills_are_timed_as_large_as_they_were(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes: list[int] = []
    measure = speed_model.measure_latency
    monkeypatch.setattr(
        speed_model,
        "measure_latency",
        lambda target, widths, context, repeats, batch: (
            sizes.append(batch),
            measure(target, widths, context, 1, min(batch, 8)),
        )[1],
    )
    path = config(tmp_path, ["AlwaysRight"], batch_size=[2, 1_000_000_000])
    assert run("--config", path, "--output", "out") == 0
    assert sorted(sizes) == [2, 3]
    assert {one["batch_size"] for one in report()["methods"]} == {2, 1_000_000_000}


def test_markup_in_names_is_shown_as_it_is(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = config(tmp_path, ["AlwaysRight"])
    rows = [
        {"category": "[/bold]", "id": 1, "prompt": "why?"},
        {"category": "[red]", "id": "[/x]", "prompt": "x" * 600},
    ]
    Path("prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert run("--config", path, "--output", "out") == 0
    assert "[red]/[/x]" in capsys.readouterr().out and report()["settings"]["tasks"] == ["[/bold]"]
    assert Evaluation().limit is None
