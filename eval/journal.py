"""The journal of an evaluation: every finished prompt is on disk before the next begins, so that it can resume."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from modules.decoding.decoder import Trace


@dataclass(frozen=True)
class Record:
    """One answer of one row.

    prompt: the prompt's id, with `#2` … for later turns. again: the second run of a baseline on the same prompt.
    prompt_ids: what was asked, as tokens. trace: of this prompt; its seconds are its share of the batch's.
    peak_memory: bytes, see `eval.harness.peak_memory`.
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
    """A JSONL file: a header that says what is measured, then one line per finished unit with its records.

    Args:
        path: where.
        header: JSON-able settings; a journal with another header is not resumed.
        resume: keep what is there (a torn last line is dropped); otherwise an earlier journal is set aside as
            `*.previous.jsonl`.

    Raises:
        ValueError: resuming a journal that was made with other settings.
    """

    def __init__(self, path: Path, header: Mapping[str, Any], resume: bool) -> None:
        self.path, self.done = path, {}
        path.parent.mkdir(parents=True, exist_ok=True)
        if resume and path.exists():
            self._load(json.loads(json.dumps(header)))
        elif path.exists():
            path.replace(path.with_suffix(".previous.jsonl"))
        if not path.exists():
            self._append(dict(header))

    done: dict[str, list[Record]]
    """Finished units by key."""

    def _load(self, header: Mapping[str, Any]) -> None:
        lines = self.path.read_bytes().split(b"\n")
        whole = [json.loads(line) for line in lines[:-1] if line]
        if not whole:
            self.path.unlink()
            return
        changed = [key for key in {**whole[0], **header} if whole[0].get(key) != header.get(key)]
        if changed:
            raise ValueError(f"{self.path} was made with another {changed[0]} ({_short(whole[0].get(changed[0]))}, now "
                             f"{_short(header.get(changed[0]))}): leave out --resume, or give another --output")
        if lines[-1]:
            self.path.write_bytes(b"\n".join(lines[:-1]) + b"\n")
        self.done = {unit["unit"]: [Record.from_json(record) for record in unit["records"]] for unit in whole[1:]}

    def add(self, unit: str, records: Sequence[Record]) -> None:
        """Write a finished unit and wait until it is on disk."""
        self.done[unit] = list(records)
        self._append({"unit": unit, "records": [asdict(record) for record in records]})

    def _append(self, value: Mapping[str, Any]) -> None:
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(value, separators=(",", ":")) + "\n")
            file.flush()
            os.fsync(file.fileno())


def _short(value: object) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else text[:57] + "..."
