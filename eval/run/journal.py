"""The journal of an evaluation: every finished unit is on disk before the next starts, so that an
interrupted evaluation can be resumed.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from configs.command_line.outputs import append_lines, write_whole
from configs.command_line.shapes import Each, mismatch
from eval.methods.digests import changed, digest, plain
from modules.decoding.decoder import Trace

logger = logging.getLogger(__name__)

_TRACE = {
    "prompt_tokens": int,
    "ids": [int],
    "drafted": [bool],
    "accepted": [int],
    "offered": [int],
    "nodes": [int],
    "seconds": Each(float),
    "time_to_first_token": float,
    "rows": [int],
}
_RECORD = {
    "row": str,
    "prompt": str,
    "task": str,
    "repeat": int,
    "again": bool,
    "prompt_ids": [int],
    "trace": _TRACE,
    "peak_memory": int,
}
_UNIT = {"unit": str, "of": str, "records": [_RECORD]}
_PREVIOUS = ".previous.jsonl"
_ANEW = "add --overwrite instead of --resume to measure anew, or give another --output"


@dataclass(frozen=True)
class Record:
    """One answer of one row.

    prompt: the prompt's id, with `#2` … for later turns. again: the second run of a baseline on the
    same prompt.
    prompt_ids: token ids of the prompt. trace: of this prompt; its seconds are its share of the
    batch's.
    peak_memory: bytes, see `eval.run.harness.peak_memory`.
    """

    row: str
    prompt: str
    task: str
    repeat: int
    again: bool
    prompt_ids: list[int]
    trace: Trace
    peak_memory: int

    @staticmethod
    def from_json(value: Mapping[str, Any]) -> Record:
        """The record that `dataclasses.asdict` made `value` from."""
        return Record(**{**value, "trace": Trace(**value["trace"])})


class Journal:
    """A JSONL file: a header with the settings, then one line per finished unit with its records.

    A unit carries the header's digest, so that records of another evaluation are never counted.
    The folder must be locked (`configs.command_line.outputs.claimed`).

    Args:
        path: of the file.
        header: JSON-able settings; a journal with another header is not resumed.
        resume: continue an existing journal; otherwise it is renamed to `*.previous.jsonl`. An
            incomplete last line is dropped; units of damaged lines are measured again, with a
            warning.

    Raises:
        ValueError: resuming a journal with other settings; the message names what changed.
    """

    def __init__(self, path: Path, header: Mapping[str, Any], resume: bool) -> None:
        self.path, self.done, self._digest = path, {}, digest(plain(header))
        path.parent.mkdir(parents=True, exist_ok=True)
        if resume and path.exists():
            self._load(plain(header))
        elif path.exists():
            set_aside(path)
        if not path.exists():
            self._append(plain(header))

    done: dict[str, list[Record]]
    """Finished units by key."""

    def _load(self, header: Mapping[str, Any]) -> None:
        # A journal without a complete header is replaced.
        *lines, torn = self.path.read_bytes().split(b"\n")
        if not lines:
            self.path.unlink()
            return
        refuse_changes(self.path, header)
        # Read what can be read; the rest is measured again.
        intact = [lines[0]]
        for number, line in enumerate(lines[1:], 2):
            try:
                unit, records = self._unit(line)
            except (ValueError, TypeError, RecursionError) as error:
                logger.warning(
                    "%s line %d does not count (%s): what it was about is measured again",
                    self.path,
                    number,
                    _reason(error),
                )
                continue
            self.done[unit] = records
            intact.append(line)
        # Rewrite the file without damaged lines.
        if torn or len(intact) < len(lines):
            write_whole({self.path: b"".join(line + b"\n" for line in intact).decode()})

    def _unit(self, line: bytes) -> tuple[str, list[Record]]:
        """Key and records of a unit's line.

        Raises:
            ValueError: the line is damaged, or from another evaluation.
        """
        value = json.loads(line)
        wrong = mismatch(value, _UNIT)
        if wrong is None and not value["records"]:
            wrong = "no records"
        if wrong is None and value["of"] != self._digest:
            wrong = "another evaluation's"
        if wrong is not None:
            raise ValueError(wrong)
        return value["unit"], [Record.from_json(record) for record in value["records"]]

    def drop(self, unit: str) -> None:
        """Forget an incomplete unit, so that it is measured again."""
        logger.warning("%s: %s lacks answers: it is measured again", self.path, unit)
        del self.done[unit]

    def add(self, unit: str, records: Sequence[Record]) -> None:
        """Write a finished unit and wait until it is on disk."""
        self.done[unit] = list(records)
        plain_records = [asdict(record) for record in records]
        self._append({"unit": unit, "of": self._digest, "records": plain_records})

    def _append(self, value: Mapping[str, Any]) -> None:
        append_lines(self.path, [json.dumps(value, separators=(",", ":"))])


def written_journals(path: Path) -> list[Path]:
    """Existing journals of one evaluation: `path`, or one file for each of several processes."""
    files = [path, *sorted(path.parent.glob(f"{path.stem}.*of*{path.suffix}"))]
    return [file for file in files if file.is_file() and not file.match(f"*{_PREVIOUS}")]


def set_aside(journal: Path) -> None:
    """Rename a journal that is to be replaced to `*.previous.jsonl`."""
    journal.replace(journal.with_suffix(_PREVIOUS))


def journaled_budgets(path: Path) -> dict[str, int]:
    """The budgets of a journal's rows by name; none where there is no journal yet."""
    if not path.is_file():
        return {}
    with path.open("rb") as file:
        line = file.readline()
    # `refuse_changes` has read this line before, so it is a header or incomplete.
    rows = json.loads(line).get("row", {}) if line.endswith(b"\n") else {}
    return {
        name: row["budget"]
        for name, row in rows.items()
        if isinstance(row, dict) and isinstance(row.get("budget"), int)
    }


def refuse_changes(path: Path, header: Mapping[str, Any], part: bool = False) -> None:
    """Refuse an existing journal with another header.

    Args:
        path: of the journal.
        header: of this evaluation, after a JSON round trip.
        part: whether `header` holds only some of the keys.

    Raises:
        ValueError: the first difference, or a first line that is no header.
    """
    # A journal without a complete first line has nothing to compare.
    if not path.is_file():
        return
    with path.open("rb") as file:
        line = file.readline()
    if not line.endswith(b"\n"):
        return
    # A first line that is no header, or of another version.
    try:
        stored = json.loads(line)
    except (ValueError, RecursionError):
        stored = None
    if not isinstance(stored, dict):
        raise ValueError(f"{path} line 1 is no header of an evaluation: {_ANEW}")
    if stored.get("format") != header.get("format"):
        versions = f"format {_short(stored.get('format'))}, now {_short(header.get('format'))}"
        raise ValueError(f"{path} is of another version ({versions}): {_ANEW}")
    # The first key that differs.
    difference = changed({key: stored.get(key) for key in header} if part else stored, dict(header))
    if difference is not None:
        name, before, now = difference
        raise ValueError(
            f"{path} was made with another {name} ({_short(before)}, now {_short(now)}): {_ANEW}"
        )


def _reason(error: BaseException) -> str:
    no_json = isinstance(error, (json.JSONDecodeError, UnicodeDecodeError))
    return "it is no JSON" if no_json else str(error)[:80]


def _short(value: object) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else text[:57] + "..."
