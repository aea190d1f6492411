"""Thirteen words in a row, whatever their case; data that is not here is said not to be."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from eval.contamination import KEY, note_overlaps, overlap_lines, overlapping, texts_of, training_overlap
from eval.html import page
from eval.methods import Method, Row
from eval.report import markdown
from eval.tasks import Prompt, Task
from modules.core.drafter import Sampling
from modules.decoding.decoder import SpeculativeDecoder
from tests.eval.test_pages import method, report
from tests.fakes import tiny_target

WORDS = [f"word{i}" for i in range(20)]
ASKED = Prompt("t/0", "t", (" ".join(WORDS[:13]) + "?",))
OTHER = Prompt("t/1", "t", (" ".join(reversed(WORDS)),))
SHORT = Prompt("t/2", "t", ("word0 word1",))
TASKS = [Task("t", (ASKED, OTHER, SHORT))]


def trained(folder: Path, **data: Any) -> str:
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    (folder / "provenance.json").write_text(json.dumps({"data": data}))
    return str(folder)


def test_thirteen_words_in_a_row_count_and_twelve_do_not() -> None:
    thirteen, twelve = "Before: " + ", ".join(WORDS[:13]).upper() + "!", " ".join(WORDS[:12])
    assert overlapping(TASKS[0].prompts, [thirteen]) == (["t/0"], 1)
    assert overlapping(TASKS[0].prompts, [twelve, " ".join(WORDS[1:13])]) == ([], 1)


def test_texts_are_found_in_rows_of_any_shape() -> None:
    row = {"messages": [{"role": "user", "content": "a"}], "chosen": "b", "ids": [1, 2], "finished": True}
    assert list(texts_of(row)) == ["user", "a", "b"]


def test_the_data_that_the_provenance_names_is_searched(tmp_path: Path) -> None:
    rows = [{"prompt": " ".join(WORDS), "response": "yes"}, {"prompt": "no", "response": "no"}]
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = training_overlap(trained(tmp_path / "drafter", train=str(tmp_path / "data.jsonl")), TASKS)
    assert found == {"data": "data.jsonl", "prompts": 3, "found": ["t/0"], "short": 1}


@pytest.mark.parametrize(("data", "words"), [
    ({"train": "gone.jsonl"}, "(gone.jsonl): not searched for the prompts, the data file is not here"),
    ({"train": "owner/name"}, "(owner/name): not searched for the prompts, a data set on the Hub"),
    ({}, "x: not searched for the prompts, its provenance names no data")])
def test_data_that_cannot_be_searched_is_noted(tmp_path: Path, data: dict[str, Any], words: str) -> None:
    overlap = training_overlap(trained(tmp_path / "drafter", **data), TASKS)
    assert words in overlap_lines([method("x", quality={KEY: overlap})])[0]


def test_the_embedded_answers_hold_no_embedded_evaluation_prompt(tmp_path: Path) -> None:
    from eval.tasks import load_tasks
    found = training_overlap(trained(tmp_path / "drafter", train="embedded"), load_tasks(["embedded"]))
    assert found["found"] == [] and found["prompts"] == 24


def test_rows_of_trained_drafters_carry_the_note_into_both_reports(tmp_path: Path) -> None:
    target, folder = tiny_target(), trained(tmp_path / "clover", train="gone.jsonl")
    rows = [Row(name, SpeculativeDecoder(target), target, Sampling(), "plain") for name in ("plain", "clover")]
    note_overlaps(rows, [Method(drafter=folder)], TASKS)
    assert KEY not in rows[0].quality and "skipped" in rows[1].quality[KEY]
    overlap = {"data": "d", "prompts": 9, "found": [f"<{i}>" for i in range(6)], "short": 0}
    shown = report(method("clover", quality={KEY: overlap}))
    assert "- training data of clover (d): 6 of 9 prompts share 13 words in a row with it (<0>, <1>," in markdown(shown)
    assert "&lt;4&gt;, …)" in page(shown, None)
