"""A training on cached states loads its target without layers, and learns the same."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import train.run
from checkpoints.pretrained import load_pretrained
from data.features import command as cache
from modules.target.head_only.target import HeadTarget, WithoutLayers, load_head
from modules.target.loading import load_target
from modules.target.target import Target
from tests.fakes import tiny_batch, tiny_target
from train.cli import command

RECIPE = """\
drafter:
  class_path: modules.drafters.feature.eagle3.Eagle3
  init_args: {{steps: 2, draft_vocabulary: 48, fused_layers: [1, 2, 3]}}
target: {target}
dtype: float32
data: {{train: {data}, validation_fraction: 0.2, max_length: 128, rows: 1, features: {folder}}}
trainer: {{max_steps: 4, max_epochs: -1, val_check_interval: 4, accelerator: cpu}}
probe: {{prompts: 0}}
"""


@pytest.fixture(scope="module", params=["llama", "qwen3", "gemma2"])
def saved(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> str:
    target = tiny_target(request.param, torch.float32, layers=4)
    folder = tmp_path_factory.mktemp(request.param)
    target.stock.save_pretrained(folder, max_shard_size="20KB")
    target.tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.fixture
def loads(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the targets that were loaded whole for training."""
    seen: list[str] = []

    def load(name: str, *rest: Any) -> Target:
        seen.append(name)
        return load_target(name, *rest)

    monkeypatch.setattr(train.run, "load_target", load)
    return seen


def test_the_parts_are_those_of_the_whole_target(saved: str) -> None:
    whole = load_target(saved, "float32", "cpu")
    head = load_head(saved, whole.fingerprint(), "float32", "cpu")
    assert head.shape == whole.shape and head.fingerprint() == whole.fingerprint()
    assert head.head_digest() == whole.head_digest() and not len(head.architecture.layers)
    hidden = torch.randn(3, whole.shape.hidden_size)
    assert torch.equal(head.logits(head.final_norm(hidden)), whole.logits(whole.final_norm(hidden)))
    for layer in (0, 3):
        assert set(head.layer_weights(layer)) == set(whole.layer_weights(layer))
        for name in whole.layer_weights(layer):
            weight = f"layers.{layer}.{name}"
            assert torch.equal(head.copy_weight(weight), whole.copy_weight(weight)), weight
    with pytest.raises(WithoutLayers):
        head.features(tiny_batch(whole), ["final"])
    with pytest.raises(WithoutLayers):
        head.open(1, 16)


def test_training_learns_the_same_without_layers(
    saved: str, conversations: Path, tmp_path: Path, loads: list[str], monkeypatch
) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(RECIPE.format(target=saved, data=conversations, folder=tmp_path / "cache"))
    flags = ["--config", str(recipe)]
    # 1. Without a cache the whole target is loaded, and fills it.
    assert command([*flags, "--output", str(tmp_path / "whole")]) == 0
    assert loads == [saved]
    # 2. Then its layers are left out.
    heads: list[Target] = []
    monkeypatch.setattr(
        train.run,
        "training_module",
        lambda recipe, trainable, target, made=train.run.training_module: (
            heads.append(target),
            made(recipe, trainable, target),
        )[1],
    )
    assert command([*flags, "--output", str(tmp_path / "head")]) == 0
    assert loads == [saved] and [type(each) for each in heads] == [HeadTarget]
    target = load_target(saved, "float32", "cpu")
    one, other = (load_pretrained(tmp_path / name, target) for name in ("whole", "head"))
    same = other.state_dict()
    assert all(torch.equal(tensor, same[name]) for name, tensor in one.state_dict().items())
    # 3. A probe decodes, so it needs the layers; so do documents that were not cached.
    assert command([*flags, "--probe.prompts", "1", "--output", str(tmp_path / "probe")]) == 0
    more = ["--data.max_length", "40", "--output", str(tmp_path / "more")]
    assert command([*flags, *more]) == 0
    assert loads == [saved] * 3


def test_another_targets_head_is_noticed(
    conversations: Path, tmp_path: Path, loads: list[str]
) -> None:
    """The name is the same, the weights are not."""
    place, recipe = tmp_path / "target", tmp_path / "recipe.yaml"
    recipe.write_text(RECIPE.format(target=place, data=conversations, folder=tmp_path / "cache"))
    for seed in (0, 1):
        target = tiny_target("llama", torch.float32, layers=4, seed=seed)
        target.stock.save_pretrained(place)
        target.tokenizer.save_pretrained(place)
        flags = ["--config", str(recipe), "--output", str(tmp_path / str(seed))]
        if seed == 0:
            assert command(flags) == 0
            continue
        with pytest.raises(ValueError, match="belong to target .*, not to this one"):
            command(flags)
    assert loads == [str(place)] * 2


def test_states_are_cached_with_layers_spread_over_devices(
    conversations: Path, tmp_path: Path
) -> None:
    """`--device auto`: a target that no device holds alone."""
    pytest.importorskip("accelerate")
    target = tiny_target("llama", torch.float32, layers=4)
    target.stock.save_pretrained(tmp_path / "target")
    target.tokenizer.save_pretrained(tmp_path / "target")
    shards = []
    for device in ("cpu", "auto"):
        flags = ["--target", str(tmp_path / "target"), "--states", "[1, final]", "--dtype"]
        folder = ["float32", "--data.features", str(tmp_path / device), "--device", device]
        data = ["--data.train", str(conversations), "--data.max_length", "128"]
        assert cache([*data, *flags, *folder]) == 0
        shards.append(sorted(path.name for path in (tmp_path / device).glob("shard-*")))
        shards.append([path.read_bytes() for path in sorted((tmp_path / device).glob("shard-*"))])
    assert shards[0] == shards[2] and shards[1] == shards[3]
