"""DeepSpeed on two CPU processes: the figures of one process, whole weights saved, resumed after a
kill.
"""

from __future__ import annotations

import csv
import json
import os
import random
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from checkpoints.pretrained import load_pretrained
from tests.fakes import tiny_target
from tests.ports import free_port
from tests.train.conftest import WORDS
from tests.train.lightning.deepspeed_worker import (
    CASES,
    RESUMED,
    STEPS,
    WHOLE,
    Signal,
    clover,
    recipe,
    torn,
)
from train.lightning.callbacks import Terminated
from train.run import Place, component_weights, resume_point, train

ROOT = Path(__file__).resolve().parents[3]


def launch(folder: Path) -> list[tuple[int, str]]:
    """Two processes, as torchrun would start them; exit status and what they said on stderr."""
    common = {
        **os.environ,
        "WORLD_SIZE": "2",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(free_port()),
        "GROUP_RANK": "0",
        "TORCHELASTIC_RUN_ID": "tests",
        "LOCAL_WORLD_SIZE": "2",
        "OMP_NUM_THREADS": "1",
    }
    command = [sys.executable, "-m", "tests.train.lightning.deepspeed_worker", str(folder)]
    running = [
        subprocess.Popen(
            command,
            cwd=ROOT,
            env={**common, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    said = [process.communicate(timeout=1200)[1] for process in running]
    return [(process.returncode, text) for process, text in zip(running, said, strict=True)]


def figures(run: Path, name: str) -> list[float]:
    """A figure that is logged in every step."""
    folder = max((run / "lightning").glob("version_*"))
    return [
        float(row[name]) for row in csv.DictReader((folder / "metrics.csv").open()) if row[name]
    ]


def alone(folder: Path, name: str, drafter, **place) -> Path:
    """The same global batches in this process."""
    run = folder / name
    what = recipe(folder, "auto", drafter, 1, 2, name.endswith("accumulated"))
    train(what, Place(run, **place), tiny_target(dtype=torch.float32))
    return run


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Conversations of different lengths, too long for two in a row: the ranks' label counts differ
    in every step.
    """
    chance, path = random.Random(0), tmp_path_factory.mktemp("deepspeed")
    rows = [
        {
            "prompt": f"{chance.choice(['cat', 'mat', 'ran', 'red'])} {i:02d}?",
            "response": " ".join(chance.choices([w for w in WORDS if len(w) == 3], k=4 + i % 5)),
        }
        for i in range(24)
    ]
    (path / "conversations.jsonl").write_text(
        "".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8"
    )
    return path


@pytest.fixture(scope="module")
def ended(folder) -> list[tuple[int, str]]:
    """Exit status of two processes that trained all cases, were asked to end, went on, and were
    killed, in one launch, and what they said; one of the runs that go on was asked to end here.
    """
    with pytest.MonkeyPatch.context() as patch, pytest.raises(Terminated, match="after step 2"):
        patch.setattr("train.run.RunProgress", lambda: Signal(signal.SIGTERM, 1, 0))
        alone(folder, "one", clover)
    found = launch(folder)
    for _, text in found:
        assert WHOLE in text, text[-3000:]
    return found


@pytest.fixture(scope="module")
def trained(folder, ended) -> Path:
    """The folder of all cases."""
    return folder


@pytest.fixture(scope="module")
def whole(folder) -> Path:
    """Clover, trained without a break by this process."""
    run = folder / "alone-clover"
    return run if run.exists() else alone(folder, run.name, clover)


@pytest.mark.parametrize("name", CASES)
def test_deepspeed_on_two_processes_is_one_process_on_the_same_batches(trained, name):
    """Losses to within 1e-4 relative, weights to that or 1e-5 (float32 sums in another order), only
    the drafter's tensors."""
    drafter = CASES[name][1]
    single = (
        trained / f"alone-{'accumulated' if name.endswith('accumulated') else drafter.__name__}"
    )
    if not single.exists():
        alone(trained, single.name, drafter)
    found, unsplit = (figures(run, "train/loss") for run in (trained / name, single))
    assert len(found) == (6 if name.endswith("accumulated") else STEPS) and found == pytest.approx(
        unsplit, rel=1e-4
    )
    assert figures(trained / name, "skipped_updates")[-1] == (1 if drafter is torn else 0)
    expected, found = (load_pretrained(run).state_dict() for run in (single, trained / name))
    saved = component_weights(trained / name / "lightning" / "checkpoints" / "last.ckpt")
    assert set(saved) == set(found) == set(expected)
    for tensor_name, tensor in expected.items():
        torch.testing.assert_close(found[tensor_name], tensor, rtol=1e-4, atol=1e-5)
        assert torch.equal(saved[tensor_name], found[tensor_name])


def ended_as(run: Path, single: Path, since: int) -> None:
    """A broken run had the losses of the unbroken one from step `since` on, and ended with its
    weights.

    Of these 99 in 100 to 1e-6, and all to 1e-5: Adam divides by the roots of small second moments,
    where another order of a sum shows in single elements (4e-6; in which ones differs by
    processor).
    """
    assert figures(run, "train/loss") == pytest.approx(
        figures(single, "train/loss")[since:], rel=1e-4
    )
    expected, found = (load_pretrained(each).state_dict() for each in (single, run))
    close = []
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-4, atol=1e-5)
        close.append(torch.isclose(found[name], tensor, rtol=1e-4, atol=1e-6).flatten())
    assert torch.cat(close).float().mean() >= 0.99


def test_deepspeed_that_lost_a_rank_goes_on_in_one_process_where_it_stopped(folder, whole, ended):
    """kill -9 of rank 1 in step 4: that step is lost, and two processes at stage 2 become one
    without DeepSpeed.
    """
    statuses = [status for status, _ in ended]
    assert statuses[1] == -9 and statuses[0] != 0
    checkpoint = resume_point(folder / "killed", "last")
    assert torch.load(checkpoint, weights_only=True)["global_step"] == STEPS - 1
    ended_as(alone(folder, "killed", clover, resume=checkpoint), whole, STEPS - 1)


def test_deepspeed_asked_to_end_saves_and_goes_on_at_another_stage_and_from_one_process(
    trained, whole, ended
):
    """SIGTERM to one of two ranks in step 2: both end well with that step saved. What stages 1 and
    3 saved goes on in one process; two go on at stage 3 from stage 2, and at stage 1 from what one
    process without DeepSpeed saved."""
    for _, text in ended:
        assert text.count("stopped by SIGTERM after step 2") == 3, text[-3000:]
    for name in ("terminated_1", "terminated_3"):
        alone(trained, name, clover, resume=resume_point(trained / name, "last"))
    for name in (*RESUMED, "terminated_1", "terminated_3"):
        ended_as(trained / name, whole, 2)
