"""DeepSpeed on two CPU processes: the figures of one process, whole weights saved, resumed after a kill."""

from __future__ import annotations

import csv
import json
import os
import random
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from checkpoints.pretrained import load_pretrained
from tests.fakes import tiny_target
from tests.train.conftest import WORDS
from tests.train.deepspeed_worker import CASES, STEPS, clover, recipe
from train.run import Place, component_weights, resume_point, train

ROOT = Path(__file__).resolve().parents[2]


def launch(folder: Path, mode: str) -> list[tuple[int, str]]:
    """Two processes, as torchrun would start them; exit status and what they said on stderr."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    common = {**os.environ, "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "GROUP_RANK": "0",
              "TORCHELASTIC_RUN_ID": "tests", "LOCAL_WORLD_SIZE": "2", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "tests.train.deepspeed_worker", str(folder), mode]
    running = [subprocess.Popen(command, cwd=ROOT, env={**common, "RANK": str(rank), "LOCAL_RANK": str(rank)},
                                stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) for rank in range(2)]
    said = [process.communicate(timeout=600)[1] for process in running]
    return [(process.returncode, text) for process, text in zip(running, said, strict=True)]


def losses(run: Path) -> list[float]:
    """The training loss of every step."""
    folder = max((run / "lightning").glob("version_*"))
    return [float(row["train/loss"]) for row in csv.DictReader((folder / "metrics.csv").open()) if row["train/loss"]]


def alone(folder: Path, name: str, drafter, **place) -> Path:
    """The same global batches in this process."""
    run = folder / name
    train(recipe(folder, "auto", drafter, 1, 2), Place(run, **place), tiny_target(dtype=torch.float32))
    return run


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Conversations of one length."""
    chance, path = random.Random(0), tmp_path_factory.mktemp("deepspeed")
    rows = [{"prompt": f"{chance.choice(['cat', 'mat', 'ran', 'red'])} {i:02d}?",
             "response": f"{' '.join(chance.choices([word for word in WORDS if len(word) == 3], k=5))}"}
            for i in range(24)]
    (path / "conversations.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def trained(folder) -> Path:
    """All cases, trained by two processes in one launch."""
    for status, said in launch(folder, "stages"):
        assert status == 0, said[-3000:]
    return folder


@pytest.fixture(scope="module")
def whole(folder) -> Path:
    """Clover, trained without a break by this process."""
    return alone(folder, "alone-clover", clover)


@pytest.mark.parametrize("name", CASES)
def test_deepspeed_on_two_processes_is_one_process_on_the_same_batches(trained, whole, name):
    """Losses and weights to within 1e-4 relative (float32 sums in another order), only the drafter's tensors."""
    drafter = CASES[name][1]
    single = whole if drafter is clover else alone(trained, f"alone-{name}", drafter)
    assert losses(trained / name) == pytest.approx(losses(single), rel=1e-4)
    expected, found = (load_pretrained(run).state_dict() for run in (single, trained / name))
    saved = component_weights(trained / name / "lightning" / "checkpoints" / "last.ckpt")
    assert set(saved) == set(found) == set(expected)
    for tensor_name, tensor in expected.items():
        torch.testing.assert_close(found[tensor_name], tensor, rtol=1e-3, atol=1e-4)
        assert torch.equal(saved[tensor_name], found[tensor_name])


def test_deepspeed_that_lost_a_rank_goes_on_in_one_process_where_it_stopped(folder, whole):
    """kill -9 of rank 1 in step 4: at most that step is lost, and two processes at stage 2 become one without any.

    What is compared is the loss of the step after it: the weights after that step were seen to differ by 2e-4.
    """
    statuses = [status for status, _ in launch(folder, "killed")]
    assert statuses[1] == -9 and statuses[0] != 0
    checkpoint = resume_point(folder / "killed", "last")
    assert torch.load(checkpoint, weights_only=True)["global_step"] == STEPS - 1
    run = alone(folder, "killed", clover, resume=checkpoint)
    assert losses(run) == pytest.approx(losses(whole)[STEPS - 1:], rel=1e-4)
