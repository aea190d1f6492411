"""One key, `chat_template`, gives a target's chat template its arguments, in every command."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest

from checkpoints.pretrained import read_config, save_pretrained
from checkpoints.provenance import Provenance
from data import datastore, regenerate
from data import features as cache_command
from data.chat_tokens import prompt_ids, render
from data.conversations import tokenize
from data.reading.rows import Conversation
from eval import cli, evaluation, generate
from eval.methods.templates import chat_arguments
from modules.drafters.heads.medusa import Medusa
from modules.target.loading import load_target, outline
from modules.target.target import Target
from modules.target.tokenizers.chat_template import arguments_of, give_arguments
from tests.fakes import tiny_target
from train import run as training
from train.cli import command

TEMPLATE = (
    "{% for m in messages %}{{ '<|' + m.role + '|>' + m.content + '<|end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% if style == 'short' %}ok {% endif %}{% endif %}"
)
ASKED = [{"role": "user", "content": "hi"}]
SHORT = {"style": "short"}


def target_with(arguments: dict[str, Any] | None = None) -> Target:
    target = tiny_target()
    target.tokenizer.chat_template = TEMPLATE
    give_arguments(target.tokenizer, arguments or {}, "tiny")
    return target


@pytest.fixture
def loaded(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """What commands load targets with, which are tiny."""
    asked: list[dict[str, Any]] = []

    def load(
        name: str, dtype: str = "", device: str = "", chat_template: dict[str, Any] | None = None
    ) -> Target:
        asked.append(dict(chat_template or {}))
        return target_with(chat_template)

    for module in (cache_command, datastore, regenerate, evaluation, generate, training):
        monkeypatch.setattr(module, "load_target", load)
    return asked


@pytest.fixture
def rows(tmp_path: Path) -> str:
    file = tmp_path / "rows.jsonl"
    file.write_text(
        "".join(
            json.dumps({"prompt": f"say {i}", "response": f"ok {i} is"}) + "\n" for i in range(12)
        )
    )
    return str(file)


def drafter(folder: Path, arguments: dict[str, Any]) -> str:
    target = target_with(arguments)
    save_pretrained(Medusa(target.shape), folder / "drafter", Provenance.of(target))
    return str(folder)


def test_every_rendering_has_them() -> None:
    plain, short = target_with().tokenizer, target_with(SHORT).tokenizer
    assert render(ASKED, short, generate=True) == render(ASKED, plain, generate=True) + "ok "
    assert prompt_ids(ASKED, short) != prompt_ids(ASKED, plain) and arguments_of(short) == SHORT
    (document,) = tokenize(
        Conversation([*ASKED, {"role": "assistant", "content": "ok yes"}]), short, 100
    ).documents
    assert document.prompt == prompt_ids(ASKED, short)


def test_what_a_template_does_not_read_is_refused_before_weights_are_loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = target_with()
    target.stock.save_pretrained(tmp_path)
    target.tokenizer.save_pretrained(tmp_path)
    assert arguments_of(load_target(str(tmp_path), chat_template=SHORT).tokenizer) == SHORT
    assert arguments_of(outline(str(tmp_path), chat_template=SHORT).tokenizer) == SHORT
    monkeypatch.setattr("modules.target.loading.AutoModelForCausalLM", None)
    for arguments, words in (
        ({"thinking": False}, "reads no 'thinking'"),
        ({"messages": []}, "chat_template.messages"),
        ({"tokenize": True}, "not an argument of a template's own"),
    ):
        for load in (load_target, outline):
            with pytest.raises(ValueError, match=words):
                load(str(tmp_path), chat_template=arguments)


def test_training_records_them_and_a_resumed_run_keeps_them(
    loaded: list[dict[str, Any]], rows: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        json.dumps(
            {
                "drafter": {
                    "class_path": "modules.drafters.heads.medusa.Medusa",
                    "init_args": {"heads": 2},
                },
                "chat_template": SHORT,
                "data": {"train": rows, "validation_fraction": 0.3, "max_length": 64, "rows": 1},
                "probe": {"prompts": 0},
                "trainer": {"max_steps": 1, "max_epochs": -1, "accelerator": "cpu"},
            }
        )
    )
    output = str(tmp_path / "run")
    assert command(["--config", str(recipe), "--output", output]) == 0
    assert (
        loaded == [SHORT]
        and read_config(tmp_path / "run" / "drafter")["target"]["chat_template"] == SHORT
    )
    with pytest.raises(
        ValueError, match="chat_template.style is 'long', but the run was begun with 'short'"
    ):
        command(
            [
                "--config",
                str(recipe),
                "--output",
                output,
                "--resume",
                "last",
                "--chat_template",
                '{"style": "long"}',
            ]
        )
    assert (
        regenerate.command(
            [
                "--config",
                str(recipe),
                "--prompts",
                rows,
                "--output",
                str(tmp_path / "new.jsonl"),
                "--generation.max_new_tokens",
                "2",
            ]
        )
        == 0
    )
    assert (
        cache_command.command(["--config", str(recipe), "--data.features", str(tmp_path / "cache")])
        == 0
    )
    assert loaded == [SHORT] * 3
    datastore.build(str(tmp_path / "store"), rows, chat_template=SHORT)
    assert loaded[3:] == [SHORT]


def test_a_journal_of_other_arguments_is_not_gone_on_with() -> None:
    plain, short = (
        regenerate._settings(target, [], regenerate.Generation())
        for target in (target_with(), target_with(SHORT))
    )
    assert plain != short


def test_prompts_are_rendered_as_the_drafter_was_trained(
    loaded: list[dict[str, Any]], rows: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    trained = drafter(tmp_path / "run", SHORT)
    settings = tmp_path / "settings.yaml"
    settings.write_text(
        json.dumps(
            {
                "drafters": [trained],
                "prompts": [rows],
                "limit": 1,
                "max_new_tokens": 2,
                "dtype": "float64",
                "quality": "none",
            }
        )
    )
    for output, given in (("own", []), ("given", ["--chat_template", '{"style": "long"}'])):
        with pytest.raises(SystemExit) as ended:
            cli.main(["--config", str(settings), "--output", str(tmp_path / output), *given])
        assert not ended.value.code
    reports = [
        json.loads((tmp_path / name / "report.json").read_text()) for name in ("own", "given")
    ]
    assert [report["settings"]["chat_template"] for report in reports] == [SHORT, {"style": "long"}]
    assert loaded == [SHORT, {"style": "long"}]
    with pytest.raises(SystemExit):
        generate.main(
            ["--drafter", trained, "--prompt", "hi", "--max_new_tokens", "2", "--compare", "false"]
        )
    assert loaded[2:] == [SHORT]


def test_drafters_that_were_trained_otherwise_are_named(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    short, plain = drafter(tmp_path / "short", SHORT), drafter(tmp_path / "plain", {})
    with caplog.at_level(logging.WARNING):
        assert chat_arguments(None, [short, plain]) == SHORT
        assert (
            chat_arguments({}, [plain])
            == {}
            == chat_arguments(None, [plain])
            == chat_arguments(None, [])
        )
    assert caplog.messages == [
        f"drafter {plain!r} was trained with chat_template {{}}, prompts have {SHORT}"
    ]
