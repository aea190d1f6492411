"""Mistakes that are told before a target is loaded, and nulls that config.yaml keeps."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from configs.command_line.loading import parse
from data.regenerate import Generation, answer_file
from eval.evaluation import Evaluation, evaluate
from modules.target.loading import check_room
from train.cli import command, make_parser, prepare, recipe_settings
from train.settings import OptimizerSettings


@pytest.fixture
def short(tmp_path: Path) -> str:
    """A folder with a target's config, and nothing that could be loaded."""
    config = {"model_type": "llama", "hidden_size": 32, "max_position_embeddings": 1024}
    folder = tmp_path / "short"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    return str(folder)


@pytest.mark.parametrize("name", ["lr", "muon_lr"])
@pytest.mark.parametrize("rate", [1e30, 11.0, 0.0, -1.0, float("nan"), float("inf")])
def test_rates_that_cannot_train(name: str, rate: float) -> None:
    with pytest.raises(ValueError, match=rf"optimizer.{name} must be above 0 and at most 10, got"):
        OptimizerSettings(**{name: rate})


def test_a_rate_of_a_stage_is_read_at_the_start(tiny, tmp_path) -> None:
    parser = make_parser()
    flags = ["--drafter.stream_lr", "1e30", "--output", str(tmp_path / "run")]
    config = parse(parser, ["--config", "m2r2.yaml", *flags])
    with pytest.raises(ValueError, match="drafter: the learning rate of stream must be above 0"):
        prepare(parser, config)


def test_room_is_read_from_the_config_alone(short: str) -> None:
    check_room(short, 1023)
    with pytest.raises(ValueError, match="max_new_tokens 1024 leaves no room .*, 1024 tokens"):
        check_room(short, 1024)
    check_room("no/such/target", 64)


def test_every_command_that_answers_asks_for_room(short: str, tmp_path: Path) -> None:
    words = "max_new_tokens 5000 leaves no room"
    with pytest.raises(ValueError, match=words):
        evaluate(Evaluation(target=short, max_new_tokens=5000, limit=1), tmp_path / "eval")
    chats = tmp_path / "chats.jsonl"
    chats.write_text('{"prompt": "hello"}\n')
    with pytest.raises(ValueError, match=words):
        answer_file(
            str(chats),
            str(tmp_path / "out.jsonl"),
            target=short,
            generation=Generation(max_new_tokens=5000),
        )


def test_the_probe_of_a_training_asks_too(tiny, recipe, tmp_path, short) -> None:
    flags = ["--target", short, "--probe.max_new_tokens", "1024"]
    with pytest.raises(ValueError, match="probe.max_new_tokens 1024 leaves no room"):
        command(["--config", str(recipe), *flags, "--output", str(tmp_path / "run")])


def test_config_yaml_keeps_nulls_that_differ_from_the_default(tiny, tmp_path) -> None:
    """A recipe without a draft vocabulary must not come back with the class's own."""
    file = tmp_path / "whole.yaml"
    parser = make_parser()
    config = parse(parser, ["--config", "clover.yaml", "--drafter.draft_vocabulary", "null"])
    settings = recipe_settings(parser, config)
    assert settings["drafter"]["init_args"]["draft_vocabulary"] is None
    file.write_text(yaml.safe_dump(settings))
    again = parse(make_parser(), ["--config", str(file)])
    assert again.drafter.init_args.draft_vocabulary is None
    assert recipe_settings(parser, again) == settings
