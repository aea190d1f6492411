"""How runs end and begin again: signals, disks, kills, a second run in one output."""

from __future__ import annotations

import json
import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.utilities import rank_zero_only

from checkpoints.pretrained import load_pretrained
from configs.command_line.loading import run as one_line_run
from data.datamodule import ConversationData
from modules.drafters.heads.medusa import Medusa
from train.cli import command, used_up
from train.lightning.callbacks import LastCheckpoint
from train.run import Recipe, claim, resume_point
from train.settings import TrainerSettings

ROOT = Path(__file__).resolve().parents[3]
WORKER = """
import sys, torch, train.run
from configs.command_line.loading import run
from tests.fakes import tiny_target
from tests.train.lightning import test_endings
from train.cli import command
torch.set_num_threads(1)
target = tiny_target(dtype=torch.float32)
train.run.load_target = lambda *_: target
train.run.RunProgress = getattr(test_endings, sys.argv[1])
sys.exit(run(command, sys.argv[2:]))
"""


class Slow(Callback):
    """Takes its time in every step."""

    def on_train_batch_start(self, *_):
        time.sleep(1.0)


class Full(Callback):
    """In step 4 the disk begins to refuse what is longer than a few bytes."""

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if trainer.global_step == 3:
            resource.setrlimit(resource.RLIMIT_FSIZE, (100, resource.RLIM_INFINITY))


class Interrupt(Callback):
    """Ctrl-C in step 4."""

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if trainer.global_step == 3:
            os.kill(os.getpid(), signal.SIGINT)


def start(kind, recipe, output) -> subprocess.Popen[str]:
    arguments = [kind, "--config", str(recipe), "--output", str(output)]
    return subprocess.Popen(
        [sys.executable, "-c", WORKER, *arguments],
        cwd=ROOT,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )


def one_line(recipe, output, *more) -> int:
    return one_line_run(command, ["--config", str(recipe), "--output", str(output), *more])


def refusal(recipe, output, *more) -> str:
    with pytest.raises(ValueError) as caught:
        command(["--config", str(recipe), "--output", str(output), *more])
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.fixture
def ctrl_c() -> Iterator[None]:
    """SIGINT as in a terminal: what a shell starts in the background ignores it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def test_ctrl_c_saves_the_steps_that_are_done(tiny, recipe, tmp_path, monkeypatch, capsys, ctrl_c):
    monkeypatch.setattr("train.run.RunProgress", Interrupt)
    before = signal.getsignal(signal.SIGINT)
    assert one_line(recipe, tmp_path / "run", "--checkpoint.every_n_steps", "100") == 130
    assert capsys.readouterr().err.splitlines()[-1] == (
        "stopped by Ctrl-C after step 4, all of it saved: go on with --resume last"
    )
    assert torch.load(resume_point(tmp_path / "run", "last"), weights_only=True)["global_step"] == 4
    assert signal.getsignal(signal.SIGINT) is before and not (tmp_path / "run" / "drafter").exists()


def test_a_second_signal_ends_a_training_at_once_but_an_echo_of_the_first_does_not(
    tmp_path, monkeypatch
):
    """torchrun passes a signal on to processes that got it from the terminal already."""
    sent, last, clock = [], LastCheckpoint(tmp_path), iter([10.0, 10.2, 12.0])
    monkeypatch.setattr(time, "monotonic", lambda: next(clock))
    monkeypatch.setattr(os, "kill", lambda *given: sent.append(given))
    monkeypatch.setattr(signal, "signal", lambda *given: sent.append(given))
    last._remember(signal.SIGINT, None)
    last._remember(signal.SIGTERM, None)
    assert not sent and last._signalled == signal.SIGINT
    last._remember(signal.SIGTERM, None)
    assert sent == [(signal.SIGTERM, signal.SIG_DFL), (os.getpid(), signal.SIGTERM)]


def test_a_run_without_a_checkpoint_gives_the_same_advice_everywhere(
    tiny, recipe, tmp_path, monkeypatch, capsys
):
    output = tmp_path / "run"
    with monkeypatch.context() as patch:
        patch.setattr("train.run.load_target", lambda *_: os.kill(os.getpid(), signal.SIGTERM))
        assert one_line(recipe, output) == 143
    assert capsys.readouterr().err == (
        "stopped by SIGTERM: begin again with --overwrite (no checkpoint is there yet)\n"
    )
    # It left nothing; one that had begun leaves its logs.
    assert not output.exists()
    (output / "lightning").mkdir(parents=True)
    assert (
        "already holds a run: it has no whole checkpoint to resume, so add --overwrite"
        in refusal(recipe, output)
    )
    assert "begin again with --overwrite" in refusal(recipe, output, "--resume", "last")
    assert "contradict each other" in refusal(recipe, output, "--resume", "last", "--overwrite")
    assert not (tmp_path / "absent").exists()
    assert "start without --resume" in refusal(recipe, tmp_path / "absent", "--resume", "last")
    assert not (tmp_path / "absent").exists()


def test_a_limit_that_is_used_up_is_named_and_nothing_called_trained(
    tiny, recipe, tmp_path, capsys
):
    assert one_line(recipe, tmp_path / "run") == 0
    assert "trained: " in capsys.readouterr().out
    assert one_line(recipe, tmp_path / "run", "--resume", "last") == 0
    said = capsys.readouterr().out
    assert (
        "nothing was left to train: trainer.max_steps 6 is used up after step 6, raise it to go on"
        in said
    )
    assert "exported: " in said and "trained: " not in said


def test_the_limit_that_is_used_up_is_the_one_that_ended_the_run():
    recipe = Recipe(
        lambda shape: Medusa(shape, 1), ConversationData("embedded"), trainer=TrainerSettings(2, 8)
    )
    assert "trainer.max_epochs 2 is used up after step 4" in used_up(recipe, 4)
    assert "trainer.max_steps 8 is used up after step 8" in used_up(recipe, 8)


def test_one_training_at_a_time_and_a_killed_one_leaves_nothing_behind(tiny, recipe, tmp_path):
    output = tmp_path / "run"
    process = start("Slow", recipe, output)
    while not (output / "lightning").exists():
        assert process.poll() is None, process.communicate()[1][-3000:]
        time.sleep(0.1)
    for more in ([], ["--overwrite"], ["--resume", "last"]):
        assert f"another run is writing there (process {process.pid} on" in refusal(
            recipe, output, *more
        )
    process.kill()
    process.communicate()
    # What a kill would have left of an export, of a checkpoint and of a replacement of the drafter.
    (output / ".drafter-killed.scratch" / "old").mkdir(parents=True)
    (output / ".drafter-killed.scratch" / "old" / "config.json").write_text("{}")
    (output / "lightning" / "checkpoints").mkdir(exist_ok=True)
    (output / "lightning" / "checkpoints" / ".last.ckpt.1.partial").write_bytes(b"half")
    torch.save({}, output / "lightning" / "checkpoints" / "last.ckpt")
    with claim(output, "last", False):
        assert (output / "drafter" / "config.json").read_text() == "{}"
        assert not list(output.glob(".drafter-*")) and not list(output.rglob("*.partial"))


def test_only_the_first_process_of_a_run_locks(tmp_path, monkeypatch):
    with claim(tmp_path, None, False):
        monkeypatch.setattr(rank_zero_only, "rank", 1)
        with claim(tmp_path, None, False) as point:
            assert point is None


def test_a_full_disk_ends_a_run_in_a_line_and_it_goes_on(tiny, recipe, tmp_path):
    output = tmp_path / "run"
    process = start("Full", recipe, output)
    said = process.communicate(timeout=300)[1]
    assert process.returncode == 2 and "Traceback" not in said, said[-3000:]
    assert (
        said.splitlines()[-1].startswith("error: File too large (")
        and "go on with --resume last" in said
    )
    assert torch.load(resume_point(output, "last"), weights_only=True)["global_step"] == 3
    assert not list(output.rglob("*.partial"))
    assert one_line(recipe, output, "--resume", "last") == 0
    assert json.loads((output / "drafter" / "provenance.json").read_text()) and load_pretrained(
        output, tiny
    )


def test_an_output_that_cannot_be_written_is_refused_before_the_target_loads(
    recipe, tmp_path, monkeypatch
):
    monkeypatch.setattr("train.run.load_target", lambda *_: pytest.fail("a model was loaded"))
    (tmp_path / "file").write_text("in the way")
    for output in (tmp_path / "file", tmp_path / "file" / "run", Path("/sys/run")):
        assert "cannot be written" in refusal(recipe, output)


def test_a_mistake_removes_nothing_of_the_run_that_was_to_be_replaced(tiny, recipe, tmp_path):
    (tmp_path / "run" / "lightning").mkdir(parents=True)
    assert "'/none' does not exist" in refusal(
        recipe, tmp_path / "run", "--overwrite", "--init_from", "/none"
    )
    (tmp_path / "run" / "drafter").mkdir()
    (tmp_path / "run" / "drafter" / "config.json").write_text(
        json.dumps(
            {
                "drafter_type": "medusa",
                "class": "Medusa",
                "format_version": 2,
                "arguments": {},
                "target": {"name": None, "fingerprint": None, "shape": {}},
            }
        )
    )
    said = refusal(recipe, tmp_path / "run", "--overwrite", "--init_from", str(tmp_path / "run"))
    assert (
        "--overwrite would remove it first" in said
        and (tmp_path / "run" / "drafter" / "config.json").is_file()
    )
