"""Labelled answers: which tokens are right, which wrong, and which teach nothing."""

from __future__ import annotations

import json
import random

import pytest
import torch

from data.conversations import prompt_ids
from data.labelled.labelled import LabelledData, corrupted, read_labelled, tokenize_labelled
from modules.contracts.batches import LabelledBatch
from tests.data.test_preferences import OPENAI
from tests.fakes import tiny_target, tiny_tokenizer

OURS = {
    "question": "2 plus 3?",
    "solution": "2 + 3 = 5 pens.",
    "wrong": "2 + 3 = 6 pens.",
    "error": [8, 9],
}


def marked(text: str, spans) -> list[tuple[str, int]]:
    return [(text[start:end], label) for start, end, label in spans]


def test_a_problem_gives_right_changed_and_wrong_answers():
    right, changed, wrong = read_labelled(OURS)
    assert marked(right.response, right.spans) == [("2 + 3 = 5 pens.", 1)]
    assert wrong.response == "2 + 3 = 6" and marked(wrong.response, wrong.spans) == [("6", 0)]
    assert changed.response.startswith("2 + 3 = ") and [span[2] for span in changed.spans] == [0]
    assert "5" not in changed.response and changed.response[changed.spans[-1][0] :].isdigit()
    assert len(read_labelled(OURS, corruptions=0)) == 2
    assert read_labelled(OURS, 3) == read_labelled(OURS, 3)
    answers = read_labelled(OPENAI, corruptions=0)
    assert [answer.response for answer in answers if answer.spans[-1][2] == 0] == [
        "2+3 = 6",
        "3*2 = 7",
        "6*2 = 12",
    ]


def test_only_the_digits_that_differ_are_wrong():
    chance = random.Random(0)
    seen = 0
    for _ in range(60):
        for response, (start, end) in corrupted("First 7 * 6 = 42 in all.", chance):
            assert end == len(response)
            assert (
                "First 7 * 6 = 42".startswith(response[:start])
                and response[start] != "First 7 * 6 = 42 "[start]
            )
            seen += 1
    assert seen > 40 and list(corrupted("no result here", chance)) == []


@pytest.mark.parametrize("corruptions", [0, 1, 5])
def test_each_token_is_labelled_right_once_whatever_the_corruptions(corruptions):
    """By prefixes: the same token behind the same text is right in one answer alone, and right
    tokens do not become more with the copies."""
    own = [
        {
            "question": "2 plus 3?",
            "solution": "2 + 3 = 5 pens.\n5 * 2 = 10 caps.",
            "wrong": "2 + 3 = 5 pens.\n5 * 2 = 12 caps.",
            "error": [24, 26],
        },
        OURS,
        OPENAI,
    ]
    for row in own:
        right = list[str]()
        for answer in read_labelled(row, corruptions):
            labels = dict.fromkeys(range(len(answer.response)))
            for start, end, label in answer.spans:
                labels.update(dict.fromkeys(range(start, end), label))
            right += [answer.response[: i + 1] for i, label in labels.items() if label == 1]
            assert answer.spans[-1][2] == 1 or answer.spans[-1][1] == len(answer.response)
        assert len(right) == len(set(right))
        texts = {text[:i] for text in right for i in range(1, len(text) + 1)}
        assert texts == set(right), "no prefix is left out"


def test_tokens_get_the_labels_of_their_characters():
    tokenizer = tiny_tokenizer()
    answer = read_labelled(
        {"prompt": "ask", "response": "abcdef", "spans": [[0, 3, 1], [3, 4, 0]]}
    )[0]
    tokens = tokenize_labelled(answer, tokenizer, 64)
    prompt = prompt_ids(answer.messages, tokenizer)
    assert tokens.prompt == prompt and tokens.prompt_length == len(prompt)
    assert tokens.loss_mask[len(prompt) :].tolist() == [True] * 4 + [False] * 2
    assert tokens.labels[len(prompt) :].tolist() == [True] * 3 + [False] * 3
    assert not tokens.loss_mask[: len(prompt)].any()


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"text": "a"}, "the row has keys text: expected `question`"),
        ({"prompt": "a", "response": "b", "spans": [[0, 5, 1]]}, "inside the response"),
        ({"prompt": "a", "response": "b", "spans": [[0, 1, 2]]}, "label 0 or 1"),
    ],
)
def test_rows_that_cannot_be_read_are_named(row, message):
    with pytest.raises(ValueError, match=message):
        read_labelled(row)


def test_batches_bring_labels_and_cached_states(tmp_path):
    file = tmp_path / "solutions.jsonl"
    rows = [{**OURS, "question": f"2 plus 3, the {i}th time?"} for i in range(12)]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    data = LabelledData(
        train=str(file),
        validation_fraction=0.25,
        max_length=128,
        rows=2,
        features=str(tmp_path / "features"),
        features_dtype="float32",
    )
    target = tiny_target(dtype=torch.float32)
    data.bind(target, ("pre_norm",))
    questions = [
        {tuple(document.prompt) for document in side} for side in (data.documents, data.held_out)
    ]
    assert not questions[0] & questions[1] and len(questions[1]) >= 1
    wrong, seen = 0, set[int]()
    for batch in data.train_dataloader():
        assert isinstance(batch, LabelledBatch) and batch.questions is not None
        torch.testing.assert_close(
            batch.text.states["pre_norm"][batch.text.loss_mask],
            target.features(batch.text, ("pre_norm",))["pre_norm"][batch.text.loss_mask],
            atol=1e-4,
            rtol=1e-4,
        )
        at = batch.text.loss_mask & (batch.labels == 0)
        numbers = {
            (b, document): set(batch.questions[b][batch.text.document_ids[b] == document].tolist())
            for b in range(len(batch.labels))
            for document in batch.text.document_ids[b].unique().tolist()
        }
        assert all(len(found) == 1 for found in numbers.values())
        seen |= {
            number for (_, document), found in numbers.items() if document >= 0 for number in found
        }
        said = target.tokenizer.decode(batch.text.input_ids[at]).replace(" ", "")
        assert said.isdigit()
        wrong += int(at.sum())
    assert wrong >= len(questions[0]) and len(seen) == len(questions[0])
    with pytest.raises(ValueError, match="data.corruptions must be 0 or above"):
        LabelledData(corruptions=-1)
