"""The learning curve: the same held-out data at every size, growing training data, and what goes
wrong in one line.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from data.corpora.word_problems import embedded_problems
from train import learning_curve
from train.learning_curve import FIGURES, PAGE, command
from train.resuming import same_run


@pytest.fixture
def judge(tmp_path: Path, tiny, monkeypatch) -> list[str]:
    monkeypatch.setattr(learning_curve, "load_target", lambda *_: tiny)
    file, config = tmp_path / "solutions.jsonl", tmp_path / "judge.yaml"
    file.write_text(
        "".join(json.dumps(row) + "\n" for row in embedded_problems(12)), encoding="utf-8"
    )
    config.write_text(
        json.dumps(
            {
                "drafter": {"class_path": "modules.judges.judge.Judge"},
                "data": {
                    "class_path": "data.labelled.labelled.LabelledData",
                    "init_args": {
                        "train": str(file),
                        "validation_fraction": 0.3,
                        "max_length": 400,
                        "rows": 2,
                        "corruptions": 1,
                    },
                },
                "optimizer": {"lr": 0.01},
                "trainer": {
                    "max_steps": 4,
                    "max_epochs": -1,
                    "val_check_interval": 4,
                    "accelerator": "cpu",
                },
            }
        )
    )
    return ["--config", str(config), "--output", str(tmp_path / "curve")]


def test_every_size_is_trained_and_judged_on_the_same_held_out_data(judge, tmp_path, capsys):
    assert command([*judge, "--sizes", "[200, 500, 1000000]"]) == 0
    points = json.loads((tmp_path / "curve" / FIGURES).read_text())
    tokens = [point["tokens"] for point in points]
    assert tokens[0] >= 200 and tokens[0] < tokens[1] < tokens[2] < 1000000
    assert all(0 <= point["held_out/auc"] <= 1 for point in points)
    runs = [
        json.loads((tmp_path / "curve" / size / "drafter" / "provenance.json").read_text())["data"]
        for size in ("200", "500", "1000000")
    ]
    assert len({run["held_out_documents"] for run in runs}) == 1
    assert [run["response_tokens"] for run in runs] == tokens
    text = (tmp_path / "curve" / PAGE).read_text()
    assert "<svg" in text and "training tokens" in text and f"{tokens[1]}" in text
    assert "held_out/auc" in capsys.readouterr().out


def test_mistakes_are_named(judge):
    for sizes in ("[]", "[20, 10]", "[0, 5]"):
        with pytest.raises(ValueError, match="--sizes must be ascending"):
            command([*judge, "--sizes", sizes])
    with pytest.raises(
        ValueError, match="--figure 'held_out/luck' was not measured: use one of val/loss|held_out"
    ):
        command([*judge, "--sizes", "[300]", "--figure", "held_out/luck"])
    with pytest.raises(ValueError, match="data.max_training_tokens must be 1 or above"):
        command([*judge, "--sizes", "[300]", "--data.max_training_tokens", "0"])


def test_a_key_that_says_nothing_may_be_younger_than_the_run_that_goes_on(tmp_path):
    file = tmp_path / "config.yaml"
    file.write_text(json.dumps({"data": {"class_path": "x.Y", "init_args": {"train": "embedded"}}}))
    now = {"train": "embedded", "max_training_tokens": None}
    same_run(file, {"data": {"class_path": "x.Y", "init_args": now}}, ["data"])
    with pytest.raises(
        ValueError, match="--resume: data.max_training_tokens is 5, but the run was begun with None"
    ):
        same_run(
            file,
            {"data": {"class_path": "x.Y", "init_args": {**now, "max_training_tokens": 5}}},
            ["data"],
        )
