"""`python -m data.features` reads a recipe's config, and its mistakes are one line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import yaml

import data.features as module
from data.feature_cache.cache import FeatureCache
from data.features import command
from modules.target.target import Target
from tests.fakes import tiny_target


@pytest.fixture(scope="module")
def target() -> Target:
    return tiny_target(dtype=torch.float32)


@pytest.fixture()
def source(tmp_path: Path) -> str:
    rows = [{"prompt": f"number {n}", "response": "so it is"} for n in range(12)]
    (tmp_path / "chats.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(tmp_path / "chats.jsonl")


def test_a_recipe_caches_what_its_drafter_reads(
    target: Target, source: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "load_target", lambda *_: target)
    recipe = {
        "target": "tiny",
        "drafter": {"class_path": "modules.drafters.heads.medusa.Medusa"},
        "optimizer": {"lr": 0.1},
        "data": {"train": source, "max_length": 64},
        "trainer": {"max_epochs": 3},
        "seed": 3,
    }
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    assert (
        command(
            ["--config", str(tmp_path / "recipe.yaml"), "--data.features", str(tmp_path / "cache")]
        )
        == 0
    )
    cache = FeatureCache(tmp_path / "cache", target.fingerprint(), ["final"])
    assert sum(len(shard["documents"]) for shard in cache.manifest["shards"]) == 12


def test_states_can_be_named(
    target: Target, source: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "load_target", lambda *_: target)
    folder = str(tmp_path / "cache")
    assert (
        command(
            [
                "--data.train",
                source,
                "--data.max_length",
                "64",
                "--states",
                "[1, pre_norm]",
                "--data.features",
                folder,
            ]
        )
        == 0
    )
    assert FeatureCache(folder, target.fingerprint(), [1, "pre_norm"]).manifest["states"] == [
        "1",
        "pre_norm",
    ]


def test_matrices_can_be_multiplied_in_bfloat16(
    target: Target, source: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "load_target", lambda *_: target)
    found = {}
    computed_in = {"32-true": "float32", "bf16-mixed": "bfloat16"}
    for precision in computed_in:
        folder = str(tmp_path / precision)
        assert (
            command(
                [
                    "--data.train",
                    source,
                    "--data.max_length",
                    "64",
                    "--states",
                    "[final]",
                    "--data.features",
                    folder,
                    "--data.features_dtype",
                    "float32",
                    "--precision",
                    precision,
                ]
            )
            == 0
        )
        cache = FeatureCache(folder, target.fingerprint(), ["final"])
        documents = [key for shard in cache.manifest["shards"] for key, _ in shard["documents"]]
        assert {shard["computed_in"] for shard in cache.manifest["shards"]} == {
            computed_in[precision]
        }
        found[precision] = torch.cat([cache.read(key)["final"] for key in sorted(documents)])
    distance = (found["bf16-mixed"] - found["32-true"]).norm() / found["32-true"].norm()
    assert 0 < distance < 0.03


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--states", "[final]"], "data.features is not set"),
        (["--data.features", "x"], "states is not set"),
        (["--data.rows", "x"], "data.rows"),
        (["--data.trian", "x"], "trian"),
        (["--config", "none"], "--config 'none'"),
    ],
)
def test_mistakes_are_one_line(arguments: list[str], message: str, source: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        command(["--data.train", source, *arguments])
    assert "\n" not in str(caught.value)


def test_parts_of_the_work_fill_one_folder(
    target: Target,
    source: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(module, "load_target", lambda *_: target)
    arguments = [
        "--data.train",
        source,
        "--data.max_length",
        "64",
        "--states",
        "[final]",
        "--data.features",
        str(tmp_path / "cache"),
    ]
    found = []
    for part in ("0/2", "1/2"):
        assert command([*arguments, "--shard", part]) == 0
        assert f"part {part} is written" in capsys.readouterr().out
        shards = FeatureCache(tmp_path / "cache", target.fingerprint(), ["final"]).manifest[
            "shards"
        ]
        found.append([key for shard in shards for key, _ in shard["documents"]])
    assert 0 < len(found[0]) < 12 and len(found[1]) == len(set(found[1])) == 12
    with pytest.raises(ValueError, match="--shard must be I/N with I from 0 to N - 1, got '2/2'"):
        command([*arguments, "--shard", "2/2"])
