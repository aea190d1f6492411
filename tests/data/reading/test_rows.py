"""One reader for every shape of row, and a reason for each that it does not take."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest

from checkpoints.pretrained import Provenance
from data.datamodule import ConversationData
from data.reading.files import REPLACED, Skipped
from data.reading.rows import chat_of, load_conversations, read_conversation, token_ids
from tests.fakes import tiny_target

ASKED, SAID = {"role": "user", "content": "hi"}, {"role": "assistant", "content": "yes"}
PAIR = [ASKED, SAID]
SHAREGPT = [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "yes"}]
PARTS = [
    {"role": "User", "content": [{"type": "text", "text": "h"}, "i"]},
    {"role": "MODEL ", "content": [{"type": "output_text", "text": "yes"}]},
]


@pytest.mark.parametrize(
    "row",
    [
        {"messages": PAIR},
        {"messages": SHAREGPT},
        {"messages": PARTS},
        {"messages": json.dumps(PAIR)},
        {"conversations": PAIR},
        {"conversations": SHAREGPT},
        {"conversation": PAIR},
        {"messages": None, "conversations": [{**turn, "weight": 1} for turn in SHAREGPT]},
        {"messages": PAIR, "prompt": "another"},
        *(
            {asked: "hi", answered: "yes"}
            for asked in ("prompt", "question", "query")
            for answered in ("response", "completion", "answer", "output")
        ),
        {"prompt": [ASKED], "completion": [SAID]},
        {"prompt": ASKED, "response": SAID},
        {"prompt": json.dumps([ASKED]), "response": "yes"},
        {"instruction": "hi", "input": "", "output": "yes"},
        {"turns": ["hi"], "response": "yes"},
    ],
)
def test_every_shape_means_the_same(row: dict[str, Any]) -> None:
    assert chat_of(row) == PAIR


def test_what_stands_beside_a_question_is_not_lost() -> None:
    system = {"role": "system", "content": "be brief"}
    for row in (
        {"system": "be brief", "question": "hi", "answer": "yes"},
        {"system_prompt": "be brief", "conversations": SHAREGPT},
        {"system": "be brief", "messages": [{"role": "System", "content": "be brief"}, *PAIR]},
    ):
        assert chat_of(row) == [system, *PAIR]
    assert (
        chat_of({"instruction": "add", "input": "1 2", "output": "3"})[0]["content"] == "add\n\n1 2"
    )
    assert chat_of({"turns": ["a", "b"]}) == [{"role": "user", "content": text} for text in "ab"]
    called = {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "f"}}]}
    told = {"role": "tool", "content": "42", "tool_call_id": "c", "name": "f"}
    thought = {"role": "assistant", "reasoning": "hm", "content": "so"}
    assert chat_of({"messages": [ASKED, called, {**told, "role": "observation"}, thought]}) == [
        ASKED,
        called,
        told,
        thought,
    ]


WRONG = [
    ({"text": "x"}, "the row has keys text: expected `messages` or"),
    ({}, r"keys \(none\)"),
    ({"messages": None}, "`messages` is null, expected"),
    ({"messages": 3}, "`messages` is a number, expected a list"),
    ({"messages": "hi"}, "`messages` is text, expected a list"),
    ({"messages": {}}, "is an object, expected a list"),
    ({"messages": ["hi"]}, "a turn is text, expected an object"),
    ({"messages": [None]}, "a turn is null"),
    ({"messages": [{"role": "user"}]}, r"no text under `content` or `value` \(its keys: role\)"),
    ({"messages": [{"role": "user", "content": None}]}, r"no text under .*content \(null\)"),
    ({"messages": [{"content": "x"}]}, "no `role` or `from`"),
    ({"messages": [{"role": 1, "content": "x"}]}, "no `role`"),
    ({"messages": [{"role": "user", "content": 3}]}, "`content` of a turn is a number"),
    ({"messages": [{"role": "user", "content": {"a": 1}}]}, "`content` of a turn is an object"),
    (
        {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]},
        "a part of type image_url",
    ),
    ({"messages": [{"role": "user", "content": [3]}]}, "a part of type a number"),
    ({"conversations": [{"from": "function_call", "value": "{}"}]}, "a tool call without a `name`"),
    ({"prompt": 3, "response": "x"}, "`prompt` is a number"),
    ({"prompt": "x", "response": b"y"}, "`response` is bytes"),
    ({"question": "5+1?", "answer": 6}, "`answer` is a number, expected text or turns"),
    (
        {"messages": [{"role": "wizard", "content": "x"}, *PAIR]},
        "a turn of role 'wizard', expected",
    ),
    ({"conversations": [{"from": "", "value": "x"}]}, "a turn of role ''"),
    ({"prompt": ["x"], "response": "y"}, "`prompt` is a list of texts"),
    ({"question": "x", "answer": ["y", "z"]}, "`answer` is a list of texts"),
    *(
        ({"messages": [ASKED, {**SAID, "tool_calls": calls}]}, f"`tool_calls` of a turn is {found}")
        for calls, found in (
            (3, "a number"),
            ("f", "text"),
            ({"name": "f"}, "an object"),
            ([1], "a list with something else"),
            ([{}], "a list with something else"),
            ([{"function": 3}], "a list with something else"),
            ([{"function": {"name": 3}}], "a list with something else"),
        )
    ),
    *(
        ({"messages": [ASKED, {**SAID, key: value}]}, f"`{key}` of a turn is .*, expected text")
        for key in ("name", "tool_call_id", "reasoning_content", "reasoning", "thinking")
        for value in (3, ["x"], {"a": 1})
    ),
    ({"messages": PAIR, "tools": "f(x)"}, "`tools` is text, expected a list"),
    ({"messages": PAIR, "tools": ["f(x)"]}, "`tools` holds text that is no function"),
    ({"messages": PAIR, "tools": [{"function": {}}]}, "`tools` holds an object that is no func"),
    *(
        ({"messages": PAIR, "chat_template_kwargs": value}, f"`chat_template_kwargs` is {found}")
        for value, found in ((3, "a number"), ("on", "text"), ([1], "a list"))
    ),
    *(
        (
            {"messages": [ASKED, {**SAID, "tool_calls": [{"name": "f", "arguments": value}]}]},
            f"`arguments` in `tool_calls` of a turn is {found}, expected an object",
        )
        for value, found in ((3, "a number"), ([1], "a list"))
    ),
    ({"messages": [ASKED, {**SAID, "weight": 0.5}]}, "`weight` of a turn is '0.5', expected 0"),
    ({"messages": [ASKED, {**SAID, "response_ids": ["a"]}]}, "`response_ids` is a list"),
    ({"messages": PAIR, "prompt_ids": "abc"}, "`prompt_ids` is text"),
    *(
        ({"messages": PAIR, "response_ids": ids}, "`response_ids` is")
        for ids in (
            "abc",
            5,
            True,
            {"a": 1},
            1.5,
            ["a"],
            [1.5],
            [True],
            [[1]],
            [-1],
            [10**30],
            [None],
        )
    ),
]


@pytest.mark.parametrize(("row", "message"), WRONG)
def test_other_rows_are_left_out_for_what_was_found(row: dict[str, Any], message: str) -> None:
    with pytest.raises(Skipped, match=message) as caught:
        read_conversation(row)
    assert "\n" not in str(caught.value)


def test_calls_of_older_data_sets_are_tool_calls() -> None:
    call = {"name": "f", "arguments": '{"a": 1}'}
    for turn in (
        {"from": "function_call", "value": json.dumps(call)},
        {"role": "assistant", "content": None, "function_call": call},
    ):
        assert chat_of({"messages": [turn]}) == [
            {
                "role": "assistant",
                "content": None,
                "tool_calls": [{"type": "function", "function": call}],
            }
        ]
    tools = [{"name": "f"}]
    wrapped = [{"type": "function", "function": {"name": "f"}}]
    for given, found in (
        (tools, wrapped),
        (wrapped, wrapped),
        (json.dumps(tools), wrapped),
        ([json.dumps(tools[0])], wrapped),
        ([], None),
        ("", None),
        ("[]", None),
    ):
        assert read_conversation({"messages": PAIR, "tools": given}).tools == found


def test_a_file_with_a_bad_row_of_each_kind_trains_on_the_good_ones(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """And says what it left out, where it was first, and keeps both in the provenance."""
    good = [{"prompt": f"say {word}", "response": word} for word in ("one", "two", "six", "ten")]
    bad = [row for row, _ in WRONG if b"y" not in row.values()]
    lines = [json.dumps(row) for row in good[:2]] + ["{", "[]"] + [json.dumps(row) for row in bad]
    lines += [
        json.dumps({**good[2], "prompt": "cut \ud83d"}),
        json.dumps(good[3]),
        json.dumps(good[0]),
    ]
    lines += [json.dumps({"messages": PAIR[:1]}), json.dumps({"prompt": "x" * 80, "response": "y"})]
    lines += [json.dumps({"messages": [ASKED, {**SAID, "reasoning_content": "hm"}]})]
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    target = tiny_target()
    recipe = ConversationData(str(tmp_path / "a.jsonl"), max_length=64)
    with caplog.at_level(logging.WARNING):
        recipe.read(target)
    assert len(recipe.documents) + len(recipe.held_out) == 4
    left_out = json.loads(json.dumps(Provenance.of(target, data=recipe.summary()).data))["left_out"]
    assert sum(found["count"] for found in left_out.values()) == len(lines) - 4 + 1
    assert left_out["not JSON (Expecting property name enclosed in double quotes)"] == {
        "count": 1,
        "first": "a.jsonl line 3",
    }
    assert left_out[REPLACED]["count"] == left_out["seen before"]["count"] == 1
    assert (
        left_out["prompt longer than the context (64 tokens)"]["first"]
        == f"a.jsonl line {len(lines) - 1}"
    )
    assert any(
        "`messages` is text, expected a list of turns (first: '" in line for line in caplog.messages
    )
    assert len(caplog.messages) == len(left_out)


def test_a_file_without_a_good_row_is_refused_with_the_reasons(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "a"}\n{"text": "b"}\n{"messages": 1}\nhello\n')
    with pytest.raises(
        ValueError,
        match="can be trained on: 2 × the row has keys text: expected .* "
        r"\(first: .*a.jsonl' line 1\); 1 × `messages` is a number.*; 1 × not JSON",
    ) as caught:
        ConversationData(str(tmp_path / "a.jsonl"), max_length=64).read(tiny_target())
    assert "\n" not in str(caught.value)


def test_tokens_beyond_the_models_vocabulary_are_left_out(tmp_path: Path) -> None:
    """Of a tokenizer that was given tokens the model was not."""
    target = tiny_target()
    target.tokenizer.add_tokens(["<extra>"])
    rows = [{"prompt": f"say {i}", "response": "a <extra>" if i == 1 else "a"} for i in range(4)]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, rows)))
    found = ConversationData(str(tmp_path / "a.jsonl"), max_length=64)
    found.read(target)
    assert len(found.documents) + len(found.held_out) == 3
    assert found.summary()["left_out"] == {
        "token 128 '<extra>' is beyond the model's vocabulary of 128": {
            "count": 1,
            "first": "a.jsonl line 2",
        }
    }


def test_without_a_tally_the_first_bad_row_ends_it(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text(json.dumps({"messages": PAIR}) + '\n{"messages": 1}\n')
    rows = load_conversations(str(tmp_path / "a.jsonl"))
    assert next(rows).messages == PAIR
    with pytest.raises(ValueError, match=r"a.jsonl' line 2: `messages` is a number"):
        next(rows)
    assert token_ids([]) is None and token_ids([0, 7]) == [0, 7]
