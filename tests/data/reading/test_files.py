"""Files of every kind read alike; rows that cannot be read are counted, files that cannot are
named.
"""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as parquet
import pytest

import data.reading.files
from data.reading.files import REPLACED, Tally, clean, local_files, read_rows
from data.reading.rows import load_conversations

ROWS = [{"prompt": f"ask {i}", "response": f"say {i} — ü"} for i in range(3)]
LINES = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in ROWS)


def contents(source: Path | str, tally: Tally | None = None) -> list[dict[str, Any]]:
    return [row.content for row in read_rows(str(source), tally=tally)]


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.jsonl", LINES.encode()),
        ("a.jsonl", LINES.encode("utf-8-sig")),
        ("a.jsonl", LINES.replace("\n", "\r\n\r\n").encode()),
        ("a.jsonl", LINES.rstrip().encode()),
        ("a.jsonl.gz", gzip.compress(LINES.encode("utf-8-sig"), mtime=0)),
        ("a.json", json.dumps(ROWS, indent=1).encode("utf-8-sig")),
        ("a.json", LINES.encode()),
        ("a.jsonl", ("\n " + json.dumps(ROWS)).encode()),
        ("a.json.gz", gzip.compress(json.dumps(ROWS).encode(), mtime=0)),
    ],
)
def test_every_kind_of_file_reads_the_same(name: str, content: bytes, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(content)
    assert contents(tmp_path / name) == ROWS


def test_parquet_and_patterns_read_the_same(tmp_path: Path) -> None:
    parquet.write_table(pa.Table.from_pylist(ROWS), tmp_path / "b.parquet")
    (tmp_path / "a.jsonl").write_text(LINES, encoding="utf-8")
    assert contents(tmp_path / "b.parquet") == ROWS
    assert contents(tmp_path / "*.*") == ROWS * 2
    places = [row.place.short for row in read_rows(str(tmp_path / "[ab].*"))]
    assert places[::3] == ["a.jsonl line 1", "b.parquet row 1"]
    odd = tmp_path / "c[1].jsonl"
    odd.write_text(LINES, encoding="utf-8")
    assert contents(odd) == ROWS, "a name that looks like a pattern is a name first"


def test_characters_that_split_other_lines_do_not_split_these(tmp_path: Path) -> None:
    row = {"prompt": "a\u2028b\u0085c\u2029d\x00e\x0cf", "response": "\x1c"}
    (tmp_path / "a.jsonl").write_text(json.dumps(row, ensure_ascii=False), encoding="utf-8")
    assert contents(tmp_path / "a.jsonl") == [row]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        (
            "a.jsonl",
            LINES.encode("utf-16"),
            r"a.jsonl' line 1: the file is UTF-16: save it as UTF-8",
        ),
        (
            "a.jsonl",
            b'{"a": 1}\n' + LINES.replace("—", "").encode("latin-1"),
            r"a.jsonl' line 2 is not UTF-8 \(byte 0xfc at 40\)",
        ),
        ("a.jsonl.gz", LINES.encode(), r"a.jsonl.gz' is not a gzip file"),
        (
            "a.jsonl.gz",
            gzip.compress(LINES.encode() * 5000, mtime=0)[:-50],
            r"a.jsonl.gz' is truncated .*after line 1\d+",
        ),
        (
            "a.jsonl.gz",
            gzip.compress(LINES.encode(), mtime=0)[:-9] + b"x" * 9,
            r"a.jsonl.gz' is (not a gzip|truncated)",
        ),
        ("a.parquet", b"no parquet at all", r"a.parquet' is no Parquet file.*after row 0"),
        ("a.json", b"[{]", r"a.json' begins as a JSON array, but is not JSON"),
        ("a.csv", b"x", r"a.csv' is of an unknown kind: use .jsonl, "),
    ],
)
def test_files_that_cannot_be_read_are_named_in_one_line(
    name: str, content: bytes, message: str, tmp_path: Path
) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message) as caught:
        contents(tmp_path / name, Tally())
    assert "\n" not in str(caught.value)


def test_a_folder_is_no_data_file(tmp_path: Path) -> None:
    """It would be read as a data set of the Hub's library, whatever it holds."""
    (tmp_path / "a.jsonl.gz").write_bytes(b"\x1f\x8b")
    with pytest.raises(
        ValueError, match=r"is a folder: name the files in it, .*\*.jsonl"
    ) as caught:
        list(read_rows(str(tmp_path)))
    assert "\n" not in str(caught.value)


def test_missing_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"none.jsonl' does not exist"):
        local_files(str(tmp_path / "none.jsonl"))
    with pytest.raises(ValueError, match=r"no data file matches .*x\*.jsonl"):
        local_files(str(tmp_path / "x*.jsonl"))
    (tmp_path / "empty.jsonl").write_text("\n \n")
    with pytest.raises(ValueError, match=r"empty.jsonl' is empty"):
        next(load_conversations(str(tmp_path / "empty.jsonl"), tally=Tally()))
    assert local_files("someone/chats:main") is None


BAD = {
    "not JSON (Expecting value)": '{"a": ',
    "the row is a list, expected a JSON object": "[1]",
    "the row is null, expected a JSON object": "null",
    "JSON that is nested too deeply": "[" * 100_000,
    "JSON with a number that is too long": '{"a": ' + "9" * 5000 + "}",
    "the line is longer than 1 MiB": '{"a": "' + "x" * (3 << 20) + '"}',
}


def test_bad_lines_are_counted_by_reason_and_passed_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(data.reading.files, "LONGEST_LINE", 1 << 20)
    lines = LINES.splitlines()
    (tmp_path / "a.jsonl").write_text(
        "\n".join([lines[0], *BAD.values(), lines[1], *BAD.values(), lines[2]])
    )
    tally = Tally()
    assert contents(tmp_path / "a.jsonl", tally) == ROWS
    assert tally.as_dict() == {
        reason: {"count": 2, "first": f"a.jsonl line {number}"}
        for number, reason in enumerate(BAD, 2)
    }
    assert len(tally.lines()) == len(BAD) and str(tmp_path) in tally.lines()[0]
    for line, reason in zip(BAD.values(), BAD, strict=True):
        (tmp_path / "b.jsonl").write_text('{"a": 1}\n' + line)
        with pytest.raises(ValueError) as caught:
            contents(tmp_path / "b.jsonl")
        assert str(caught.value) == f"'{tmp_path}/b.jsonl' line 2: {reason}"


def test_halves_of_surrogate_pairs_are_replaced_wherever_they_stand(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text(
        '{"prompt": "\\ud83d", "k\\udc00": ["\\ud83d\\ude00", {"x": "a\\ud800b"}]}\n'
        '{"prompt": "\\ud83d\\ude00"}\n'
    )
    (tmp_path / "b.json").write_text('[{"prompt": "\\ud83d"}]')
    tally = Tally()
    assert contents(tmp_path / "[ab].json*", tally) == [
        {"prompt": "\ufffd", "k\ufffd": ["😀", {"x": "a\ufffdb"}]},
        {"prompt": "😀"},
        {"prompt": "\ufffd"},
    ]
    assert tally.as_dict() == {REPLACED: {"count": 2, "first": "a.jsonl line 1"}}
    assert clean("\ud83d" + "\ude00") == "😀" and clean(["\ud83d", 1, None]) == ["\ufffd", 1, None]
