import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.fakes import tiny_target
from train.strategy import CpuDeepSpeedStrategy, strategy_named

ROOT = Path(__file__).resolve().parents[2]


def test_deepspeed_is_named_by_its_stage_and_everything_else_is_lightnings():
    assert strategy_named("ddp", "auto") == "ddp"
    found = strategy_named("deepspeed_2", "cpu")
    assert isinstance(found, CpuDeepSpeedStrategy) and found.root_device == torch.device("cpu", 0)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A tiny target on disk."""
    target, path = tiny_target(dtype=torch.float32), tmp_path_factory.mktemp("target")
    target.model.save_pretrained(path)
    target.tokenizer.save_pretrained(path)
    return path


def losses(recipe: Path, output: Path, folder: Path, strategy: str) -> dict[str, float]:
    """The figures of a training in a process of its own."""
    flags = ["--target", str(folder), "--output", str(output), "--trainer.strategy", strategy, "--trainer.devices", "1"]
    command = [sys.executable, str(ROOT / "train.py"), "--config", str(recipe), *flags]
    done = subprocess.run(command, cwd=ROOT, text=True, capture_output=True, timeout=300,
                          env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr
    return json.loads((output / "drafter" / "provenance.json").read_text())["measured"]


def test_deepspeed_trains_on_a_cpu_to_the_same_figures(recipe, folder, tmp_path):
    plain, sharded = (losses(recipe, tmp_path / name, folder, name) for name in ("auto", "deepspeed_2"))
    assert sharded == pytest.approx(plain, rel=1e-4)
