"""Answers are the target's own, resumable, and readable as training data."""

from __future__ import annotations

import json
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import decoders

import data.regenerate as module
from data.conversations import prompt_ids, tokenize
from data.files import read_jsonl
from data.regenerate import Generation, command, regenerate
from data.rows import load_conversations
from modules.core.target import Target
from tests.fakes import tiny_target
from train.run import Recipe

PROMPTS = [{"category": "c", "prompt": "x" * n} for n in (3, 9, 5, 2, 7)]
QUICK = Generation(max_new_tokens=6, batch_size=2, answers=2)


@pytest.fixture(scope="module")
def target() -> Target:
    target = tiny_target()
    target.tokenizer.backend_tokenizer.decoder = decoders.Fuse()
    return target


def greedy(target: Target, ids: list[int], count: int) -> list[int]:
    """Plain argmax decoding of one prompt, without padding."""
    said: list[int] = []
    while len(said) < count and (not said or said[-1] not in target.eos_ids):
        with torch.no_grad():
            said.append(int(target.model(input_ids=torch.tensor([ids + said])).logits[0, -1].argmax()))
    return said


def test_greedy_answers_are_the_targets_own(target: Target, tmp_path: Path) -> None:
    output = regenerate(target, PROMPTS, tmp_path / "answers.jsonl.gz", QUICK, progress=False)
    rows = list(read_jsonl(output))
    assert [row["prompt"] for row in rows] == [row["prompt"] for row in PROMPTS for _ in range(2)]
    assert [row["temperature"] for row in rows] == [0.0, 0.8, 0.8, 0.0] * 2 + [0.0, 0.8]
    assert not list(tmp_path.glob("*.journal"))
    for row in (row for row in rows if row["temperature"] == 0):
        ids = prompt_ids([{"role": "user", "content": row["prompt"]}], target.tokenizer)
        assert row["response_ids"] == greedy(target, ids, 6)
        assert row["finished"] == (row["response_ids"][-1] in target.eos_ids)


def test_the_output_trains_on_the_exact_ids(target: Target, tmp_path: Path) -> None:
    output = regenerate(target, PROMPTS, tmp_path / "answers.jsonl", QUICK, progress=False)
    for row, conversation in zip(read_jsonl(output), load_conversations(str(output)), strict=True):
        (tokens,) = tokenize(conversation, target.tokenizer, 100).documents
        assert tokens.input_ids[tokens.loss_mask].tolist() == row["response_ids"]
        assert conversation.finished == row["finished"]


def test_an_interrupted_run_goes_on_and_ends_the_same(target: Target, tmp_path: Path,
                                                      monkeypatch: pytest.MonkeyPatch) -> None:
    whole = regenerate(target, PROMPTS, tmp_path / "whole.jsonl", QUICK, progress=False).read_text()
    generate, calls = module._generate, []

    def killed(*arguments: Any) -> list[list[int]]:
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return generate(*arguments)
    monkeypatch.setattr(module, "_generate", killed)
    with pytest.raises(KeyboardInterrupt):
        regenerate(target, PROMPTS, tmp_path / "again.jsonl", QUICK, progress=False)
    journal = tmp_path / "again.jsonl.journal"
    journal.write_text(journal.read_text() + '{"index": 4, "num')
    assert not (tmp_path / "again.jsonl").exists()
    calls[:] = [1] * 10
    again = regenerate(target, PROMPTS, tmp_path / "again.jsonl", QUICK, progress=False)
    assert [json.loads(line)["prompt"] for line in again.read_text().splitlines()] == [
        json.loads(line)["prompt"] for line in whole.splitlines()]
    assert len(calls) - 10 == 4


def test_a_journal_of_other_settings_is_refused(target: Target, tmp_path: Path,
                                                    monkeypatch: pytest.MonkeyPatch) -> None:
    def killed(*_: Any) -> None:
        raise KeyboardInterrupt
    monkeypatch.setattr(module, "_generate", killed)
    with pytest.raises(KeyboardInterrupt):
        regenerate(target, PROMPTS, tmp_path / "a.jsonl", QUICK, progress=False)
    with pytest.raises(ValueError, match="begun with max_new_tokens 6, not 7"):
        regenerate(target, PROMPTS, tmp_path / "a.jsonl", Generation(max_new_tokens=7, answers=2), progress=False)
    monkeypatch.setattr(Target, "eos_ids", frozenset({0, 9}))
    monkeypatch.setattr(module, "_generate", lambda target, jobs, generation: [[9] for _ in jobs])
    with pytest.raises(ValueError, match=r"begun with stop_ids \[0\], not \[0, 9\]"):
        regenerate(target, PROMPTS, tmp_path / "a.jsonl", QUICK, progress=False)


def test_chats_are_answered_too(target: Target, tmp_path: Path) -> None:
    chat = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}, {"role": "user", "content": "c"}]
    output = regenerate(target, [{"messages": chat}], tmp_path / "a.jsonl", Generation(3), progress=False)
    conversation = next(load_conversations(str(output)))
    assert conversation.messages[:3] == chat and conversation.messages[3]["role"] == "assistant"


@pytest.mark.parametrize(("prompts", "output", "message"), [
    ([{"text": "x"}], "a.jsonl", "prompt 1 has keys text"), ([{"prompt": "x" * 600}], "a.jsonl", "prompt 1 has 60"),
    (PROMPTS, "a.txt", "must end in .jsonl"), (PROMPTS, "taken.jsonl", "exists already"),
])
def test_bad_input_is_one_line(prompts: list, output: str, message: str, target: Target, tmp_path: Path) -> None:
    (tmp_path / "taken.jsonl").write_text("")
    with pytest.raises(ValueError, match=message):
        regenerate(target, prompts, tmp_path / output, QUICK, progress=False)


@pytest.mark.parametrize(("arguments", "message"), [
    (["--prompts", "none.jsonl", "--output", "a.jsonl"], "'none.jsonl' does not exist"),
    (["--prompts", "p.jsonl", "--output", "a.jsonl", "--generation.batch_size", "0"], "batch_size must be 1"),
    (["--prompts", "p.jsonl", "--output", "a.jsonl", "--generation.answers", "3"], "greedy answer would repeat"),
    (["--prompts", "p.jsonl", "--output", "a.jsonl", "--beams", "3"], "--beams"),
    (["--prompts", "p.jsonl", "--output", "a.jsonl", "--limit", "x"], "limit"),
])
def test_mistakes_on_the_command_line_are_one_line(arguments: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        command(arguments)
    assert "\n" not in str(caught.value)


def test_the_config_of_a_run_says_which_target_answers(target: Target, tmp_path: Path,
                                                       monkeypatch: pytest.MonkeyPatch) -> None:
    """Every section that a run's config.yaml can have is accepted."""
    asked = []
    monkeypatch.setattr(module, "load_target", lambda name, dtype, *_: (asked.append((name, dtype)), target)[1])
    (tmp_path / "p.jsonl").write_text(json.dumps(PROMPTS[0]) + "\n")
    recipe = {key.name: {} for key in fields(Recipe)} | {"target": "mine", "dtype": "float64", "seed": 3}
    (tmp_path / "config.yaml").write_text(json.dumps(recipe))
    flags = ["--config", str(tmp_path / "config.yaml"), "--prompts", str(tmp_path / "p.jsonl"), "--output"]
    assert command([*flags, str(tmp_path / "a.jsonl"), "--generation.max_new_tokens", "3"]) == 0
    assert asked == [("mine", "float64")] and len(list(read_jsonl(tmp_path / "a.jsonl"))) == 1
