"""Prompts as chats that are answered turn by turn, the journal of their answers, and the rows that
come out: what `data.regenerate` and `data.endpoint` share.

A chat that has answers loses them: each of its questions is answered behind the new answers to the
earlier ones, so that no turn goes on from words that the target did not say.
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
from data.reading.rows import CHATS, Message, questions_of
from modules.runtime.files import whole_file

logger = logging.getLogger(__name__)

_ANSWER = ("response", "response_ids", "temperature", "finished")


class Key(NamedTuple):
    """An answer: number `number` to question `turn` of prompt `index`."""

    index: int
    number: int
    turn: int


@dataclass(frozen=True)
class Chat:
    """A prompt's questions: for each, the turns that stand before its answer, behind the answer
    before it.
    """

    index: int
    row: Row
    questions: list[list[Message]]

    def before(self, answers: Sequence[Mapping[str, Any]]) -> list[Message]:
        """All turns up to the question behind the given answers."""
        turns = list(self.questions[0])
        for answer, question in zip(answers, self.questions[1:]):
            turns += [_turn(answer), *question]
        return turns

    def answered(self, answers: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """The prompt's row with the last answer, and all turns as `messages` where one answer alone
        does not tell them."""
        content, last = self.row.content, answers[-1]
        kept = {key: value for key, value in content.items() if key not in (*CHATS, "turns")}
        made = {key: last[key] for key in _ANSWER if key in last}
        if len(self.questions) > 1 or len(kept) < len(content) or "reasoning_content" in last:
            made["messages"] = [*self.before(answers[:-1]), _turn(last)]
        return {**kept, **made}


def _turn(answer: Mapping[str, Any]) -> Message:
    turn = {"role": "assistant", "content": answer["response"]}
    thought = answer.get("reasoning_content")
    return {**turn, "reasoning_content": thought} if thought else turn


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


def chats_of(rows: Sequence[Row], tally: Tally) -> list[Chat]:
    """The chats that rows open; others are counted.

    Raises:
        ValueError: none does.
    """
    chats = []
    for index, row in enumerate(rows):
        try:
            if row.content.get("tools"):
                raise Skipped("a prompt with `tools`, which are not offered here")
            chats.append(Chat(index, row, questions_of(row.content)))
        except Skipped as reason:
            tally.skip(str(reason), row.place)
    if not chats:
        raise ValueError(f"no prompt can be answered: {tally.reasons()}")
    return chats


def open_questions(
    chats: Sequence[Chat], turn: int, answers: int, journal: Journal
) -> Iterator[tuple[Chat, Key, list[Message]]]:
    """Questions number `turn` that are not answered, behind their chats so far.

    A chat ends at an answer that was cut off, or that could not be made: nothing follows from it.
    """
    for chat in chats:
        for number in range(answers if turn < len(chat.questions) else 0):
            key, said = Key(chat.index, number, turn), journal.said(chat.index, number)
            if len(said) == turn and (not turn or said[-1].get("finished", True)):
                yield chat, key, chat.before(said)


def prompts_digest(prompts: Sequence[Mapping[str, Any]]) -> str:
    """Hash of all prompts."""
    return hashlib.sha256(json.dumps(list(prompts), default=str).encode()).hexdigest()[:16]


# -- files -----------------------------------------------------------------------------------------


class Journal:
    """Answers made so far, one line each behind a line of settings.

    A line that is cut or damaged is dropped, and its answer made anew; a journal without answers is
    begun anew. It is written with the first answer.

    Args:
        needs: the key that a line must hold besides `index` and `number`.

    Raises:
        ValueError: it holds answers made with other settings.
    """

    def __init__(self, path: Path, settings: dict[str, Any], needs: str = "response") -> None:
        self.path, self.settings, self.needs = path, settings, needs
        self.answers: dict[Key, dict[str, Any]] = {}
        self._begun = False
        lines = (
            path.read_text(encoding="utf-8", errors="replace").split("\n") if path.exists() else []
        )
        begun, found = _object(lines[0]) if lines else None, [*map(_object, lines[1:])]
        damaged = sum(not self._remember(answer) for answer, line in zip(found, lines[1:]) if line)
        if not self.answers:
            return
        if damaged:
            logger.warning(
                "journal %r: %d line(s) hold no answer, which are made anew", str(path), damaged
            )
        for key, value in settings.items():
            if begun is None or begun.get(key) != value:
                raise ValueError(
                    f"journal {str(path)!r} was begun with {key} {begun and begun.get(key)}, not "
                    f"{value}: restore it, or delete the journal"
                )
        self._write(self.answers.values())

    def append(self, answers: Sequence[dict[str, Any]]) -> None:
        """Write a batch of answers through to the disk."""
        answers = clean(list(answers))
        for answer in answers:
            self._remember(answer)
        if not self._begun:
            self._write(answers)
            return
        append_lines(self.path, map(json.dumps, answers))

    def said(self, index: int, number: int) -> list[dict[str, Any]]:
        """The answers to a prompt's first questions, as far as they go."""
        found = (self.answers.get(Key(index, number, turn)) for turn in range(len(self.answers)))
        return list(iter(lambda: next(found, None), None))

    def remove(self) -> None:
        """Delete it, when the output holds all of it."""
        self.path.unlink(missing_ok=True)

    def _write(self, answers: Any) -> None:
        lines = [json.dumps(one) + "\n" for one in (self.settings, *answers)]
        whole(self.path, "".join(lines).encode())
        self._begun = True

    def _remember(self, answer: dict[str, Any] | None) -> bool:
        if answer is None or not isinstance(answer.get(self.needs), str | list):
            return False
        place = [answer.get("index"), answer.get("number"), answer.get("turn", 0)]
        if not all(type(one) is int for one in place):
            return False
        self.answers[Key(*map(int, place))] = answer  # pyright: ignore[reportArgumentType]
        return True


def _object(line: str) -> dict[str, Any] | None:
    """What a line holds; None if that is no JSON object."""
    try:
        found = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return clean(found) if isinstance(found, dict) else None


def writable(output: Path) -> Path:
    """A path that answers may be written to; ValueError if not."""
    if not output.name.endswith((".jsonl", ".jsonl.gz")):
        raise ValueError(f"output {str(output)!r} must end in .jsonl or .jsonl.gz")
    if output.exists():
        raise ValueError(f"output {str(output)!r} exists already: delete it or give another")
    output.parent.mkdir(parents=True, exist_ok=True)
    return output


@contextmanager
def making(output: Path) -> Iterator[Path]:
    """A path that answers may be written to, kept from other runs while the block lasts: they would
    write into the same journal.

    Raises:
        ValueError: as `writable`, or another run is making it.
    """
    with claimed_file(writable(output)):
        yield writable(output)


def write_answers(
    output: Path, chats: Sequence[Chat], answers: int, journal: Journal, tally: Tally
) -> None:
    """One row for each of `answers` to every chat that has one, and remove the journal. Chats that
    ended early are counted."""
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
    """All rows at once; compressed files are the same bytes for the same rows."""
    lines = (json.dumps(clean(row), ensure_ascii=False, default=str) + "\n" for row in rows)
    content = "".join(lines).encode()
    whole(output, gzip.compress(content, 9, mtime=0) if output.suffix == ".gz" else content)


def whole(path: Path, content: bytes) -> None:
    """Write a file that is there whole or as it was."""
    with whole_file(path) as partial:
        partial.write_bytes(content)


def placed(rows: Sequence[dict[str, Any]]) -> list[Row]:
    """Rows that were made in Python."""
    return [Row(Place("prompts", "row", number), clean(row)) for number, row in enumerate(rows, 1)]


def summary(output: str | Path, count: int, tally: Tally) -> str:
    """What a run says at its end: how many answers, and what was left out."""
    return "\n".join([f"{count} answers: {output}", *tally.lines()])
