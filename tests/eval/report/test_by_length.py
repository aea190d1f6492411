"""Figures by length of the context, and the tasks that they are for."""

from __future__ import annotations

from typing import Any

import pytest

from eval.evaluation import Evaluation
from eval.methods.reselection import needle_texts, table
from eval.report.by_length import by_length, length_table, plotted_lengths
from eval.report.plots import against_length
from eval.run.journal import Record
from eval.tasks.answer_checks import Check, named_share, same_line
from eval.tasks.tasks import load_tasks
from modules.decoding.decoder import Trace
from tests.fakes import tiny_target


def record(prompt: str, tokens: int, seconds: float, kv_bytes: list[int]) -> Record:
    trace = Trace(tokens, ids=[7, 8, 9, 10], accepted=[2, 1], seconds={"verify": seconds})
    trace.kv_bytes, trace.time_to_first_token = kv_bytes, seconds / 2
    return Record("m", prompt, "t", 0, False, [7] * tokens, trace, 1000 * tokens)


def test_answers_are_grouped_by_the_nearest_power_of_two() -> None:
    target: Any = tiny_target()
    text = target.tokenizer.decode([7, 8, 9, 10])
    answers = {
        "a": record("a", 900, 1.0, [10, 20]),
        "b": record("b", 1100, 2.0, [30]),
        "c": record("c", 3900, 4.0, []),
    }
    checks = {"a": Check("named_share", text[:2]), "b": Check("named_share", "§")}
    short, long = by_length(target, answers, answers, checks)
    assert (short["context"], long["context"]) == (1024, 4096)
    assert short["prompts"] == 2 and short["prompt_tokens"] == 1000
    assert short["tokens_per_second"] == pytest.approx(6 / 3)
    assert short["kv_bytes_per_step"] == 20 and long["kv_bytes_per_step"] is None
    assert short["time_to_first_token"] == 0.75 and short["mean_accepted_tokens"] == 1.5
    assert short["score"] == 0.5 and long["score"] is None
    assert long["peak_memory_bytes"] == 3_900_000 and long["speedup"] == 1.0
    # Nothing where no context is long.
    assert by_length(target, {"a": answers["a"]}, answers, checks) == []
    # The table and the plots, beside a report of an earlier version.
    methods = [{"name": "old"}, {"name": "m", "by_length": [short, long]}]
    header, lines = length_table(methods)
    assert [line[:3] for line in lines] == [["1k", "m", "2"], ["4k", "m", "1"]]
    assert lines[0][header.index("KV MB a step")] == "0.00" and lines[1][-1] == "–"
    assert "score" in plotted_lengths(methods)
    assert "<svg" in against_length(methods[1:], "score", "score")


def test_generated_tasks_have_a_category_for_each_length() -> None:
    tasks = load_tasks(["tasks/long/needle", "tasks/long/variables"], limit=1)
    names = ["1k", "2k", "4k", "8k", "16k", "32k"]
    expected = [f"{kind}/{name}" for kind in ("needle", "variables") for name in names]
    assert [task.name for task in tasks] == expected
    check = tasks[-1].prompts[0].check
    assert check is not None and len(check.reference.splitlines()) == 4
    assert Evaluation(prompts=["tasks/long/passkey"]).check()


def test_sources_and_lengths_belong_together(tmp_path: Any) -> None:
    for text, words in (
        ("source: generated:needle\n", "give lengths"),
        ("source: a.jsonl\nlengths: [10]\n", "give lengths"),
        ("source: generated:pin\nlengths: [10]\n", "no kind"),
        ("source: generated:needle\nlengths: [0]\n", "at least 1"),
    ):
        file = tmp_path / "task.yaml"
        file.write_text(text)
        with pytest.raises(ValueError, match=words):
            load_tasks([str(file)])
    with pytest.raises(ValueError, match="no such folder"):
        load_tasks(["tasks/long/repository=repository:/nowhere"])


def test_answers_are_scored_by_what_they_name() -> None:
    assert named_share("12 and 34", "12\n56") == 0.5
    assert same_line("```python\n  x = 1\n```", "x = 1") and not same_line("y = 1\nx = 1", "x = 1")


def test_needle_texts_end_in_their_answer() -> None:
    target: Any = tiny_target()
    ((prompt, answer),) = needle_texts(target, 400, 1, 0)
    assert target.tokenizer.decode(answer).replace(" ", "").isdigit() and len(prompt) > 300
    assert table({3: (0.5, -1.0), 5: (0.75, -2.0)}).splitlines()[2].startswith("| 5 |")
