"""The house style, measured: short functions, small files, imports that go leftwards, nothing left
undone.
"""

from __future__ import annotations

import ast
import os
import re
import statistics
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
ROOMS = ("modules", "data", "checkpoints", "eval", "train")
"""Left to right: a room imports from itself and from rooms before it."""
SOURCES = [path for room in ROOMS for path in sorted((ROOT / room).rglob("*.py"))]
TEXT_SUFFIXES = {".py", ".md", ".yaml", ".toml", ".txt", ".html", ".jsonl", ""}
SKIPPED = {
    ".venv",
    ".venv-vllm",
    ".git",
    "runs",
    "build",
    "dist",
    "__pycache__",
    ".pytest_cache",
    ".ruff_cache",
}
UNWANTED = ("TO" + "DO", "FIX" + "ME", "X" * 3, ".." + "/shared", "/wo" + "rk/")


def functions(path: Path) -> Iterator[tuple[str, int]]:
    """Name and length in lines, docstring included, of every function of a file."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            assert node.end_lineno is not None
            yield (
                f"{path.relative_to(ROOT)}:{node.lineno} {node.name}",
                node.end_lineno - node.lineno + 1,
            )


def imported_rooms(path: Path) -> Iterator[str]:
    """Top-level names that a file imports, wherever the import stands."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name.split(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            yield node.module.split(".")[0]


def texts() -> Iterator[tuple[Path, str]]:
    """Every text file that belongs to the project."""
    for folder, inside, names in os.walk(ROOT):
        inside[:] = sorted(
            name for name in inside if name not in SKIPPED and not name.endswith(".egg-info")
        )
        for path in (Path(folder, name) for name in sorted(names)):
            if path.suffix in TEXT_SUFFIXES and path.name not in SKIPPED:
                yield path, path.read_text()


def test_median_function_has_at_most_12_lines() -> None:
    lengths = [length for path in SOURCES for _, length in functions(path)]
    assert statistics.median(lengths) <= 12


def test_no_function_has_more_than_60_lines() -> None:
    assert [name for path in SOURCES for name, length in functions(path) if length > 60] == []


@pytest.mark.parametrize("folder", [*ROOMS, "tests"])
def test_no_file_has_more_than_400_lines(folder: str) -> None:
    lengths = {
        str(path): len(path.read_text().splitlines()) for path in (ROOT / folder).rglob("*.py")
    }
    assert {name: length for name, length in lengths.items() if length > 400} == {}


@pytest.mark.parametrize("room", ROOMS)
def test_imports_go_leftwards_only(room: str) -> None:
    rightwards = {*ROOMS[ROOMS.index(room) + 1 :], "tests"}
    wrong = [
        f"{path.relative_to(ROOT)} imports {name}"
        for path in (ROOT / room).rglob("*.py")
        for name in imported_rooms(path)
        if name in rightwards
    ]
    assert wrong == []


def test_nothing_is_left_undone() -> None:
    pattern = re.compile(
        "|".join(
            rf"(?<!\w){re.escape(word)}(?!\w)" if word.isalpha() else re.escape(word)
            for word in UNWANTED
        )
    )
    found = [
        f"{path.relative_to(ROOT)}: {match.group()}"
        for path, text in texts()
        for match in pattern.finditer(text)
    ]
    assert found == []
