"""Thirteen words in a row, whatever their case; data that is not here is said not to be."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from eval.methods.rows import Method, Row
from eval.report.html import page
from eval.report.markdown import markdown
from eval.tasks.contamination import (
    KEY,
    note_overlaps,
    overlap_lines,
    overlapping,
    texts_of,
    training_overlap,
)
from eval.tasks.tasks import Prompt, Task
from modules.contracts.sampling import Sampling
from modules.decoding.decoder import SpeculativeDecoder
from modules.drafters.retrieval.prompt_lookup import PromptLookup
from modules.drafters.retrieval.rasd import Rasd
from modules.drafters.retrieval.rest import Rest
from modules.drafters.retrieval.suffix_array import Datastore
from tests.eval.fakes import Replay
from tests.eval.report.test_pages import method, report
from tests.fakes import ScriptedDrafter, tiny_target

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
    row = {
        "messages": [{"role": "user", "content": "a"}],
        "chosen": "b",
        "ids": [1, 2],
        "finished": True,
    }
    assert list(texts_of(row)) == ["user", "a", "b"]


def test_the_data_that_the_provenance_names_is_searched(tmp_path: Path) -> None:
    rows = [{"prompt": " ".join(WORDS), "response": "yes"}, {"prompt": "no", "response": "no"}]
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = training_overlap(
        trained(tmp_path / "drafter", train=str(tmp_path / "data.jsonl")), TASKS
    )
    assert found == {"data": "data.jsonl", "prompts": 3, "found": ["t/0"], "short": 1}


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (
            {"train": "gone.jsonl"},
            "(gone.jsonl): not searched for the prompts, the data file is not here",
        ),
        (
            {"train": "owner/name"},
            "(owner/name): not searched for the prompts, a data set on the Hub",
        ),
        ({}, "x: not searched for the prompts, its provenance names no data"),
    ],
)
def test_data_that_cannot_be_searched_is_noted(
    tmp_path: Path, data: dict[str, Any], words: str
) -> None:
    overlap = training_overlap(trained(tmp_path / "drafter", **data), TASKS)
    assert words in overlap_lines([method("x", quality={KEY: overlap})])[0]


def test_the_embedded_answers_hold_no_embedded_evaluation_prompt(tmp_path: Path) -> None:
    from eval.tasks.tasks import load_tasks

    found = training_overlap(
        trained(tmp_path / "drafter", train="embedded"), load_tasks(["embedded"])
    )
    assert found["found"] == [] and found["prompts"] == 24


def test_rows_of_trained_drafters_carry_the_note_into_both_reports(tmp_path: Path) -> None:
    target, folder = tiny_target(), trained(tmp_path / "clover", train="gone.jsonl")
    rows = [
        Row(name, SpeculativeDecoder(target), target, Sampling(), "plain")
        for name in ("plain", "clover")
    ]
    note_overlaps(rows, [Method(drafter=folder)], TASKS)
    assert KEY not in rows[0].quality and "skipped" in rows[1].quality[KEY]
    for short, words in (
        (0, "with it"),
        (1, "; 1 is too short for that"),
        (2, "; 2 are too short"),
    ):
        few = {"data": "d", "prompts": 9, "found": [], "short": short}
        assert words in overlap_lines([{"name": "a", "quality": {KEY: few}}])[0]
    overlap = {"data": "d", "prompts": 9, "found": [f"<{i}>" for i in range(6)], "short": 0}
    shown = report(method("clover", quality={KEY: overlap}))
    told = (
        "- training data of clover (d): 6 of 9 prompts share 13 words in a row with it "
        "(&lt;0&gt;, &lt;1&gt;,"
    )
    assert told in markdown(shown)
    assert "&lt;4&gt;, …)" in page(shown, None)


class Assisted(Replay):
    """A decoder that names the trained component beside it."""

    def __init__(self, folder: Path) -> None:
        super().__init__(tiny_target())
        self.folder = folder

    def parts(self) -> dict[str, Path]:
        return {"assistant": self.folder}


def test_datastores_partners_assistants_and_rules_are_searched_too(tmp_path: Path) -> None:
    """The prompt stands in the judge's data alone, in the partner's, or in the corpus that is
    retrieved from.
    """
    for name, words in (("asked", WORDS), ("clean", ["no"])):
        (tmp_path / f"{name}.jsonl").write_text(
            json.dumps({"prompt": " ".join(words), "response": "yes"}) + "\n"
        )
        trained(tmp_path / name, train=str(tmp_path / f"{name}.jsonl"))
        Datastore.build([[5, 6]], 128).save(
            tmp_path / f"{name}_store", str(tmp_path / f"{name}.jsonl")
        )
    Datastore.build([[5, 6]], 128).save(tmp_path / "untold")
    at = {
        name: str(tmp_path / name)
        for name in ("asked", "clean", "asked_store", "clean_store", "untold")
    }
    methods = [
        Method(
            "judged", at["clean"], rule={"trained": at["asked"], "init_args": {"threshold": 0.7}}
        ),
        Method("judged_by_name", at["clean"], rule=at["asked"]),
        Method("typical", at["clean"], rule="typical"),
        *(Method(name, {}) for name in ("rest", "rasd", "untold", "partly")),
        Method("lookup", {}),
        Method("assisted", decoder={}),
    ]
    target = tiny_target()
    shape, partner = target.shape, ScriptedDrafter(target.shape)
    partner.loaded_from = at["asked"]
    decoders: dict[str, Any] = {
        "rest": SpeculativeDecoder(target, Rest(shape, at["asked_store"])),
        "rasd": SpeculativeDecoder(target, Rasd(shape, partner, at["clean_store"])),
        "untold": SpeculativeDecoder(target, Rasd(shape, datastore=at["untold"])),
        "partly": SpeculativeDecoder(target, Rasd(shape, partner, at["untold"])),
        "lookup": SpeculativeDecoder(target, PromptLookup(shape)),
        "assisted": Assisted(Path(at["asked"])),
    }
    plain = SpeculativeDecoder(target)
    rows = [
        Row(one.name, decoders.get(one.name, plain), target, Sampling(), "plain") for one in methods
    ]
    note_overlaps(rows, methods, TASKS)
    found: dict[str, Any] = {row.name: row.quality.get(KEY) for row in rows}
    assert all(
        found[name]["found"] == ["t/0"]
        for name in ("judged", "judged_by_name", "rest", "rasd", "assisted")
    )
    assert found["judged"]["data"] == "clean.jsonl, asked.jsonl" and found["typical"]["found"] == []
    assert (
        found["lookup"] is None
        and "does not name what it was built from" in found["untold"]["skipped"]
    )
    line = overlap_lines([method("x", quality={KEY: found["partly"]})])[0]
    assert "1 of 3 prompts" in line and "not all was searched, its datastore does not name" in line
