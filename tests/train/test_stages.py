"""Components that train a part first, and that finish with the held-out batches."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch

from checkpoints.pretrained import load_pretrained
from modules.alignment.cdpo import CDPO, PAGE
from tests.train.conftest import WORDS
from train.cli import command


@pytest.fixture
def pairs(tmp_path) -> Path:
    chance = random.Random(0)
    file = tmp_path / "pairs.jsonl"
    rows = [{"prompt": f"{' '.join(chance.choices(WORDS, k=3))} {i}?", "chosen": " ".join(chance.choices(WORDS, k=4)),
             "rejected": " ".join(chance.choices(WORDS, k=4))} for i in range(12)]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return file


def recipe(folder: Path, pairs: Path, drafter: dict[str, Any]) -> Path:
    file = folder / "tiny.yaml"
    data = {"class_path": "data.preferences.PreferenceData",
            "init_args": {"train": str(pairs), "validation_fraction": 0.2, "max_length": 96, "rows": 4}}
    file.write_text(json.dumps({
        "drafter": drafter, "data": data, "optimizer": {"lr": 0.01},
        "trainer": {"max_steps": 3, "max_epochs": -1, "val_check_interval": 1, "accelerator": "cpu",
                    "log_every_n_steps": 1}}), encoding="utf-8")
    return file


def test_cdpo_end_to_end_leaves_adapters_figures_and_a_page(tiny, pairs, tmp_path):
    drafter = {"class_path": "modules.alignment.cdpo.CDPO",
               "init_args": {"rank": 2, "estimator_rank": 2, "estimator_lr": 0.01}}
    before = tiny.fingerprint()
    output = tmp_path / "run"
    assert command(["--config", str(recipe(tmp_path, pairs, drafter)), "--output", str(output)]) == 0
    trained = load_pretrained(output, tiny)
    assert isinstance(trained, CDPO)
    for part in (trained.policy, trained.estimator.positive, trained.estimator.negative):
        ups = [parameter for name, parameter in part.named_parameters() if name.endswith("up")]
        assert all(bool(up.any()) for up in ups), "a part was not trained"
    assert not any(parameter.requires_grad for parameter in trained.estimator.parameters())
    measured = json.loads((output / "drafter" / "provenance.json").read_text())["measured"]
    assert 0 <= measured["val/preference_accuracy"] <= 1 and "val/reward_margin" in measured
    assert "probe/tau" not in measured and (output / PAGE).read_text().startswith("<!doctype html>")
    logs = output / "lightning" / "estimator" / "version_0" / "metrics.csv"
    assert "val/positive_cross_entropy" in logs.read_text()
    tiny._fingerprint = None
    assert tiny.fingerprint() == before


def test_a_resumed_run_keeps_the_parts_it_trained_first(tiny, pairs, tmp_path):
    drafter = {"class_path": "modules.alignment.cdpo.CDPO", "init_args": {"rank": 2, "estimator_rank": 2}}
    config, output = recipe(tmp_path, pairs, drafter), tmp_path / "run"
    command(["--config", str(config), "--output", str(output), "--trainer.max_steps", "1"])
    first = load_pretrained(output).state_dict()
    command(["--config", str(config), "--output", str(output), "--resume", "last"])
    second = load_pretrained(output).state_dict()
    for name, tensor in first.items():
        assert torch.equal(tensor, second[name]) or name.startswith("policy"), name
    assert not (output / "lightning" / "estimator" / "version_1").exists()
