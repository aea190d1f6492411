"""Components that train a part first, and that finish with the held-out batches."""

from __future__ import annotations

import json
import random
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from checkpoints.pretrained import Provenance, load_pretrained, save_pretrained
from configs.command_line.loading import CONFIGS
from data.corpora.word_problems import embedded_problems
from eval.methods.rows import Method, build_rows
from modules.contracts.batches import PreferenceBatch
from modules.contracts.sampling import Sampling
from modules.decoding.decoder import SpeculativeDecoder
from modules.drafters.heads.clover import Clover
from modules.judges.judge import Judge
from modules.preference.cdpo import CDPO, PAGE, ContrastiveEstimator
from tests.test_style import ROOT
from tests.train.conftest import WORDS
from train.cli import command


@pytest.fixture
def pairs(tmp_path) -> Path:
    chance = random.Random(0)
    file = tmp_path / "pairs.jsonl"
    rows = [
        {
            "prompt": f"{' '.join(chance.choices(WORDS, k=3))} {i}?",
            "chosen": " ".join(chance.choices(WORDS, k=4)),
            "rejected": " ".join(chance.choices(WORDS, k=4)),
        }
        for i in range(12)
    ]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return file


def recipe(folder: Path, pairs: Path, drafter: dict[str, Any]) -> Path:
    file = folder / "tiny.yaml"
    data = {
        "class_path": "data.preferences.PreferenceData",
        "init_args": {"train": str(pairs), "validation_fraction": 0.2, "max_length": 96, "rows": 4},
    }
    file.write_text(
        json.dumps(
            {
                "drafter": drafter,
                "data": data,
                "optimizer": {"lr": 0.01},
                "trainer": {
                    "max_steps": 3,
                    "max_epochs": -1,
                    "val_check_interval": 1,
                    "accelerator": "cpu",
                    "log_every_n_steps": 1,
                },
            }
        ),
        encoding="utf-8",
    )
    return file


def test_cdpo_end_to_end_leaves_adapters_figures_and_a_page(tiny, pairs, tmp_path):
    drafter = {
        "class_path": "modules.preference.cdpo.CDPO",
        "init_args": {"rank": 2, "estimator_rank": 2, "estimator_lr": 0.01},
    }
    before = tiny.fingerprint()
    output = tmp_path / "run"
    assert (
        command(["--config", str(recipe(tmp_path, pairs, drafter)), "--output", str(output)]) == 0
    )
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


def test_cdpo_tells_how_well_it_finds_the_errors_of_solutions(tiny, tmp_path, capsys):
    file, output = tmp_path / "solutions.jsonl", tmp_path / "run"
    file.write_text(
        "".join(json.dumps(row) + "\n" for row in embedded_problems(12)), encoding="utf-8"
    )
    drafter = {
        "class_path": "modules.preference.cdpo.CDPO",
        "init_args": {"rank": 2, "estimator_rank": 2},
    }
    arguments = [
        "--config",
        str(recipe(tmp_path, file, drafter)),
        "--output",
        str(output),
        "--data.max_length",
        "500",
    ]
    assert command(arguments) == 0
    measured = json.loads((output / "drafter" / "provenance.json").read_text())["measured"]
    assert 0 <= measured["held_out/criticality_auc"] <= 1 and measured["held_out/known_errors"] >= 1
    page = (output / PAGE).read_text()
    assert 'class="error"' in page or 'class="lowest error"' in page
    printed = capsys.readouterr().out
    assert "held_out/criticality_auc" in printed and "val/preference_accuracy" in printed


def test_the_estimators_see_every_trace_once_an_epoch(tiny, tmp_path, monkeypatch):
    """Although each right solution stands in the pairs of its corrupted copies too."""
    file, output, seen = tmp_path / "solutions.jsonl", tmp_path / "run", Counter[tuple[int, ...]]()
    file.write_text("".join(json.dumps(row) + "\n" for row in embedded_problems(10)))
    plain = ContrastiveEstimator.loss

    def watched(self: Any, batch: PreferenceBatch, target: Any, progress: float) -> Any:
        text = batch.chosen
        texts = [tuple(ids[mask].tolist()) for ids, mask in zip(text.input_ids, text.loss_mask)]
        seen.update(text for text in texts if text and self.training)
        return plain(self, batch, target, progress)

    monkeypatch.setattr(ContrastiveEstimator, "loss", watched)
    drafter = {
        "class_path": "modules.preference.cdpo.CDPO",
        "init_args": {"rank": 2, "estimator_rank": 2, "estimator_epochs": 2},
    }
    command(
        [
            "--config",
            str(recipe(tmp_path, file, drafter)),
            "--output",
            str(output),
            "--data.max_length",
            "500",
            "--data.corruptions",
            "2",
        ]
    )
    counts = json.loads((output / "drafter" / "provenance.json").read_text())["data"]
    assert set(seen.values()) == {2} and len(seen) == counts["right_traces"] < counts["documents"]
    assert counts["wrong_traces"] > counts["right_traces"]


def test_a_resumed_run_keeps_the_parts_it_trained_first(tiny, pairs, tmp_path):
    drafter = {
        "class_path": "modules.preference.cdpo.CDPO",
        "init_args": {"rank": 2, "estimator_rank": 2},
    }
    config, output = recipe(tmp_path, pairs, drafter), tmp_path / "run"
    command(["--config", str(config), "--output", str(output), "--trainer.max_steps", "1"])
    first = load_pretrained(output).state_dict()
    command(["--config", str(config), "--output", str(output), "--resume", "last"])
    second = load_pretrained(output).state_dict()
    for name, tensor in first.items():
        assert torch.equal(tensor, second[name]) or name.startswith("policy"), name
    assert not (output / "lightning" / "estimator" / "version_1").exists()


def test_a_judge_is_calibrated_saved_and_named_as_a_rule(tiny, tmp_path):
    file, config, output = tmp_path / "solutions.jsonl", tmp_path / "judge.yaml", tmp_path / "judge"
    file.write_text(
        "".join(json.dumps(row) + "\n" for row in embedded_problems(12)), encoding="utf-8"
    )
    config.write_text(
        json.dumps(
            {
                "drafter": {
                    "class_path": "modules.judges.judge.Judge",
                    "init_args": {"threshold": None, "precision": 0.6},
                },
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
                "trainer": {"max_steps": 4, "max_epochs": -1, "accelerator": "cpu"},
            }
        )
    )
    assert command(["--config", str(config), "--output", str(output)]) == 0
    judge = load_pretrained(output, tiny)
    measured = json.loads((output / "drafter" / "provenance.json").read_text())["measured"]
    assert isinstance(judge, Judge) and float(judge.threshold) == pytest.approx(
        measured["held_out/threshold"]
    )
    assert 0 <= measured["held_out/auc"] <= 1 and "val/auc" in measured
    drafter = {"class_path": "tests.fakes.ScriptedDrafter"}
    methods = [
        Method("calibrated", drafter, rule=str(output)),
        Method("strict", drafter, rule={"trained": str(output), "init_args": {"threshold": 2.0}}),
        Method(
            "near",
            drafter,
            rule={"class_path": "modules.acceptance.relaxed.TopKRule", "init_args": {"k": 2}},
        ),
    ]
    for method in methods:
        method.check()
    rows = build_rows(methods, tiny, Sampling())[1:]
    assert [row.rule.split()[0] for row in rows] == ["judge", "judge", "top_k"]
    assert not any(row.claims_lossless for row in rows)
    plain = SpeculativeDecoder(tiny).decode([[7, 8, 9]], Sampling(), 12)[0].ids
    assert rows[1].decoder.decode([[7, 8, 9]], Sampling(), 12)[0].ids == plain
    for rule, message in (
        (str(tmp_path / "nowhere"), "does not exist"),
        ("nothing", "rule 'nothing' is unknown"),
        ({"trained": str(output), "other": 1}, "other is wrong"),
        (str(tmp_path), "holds no drafter"),
    ):
        with pytest.raises(ValueError, match=message):
            Method("wrong", drafter, rule=rule).check()
    with pytest.raises(ValueError, match="init_args"):
        build_rows(
            [Method("wrong", drafter, rule={"trained": str(output), "init_args": {"delta": 1}})],
            tiny,
            Sampling(),
        )


RELAXED = {
    "relaxed": CONFIGS / "eval" / "relaxed.yaml",
    "judge": ROOT / "docs/benchmarks/judge_xeon2_202611/methods.yaml",
    "judge_free": ROOT / "docs/benchmarks/judge_xeon2_202611/methods_token_recycling.yaml",
}


@pytest.mark.parametrize("config", RELAXED)
def test_the_relaxed_evaluations_name_every_rule(config, tiny, tmp_path):
    """The shipped rows, with a folder for each part that is to be trained first."""
    clover = Clover(tiny.shape, heads=3, draft_vocabulary=64)
    runs = {"runs/clover": clover, "runs/bench/clover": clover, "runs/judge": Judge(tiny.shape)}
    for name, component in runs.items():
        save_pretrained(component, tmp_path / name, Provenance.of(tiny))
    text = RELAXED[config].read_text().replace(": runs/", f": {tmp_path}/runs/")
    methods = [Method(**row) for row in yaml.safe_load(text)["methods"]]
    for method in methods:
        method.check()
    rows = build_rows(methods, tiny, Sampling())
    found = {row.name: row.decoder.decode([[7, 8, 9]], Sampling(), 8)[0] for row in rows}
    assert found["lossless"].ids == found["autoregressive"].ids and all(
        len(trace.ids) for trace in found.values()
    )
    assert {"autoregressive", "lossless", "judge", "typical", "top"} <= {
        name.split("_")[0] for name in found
    }
    assert ("divergence" in text) == (config != "judge_free")
    assert config != "relaxed" or found["typical"].ids == found["autoregressive"].ids
    control = [row.name for row in rows if row.quality.get("control")]
    assert control == ([] if config == "relaxed" else ["judge_0"])
    assert config != "judge" or min(found["judge_0"].accepted[:-1]) > 1, "everything is let through"


def test_a_drafter_is_trained_on_preferences_and_stays_a_drafter(tiny, conversations, tmp_path):
    first, second = tmp_path / "first", tmp_path / "second"
    common = [
        "--drafter",
        "modules.drafters.heads.medusa.Medusa",
        "--drafter.heads",
        "2",
        "--data.train",
        str(conversations),
        "--data.max_length",
        "128",
        "--data.validation_fraction",
        "0.2",
        "--trainer.max_steps",
        "2",
        "--trainer.max_epochs=-1",
        "--trainer.accelerator",
        "cpu",
        "--probe.prompts",
        "1",
        "--probe.max_new_tokens",
        "4",
    ]
    assert command([*common, "--output", str(first)]) == 0
    objective = "modules.preference.aligned_drafting.AlignedDrafting"
    arguments = [
        *common,
        "--init_from",
        str(first),
        "--objective",
        objective,
        "--objective.anchor",
        "0.0",
    ]
    assert command([*arguments, "--output", str(second)]) == 0
    before, after = (
        load_pretrained(first, tiny).state_dict(),
        load_pretrained(second, tiny).state_dict(),
    )
    assert set(before) == set(after) and any(
        not torch.equal(before[name], after[name]) for name in before
    )
    measured = json.loads((second / "drafter" / "provenance.json").read_text())["measured"]
    assert "val/alignment" in measured and "probe/tau" in measured


@pytest.mark.parametrize("name", ["clover", "eagle"])
def test_the_shipped_objective_aligns_a_head_and_a_feature_drafter(
    name, tiny, conversations, tmp_path
):
    """As preference/aligned.yaml says: a trained drafter goes on with it, or as long without
    it.
    """
    first, aligned, longer = (tmp_path / kind for kind in ("first", "aligned", "longer"))
    common = [
        "--config",
        f"{name}.yaml",
        "--drafter.draft_vocabulary",
        "48",
        "--data.train",
        str(conversations),
        "--data.max_length",
        "128",
        "--data.validation_fraction",
        "0.2",
        "--trainer.max_steps",
        "2",
        "--trainer.max_epochs=-1",
        "--trainer.accelerator",
        "cpu",
        "--probe.prompts",
        "0",
    ]
    assert command([*common, "--output", str(first)]) == 0
    common += ["--config", "preference/aligned.yaml", "--init_from", str(first)]
    assert command([*common, "--output", str(aligned)]) == 0
    assert command([*common, "--objective", "null", "--output", str(longer)]) == 0
    settings = [yaml.safe_load((run / "config.yaml").read_text()) for run in (aligned, longer)]
    assert (
        settings[0]["objective"]["init_args"]["beta"] == 0.5
        and settings[1].get("objective") is None
    )
    assert (
        settings[0]["optimizer"] == settings[1]["optimizer"]
        and settings[0]["trainer"] == settings[1]["trainer"]
    )
    measured = [
        json.loads((run / "drafter" / "provenance.json").read_text())["measured"]
        for run in (aligned, longer)
    ]
    assert "val/alignment" in measured[0] and "val/alignment" not in measured[1]
    weights = [load_pretrained(run, tiny).state_dict() for run in (aligned, longer)]
    assert any(not torch.equal(tensor, weights[1][key]) for key, tensor in weights[0].items())
