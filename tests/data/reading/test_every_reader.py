"""What one reader of rows takes all of them take: training, pairs, labels, regeneration, endpoint,
evaluation.
"""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as parquet
import pytest
from tokenizers import decoders

from data import endpoint, regenerate
from data.datamodule import ConversationData
from data.generation.answering import prompt_rows
from data.labelled.labelled import LabelledData
from data.preferences import PreferenceData
from data.reading.files import Tally
from eval.tasks.tasks import load_tasks
from modules.target.target import Target
from tests.fakes import tiny_target

QUESTIONS = [f"ask {letter}" for letter in "abcd"]
Found = tuple[list[str], dict[str, Any]]
ANSWERS: dict[str, dict[str, Any]] = {
    "training": {"response": "yes"},
    "pairs": {"chosen": "yes", "rejected": "no"},
    "labels": {"response": "yes", "spans": [[0, 3, 1]]},
    "regeneration": {},
    "endpoint": {},
    "evaluation": {},
}
DATA = {"training": ConversationData, "pairs": PreferenceData, "labels": LabelledData}


@pytest.fixture(scope="module")
def target() -> Target:
    target = tiny_target()
    target.tokenizer.backend_tokenizer.decoder = decoders.Fuse()
    return target


def question(prompt: object) -> str:
    return str(prompt).removeprefix("<|user|>").removesuffix("<|end|><|assistant|>")


@pytest.fixture(params=list(ANSWERS))
def name(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def read(
    name: str, target: Target, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[[Path], Found]:
    """Questions that a reader finds in a file, sorted, and what it leaves out."""

    def trained(file: Path) -> Found:
        data = DATA[name](train=str(file), max_length=64)
        data.read(target)
        prompts = [
            target.tokenizer.decode(document.prompt)
            for document in [*data.documents, *data.held_out]
        ]
        return sorted(map(question, prompts)), data.tallies[0].as_dict()

    def regenerated(file: Path) -> Found:
        asked, tally = list[str](), Tally()

        def generate(_: Target, jobs: list[regenerate.Job], __: Any) -> list[list[int]]:
            asked.extend(question(target.tokenizer.decode(job.ids)) for job in jobs)
            return [[0] for _ in jobs]

        monkeypatch.setattr(regenerate, "_generate", generate)
        regenerate.regenerate(
            target,
            prompt_rows(str(file), None, tally),
            tmp_path / "out.jsonl",
            progress=False,
            tally=tally,
        )
        return sorted(asked), tally.as_dict()

    def served(file: Path) -> Found:
        asked, tally = list[str](), Tally()

        async def posted(_: Any, settings: Any, body: dict[str, Any], extra: Any) -> Any:
            (turn,) = body["messages"]
            asked.append(turn["content"])
            message = {"role": turn["role"], "content": "yes"}
            return {"message": message, "finish_reason": "stop"}, None

        monkeypatch.setattr(endpoint, "_posted", posted)
        endpoint.regenerate_by(
            endpoint.Endpoint("http://127.0.0.1:9/v1", "m"),
            prompt_rows(str(file), None, tally),
            tmp_path / "out.jsonl",
            tally=tally,
        )
        return sorted(asked), tally.as_dict()

    def evaluated(file: Path) -> Found:
        tally = Tally()
        tasks = load_tasks([str(file)], tally=tally)
        return sorted(
            turn for task in tasks for prompt in task.prompts for turn in prompt.turns
        ), tally.as_dict()

    return {"regeneration": regenerated, "endpoint": served, "evaluation": evaluated}.get(
        name, trained
    )


def rows_of(name: str, shape: Callable[[str], dict[str, Any]]) -> list[dict[str, Any]]:
    """The questions in a shape, with what the reader needs besides; a chat holds its answer itself
    for training.
    """
    return [{**shape(question), **ANSWERS[name]} for question in QUESTIONS]


SHAPES: dict[str, Callable[[str], dict[str, Any]]] = {
    "prompt": lambda text: {"prompt": text},
    "question": lambda text: {"question": text},
    "instruction": lambda text: {"instruction": text, "input": ""},
    "query": lambda text: {"query": text},
    "turns": lambda text: {"prompt": None, "turns": [text]},
    "prompt of turns": lambda text: {"prompt": [{"role": "user", "content": text}]},
    "prompt as JSON": lambda text: {"prompt": json.dumps([{"from": "human", "value": text}])},
    "prompt in parts": lambda text: {
        "prompt": {"role": "User", "content": [{"type": "text", "text": text}]}
    },
}
CHATS: dict[str, Callable[[list[dict[str, Any]]], dict[str, Any]]] = {
    "messages": lambda turns: {"messages": turns},
    "conversation": lambda turns: {"conversation": turns, "messages": None},
    "messages as JSON": lambda turns: {"messages": json.dumps(turns)},
    "conversations": lambda turns: {
        "conversations": [
            {"from": {"user": "human", "assistant": "GPT"}[turn["role"]], "value": turn["content"]}
            for turn in turns
        ]
    },
}


def write(
    path: Path, rows: list[dict[str, Any]], text: Callable[[str], bytes] = str.encode
) -> Path:
    path.write_bytes(text("".join(json.dumps(row) + "\n" for row in rows)))
    return path


@pytest.mark.parametrize("shape", list(SHAPES))
def test_every_shape_of_question(
    name: str, shape: str, read: Callable[[Path], Found], tmp_path: Path
) -> None:
    assert read(write(tmp_path / "a.jsonl", rows_of(name, SHAPES[shape]))) == (QUESTIONS, {})


@pytest.mark.parametrize("shape", list(CHATS))
def test_every_shape_of_chat(
    name: str, shape: str, read: Callable[[Path], Found], tmp_path: Path
) -> None:
    def chat(text: str) -> dict[str, Any]:
        return CHATS[shape](
            [{"role": "user", "content": text}, {"role": "assistant", "content": "yes"}]
        )

    assert read(write(tmp_path / "a.jsonl", rows_of(name, chat))) == (QUESTIONS, {})


@pytest.mark.parametrize(
    ("file", "text"),
    [
        ("a.jsonl", lambda text: text.encode("utf-8-sig")),
        ("a.jsonl", lambda text: text.replace("\n", "\r\n\n").encode()),
        ("a.jsonl.gz", lambda text: gzip.compress(text.encode())),
        ("a.json", str.encode),
        (
            "a.json",
            lambda text: json.dumps(
                [json.loads(line) for line in text.splitlines()], indent=1
            ).encode(),
        ),
        ("a.parquet", None),
    ],
)
def test_every_kind_of_file(
    name: str, file: str, text: Any, read: Callable[[Path], Found], tmp_path: Path
) -> None:
    rows = rows_of(name, SHAPES["prompt"])
    if text is None:
        parquet.write_table(pa.Table.from_pylist(rows), tmp_path / file)
    assert read(tmp_path / file if text is None else write(tmp_path / file, rows, text)) == (
        QUESTIONS,
        {},
    )


def test_bad_rows_are_counted_by_reason_and_place(
    name: str, read: Callable[[Path], Found], tmp_path: Path
) -> None:
    rows = rows_of(name, SHAPES["prompt"])
    odd = [
        {**rows[0], "prompt": value}
        for value in (3, [{"role": "user"}], [{"role": "user", "content": [{}]}])
    ]
    lines = ["{", "[]", "[" * 100_000, *map(json.dumps, odd), *map(json.dumps, rows)]
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    questions, left_out = read(tmp_path / "a.jsonl")
    assert questions == QUESTIONS
    assert [found["first"] for found in left_out.values()] == [
        f"a.jsonl line {number}" for number in range(1, 7)
    ]
    assert all(found["count"] == 1 for found in left_out.values())


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("a.jsonl", '{"prompt": "é"}'.encode("latin-1")),
        ("a.jsonl", '{"prompt": "a"}'.encode("utf-16")),
        ("a.jsonl.gz", b'{"prompt": "a"}'),
        ("a.parquet", b"PAR1"),
        ("a.json", b"[{"),
        ("a.jsonl", b""),
        ("a.jsonl", b"x\n{}"),
    ],
)
def test_files_that_are_none_are_refused_in_one_line_that_names_them(
    file: str, content: bytes, read: Callable[[Path], Found], tmp_path: Path
) -> None:
    (tmp_path / file).write_bytes(content)
    with pytest.raises(ValueError, match=file.replace(".", r"\.")) as caught:
        read(tmp_path / file)
    assert "\n" not in str(caught.value) and not list(tmp_path.glob("out*"))


def test_half_a_surrogate_pair_ends_nothing(
    name: str, read: Callable[[Path], Found], tmp_path: Path
) -> None:
    rows = rows_of(name, lambda text: {"prompt": text, "category": "c\ud83d"})
    questions, left_out = read(write(tmp_path / "a.jsonl", rows))
    assert questions == QUESTIONS and [found["count"] for found in left_out.values()] == [4]
