"""The prompts of an evaluation, grouped into tasks."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from data.reading.files import Skipped, Tally
from data.reading.rows import template_of, tools_of
from eval.tasks.answer_checks import Check
from eval.tasks.task_files import TaskSource, Turns, task_sources

THINKING = ("enable_thinking", "thinking", "reasoning_effort")
"""Arguments of chat templates that choose how a model thinks: Qwen3's, DeepSeek's, gpt-oss's."""


@dataclass(frozen=True)
class Prompt:
    """One conversation to be answered turn by turn. `id` is unique within an evaluation.

    embedded: written for this project, so that a report may show its text. check: how the first
    answer is scored. system: the system prompt, if any. tools: functions that are offered.
    template: the prompt's own arguments of the chat template. language: of the answers, if known.
    schema: JSON schema that answers are constrained to; empty: none.
    """

    id: str
    task: str
    turns: tuple[str, ...]
    embedded: bool = False
    check: Check | None = None
    system: str = ""
    tools: list[Any] | None = None
    template: dict[str, Any] | None = None
    language: str = ""
    schema: str = ""


@dataclass(frozen=True)
class Task:
    """Prompts of one kind: a category of a file, or the whole file when its rows have none."""

    name: str
    prompts: tuple[Prompt, ...]


def load_tasks(
    sources: Sequence[str],
    limit: int | None = None,
    turns: Turns = "first",
    tally: Tally | None = None,
) -> list[Task]:
    """The tasks of some sources.

    Args:
        sources: entries of `eval.tasks.task_files.task_source`: files whose rows have `turns`
            (Spec-Bench), `prompt`, `question`, `messages`, …, YAML files of tasks, Hub data sets,
            `embedded`.
        limit: prompts per task, from the top of the file.
        turns: only the first question of each conversation, or all of them; a task's YAML may say
            otherwise.
        tally: counts skipped rows (no JSON, no question, no reference); by default they are
            logged.

    Raises:
        ValueError: a missing or empty file, a source without a prompt, a limit below one.
    """
    if limit is not None and limit < 1:
        raise ValueError(f"limit {limit} leaves no prompt: give at least 1 per task")
    # Prompts by task; the limit holds for each.
    grouped: dict[str, list[Prompt]] = {}
    counted = Tally("prompt") if tally is None else tally
    for source in task_sources(sources):
        every = (source.turns or turns) == "all"
        for prompt in _read(source, limit, len(sources) > 1, counted):
            selected = grouped.setdefault(prompt.task, [])
            if limit is None or len(selected) < limit:
                selected.append(prompt if every else replace(prompt, turns=prompt.turns[:1]))
    # Ids must be unique, because journals and reports use them.
    _check_ids(grouped)
    if tally is None:
        counted.log()
    return [Task(name, tuple(prompts)) for name, prompts in grouped.items()]


def _check_ids(grouped: Mapping[str, Sequence[Prompt]]) -> None:
    ids = Counter(prompt.id for prompts in grouped.values() for prompt in prompts)
    twice = next((name for name, count in ids.items() if count > 1), None)
    if twice is not None:
        raise ValueError(
            f"prompts: the id {twice!r} occurs twice: give each row of a task its own `id`"
        )


def described(tasks: Sequence[Task], arguments: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """The report's entry of every task: its number of `prompts`, the `language` of its answers, the
    mode of `thinking` that the chat template is asked for, and its `metric`; None where none is
    given.

    Args:
        arguments: of the chat template, for all prompts.
    """
    return {
        task.name: {
            "prompts": len(task.prompts),
            "language": _together(prompt.language for prompt in task.prompts),
            "thinking": _together(
                _thinking({**arguments, **(prompt.template or {})}) for prompt in task.prompts
            ),
            "metric": _together(
                prompt.check.metric if prompt.check else "" for prompt in task.prompts
            ),
        }
        for task in tasks
    }


def asked_of(tasks: Sequence[Task], arguments: Mapping[str, Any] | None) -> dict[str, Any]:
    """The report's `settings` of the tasks: their names as `tasks`, and `described`."""
    return {
        "tasks": [task.name for task in tasks],
        "task_table": described(tasks, arguments or {}),
    }


def _thinking(arguments: Mapping[str, Any]) -> str:
    """`on`, `off` or a named mode; empty where the template decides."""
    value = next((arguments[key] for key in THINKING if key in arguments), None)
    return {None: "", True: "on", False: "off"}.get(value, str(value))


def _together(values: Iterable[str]) -> str | None:
    return ", ".join(dict.fromkeys(filter(None, values))) or None


def _read(source: TaskSource, limit: int | None, several: bool, tally: Tally) -> Iterator[Prompt]:
    count = 0
    for number, (place, row) in enumerate(source.rows(limit, tally), 1):
        # The task's name: the source's, the category's, or both.
        if not source.wanted(row):
            continue
        category = source.category(row)
        name = "/".join(
            part for part in (source.stem if several or not category else "", category) if part
        )
        # Without categories there is one task, which may be full.
        if limit is not None and not category and count >= limit:
            return
        # A row that cannot be used is counted with its reason.
        try:
            system, questions = source.questions(row)
            prompt = Prompt(
                f"{name}/{source.key(row, number)}",
                name,
                questions,
                source.embedded,
                source.check(row),
                system,
                tools_of(row),
                {**(source.chat_template or {}), **(template_of(row) or {})} or None,
                source.language_of(row),
                source.schema_of(row),
            )
        except Skipped as reason:
            tally.skip(str(reason), place)
            continue
        count += 1
        yield prompt
    if not count:
        kinds = f" of {', '.join(source.categories)}" if source.categories else ""
        raise ValueError(f"prompts {source.source!r} has no prompt{kinds}: {tally.reasons()}")
