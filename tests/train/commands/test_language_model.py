"""Small language models from scratch: the command, its folder, its figures."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from configs.command_line.loading import CONFIGS
from eval.analysis.language_text import command as read_command
from eval.analysis.language_text import evaluate
from modules.tokenization.hierarchical import Hierarchical
from modules.tokenization.learn_your_tokens import LearnYourTokens
from modules.tokenization.saved import load_language_model
from modules.tokenization.units import ByteUnits
from train.language_model import (
    LanguageModelModule,
    LanguageModelSettings,
    command,
    documents,
    make_model,
)

FOLDER = "modules.tokenization"
SIZES = {"width": 16, "layers": 1, "heads": 2, "length": 16}
TINY = {
    f"{FOLDER}.hierarchical.Hierarchical": ("bytes", {"unit_width": 16, "unit_heads": 2}),
    f"{FOLDER}.learn_your_tokens.LearnYourTokens": ("characters", {}),
    f"{FOLDER}.subword.Subword": ("subwords", {}),
    f"{FOLDER}.byte2word.Byte2Word": ("subwords", {"byte_width": 8}),
    f"{FOLDER}.lexinvariant.Lexinvariant": (
        "characters",
        {"width": 288, "orthonormal": True, "curriculum": True, "induction": True},
    ),
}


HAT = {"class_path": f"{FOLDER}.hierarchical.Hierarchical"}


def run(tmp_path: Path, path: str, **settings: Any) -> dict[str, float]:
    """The figures of a training of a few steps."""
    units, extra = TINY[path]
    model = {"class_path": path, "init_args": {**SIZES, **extra}}
    settings = {"model": model, "units": units, "vocabulary": 280, **settings}
    settings = {"steps": 3, "batch": 2, "warmup_steps": 1, "limit": 12, **settings}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump({"settings": settings}))
    arguments = ["--config", str(tmp_path / "config.yaml"), "--output", str(tmp_path / "run")]
    assert command(arguments) == 0
    assert not logging.getLogger("lightning.pytorch").isEnabledFor(logging.INFO)
    return json.loads((tmp_path / "run" / "metrics.json").read_text())


@pytest.mark.parametrize("path", TINY)
def test_a_folder_scores_as_the_model_that_was_trained(tmp_path: Path, path: str) -> None:
    figures = run(tmp_path, path)
    model = load_language_model(tmp_path / "run" / "model")
    stored = json.loads((tmp_path / "run" / "model" / "config.json").read_text())["training"]
    _, held_out = documents(LanguageModelSettings(**stored))
    score, _, _ = evaluate(model, held_out, 2)
    assert score.bits_per_byte == pytest.approx(figures["bits_per_byte"], rel=1e-4)
    assert figures["bits_per_byte_with_typos"] != figures["bits_per_byte"]
    assert 0 < figures["backbone_steps_per_byte"] <= 1.2 < figures["multiply_adds_per_byte"]


def test_other_text_is_scored_as_held_out_text_is(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = tmp_path / "text.txt"
    text.write_text("one two three four five six seven eight nine ten. " * 20)
    figures = run(tmp_path, f"{FOLDER}.hierarchical.Hierarchical", train=str(text))
    _, (held_out,) = documents(LanguageModelSettings(HAT, train=str(text)))
    (tmp_path / "other.txt").write_text(held_out)
    capsys.readouterr()
    output = tmp_path / "figures.json"
    arguments = ["--model", str(tmp_path / "run"), "--texts", str(tmp_path / "other.txt")]
    assert read_command([*arguments, "--batch", "2", "--output", str(output)]) == 0
    assert json.loads(capsys.readouterr().out) == json.loads(output.read_text()) == figures


@pytest.mark.parametrize("wrong", [["--batch", "0"], ["--typos", "1.5"], ["--limit", "0"]])
def test_other_text_is_refused_before_a_model_is_loaded(wrong: list[str]) -> None:
    with pytest.raises(ValueError, match=wrong[0].removeprefix("--")):
        read_command(["--model", "nowhere", *wrong])


def test_texts_without_a_word_are_refused(tmp_path: Path) -> None:
    path = f"{FOLDER}.byte2word.Byte2Word"
    run(tmp_path, path)
    (tmp_path / "empty.txt").write_text("")
    output = tmp_path / "figures.json"
    arguments = ["--model", str(tmp_path / "run"), "--texts", str(tmp_path / "empty.txt")]
    with pytest.raises(ValueError, match="texts have nothing to predict"):
        read_command([*arguments, "--output", str(output)])
    assert not output.exists()


def test_training_learns_and_a_seed_decides_all(tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("one two three four five six seven eight nine ten. " * 60)
    path = f"{FOLDER}.hierarchical.Hierarchical"
    runs = []
    for name in ("first", "second"):
        place = tmp_path / name
        place.mkdir()
        runs.append(run(place, path, train=str(text), steps=60, lr=1e-2))
    assert runs[0] == runs[1]
    assert runs[0]["bits_per_byte"] < 1.5 and runs[0]["word_accuracy"] > 0.5


def test_a_run_is_not_replaced_and_arguments_of_the_model_are_flags(tmp_path: Path) -> None:
    recipe = ["--config", "tokenization/hierarchical.yaml", "--output", str(tmp_path / "run")]
    recipe += ["--settings.limit", "12", "--settings.steps", "1"]
    recipe += ["--settings.model.init_args.width", "16", "--settings.model.init_args.layers", "1"]
    assert command(recipe) == 0
    config = json.loads((tmp_path / "run" / "model" / "config.json").read_text())
    assert config["settings"]["width"] == 16 and config["settings"]["unit_width"] == 128
    with pytest.raises(ValueError, match="already holds a run: add --overwrite"):
        command([*recipe, "--settings.seed", "1"])
    assert json.loads((tmp_path / "run" / "model" / "config.json").read_text()) == config
    assert command([*recipe, "--settings.seed", "1", "--overwrite"]) == 0
    again = json.loads((tmp_path / "run" / "model" / "config.json").read_text())
    assert again["training"]["seed"] == 1


def test_text_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    for name, words in (("none.txt", "none.txt cannot be read"), ("latin.txt", "is not UTF-8")):
        (tmp_path / "latin.txt").write_bytes(b"caf\xe9")
        with pytest.raises(ValueError, match=f"train: .*{words}"):
            documents(LanguageModelSettings(HAT, train=str(tmp_path / name)))


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_the_precision_is_the_trainings(
    tmp_path: Path, precision: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    step, seen = LanguageModelModule.training_step, set()

    def noted(self: LanguageModelModule, batch: Any, index: int) -> Any:
        seen.add(torch.is_autocast_enabled("cpu"))
        return step(self, batch, index)

    monkeypatch.setattr(LanguageModelModule, "training_step", noted)
    run(tmp_path, f"{FOLDER}.subword.Subword", precision=precision)
    assert seen == {precision == "bf16-mixed"}


def test_no_text_counts_twice(tmp_path: Path) -> None:
    """Every byte of the held-out text is predicted once."""
    settings = LanguageModelSettings(
        {"class_path": f"{FOLDER}.hierarchical.Hierarchical"}, limit=12
    )
    texts, held_out = documents(settings)
    assert set(texts).isdisjoint(held_out)
    (tmp_path / "a").mkdir()
    run(tmp_path / "a", f"{FOLDER}.hierarchical.Hierarchical")
    score, _, _ = evaluate(load_language_model(tmp_path / "a" / "run" / "model"), held_out, 2)
    assert score.bytes == len("".join(held_out).encode())


def test_a_strangers_folder_is_refused_before_memory_is_used(tmp_path: Path) -> None:
    run(tmp_path, f"{FOLDER}.hierarchical.Hierarchical")
    place = tmp_path / "run" / "model" / "config.json"
    config = json.loads(place.read_text())
    huge = {**config, "settings": {**config["settings"], "width": 1 << 16, "heads": 2}}
    for wrong, words in (
        (huge, "do not fit: .*size mismatch"),
        ({**config, "class": "words.capped"}, "is no language model of ours"),
        ({**config, "settings": {**config["settings"], "colour": 1}}, "do not fit: .*colour"),
        ({**config, "settings": {**config["settings"], "width": 16.0}}, "width must be a whole"),
        (
            {**config, "settings": {**config["settings"], "length": 1 << 17}},
            "length must be at most",
        ),
        ({**config, "units": {"kind": "letters"}}, "units cannot be read"),
        ({**config, "class": "units.ByteUnits"}, "is no language model of ours"),
        ({"units": config["units"]}, "no language model of ours"),
    ):
        place.write_text(json.dumps(wrong))
        with pytest.raises(ValueError, match=words):
            load_language_model(place.parent)


@pytest.mark.parametrize(
    "name",
    sorted({path.stem for path in (CONFIGS / "tokenization").glob("*.yaml")} - {"zett"}),
)
def test_shipped_recipes_can_be_built(name: str) -> None:
    stored = yaml.safe_load((CONFIGS / "tokenization" / f"{name}.yaml").read_text())
    settings = LanguageModelSettings(**stored["settings"])
    with torch.device("meta"):
        make_model(settings, ["".join(map(chr, range(33, 300)))])


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"steps": 0}, "steps must be at least 1, got 0"),
        ({"held_out": 1.0}, "held_out must be between 0 and 1"),
        ({"limit": 0}, "limit must be at least 1, got 0"),
        ({"warmup_steps": -1}, "warmup_steps must be at least 0, got -1"),
        ({"typos": 20.0}, "typos must be from 0 to 1, got 20.0"),
        ({"lr": -1.0}, "lr must be above 0, got -1.0"),
        ({"units": "words"}, "units 'words' is unknown: use bytes, characters or subwords"),
        ({"units": "subwords", "vocabulary": 200}, "vocabulary 200 has no room for all bytes"),
        ({"model": {"class_path": f"{FOLDER}.words.capped"}}, "is no language_model"),
        ({"model": {"class_path": "os.system"}}, "is in no package"),
        ({"model": {**HAT, "init_args": {"width": "x"}}}, "width must be a whole number, got 'x'"),
        ({"model": {**HAT, "init_args": {"width": 1.5}}}, "width must be a whole number, got 1.5"),
        ({"model": {**HAT, "widht": 64}}, "unexpected keyword argument 'widht'"),
    ],
)
def test_settings_that_cannot_run_are_refused(settings: dict[str, Any], words: str) -> None:
    model = {"class_path": f"{FOLDER}.hierarchical.Hierarchical"}
    with pytest.raises(ValueError, match=words):
        LanguageModelSettings(**{"model": model, **settings})


def test_all_multiply_adds_are_counted() -> None:
    """By hand, those of fused layers too; rotations and what is no product are left out."""
    model = Hierarchical(ByteUnits(), 16, 1, 2, unit_width=8, unit_layers=1, unit_heads=2)
    text, inner = "The cat sat on the mat.", model.backbone.config.intermediate_size
    (row,) = model.rows(text)
    words, length, wide, narrow = len(row), model.most_bytes + 1, 16, 8
    ends = words * length * (12 * narrow**2 + 2 * length * narrow)
    backbone = words * (4 * wide**2 + 3 * wide * inner + 2 * words * wide)
    between = 2 * words * wide * narrow + words * length * narrow * (model.units.size + 1)
    _, steps, work = evaluate(model, [text], 1)
    assert steps == words and work == pytest.approx(2 * ends + backbone + between, rel=0.01)
    assert torch.backends.mha.get_fastpath_enabled()


def test_every_state_of_a_word_is_a_position_of_the_backbone() -> None:
    model = LearnYourTokens(ByteUnits(), 16, 1, 2, 1, pooled=3, length=8)
    _, steps, _ = evaluate(model, ["The cat sat.", "A dog"], 2)
    assert steps == 3 * ((3 + 1) + (2 + 1))
