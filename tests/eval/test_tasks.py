"""Prompt files become tasks; what cannot is one line that says where and why."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest

from eval.tasks import load_tasks


def write(path: Path, rows: list[dict]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def spec_bench(path: Path) -> str:
    rows = [{"question_id": i, "category": f"c{i % 3}", "turns": [f"q{i}", f"again {i}"]} for i in range(12)]
    return write(path, rows)


def test_each_category_is_a_task_and_limit_counts_per_task(tmp_path: Path) -> None:
    tasks = load_tasks([spec_bench(tmp_path / "q.jsonl")], limit=2)
    assert [(task.name, len(task.prompts)) for task in tasks] == [("c0", 2), ("c1", 2), ("c2", 2)]
    assert tasks[1].prompts[0].id == "c1/1" and tasks[1].prompts[0].turns == ("q1",)
    assert not tasks[0].prompts[0].embedded


def test_all_turns(tmp_path: Path) -> None:
    assert load_tasks([spec_bench(tmp_path / "q.jsonl")], turns="all")[0].prompts[0].turns == ("q0", "again 0")


def test_prompt_and_question_files_are_one_task_each(tmp_path: Path) -> None:
    first = write(tmp_path / "a.jsonl", [{"prompt": "x"}, {"prompt": "y"}])
    packed = tmp_path / "b.jsonl.gz"
    packed.write_bytes(gzip.compress(b'{"question": "z", "answer": "w"}\n'))
    tasks = load_tasks([first, str(packed)])
    assert [(t.name, [p.turns[0] for p in t.prompts]) for t in tasks] == [("a", ["x", "y"]), ("b", ["z"])]


def test_two_files_with_the_same_categories_stay_apart(tmp_path: Path) -> None:
    sources = [spec_bench(tmp_path / "a.jsonl"), spec_bench(tmp_path / "b.jsonl")]
    ids = [p.id for t in load_tasks(sources) for p in t.prompts]
    assert len(set(ids)) == 24 and "a/c0/0" in ids and "b/c0/0" in ids


def test_the_embedded_prompts_may_be_shown() -> None:
    tasks = load_tasks(["embedded"], limit=1)
    assert len(tasks) > 1 and all(len(t.prompts) == 1 and t.prompts[0].embedded for t in tasks)


@pytest.mark.parametrize(("text", "message"), [
    ("", "has no rows"), ("not json\n", "line 1 is not JSON"), ("[1]\n", "line 1 is not a JSON object"),
    ('{"text": "x"}\n', "row 1 asks nothing"), ('{"prompt": "x"}\n{"turns": []}\n', "row 2 asks nothing"),
    ('{"turns": [1]}\n', "row 1 asks nothing")])
def test_bad_files(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "x.jsonl").write_text(text)
    with pytest.raises(ValueError, match=message):
        load_tasks([str(tmp_path / "x.jsonl")])


def test_missing_file_no_file_and_no_prompt() -> None:
    for sources, limit, message in ((["nowhere.jsonl"], 1, "does not exist"), ([], 1, "names no file"),
                                    (["embedded"], 0, "limit 0")):
        with pytest.raises(ValueError, match=message):
            load_tasks(sources, limit)
