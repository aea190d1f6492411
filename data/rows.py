"""Rows from files or the Hub, and the conversations that they hold."""

from __future__ import annotations

import gzip
import json
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

EMBEDDED = "embedded"
EMBEDDED_ANSWERS = Path(__file__).parent / "prompts" / "answers.jsonl.gz"
SHAPES = "`messages`, `conversations` (from/value), `prompt` + `response`, or `question` + `answer`"
_ROLES = {"human": "user", "gpt": "assistant", "chatgpt": "assistant", "bing": "assistant", "bard": "assistant",
          "model": "assistant", "bot": "assistant"}
Message = dict[str, Any]


@dataclass(frozen=True)
class Conversation:
    """Messages of `{role, content}`.

    response_ids: the exact tokens of the last assistant message, end-of-turn token included if it was emitted.
    finished: whether the last answer ended by itself; if not, nothing teaches the model to stop there.
    tools: descriptions of the functions that the assistant may call, for templates that take them.
    """

    messages: list[Message]
    response_ids: list[int] | None = None
    finished: bool = True
    tools: list[Any] | None = None


def load_conversations(source: str, limit: int | None = None, split: str = "train", streaming: bool = False
                       ) -> Iterator[Conversation]:
    """Read conversations, one after the other as they are asked for.

    Args:
        source: a `.jsonl`, `.jsonl.gz` or `.parquet` file, a Hub data set (`owner/name`, `owner/name:config`), or
            `embedded` (the answers shipped with this package).
        limit: read at most this many.
        split: split of a Hub data set.
        streaming: whether a Hub data set is downloaded no further than it is read; with a limit it always is so.

    Raises:
        ValueError: no such file or data set, a row of an unknown shape, or nothing in it.
    """
    number = 0
    for number, row in enumerate(islice(read_rows(source, split, streaming or limit is not None), limit), 1):
        yield _conversation(row, f"{source!r} row {number}")
    if not number:
        raise ValueError(f"data set {source!r} is empty: give one with at least one conversation")


def local_file(source: str) -> Path | None:
    """The file that `source` names; None for a Hub data set. ValueError: it does not exist or is of an unknown kind."""
    path = EMBEDDED_ANSWERS if source == EMBEDDED else Path(source)
    if path.name.endswith((".jsonl", ".jsonl.gz", ".parquet")):
        if not path.is_file():
            raise ValueError(f"data file {str(path)!r} does not exist: check the path")
        return path
    if path.is_file():
        raise ValueError(f"data file {source!r} is of an unknown kind: use .jsonl, .jsonl.gz or .parquet")
    return None


def read_rows(source: str, split: str = "train", streaming: bool = False) -> Iterator[dict[str, Any]]:
    """Rows of a file or of a Hub data set, see `load_conversations`."""
    path = local_file(source)
    if path is None:
        return _hub_rows(source, split, streaming)
    return _parquet_rows(path) if path.suffix == ".parquet" else read_jsonl(path)


def read_jsonl(path: Path) -> Iterator[dict[str, Any]]:
    """Rows of a `.jsonl` or `.jsonl.gz` file; a line that is not a JSON object raises ValueError with its number."""
    with (gzip.open if path.suffix == ".gz" else open)(path, "rt", encoding="utf-8") as lines:
        for number, line in enumerate(lines, 1):
            if line.strip():
                yield _parsed(line, path, number)


def _parsed(line: str, path: Path, number: int) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"{str(path)!r} line {number} is not JSON: {error}") from None
    if not isinstance(row, dict):
        raise ValueError(f"{str(path)!r} line {number} is not a JSON object: one object per line is expected")
    return row


def _parquet_rows(path: Path) -> Iterator[dict[str, Any]]:
    import pyarrow.parquet

    for batch in pyarrow.parquet.ParquetFile(path).iter_batches():
        yield from batch.to_pylist()


def _hub_rows(source: str, split: str, streaming: bool) -> Iterator[dict[str, Any]]:
    import datasets
    from datasets.exceptions import DatasetsError

    name, _, config = source.partition(":")
    try:
        loaded = datasets.load_dataset(name, config or None, split=split, streaming=streaming)
    except (OSError, ValueError, DatasetsError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise ValueError(f"data set {source!r} (split {split!r}) is neither a file nor loadable: {reason}") from error
    return (dict(row) for row in loaded)


def _conversation(row: dict[str, Any], where: str) -> Conversation:
    if isinstance(turns := row.get("messages"), list):
        messages = [read_message(turn, "role", "content", where) for turn in turns]
    elif isinstance(turns := row.get("conversations"), list):
        messages = [read_message(turn, "from", "value", where) for turn in turns]
    else:
        messages = _pair(row, where)
    ids = row.get("response_ids")
    tools = row.get("tools")
    return Conversation(messages, list(ids) if ids else None, bool(row.get("finished", True)),
                        tools if isinstance(tools, list) else None)


def read_message(turn: Any, role: str, content: str, where: str) -> Message:
    """A turn with its role named as chat templates name it; `role` and `content` are its keys, `where` the row."""
    if not isinstance(turn, dict) or not isinstance(turn.get(role), str) or not isinstance(turn.get(content), str):
        raise ValueError(f"{where}: a turn must hold text under `{role}` and `{content}`, got {str(turn)[:80]}")
    speaker: str = turn[role]
    return {"role": _ROLES.get(speaker, speaker), "content": turn[content]}


def _pair(row: dict[str, Any], where: str) -> list[Message]:
    for asked, answered in (("prompt", "response"), ("question", "answer")):
        if isinstance(row.get(asked), str) and isinstance(row.get(answered), str):
            return [{"role": "user", "content": row[asked]}, {"role": "assistant", "content": row[answered]}]
    raise ValueError(f"{where} has keys {', '.join(row) or '(none)'}: expected {SHAPES}")
