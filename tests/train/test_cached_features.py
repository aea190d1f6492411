"""A drafter that reads cached states learns what it learns from states computed online, and
survives a kill -9.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from checkpoints.pretrained import load_pretrained
from data.conversations import Tokens
from data.datamodule import Batches
from data.feature_cache.cache import CacheDtype, FeatureCache, cache_features
from modules.drafters.feature.eagle3 import Eagle3
from tests.data.test_packing import document
from tests.fakes import tiny_target
from train.cli import command
from train.lightning.module import TrainableModule
from train.run import resume_point
from train.settings import OptimizerSettings

ROOT = Path(__file__).resolve().parents[2]
TOLERANCES: dict[CacheDtype, float] = {"float32": 0.0, "bfloat16": 2e-3, "int8": 5e-3}
"""Relative, of the loss: float32 is bit-equal; bfloat16 keeps 8 bits of a state, int8 7 and a
sign.
"""


def losses(
    documents: list[Tokens], length: int, folder: Path, dtype: CacheDtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """EAGLE-3's loss on one batch of all documents, online and from a cache."""
    target = tiny_target(dtype=torch.float32, layers=4)
    torch.manual_seed(1)
    drafter = Eagle3(target.shape, steps=2)
    drafter.initialise(target)
    module = TrainableModule(drafter, target, OptimizerSettings())
    cache_features(target, documents, drafter.training_states, folder, dtype, progress=False)
    cache = FeatureCache(folder, target.fingerprint(), drafter.training_states)
    found = []
    for source in (None, cache):
        (batch,) = Batches(documents, length, rows=len(documents), cache=source)
        assert set(batch.states) == (set() if source is None else set(drafter.training_states))
        module.fill_states(batch)
        found.append(drafter.loss(batch, target, 0.0).total.detach())
    return found[0], found[1]


@pytest.mark.parametrize("dtype", TOLERANCES)
def test_the_loss_from_a_cache_is_the_online_one(tmp_path: Path, dtype: CacheDtype) -> None:
    """One document to a row, so that the target multiplies the same matrices either way."""
    online, cached = losses([document(24, i) for i in range(4)], 24, tmp_path, dtype)
    assert abs(cached - online) <= TOLERANCES[dtype] * abs(online)
    assert torch.equal(cached, online) == (dtype == "float32")


def test_packed_documents_of_other_lengths_differ_by_rounding_alone(tmp_path: Path) -> None:
    """Cached one to a row and read several to a row: sums of float32 in another order."""
    online, cached = losses([document(5 + 3 * i, i) for i in range(6)], 40, tmp_path, "float32")
    torch.testing.assert_close(cached, online, rtol=1e-5, atol=0)


_KILLED = """
import signal, sys, torch, train.run
from tests.fakes import tiny_target
from tests.train.lightning.deepspeed_worker import Signal
from train.cli import command
torch.set_num_threads(1)
target = tiny_target(dtype=torch.float32)
train.run.load_target = lambda *_: target
train.run.RunProgress = lambda: Signal(signal.SIGKILL, 3, 0)
command(sys.argv[1:])
"""


def test_a_training_from_a_cache_that_is_killed_goes_on_to_the_unbroken_runs_weights(
    tiny, conversations, tmp_path: Path
) -> None:
    """kill -9 in step 4, after three checkpoints and with the cache written."""
    recipe = tmp_path / "eagle3.yaml"
    recipe.write_text(
        f"""\
drafter:
  class_path: modules.drafters.feature.eagle3.Eagle3
  init_args: {{steps: 2, draft_vocabulary: 48}}
data:
  {{train: {conversations}, validation_fraction: 0.2, max_length: 128, rows: 1,
   features: {tmp_path}/states}}
trainer: {{max_steps: 6, max_epochs: -1, val_check_interval: 3, accelerator: cpu}}
probe: {{prompts: 1, max_new_tokens: 3}}
checkpoint: {{every_n_steps: 1, export: last}}
""",
        encoding="utf-8",
    )
    flags = ["--config", str(recipe), "--output"]
    killed = subprocess.run(
        [sys.executable, "-c", _KILLED, *flags, str(tmp_path / "killed")],
        cwd=ROOT,
        check=False,
        timeout=120,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert killed.returncode == -9, killed.stderr[-3000:]
    assert (
        torch.load(resume_point(tmp_path / "killed", "last"), weights_only=True)["global_step"] == 3
    )
    written = {path: path.stat().st_mtime_ns for path in (tmp_path / "states").glob("shard-*")}
    assert command([*flags, str(tmp_path / "killed"), "--resume", "last"]) == 0
    assert command([*flags, str(tmp_path / "whole")]) == 0
    assert (
        written
        == {path: path.stat().st_mtime_ns for path in (tmp_path / "states").glob("shard-*")}
        != {}
    )
    resumed, unbroken = (
        load_pretrained(tmp_path / name).state_dict() for name in ("killed", "whole")
    )
    assert resumed.keys() == unbroken.keys()
    assert all(torch.equal(resumed[name], tensor) for name, tensor in unbroken.items())
