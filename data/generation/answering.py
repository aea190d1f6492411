"""Prompts as chats that are answered turn by turn, the journal of their answers, and the resulting
rows, for `data.regenerate` and `data.endpoint`.

Existing answers of a chat are replaced: each question is answered after the new answers to the
earlier ones, so that no turn continues text that the target did not generate.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

from configs.command_line.outputs import append_lines, claimed_file
from data.reading.files import Place, Row, Skipped, Tally, clean, local_files, read_rows
from data.reading.rows import (
    CHATS,
    TEMPLATE_ARGUMENTS,
    Message,
    questions_of,
    template_of,
    tools_of,
)
from modules.runtime.files import whole_file

logger = logging.getLogger(__name__)

_ANSWER = ("response", "response_ids", "prompt_ids", "temperature", "finished")
_IN_TURNS = ("reasoning_content", "tool_calls", "response_ids")
"""Keys of an answer that its turn holds as well."""


class Key(NamedTuple):
    """The key of an answer: number `number` to question `turn` of prompt `index`."""

    index: int
    number: int
    turn: int


@dataclass(frozen=True)
class Chat:
    """A prompt's questions: for each, the turns between the previous answer and its answer.

    tools: functions that are offered. template: the row's own arguments of the chat template.
    """

    index: int
    row: Row
    questions: list[list[Message]]
    tools: list[Any] | None = None
    template: dict[str, Any] | None = None

    def calls(self, answer: Mapping[str, Any]) -> bool:
        """Whether an answer calls an offered function, whose result nobody has. Of an answer as
        text it is enough that it names one."""
        names = [str(tool["function"]["name"]) for tool in self.tools or ()]
        return bool(answer.get("tool_calls")) or any(name in answer["response"] for name in names)

    def before(self, answers: Sequence[Mapping[str, Any]]) -> list[Message]:
        """All turns up to the question after the given answers."""
        turns = list(self.questions[0])
        for answer, question in zip(answers, self.questions[1:]):
            turns += [_turn(answer), *question]
        return turns

    def answered(self, answers: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """The prompt's row with the last answer, and with all turns as `messages` if the row and
        the answer do not determine them."""
        content, last = self.row.content, answers[-1]
        prompt_keys = {key: value for key, value in content.items() if key not in (*CHATS, "turns")}
        made = {key: last[key] for key in _ANSWER if key in last}
        if (
            len(self.questions) > 1
            or len(prompt_keys) < len(content)
            or any(last.get(key) for key in ("reasoning_content", "tool_calls"))
        ):
            turn = {key: value for key, value in _turn(last).items() if key != "response_ids"}
            made["messages"] = [*self.before(answers[:-1]), turn]
        return {**prompt_keys, **made}


def _turn(answer: Mapping[str, Any]) -> Message:
    turn = {"role": "assistant", "content": answer["response"]}
    if answer.get("tool_calls") and not answer["response"]:
        turn["content"] = None
    return {**turn, **{key: answer[key] for key in _IN_TURNS if answer.get(key)}}


# -- prompts --------------------------------------------------------------------------------------


def prompt_rows(prompts: str, limit: int | None, tally: Tally) -> list[Row]:
    """The first rows of files of prompts.

    Raises:
        ValueError: no such file, or no row in it that can be read.
    """
    if local_files(prompts) is None:
        raise ValueError(
            f"prompts {prompts!r} does not exist: give a .jsonl, .json or .parquet file"
        )
    rows = list(islice(read_rows(prompts, tally=tally), limit))
    if not rows:
        raise ValueError(f"prompts {prompts!r} has no prompt: {tally.reasons()}")
    return rows


def chats_of(rows: Sequence[Row], tally: Tally, offered: bool = False) -> list[Chat]:
    """The chats of rows with a question; other rows are counted.

    Args:
        offered: whether the caller passes `Chat.tools` and `Chat.template` on; rows with either are
            skipped otherwise.

    Raises:
        ValueError: no row has a question.
    """
    chats = []
    # Tools and unreadable rows are reasons to skip.
    for index, row in enumerate(rows):
        try:
            chat = Chat(
                index,
                row,
                questions_of(row.content),
                tools_of(row.content),
                template_of(row.content),
            )
            if not offered and (chat.tools or chat.template):
                key = "tools" if chat.tools else TEMPLATE_ARGUMENTS
                raise Skipped(f"a prompt with `{key}`, which this command does not pass on")
            chats.append(chat)
        except Skipped as reason:
            tally.skip(str(reason), row.place)
    if not chats:
        raise ValueError(f"no prompt can be answered: {tally.reasons()}")
    return chats


def open_questions(
    chats: Sequence[Chat], turn: int, answers: int, journal: Journal
) -> Iterator[tuple[Chat, Key, list[Message]]]:
    """Unanswered questions number `turn`, each with all turns before its answer.

    A chat ends at a truncated or missing answer, and at one that calls a function.
    """
    for chat in chats:
        for number in range(answers if turn < len(chat.questions) else 0):
            key, said = Key(chat.index, number, turn), journal.said(chat.index, number)
            ended = said and (not said[-1].get("finished", True) or chat.calls(said[-1]))
            if len(said) == turn and not ended:
                yield chat, key, chat.before(said)


def prompts_digest(prompts: Sequence[Mapping[str, Any]]) -> str:
    """Hash of all prompts, 16 hexadecimal digits."""
    return hashlib.sha256(json.dumps(list(prompts), default=str).encode()).hexdigest()[:16]


# -- files -----------------------------------------------------------------------------------------


class Journal:
    """Answers so far, one line each, after a first line of settings.

    Truncated or damaged lines are dropped, and their answers are generated again; a journal without
    answers starts anew. The file is created with the first answer.

    Args:
        needs: the key that a line must hold besides `index` and `number`.

    Raises:
        ValueError: it holds answers with other settings.
    """

    def __init__(self, path: Path, settings: dict[str, Any], needs: str = "response") -> None:
        self.path, self.settings, self.needs = path, settings, needs
        self.answers: dict[Key, dict[str, Any]] = {}
        self._begun = False
        # 1. Read what can be read.
        lines = (
            path.read_text(encoding="utf-8", errors="replace").split("\n") if path.exists() else []
        )
        begun, entries = _object(lines[0]) if lines else None, [*map(_object, lines[1:])]
        damaged = sum(
            not self._remember(answer) for answer, line in zip(entries, lines[1:]) if line
        )
        if not self.answers:
            return
        if damaged:
            logger.warning(
                "journal %r: %d line(s) hold no answer, which are generated again",
                str(path),
                damaged,
            )
        # 2. Refuse answers that were made with other settings.
        for key, value in settings.items():
            if begun is None or begun.get(key) != value:
                raise ValueError(
                    f"journal {str(path)!r} was begun with {key} {begun and begun.get(key)}, not "
                    f"{value}: restore it, or delete the journal"
                )
        # 3. Rewrite the file without damaged lines.
        self._write(self.answers.values())

    def append(self, answers: Sequence[dict[str, Any]]) -> None:
        """Write a batch of answers and wait until they are on disk."""
        answers = clean(list(answers))
        for answer in answers:
            self._remember(answer)
        if not self._begun:
            self._write(answers)
            return
        append_lines(self.path, map(json.dumps, answers))

    def said(self, index: int, number: int) -> list[dict[str, Any]]:
        """The answers to a prompt's questions, up to the first without an answer."""
        answers = (self.answers.get(Key(index, number, turn)) for turn in range(len(self.answers)))
        return list(iter(lambda: next(answers, None), None))

    def remove(self) -> None:
        """Delete the journal, after the output is written."""
        self.path.unlink(missing_ok=True)

    def _write(self, answers: Any) -> None:
        lines = [json.dumps(entry) + "\n" for entry in (self.settings, *answers)]
        whole(self.path, "".join(lines).encode())
        self._begun = True

    def _remember(self, answer: dict[str, Any] | None) -> bool:
        if answer is None or not isinstance(answer.get(self.needs), str | list):
            return False
        place = [answer.get("index"), answer.get("number"), answer.get("turn", 0)]
        if not all(type(number) is int for number in place):
            return False
        self.answers[Key(*map(int, place))] = answer  # pyright: ignore[reportArgumentType]
        return True


def _object(line: str) -> dict[str, Any] | None:
    """The JSON object of a line; None if it is none."""
    try:
        value = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return clean(value) if isinstance(value, dict) else None


def writable(output: Path) -> Path:
    """The path, if answers can be written to it; raises ValueError otherwise."""
    if not output.name.endswith((".jsonl", ".jsonl.gz")):
        raise ValueError(f"output {str(output)!r} must end in .jsonl or .jsonl.gz")
    if output.exists():
        raise ValueError(f"output {str(output)!r} exists already: delete it or give another")
    output.parent.mkdir(parents=True, exist_ok=True)
    return output


@contextmanager
def making(output: Path) -> Iterator[Path]:
    """A path that answers can be written to, locked inside of the `with` block, because other runs
    would write into the same journal.

    Raises:
        ValueError: as `writable`, or another run is writing it.
    """
    with claimed_file(writable(output)):
        yield writable(output)


def write_answers(
    output: Path, chats: Sequence[Chat], answers: int, journal: Journal, tally: Tally
) -> None:
    """Write one row per answer number and chat, and remove the journal. Chats that ended early are
    counted."""
    rows = []
    for chat in chats:
        for number in range(answers):
            said = journal.said(chat.index, number)
            if said:
                rows.append(chat.answered(said))
            if 0 < len(said) < len(chat.questions):
                tally.change("ended before its last question", chat.row.place)
    write_rows(output, rows)
    journal.remove()


def write_rows(output: Path, rows: Sequence[dict[str, Any]]) -> None:
    """Write all rows atomically; compressed files of the same rows are identical."""
    lines = (json.dumps(clean(row), ensure_ascii=False, default=str) + "\n" for row in rows)
    content = "".join(lines).encode()
    whole(output, gzip.compress(content, 9, mtime=0) if output.suffix == ".gz" else content)


def whole(path: Path, content: bytes) -> None:
    """Write a file atomically."""
    with whole_file(path) as partial:
        partial.write_bytes(content)


def placed(rows: Sequence[dict[str, Any]]) -> list[Row]:
    """Rows from Python objects, with places."""
    return [Row(Place("prompts", "row", number), clean(row)) for number, row in enumerate(rows, 1)]


def summary(output: str | Path, count: int, tally: Tally) -> str:
    """The final message of a run: the number of answers, and reasons of skipped rows."""
    return "\n".join([f"{count} answers: {output}", *tally.lines()])
