"""Preference rows of every shape, their tokens, and batches of pairs."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator
from typing import Any

import pytest
import torch

from data.conversations import Skipped, prompt_ids
from data.corpora.word_problems import EMBEDDED_SOLUTIONS, embedded_problems
from data.labelled.solution_errors import CALCULATION, first_error, is_problem, read_problem
from data.preferences import (
    EMBEDDED_PAIRS,
    PreferenceData,
    read_preferences,
    separate_traces,
    tokenize_pairs,
)
from data.reading.files import Place, Row, read_jsonl
from tests.fakes import tiny_target, tiny_tokenizer

ASKED = {"role": "user", "content": "say a"}
DIALOGUE = "\n\nHuman: hi\n\nAssistant: yes?\n\nHuman: say a\n\nAssistant: "
OPENAI = {
    "question": "How many?",
    "ground_truth": "2+3 = <<2+3=5>>5 pens.\nThen 5*2 = <<5*2=10>>10.\nA: 10",
    "small": {
        "is_correct": False,
        "solution": "2+3 = <<2+3=6>>6 pens.\nThen 6*2 = <<6*2=12>>12.\nA: 12",
    },
    "large": {"is_correct": True, "solution": "(2+3)*2 = <<(2+3)*2=10.0>>10.0\nA: 10"},
    "other": {"is_correct": False, "solution": "3*2 = <<3*2=7>>7\nA: 7"},
    "again": {"is_correct": False, "solution": "6*2 = <<6*2=12>>12\nA: 12"},
}


def placed(rows: Iterable[dict[str, Any]]) -> Iterator[Row]:
    return (Row(Place("rows", "row", number), row) for number, row in enumerate(rows, 1))


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "say a", "chosen": "a", "rejected": "b"},
        {"prompt": [ASKED], "chosen": "a", "rejected": "b"},
        {
            "prompt": "say a",
            "chosen": [{"role": "assistant", "content": "a"}],
            "rejected": [{"role": "assistant", "content": "b"}],
        },
        {
            "prompt": "say a",
            "chosen": [ASKED, {"role": "assistant", "content": "a"}],
            "rejected": [ASKED, {"role": "assistant", "content": "b"}],
        },
        {
            "chosen": [ASKED, {"role": "assistant", "content": "a"}],
            "rejected": [ASKED, {"role": "gpt", "content": "b"}],
        },
    ],
)
def test_rows_of_every_shape_mean_the_same(row):
    (found,) = read_preferences(row)
    assert (found.messages, found.chosen, found.rejected) == ([ASKED], "a", "b")


def test_dialogues_share_everything_but_the_last_answer():
    (found,) = read_preferences({"chosen": DIALOGUE + "a", "rejected": DIALOGUE + "b"})
    assert [message["role"] for message in found.messages] == ["user", "assistant", "user"]
    assert (found.messages[1]["content"], found.chosen, found.rejected) == ("yes?", "a", "b")
    for row, reason in (
        ({"chosen": DIALOGUE + "a", "rejected": "\n\nHuman: b\n\nAssistant: b"}, "differ before"),
        ({"chosen": "\n\nHuman: a", "rejected": "\n\nHuman: a"}, "does not end"),
    ):
        with pytest.raises(Skipped, match=reason):
            read_preferences(row)
    with pytest.raises(Skipped, match="`chosen` without a `prompt` does not begin with 'Human:'"):
        read_preferences({"chosen": "plain", "rejected": "text"})
    with pytest.raises(Skipped, match="the row has keys text: expected `chosen`"):
        read_preferences({"text": "a"})


def test_problems_give_the_most_frequent_wrong_solution_against_a_right_one():
    assert is_problem(OPENAI)
    problem = read_problem(OPENAI)
    assert [solution.answer for solution in problem.right] == ["10", "10"]
    assert [
        solution.text[slice(*solution.error)] for solution in problem.wrong if solution.error
    ] == ["6", "7", "6*2 = 12"]
    assert [solution.inferred for solution in problem.wrong] == [False, False, True]
    assert "<<" not in problem.wrong[0].text and problem.wrong[0].text.startswith("2+3 = 6 pens.")
    (pair,) = read_preferences(OPENAI)
    assert (pair.rejected, pair.error) == (problem.wrong[0].text, problem.wrong[0].error)
    assert pair.chosen == "(2+3)*2 = 10.0\nA: 10", "wrong ones were sampled, and so is it"
    (written,) = read_preferences({**OPENAI, "large": OPENAI["other"]})
    assert written.chosen == problem.right[0].text


def sampled(answers: str) -> dict[str, Any]:
    """A question whose right answer is r, with a solution for each letter; those of one letter
    differ in their text."""
    tried = {
        f"model {k}": {"is_correct": letter == "r", "solution": f"{k}th try.\nA: {ord(letter)}"}
        for k, letter in enumerate(answers)
    }
    return {
        "question": f"How many in {answers}?",
        "ground_truth": f"By hand.\nA: {ord('r')}",
        **tried,
    }


def released_selection(answers: str) -> tuple[set[str], set[str], tuple[str, str] | None]:
    """Answers of the right traces, the wrong traces and the pair, by the released code's loop over
    answers in falling
    order of their counts: the wrong ones are to cover half of all wrong solutions."""
    counts = [(answers.count(letter), letter) for letter in dict.fromkeys(answers)]
    counts.sort(key=lambda pair: pair[0], reverse=True)
    right, wrong = set[str](), set[str]()
    first: dict[bool, str] = {}
    whole = needed = -(-sum(letter != "r" for letter in answers) // 2)
    for count, letter in counts:
        first.setdefault(letter == "r", letter)
        if letter == "r":
            right.add(letter)
        elif needed > 0 and (needed == whole or count > 1):
            wrong.add(letter)
            needed -= count
    return right or {"r"}, wrong, (("r", first[False]) if False in first else None)


@pytest.mark.parametrize(
    "answers", ["raaabbc", "rabc", "raabbccd", "rr", "aabbb", "raabbcd", "rrraaaab"]
)
def test_a_question_gives_one_pair_and_each_frequent_wrong_answer_one_trace(answers):
    right, wrong, compared = released_selection(answers)
    pairs = tokenize_pairs(placed([sampled(answers), sampled("rx")]), "rows", tiny_tokenizer(), 256)
    own = [pair for pair in pairs if pair.prompt == pairs[0].prompt]
    others = [False] * (len(own) - 1)
    assert [pair.compared for pair in own] == [compared is not None, *others]
    assert len(own) == max(1, len(wrong)) and (compared is None or own[0].response_tokens > 0)
    assert sum(pair.response_tokens for pair in own[1:]) == 0, "budgets count pairs"

    def letters(side: str) -> list[str]:
        traces = [getattr(pair, side) for pair in separate_traces(own)]
        texts = [str(tiny_tokenizer().decode(one.input_ids[one.loss_mask])) for one in traces]
        return [chr(int(re.sub(r"[^0-9]", "", text.split(":")[-1]))) for text in texts if text]

    assert sorted(letters("chosen")) == sorted(right)
    assert sorted(letters("rejected")) == sorted(wrong)
    if compared:
        assert letters("rejected")[0] == compared[1]


def test_stages_see_every_trace_once_and_provenance_counts_them(tmp_path):
    """Corruptions repeat their right solution in each pair: it is a trace once."""
    file = tmp_path / "solutions.jsonl"
    rows = [
        {**row, "question": f"{row['question']} {i}"}
        for i in range(6)
        for row in (OPENAI, sampled("raabbc"), sampled("rr"))
    ]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    data = PreferenceData(
        corruptions=2, train=str(file), validation_fraction=0.2, max_length=256, rows=3
    )
    data.bind(tiny_target())
    sides: dict[str, list[tuple[int, ...]]] = {"chosen": [], "rejected": []}
    for batch in data.for_stages().train_dataloader():
        for name, found in sides.items():
            text = getattr(batch, name)
            found += [
                tuple(ids[mask].tolist())
                for ids, mask in zip(text.input_ids, text.loss_mask)
                if bool(mask.any())
            ]
            assert text.input_ids.shape[0] == batch.chosen.input_ids.shape[0]
    asked = [tuple(pair.prompt) for pair in data.traces if pair.chosen.response_tokens]
    assert len(asked) == len(set(asked)) == len(sides["chosen"]), "one right trace a question"
    assert len(data.documents) > len(sides["chosen"]), "and several pairs"
    wrong = {
        (tuple(pair.prompt), pair.rejected.key)
        for pair in data.traces
        if pair.rejected.response_tokens
    }
    assert len(wrong) == len(sides["rejected"]) > len(data.documents)
    summary = data.summary()
    assert (summary["right_traces"], summary["wrong_traces"]) == (len(asked), len(wrong))
    assert (
        summary["documents"]
        == len(data.documents)
        == sum(len(batch.chosen.input_ids) for batch in data.train_dataloader())
    )
    assert {tuple(pair.prompt) for pair in data.held_out_traces}.isdisjoint(asked)
    assert len(data.for_stages().held_out) == len(data.held_out_traces) >= len(data.held_out)


def test_data_whose_held_out_questions_give_no_pair_are_refused(tmp_path):
    file = tmp_path / "solutions.jsonl"
    rows = [sampled("rx"), *({**sampled("rr"), "question": f"How many, {i}?"} for i in range(5))]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = PreferenceData(train=str(file), validation_fraction=0.2, max_length=256)
    with pytest.raises(ValueError, match="no question with a right and a wrong solution is left"):
        data.bind(tiny_target())


def test_one_solution_that_is_too_long_skips_itself_alone(caplog):
    """Cut at the context, the right and the first wrong solution are the same; the second wrong one
    still counts."""
    row = sampled("raabbc")
    for name in ("model 0", "model 1"):
        row[name]["solution"] = "x" * 300 + row[name]["solution"]
    pairs = tokenize_pairs(placed([row, sampled("rx")]), "rows", tiny_tokenizer(), 128)
    assert [pair.compared for pair in pairs] == [False, True]
    assert "skipped 1 pair: both answers are the same" in caplog.text
    with pytest.raises(ValueError, match="can be trained on: no question has a wrong solution"):
        tokenize_pairs(placed([sampled("rr")]), "rows", tiny_tokenizer(), 128)


@pytest.mark.parametrize(
    ("text", "step", "inferred"),
    [
        ("He has $16 - $3 = $<<16-3=13>>13 left.", "$16 - $3 = $13", True),
        (
            "She ran 16 km.\nSo 16 minutes per lap * 3 laps = <<16*3=48>>48.",
            "16 minutes per lap * 3 laps = 48",
            True,
        ),
        ("A 3, then 3 + 12 + 3 = <<3+12+3=18>>18.", "3 + 12 + 3 = 18", True),
        ("Nine hours - 20 = <<9-20=-11>>-11.", "20 = -11", True),
        ("(2 + 3) * 4 = <<(2+3)*4=20.0>>20.0, yes.", "(2 + 3) * 4 = 20.0", True),
        ("Seven less is <<7-6=1>>1.", "1", True),
        ("50% of 30 is <<50%*30=16>>16.", "50% of 30 is 16", True),
        ("He has 16 - 3 = <<16-3=14>>14.", "14", False),
        ("That makes 1,000 / 3 = <<1000/3=333.33>>333.33", "1,000 / 3 = 333.33", True),
    ],
)
def test_a_step_that_no_right_solution_takes_is_wrong_as_a_whole_unless_its_arithmetic_is(
    text, step, inferred
):
    error, is_inferred = first_error(text, {"5"})
    assert (
        error is not None
        and CALCULATION.sub("", text)[slice(*error)] == step
        and is_inferred == inferred
    )
    assert first_error("2+3 = <<2+3=5>>5", {"5"}) == (None, False)


def test_injected_errors_change_one_number_whose_place_is_known():
    plain = read_preferences(OPENAI)
    for seed in range(8):
        found = read_preferences(OPENAI, 3, seed)
        assert found[: len(plain)] == plain and read_preferences(OPENAI, 3, seed) == found
        assert len(plain) < len(found) <= len(plain) + 3
        for pair in found[len(plain) :]:
            start, end = pair.error or (0, 0)
            assert pair.chosen is not None and pair.rejected is not None
            assert pair.rejected[start:end].isdigit() and not pair.inferred
            assert pair.rejected.startswith(pair.chosen[:start]) and pair.chosen.endswith(
                pair.rejected[end:]
            )
            assert pair.rejected != pair.chosen
    chosen = "It costs $9 * 2 = $18 in all."
    priced = {"question": "How much?", "ground_truth": chosen}
    assert any(read_preferences(priced, 1, seed)[0].rejected != chosen for seed in range(3))
    with pytest.raises(ValueError, match="data.corruptions must be 0 or above"):
        PreferenceData(corruptions=-1)


def test_batches_tell_injected_errors_from_inferred_ones(tmp_path):
    file = tmp_path / "solutions.jsonl"
    turned = {**OPENAI, "small": OPENAI["again"], "again": OPENAI["small"]}
    rows = [{**turned, "question": f"How many, {i}?"} for i in range(8)]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = PreferenceData(
        corruptions=1, train=str(file), validation_fraction=0.2, max_length=256, rows=2
    )
    data.bind(tiny_target())
    found = [
        (inferred, int(errors.sum()))
        for batch in data.train_dataloader()
        for inferred, errors in zip(batch.inferred.tolist(), batch.errors)
    ]
    assert {inferred for inferred, _ in found} == {True, False}
    assert all(count > (5 if inferred else 0) for inferred, count in found)


def test_only_the_last_answer_is_learned_and_pairs_share_their_prompt():
    tokenizer = tiny_tokenizer()
    rows: list[dict[str, Any]] = [
        {"chosen": DIALOGUE + "a", "rejected": DIALOGUE + "bcd"},
        {"chosen": DIALOGUE + "a", "rejected": DIALOGUE + "a"},
        {"prompt": "x" * 90, "chosen": "a", "rejected": "b"},
    ]
    (pair,) = tokenize_pairs(placed(rows), "rows", tokenizer, 64)
    prompt = prompt_ids(read_preferences(rows[0])[0].messages, tokenizer)
    for document, answer in ((pair.chosen, "a"), (pair.rejected, "bcd")):
        assert document.prompt == pair.prompt == prompt
        assert (
            str(tokenizer.decode(document.input_ids[document.loss_mask])).replace(" ", "")
            == f"{answer}<|end|>"
        )
    assert pair.response_tokens == 6 and len(pair) == len(pair.rejected)
    with pytest.raises(
        ValueError,
        match="no pair of data set 'rows' can be trained on: 1 × both answers are the same",
    ):
        tokenize_pairs(placed(rows[1:2]), "rows", tokenizer, 64)


def test_batches_hold_a_pair_to_a_row(tmp_path):
    file = tmp_path / "pairs.jsonl"
    rows = [
        {"prompt": f"say {letter}", "chosen": letter, "rejected": letter + "!"}
        for letter in "abcdefghij"
    ]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    data = PreferenceData(
        train=str(file),
        validation_fraction=0.2,
        max_length=64,
        rows=3,
        features=str(tmp_path / "unused"),
    )
    data.bind(tiny_target(), ("final",))
    assert len(data.documents) + len(data.held_out) == 10 and len(data.held_out) >= 1
    seen = 0
    for batch in data.train_dataloader():
        assert batch.chosen.input_ids.shape[0] == batch.rejected.input_ids.shape[0] <= 3
        assert not batch.chosen.document_ids.gt(0).any()
        prompts = [
            (text.input_ids * ~text.loss_mask * (text.document_ids == 0))[:, :9]
            for text in (batch.chosen, batch.rejected)
        ]
        assert torch.equal(*prompts)
        seen += batch.chosen.input_ids.shape[0]
    assert seen == len(data.documents)
    assert data.summary()["documents"] == seen and not (tmp_path / "unused").exists()


def test_the_tokens_of_a_known_error_are_marked(tmp_path):
    file = tmp_path / "solutions.jsonl"
    file.write_text(
        "".join(json.dumps(row) + "\n" for row in embedded_problems(8)), encoding="utf-8"
    )
    data = PreferenceData(train=str(file), validation_fraction=0.2, max_length=512, rows=2)
    data.bind(tiny_target())
    wrong = {row["question"]: row["wrong"][slice(*row["error"])] for row in embedded_problems(8)}
    tokenizer, found = tiny_tokenizer(), []
    for batch in data.train_dataloader():
        assert bool((batch.errors <= batch.rejected.loss_mask).all())
        for ids, errors in zip(batch.rejected.input_ids, batch.errors):
            found.append("".join(str(tokenizer.decode([token])) for token in ids[errors].tolist()))
    assert len(found) == len(data.documents) and set(found) <= set(wrong.values()) and all(found)
    (pair,) = tokenize_pairs(
        placed([{"prompt": "say a", "chosen": "a", "rejected": "b"}]), "rows", tokenizer, 64
    )
    assert not bool(pair.errors.any())


def embedded(source: str) -> Iterator[dict[str, Any]]:
    return read_jsonl(EMBEDDED_PAIRS if source == "embedded" else EMBEDDED_SOLUTIONS)


def test_the_embedded_pairs_are_readable_and_different():
    rows = list(embedded("embedded"))
    assert len(rows) >= 60 and len({row["prompt"] for row in rows}) == len(rows)
    assert all(read_preferences(row)[0].chosen != row["rejected"] for row in rows)


def test_the_embedded_problems_are_what_the_script_makes_and_their_arithmetic_is_known():
    rows = list(embedded("embedded_solutions"))
    assert rows == embedded_problems(len(rows))
    for row in rows:
        problem = read_problem(row)
        (right,), (wrong,) = problem.right, problem.wrong
        assert wrong.error is not None and right.answer != wrong.answer
        before = wrong.text[: wrong.error[0]]
        assert right.text.startswith(before) and not right.text.startswith(
            wrong.text[: wrong.error[1]] + "\n"
        )
        sums = re.findall(r"(\d+ [*+-] \d+) = (\d+)", right.text)
        assert sums and all(calculated(left) == int(result) for left, result in sums)
        slips = [
            left
            for left, result in re.findall(r"(\d+ [*+-] \d+) = (\d+)", wrong.text)
            if calculated(left) != int(result)
        ]
        assert len(slips) == 1 and before.rstrip().endswith(slips[0] + " =")


def calculated(expression: str) -> int:
    left, sign, right = expression.split()
    a, b = int(left), int(right)
    return {"*": a * b, "+": a + b, "-": a - b}[sign]
