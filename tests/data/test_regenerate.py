"""Answers are the target's own, resumable, and readable as training data."""

from __future__ import annotations

import json
from dataclasses import fields
from datetime import datetime
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as parquet
import pytest
import torch
from tokenizers import decoders

import data.regenerate as module
from data.conversations import prompt_ids, tokenize
from data.generation.answering import placed
from data.reading.files import Tally, read_jsonl
from data.reading.rows import load_conversations
from data.regenerate import Generation, command, regenerate
from modules.target.target import Target
from tests.fakes import tiny_target
from train.run import Recipe

PROMPTS = placed([{"category": "c", "prompt": "x" * n} for n in (3, 9, 5, 2, 7)])
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
            said.append(
                int(target.model(input_ids=torch.tensor([ids + said])).logits[0, -1].argmax())
            )
    return said


def test_greedy_answers_are_the_targets_own(target: Target, tmp_path: Path) -> None:
    output = regenerate(target, PROMPTS, tmp_path / "answers.jsonl.gz", QUICK, progress=False)
    rows = list(read_jsonl(output))
    assert [row["prompt"] for row in rows] == [
        row.content["prompt"] for row in PROMPTS for _ in range(2)
    ]
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


def test_an_interrupted_run_goes_on_and_ends_the_same(
    target: Target, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
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
        json.loads(line)["prompt"] for line in whole.splitlines()
    ]
    assert len(calls) - 10 == 4


def test_a_journal_of_other_settings_is_refused(
    target: Target, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[int] = []

    def killed(target: Target, jobs: list, generation: Generation) -> list[list[int]]:
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return [[9] for _ in jobs]

    monkeypatch.setattr(module, "_generate", killed)
    with pytest.raises(KeyboardInterrupt):
        regenerate(target, PROMPTS, tmp_path / "a.jsonl", QUICK, progress=False)
    with pytest.raises(ValueError, match="begun with max_new_tokens 6, not 7"):
        regenerate(
            target,
            PROMPTS,
            tmp_path / "a.jsonl",
            Generation(max_new_tokens=7, answers=2),
            progress=False,
        )
    monkeypatch.setattr(Target, "eos_ids", frozenset({0, 9}))
    with pytest.raises(ValueError, match=r"begun with stop_ids \[0\], not \[0, 9\]"):
        regenerate(target, PROMPTS, tmp_path / "a.jsonl", QUICK, progress=False)


@pytest.mark.parametrize(
    "left", ["", '{"prompts": "of another file"}\n', "\n\n", '{"index": 0}\nnull\n[]\n']
)
def test_a_journal_without_answers_never_stands_in_the_way(
    left: str, target: Target, tmp_path: Path
) -> None:
    (tmp_path / "a.jsonl.journal").write_text(left)
    output = regenerate(target, PROMPTS[:1], tmp_path / "a.jsonl", Generation(3), progress=False)
    assert len(list(read_jsonl(output))) == 1 and list(tmp_path.iterdir()) == [output]


def test_damaged_lines_of_a_journal_are_made_anew_and_half_pairs_are_written_out(
    target: Target, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """No answer that was made is locked in."""
    output = tmp_path / "a.jsonl"
    settings = module._settings(target, PROMPTS, Generation(3, temperatures=(0.0,)))
    kept = {"index": 1, "number": 0, "response": "cut \ud83d", "finished": True, "temperature": 0.0}
    bad = [
        '{"index": 2, "number": 0}',
        '{"index": "3", "number": 0, "response": "x"}',
        "[" * 100_000,
        "\0\0",
        "[3]",
        '{"index": 4, "number": 0, "response": 5}',
    ]
    output.with_name("a.jsonl.journal").write_text(
        "\n".join([json.dumps(settings), json.dumps(kept), *bad, '{"ind'])
    )
    rows = list(
        read_jsonl(
            regenerate(target, PROMPTS, output, Generation(3, temperatures=(0.0,)), progress=False)
        )
    )
    assert (
        len(rows) == 5
        and rows[1]["response"] == "cut \ufffd"
        and "7 line(s) hold no answer" in caplog.text
    )


def scripted(
    monkeypatch: pytest.MonkeyPatch, target: Target, answers: list[str], ended: bool = True
) -> list[str]:
    """Let the target say these, one after the other; the prompts it is given, as text."""
    asked: list[str] = []

    def generate(target: Target, jobs: list, generation: Generation) -> list[list[int]]:
        said = []
        for job in jobs:
            asked.append(target.tokenizer.decode(job.ids))
            said.append(
                target.tokenizer(answers[len(asked) - 1], add_special_tokens=False)["input_ids"]
                + [0] * ended
            )
        return said

    monkeypatch.setattr(module, "_generate", generate)
    return asked


def turns(*texts: str) -> list[dict[str, str]]:
    return [{"role": role, "content": text} for role, text in zip(["user", "assistant"] * 9, texts)]


@pytest.mark.parametrize(
    "row",
    [
        {"messages": turns("a", "old", "b", "old")},
        {"messages": turns("a", "old", "b")},
        {"turns": ["a", "b"]},
        {"messages": [{"role": "assistant", "content": "hello"}, *turns("a", "old", "b", "old")]},
        {
            "conversations": [
                {"from": "human", "value": "a"},
                {"from": "gpt", "value": "old"},
                {"from": "human", "value": "b"},
            ]
        },
        {"prompt": turns("a", "old", "b"), "completion": turns("a", "old")[1:]},
        {
            "messages": [
                {"role": "User", "content": [{"type": "text", "text": "a"}]},
                *turns("", "old", "b")[1:],
            ]
        },
    ],
)
def test_a_chats_questions_are_answered_behind_the_new_answers(
    row: dict[str, Any], target: Target, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = scripted(monkeypatch, target, ["one", "two"])
    output = regenerate(
        target,
        placed([{"category": "c", **row}]),
        tmp_path / "a.jsonl",
        Generation(9),
        progress=False,
    )
    assert asked == [
        "<|user|>a<|end|><|assistant|>",
        "<|user|>a<|end|><|assistant|>one<|end|><|user|>b<|end|><|assistant|>",
    ]
    conversation = next(load_conversations(str(output)))
    ids = conversation.messages[1].pop("response_ids")
    assert conversation.messages == turns("a", "one", "b", "two") and "old" not in str(conversation)
    assert target.tokenizer.decode(ids) == "one<|end|>"
    assert target.tokenizer.decode(conversation.response_ids) == "two<|end|>"
    assert next(read_jsonl(output))["category"] == "c"


def test_a_chat_ends_at_an_answer_that_is_cut(
    target: Target, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scripted(monkeypatch, target, ["one"], ended=False)
    tally = Tally("prompt")
    output = regenerate(
        target, placed([{"turns": ["a", "b"]}]), tmp_path / "a.jsonl", Generation(3), False, tally
    )
    conversation = next(load_conversations(str(output)))
    assert conversation.messages == turns("a", "one") and not conversation.finished
    assert tally.as_dict() == {
        "ended before its last question": {"count": 1, "first": "prompts row 1"}
    }


def test_a_row_of_a_question_keeps_what_it_holds(
    target: Target, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A reference that is no text too."""
    scripted(monkeypatch, target, ["one", "two"])
    rows = [{"question": "a", "answer": 6}, {"system": "be kind", "prompt": "a", "response": "old"}]
    output = regenerate(target, placed(rows), tmp_path / "a.jsonl", Generation(9), progress=False)
    first, second = read_jsonl(output)
    assert (first["answer"], first["response"], "messages" in first) == (6, "one", False)
    assert [
        conversation.messages[-1]["content"] for conversation in load_conversations(str(output))
    ] == ["one", "two"]
    assert second["system"] == "be kind"


def test_prompts_that_cannot_be_answered_are_counted_and_the_others_answered(
    target: Target,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    rows = [
        {"prompt": "a"},
        {"text": "x"},
        {"messages": []},
        {"messages": ["hi"]},
        {"prompt": "x" * 600},
        {"messages": [{"role": "user", "content": None}]},
        {"prompt": " "},
        {"prompt": "<extra>"},
        {"messages": [{"role": "system", "content": "be kind"}]},
        {"prompt": "b", "tools": [{"name": "f"}]},
        {"messages": [*turns("a"), {"role": "assistant", "tool_calls": [{"name": "f"}]}]},
        {"prompt": "cut \ud83d"},
    ]
    prompts, output = tmp_path / "p.jsonl", tmp_path / "a.jsonl"
    prompts.write_text("\n".join(map(json.dumps, rows)) + "\nno json")
    target.tokenizer.add_tokens(["<extra>"])
    monkeypatch.setattr(module, "load_target", lambda *_: target)
    flags = ["--prompts", str(prompts), "--output", str(output), "--generation.max_new_tokens", "3"]
    assert command(flags) == 0
    answered = list(read_jsonl(output))
    assert [row.get("prompt") for row in answered] == ["a", None, "cut \ufffd"]
    assert [turn["role"] for turn in answered[1]["messages"]] == ["user", "assistant"]
    printed = capsys.readouterr().out
    for number, reason in enumerate(
        [
            "the row has keys text",
            "no question",
            "a turn is text",
            "longer than 509 tokens",
            "no text under",
            "an empty question",
            "token 128 '<extra>' is beyond",
            "no question",
            "the chat template leaves out `tools`",
        ],
        2,
    ):
        assert f"{reason}" in printed and (number == 9 or f"p.jsonl' line {number})" in printed)
    assert "3 answers: " in printed and "not JSON" in printed and "surrogate" in printed


@pytest.mark.parametrize(
    ("prompts", "output", "message"),
    [
        (
            [{"text": "x"}],
            "a.jsonl",
            r"no prompt can be answered: 1 × the row has keys text.*\(first: 'prompts' row 1\)",
        ),
        (
            [{"prompt": "x" * 600}],
            "a.jsonl",
            "no prompt can be answered: 1 × longer than 506 tokens",
        ),
        ([{"prompt": "x"}], "a.txt", "must end in .jsonl"),
        ([{"prompt": "x"}], "taken.jsonl", "exists already"),
    ],
)
def test_bad_input_is_one_line(
    prompts: list, output: str, message: str, target: Target, tmp_path: Path
) -> None:
    (tmp_path / "taken.jsonl").write_text("")
    with pytest.raises(ValueError, match=message):
        regenerate(target, placed(prompts), tmp_path / output, QUICK, progress=False)
    assert not list(tmp_path.glob("*.journal"))


def test_prompts_of_every_kind_of_file_are_read(
    target: Target, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [{"prompt": "a", "when": datetime(2020, 1, 2)}, {"prompt": "b", "when": None}]
    parquet.write_table(pa.Table.from_pylist(rows), tmp_path / "p.parquet")
    monkeypatch.setattr(module, "load_target", lambda *_: target)
    assert (
        command(
            [
                "--prompts",
                str(tmp_path / "p.parquet"),
                "--output",
                str(tmp_path / "a.jsonl.gz"),
                "--generation.max_new_tokens",
                "3",
            ]
        )
        == 0
    )
    assert [row["when"] for row in read_jsonl(tmp_path / "a.jsonl.gz")] == [
        "2020-01-02 00:00:00",
        None,
    ]


@pytest.mark.parametrize("temperatures", [(0.0, 0.0), (0.0, 0.8, 0.0)])
def test_temperatures_that_would_repeat_a_greedy_answer_are_refused(
    temperatures: tuple[float, ...],
) -> None:
    """Also where answers take them in turns: the last one, then the first."""
    with pytest.raises(ValueError, match="greedy answer would repeat"):
        Generation(temperatures=temperatures, answers=2)
    assert Generation(temperatures=(0.0, 0.8, 0.0, 0.8), answers=2).answers == 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--prompts", "none.jsonl", "--output", "a.jsonl"], "'none.jsonl' does not exist"),
        (
            ["--prompts", "p.jsonl", "--output", "a.jsonl", "--generation.batch_size", "0"],
            "batch_size must be 1",
        ),
        (
            ["--prompts", "p.jsonl", "--output", "a.jsonl", "--generation.answers", "3"],
            "greedy answer would repeat",
        ),
        (["--prompts", "p.jsonl", "--output", "a.jsonl", "--beams", "3"], "--beams"),
        (["--prompts", "p.jsonl", "--output", "a.jsonl", "--limit", "x"], "limit"),
    ],
)
def test_mistakes_on_the_command_line_are_one_line(arguments: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        command(arguments)
    assert "\n" not in str(caught.value)


def test_the_config_of_a_run_says_which_target_answers(
    target: Target, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every section that a run's config.yaml can have is accepted."""
    asked = []
    monkeypatch.setattr(
        module, "load_target", lambda name, dtype, *_: (asked.append((name, dtype)), target)[1]
    )
    (tmp_path / "p.jsonl").write_text(json.dumps(PROMPTS[0].content) + "\n")
    recipe = {key.name: {} for key in fields(Recipe)} | {
        "target": "mine",
        "dtype": "float64",
        "seed": 3,
    }
    (tmp_path / "config.yaml").write_text(json.dumps(recipe))
    flags = [
        "--config",
        str(tmp_path / "config.yaml"),
        "--prompts",
        str(tmp_path / "p.jsonl"),
        "--output",
    ]
    assert command([*flags, str(tmp_path / "a.jsonl"), "--generation.max_new_tokens", "3"]) == 0
    assert asked == [("mine", "float64")] and len(list(read_jsonl(tmp_path / "a.jsonl"))) == 1
