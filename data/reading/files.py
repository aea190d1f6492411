"""Rows of local files and Hub data sets of several formats, and counts of skipped rows.

An unreadable row is counted by its reason and skipped; an unreadable file ends the run. Half of a
surrogate pair (a truncated emoji) becomes U+FFFD, because tokenizers and UTF-8 files cannot
represent it.
"""

from __future__ import annotations

import glob
import gzip
import json
import logging
import re
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from io import BufferedReader
from pathlib import Path
from typing import Any, NamedTuple

logger = logging.getLogger(__name__)

EMBEDDED = "embedded"
EMBEDDED_ANSWERS = Path(__file__).parent.parent / "prompts" / "answers.jsonl.gz"
KINDS = (".jsonl", ".json", ".jsonl.gz", ".json.gz", ".parquet")
LONGEST_LINE = 16 * 2**20
"""Largest size of a line in bytes, and of a text in characters."""
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
REPLACED = "half of a surrogate pair became U+FFFD"
_BOM = b"\xef\xbb\xbf"
_SUSPICIOUS = re.compile(r"\\u[dD][89a-fA-F]|[\ud800-\udfff]")


class Skipped(ValueError):
    """A row that cannot be used; it is counted under the message as its reason."""


class Place(NamedTuple):
    """The place of a row: line or row `number`, from 1, of `source`."""

    source: str
    unit: str
    number: int

    def __str__(self) -> str:
        """The place as written in messages."""
        return f"{self.source!r} {self.unit} {self.number}"

    @property
    def short(self) -> str:
        """The place without folders, as written in provenance."""
        return f"{Path(self.source).name} {self.unit} {self.number}"


class Row(NamedTuple):
    """The content of a row, and its place."""

    place: Place
    content: dict[str, Any]


@dataclass
class Tally:
    """Numbers of skipped and changed rows by reason, and the place of the first one.

    word: name of what is counted. Rows with the same reason have the same text of it.
    parts: changes of parts of rows, as the part's name and what happened to it.
    """

    word: str = "row"
    skipped: dict[str, int] = field(default_factory=dict)
    changed: dict[str, int] = field(default_factory=dict)
    first: dict[str, Place] = field(default_factory=dict)
    parts: dict[str, tuple[str, str]] = field(default_factory=dict)

    def skip(self, reason: str, place: Place | None = None) -> None:
        """Count a skipped row."""
        self.skipped[reason] = self.skipped.get(reason, 0) + 1
        self._note(reason, place)

    def change(self, reason: str, place: Place | None = None) -> None:
        """Count a row that is used with a change."""
        self.changed[reason] = self.changed.get(reason, 0) + 1
        self._note(reason, place)

    def change_parts(self, part: str, became: str, place: Place | None, count: int) -> None:
        """Count `count` changed or skipped parts of a row: `answer`, `left out: …`."""
        reason = f"{part}s {became}"
        if count:
            self.parts[reason] = part, became
            self.changed[reason] = self.changed.get(reason, 0) + count
            self._note(reason, place)

    def _note(self, reason: str, place: Place | None) -> None:
        if place is not None:
            self.first.setdefault(reason, place)

    def lines(self) -> list[str]:
        """One line of text per reason."""
        return [
            self._line(verb, reason, count)
            for verb, counts in (("skipped", self.skipped), ("changed", self.changed))
            for reason, count in counts.items()
        ]

    def _line(self, verb: str, reason: str, count: int) -> str:
        plural = "s" * (count != 1)
        if reason in self.parts:
            part, became = self.parts[reason]
            return f"{count} {part}{plural} {became}{self._first(reason)}"
        return f"{verb} {count} {self.word}{plural}: {reason}{self._first(reason)}"

    def _first(self, reason: str) -> str:
        return f" (first: {self.first[reason]})" if reason in self.first else ""

    def reasons(self) -> str:
        """The reasons of skipped rows, in one line."""
        return (
            "; ".join(
                f"{count} × {reason}{self._first(reason)}" for reason, count in self.skipped.items()
            )
            or "it is empty"
        )

    def log(self) -> None:
        """Log one warning per reason."""
        for line in self.lines():
            logger.warning("%s", line)

    def as_dict(self) -> dict[str, Any]:
        """Reason to `count` and `first`, for provenance and reports; empty without any."""
        return {
            reason: {"count": count}
            | ({"first": self.first[reason].short} if reason in self.first else {})
            for counts in (self.skipped, self.changed)
            for reason, count in counts.items()
        }


def clean(value: Any) -> Any:
    """JSON data with U+FFFD for lone surrogates, also in keys; two adjacent halves are joined into
    one character."""
    if isinstance(value, str):
        return (
            value
            if value.isascii()
            else value.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
        )
    if isinstance(value, list):
        return [clean(item) for item in value]
    return (
        {clean(key): clean(inner) for key, inner in value.items()}
        if isinstance(value, dict)
        else value
    )


# -- sources --------------------------------------------------------------------------------------


def local_files(source: str) -> list[Path] | None:
    """The files of `source`, which is a path or a pattern; None for a Hub data set.

    Raises:
        ValueError: no such file, or a file of an unknown kind.
    """
    if source == EMBEDDED:
        return [EMBEDDED_ANSWERS]
    # A folder would be ambiguous with a Hub data set.
    path = Path(source)
    if path.is_dir() and not _HUB_ID.fullmatch(source):
        raise ValueError(
            f"data {source!r} is a folder: name the files in it, for instance "
            f"{str(path / '*.jsonl')!r}"
        )
    # A pattern, unless a file has that name.
    if glob.has_magic(source) and not path.exists():
        matches = [match for match in map(Path, sorted(glob.glob(source))) if match.is_file()]
        if not matches:
            raise ValueError(f"no data file matches {source!r}: check the path")
        return [_known(match) for match in matches]
    # A file; everything else is a Hub data set.
    if path.name.endswith(KINDS) and not path.is_file():
        raise ValueError(f"data file {source!r} does not exist: check the path")
    return [_known(path)] if path.is_file() else None


def _known(path: Path) -> Path:
    if not path.name.endswith(KINDS):
        raise ValueError(f"data file {str(path)!r} is of an unknown kind: use {', '.join(KINDS)}")
    return path


def read_rows(
    source: str, split: str = "train", streaming: bool = False, tally: Tally | None = None
) -> Iterator[Row]:
    """Rows of files or of a Hub data set, read lazily.

    Args:
        source: a file of one of `KINDS`, a pattern of such (`answers/*.jsonl`), a Hub data set
            (`owner/name`, `owner/name:config`), or `embedded` (the answers in this package). A
            `.json` file holds an array of rows or, like `.jsonl`, one row per line.
        split: split of a Hub data set.
        streaming: whether a Hub data set is only downloaded as far as it is read.
        tally: counts skipped rows; without one, the first unreadable row is an error.

    Raises:
        ValueError: a missing, unreadable or undecodable file or data set or, without a tally, a
            row that is not JSON or not an object.
    """
    files = local_files(source)
    if files is None:
        yield from _hub_rows(source, split, streaming)
        return
    for path in files:
        try:
            yield from (_parquet_rows if path.suffix == ".parquet" else _json_rows)(path, tally)
        except OSError as error:
            raise ValueError(f"data file {str(path)!r} cannot be read: {error}") from None


def read_jsonl(path: Path) -> Iterator[dict[str, Any]]:
    """The rows of one file, as `read_rows` without a tally."""
    return (row.content for row in read_rows(str(path)))


def _json_rows(path: Path, tally: Tally | None) -> Iterator[Row]:
    # A `.json` file may hold one array or a row per line.
    packed = path.suffix == ".gz"
    number = 0
    try:
        with gzip.open(path, "rb") if packed else open(path, "rb") as file:
            if file.peek(256).lstrip(_BOM + b" \t\r\n").startswith(b"["):
                yield from _array_rows(path, file.read(), tally)
                return
            for number, line in _lines(file):
                row = _row(Place(str(path), "line", number), line, tally)
                if row is not None:
                    yield row
    # Damage is only noticed while reading.
    except gzip.BadGzipFile:
        raise ValueError(
            f"data file {str(path)!r} is not a gzip file, or a damaged one: fetch it "
            "again, or name it without .gz"
        ) from None
    except (EOFError, zlib.error) as error:
        raise ValueError(
            f"data file {str(path)!r} is truncated or damaged after line {number} "
            f"({error}): fetch it again"
        ) from None


def _lines(file: gzip.GzipFile | BufferedReader) -> Iterator[tuple[int, bytes | None]]:
    """Non-blank lines with their numbers; None in place of a line that is too long."""
    number = 0
    while line := file.readline(LONGEST_LINE + 1):
        number += 1
        if number == 1:
            line = line.removeprefix(_BOM)
        # A line within the limit.
        if len(line) <= LONGEST_LINE or line.endswith(b"\n"):
            if line.strip():
                yield number, line
            continue
        # Skip the rest of a line that is too long.
        while line and not line.endswith(b"\n"):
            line = file.readline(LONGEST_LINE)
        yield number, None


def _row(place: Place, line: bytes | None, tally: Tally | None) -> Row | None:
    """The row of a line; None if it is skipped."""
    try:
        if line is None:
            raise Skipped(f"the line is longer than {LONGEST_LINE >> 20} MiB")
        text = _decoded(line, place)
        content = _object(_loaded(text))
    except Skipped as reason:
        if tally is None:
            raise ValueError(f"{place}: {reason}") from None
        tally.skip(str(reason), place)
        return None
    return _cleaned(Row(place, content), tally) if _SUSPICIOUS.search(text) else Row(place, content)


def _cleaned(row: Row, tally: Tally | None) -> Row:
    content = clean(row.content)
    if tally is not None and content != row.content:
        tally.change(REPLACED, row.place)
    return Row(row.place, content)


def _decoded(line: bytes, place: Place) -> str:
    if line.startswith((b"\xff\xfe", b"\xfe\xff")):
        raise ValueError(f"{place}: the file is UTF-16: save it as UTF-8")
    try:
        return line.decode("utf-8", "surrogatepass")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{place} is not UTF-8 (byte 0x{line[error.start]:02x} at {error.start}): "
            "save the file as UTF-8"
        ) from None


def _loaded(text: str) -> Any:
    """The value of a JSON text. Raises Skipped if it is not JSON."""
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise Skipped(f"not JSON ({error.msg})") from None
    except RecursionError:
        raise Skipped("JSON that is nested too deeply") from None
    except ValueError:  # a number of thousands of digits
        raise Skipped("JSON with a number that is too long") from None


def _object(value: Any) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise Skipped(f"the row is {kind(value)}, expected a JSON object")
    return value


def _array_rows(path: Path, content: bytes, tally: Tally | None) -> Iterator[Row]:
    text = _decoded(content.removeprefix(_BOM), Place(str(path), "line", 1))
    # A damaged array ends the run, a damaged item only its row.
    try:
        rows = _loaded(text)
    except Skipped as reason:
        raise ValueError(
            f"data file {str(path)!r} begins as a JSON array, but is {reason}: write "
            "one array of rows, or one row per line"
        ) from None
    for number, item in enumerate(rows, 1):
        place = Place(str(path), "row", number)
        try:
            row = Row(place, _object(item))
        except Skipped as reason:
            if tally is None:
                raise ValueError(f"{place}: {reason}") from None
            tally.skip(str(reason), place)
            continue
        yield _cleaned(row, tally)


def _parquet_rows(path: Path, tally: Tally | None) -> Iterator[Row]:
    import pyarrow
    import pyarrow.parquet

    # In batches, so that memory does not grow with the file.
    number = 0
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            for batch in file.iter_batches(batch_size=1024):
                for row in batch.to_pylist():
                    number += 1
                    yield Row(Place(str(path), "row", number), row)
    except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise ValueError(
            f"data file {str(path)!r} is no Parquet file, or a damaged one "
            f"(after row {number}): {reason}"
        ) from None


def _hub_rows(source: str, split: str, streaming: bool) -> Iterator[Row]:
    import datasets
    from datasets.exceptions import DatasetsError

    name, _, config = source.partition(":")
    if not name:
        raise ValueError(f"data set {source!r} has no name: give files or a Hub data set")
    # The library's many errors become one line.
    try:
        loaded = datasets.load_dataset(name, config or None, split=split, streaming=streaming)
        for number, row in enumerate(loaded, 1):
            yield Row(Place(source, "row", number), dict(row))
    except (OSError, ValueError, EOFError, zlib.error, DatasetsError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise ValueError(
            f"data set {source!r} (split {split!r}) is neither a file nor loadable: {reason}"
        ) from error


def kind(value: Any) -> str:
    """The kind of a value, for messages."""
    names = (
        (bool, "true or false"),
        (str, "text"),
        (int | float, "a number"),
        (list, "a list"),
        (dict, "an object"),
        (bytes, "bytes"),
        (type(None), "null"),
    )
    return next((name for types, name in names if isinstance(value, types)), type(value).__name__)
