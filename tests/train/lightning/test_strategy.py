import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.fakes import tiny_target
from tests.ports import free_port
from train.lightning.deepspeed import CpuDeepSpeedStrategy, strategy_named

ROOT = Path(__file__).resolve().parents[3]


def test_deepspeed_is_named_by_its_stage_and_everything_else_is_lightnings():
    assert strategy_named("ddp", "auto") == "ddp"
    found = strategy_named("deepspeed_2", "cpu")
    assert isinstance(found, CpuDeepSpeedStrategy) and found.root_device == torch.device("cpu", 0)


@pytest.mark.parametrize("stage", [2, 3])
def test_deepspeed_offloads_the_optimiser_that_the_module_has(stage, monkeypatch):
    """What is asked of DeepSpeed where there is a GPU; the engine itself is not started."""
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    config: Any = strategy_named(f"deepspeed_{stage}_offload", "cuda").config
    assert config["zero_optimization"]["offload_optimizer"]["device"] == "cpu"
    assert (
        config["zero_optimization"]["stage"] == stage
        and config["zero_force_ds_cpu_optimizer"] is False
    )
    plain: Any = strategy_named(f"deepspeed_{stage}", "cuda")
    assert "offload_optimizer" not in plain.config["zero_optimization"]


@pytest.mark.parametrize("accelerator", ["cpu", "cuda"])
def test_deepspeed_is_asked_for_what_experts_ask(accelerator, monkeypatch):
    """Sums of gradients in float32, groups of a thousand million weights, pinned host memory."""
    monkeypatch.setattr("torch.cuda.is_available", lambda: accelerator == "cuda")
    config: Any = strategy_named("deepspeed_3_offload", accelerator).config
    assert config["data_types"] == {"grad_accum_dtype": "fp32"}
    first: Any = strategy_named("deepspeed_1", accelerator).config
    assert "data_types" not in first
    assert config["communication_data_type"] == first["communication_data_type"] == "fp32"
    assert config["zero_optimization"]["sub_group_size"] == 10**9
    if accelerator == "cuda":
        assert config["zero_optimization"]["offload_optimizer"]["pin_memory"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A tiny target on disk."""
    target, path = tiny_target(dtype=torch.float32), tmp_path_factory.mktemp("target")
    target.model.save_pretrained(path)
    target.tokenizer.save_pretrained(path)
    return path


def losses(recipe: Path, output: Path, folder: Path, strategy: str) -> dict[str, float]:
    """The figures of a training in a process of its own."""
    flags = [
        "--target",
        str(folder),
        "--output",
        str(output),
        "--trainer.strategy",
        strategy,
        "--trainer.devices",
        "1",
    ]
    command = [sys.executable, str(ROOT / "train.py"), "--config", str(recipe), *flags]
    done = subprocess.run(
        command,
        cwd=ROOT,
        text=True,
        capture_output=True,
        timeout=300,
        env={**os.environ, "OMP_NUM_THREADS": "1", "MASTER_PORT": str(free_port())},
    )
    assert done.returncode == 0, done.stderr
    return json.loads((output / "drafter" / "provenance.json").read_text())["measured"]


def test_deepspeed_trains_on_a_cpu_to_the_same_figures(recipe, folder, tmp_path):
    plain, sharded = (
        losses(recipe, tmp_path / name, folder, name) for name in ("auto", "deepspeed_2")
    )
    assert sharded == pytest.approx(plain, rel=1e-4)
