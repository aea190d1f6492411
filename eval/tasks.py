"""What is asked: prompts from JSONL files, grouped into tasks."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from data.conversations import read_jsonl

EMBEDDED = "embedded"
HELD_OUT = Path(__file__).resolve().parent.parent / "data" / "prompts" / "heldout.jsonl"
Turns = Literal["first", "all"]
_QUESTION_KEYS = ("turns", "prompt", "question")
_ID_KEYS = ("question_id", "id", "task_id")


@dataclass(frozen=True)
class Prompt:
    """One conversation to be answered turn by turn. `id` is unique within an evaluation.

    embedded: written for this project, so that a report may show its text.
    """

    id: str
    task: str
    turns: tuple[str, ...]
    embedded: bool = False


@dataclass(frozen=True)
class Task:
    """Prompts of one kind: a category of a file, or the whole file when its rows have none."""

    name: str
    prompts: tuple[Prompt, ...]


def load_tasks(sources: Sequence[str], limit: int | None = None, turns: Turns = "first") -> list[Task]:
    """The tasks of some prompt files.

    Args:
        sources: JSONL files (`.gz` too) whose rows have `turns` (Spec-Bench), `prompt` or `question`; or `embedded`.
        limit: prompts per task, from the top of the file.
        turns: only the first question of each conversation, or all of them.

    Raises:
        ValueError: a missing or empty file, a row that asks nothing, a limit below one.
    """
    if limit is not None and limit < 1:
        raise ValueError(f"limit {limit} leaves no prompt: give at least 1 per task")
    if not sources:
        raise ValueError("prompts: [] names no file: give JSONL files or `embedded`")
    grouped: dict[str, list[Prompt]] = {}
    for source in dict.fromkeys(sources):
        for prompt in _read(source, several=len(sources) > 1):
            kept = grouped.setdefault(prompt.task, [])
            if limit is None or len(kept) < limit:
                kept.append(prompt if turns == "all" else _first_turn(prompt))
    return [Task(name, tuple(prompts)) for name, prompts in grouped.items()]


def _first_turn(prompt: Prompt) -> Prompt:
    return Prompt(prompt.id, prompt.task, prompt.turns[:1], prompt.embedded)


def _read(source: str, several: bool) -> Iterator[Prompt]:
    path = HELD_OUT if source == EMBEDDED else Path(source)
    if not path.is_file():
        raise ValueError(f"prompts {source!r} does not exist: give a JSONL file (`--prompts PATH`) or `embedded`")
    stem = EMBEDDED if source == EMBEDDED else path.name.split(".")[0]
    found = 0
    for number, row in enumerate(read_jsonl(path), 1):
        task = str(row.get("category") or "")
        name = "/".join(part for part in (stem if several or not task else "", task) if part)
        key = next((str(row[k]) for k in _ID_KEYS if k in row), str(number))
        found += 1
        yield Prompt(f"{name}/{key}", name, _turns(row, f"{path} row {number}"), source == EMBEDDED)
    if not found:
        raise ValueError(f"prompts {source!r} has no rows: give a JSONL file with `turns`, `prompt` or `question`")


def _turns(row: Mapping[str, Any], where: str) -> tuple[str, ...]:
    value = next((row[key] for key in _QUESTION_KEYS if row.get(key)), None)
    turns = (value,) if isinstance(value, str) else tuple(value or ())
    if not turns or not all(isinstance(turn, str) and turn.strip() for turn in turns):
        raise ValueError(f"{where} asks nothing: give `turns` (a list of texts), `prompt` or `question`")
    return turns
