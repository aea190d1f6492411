"""The house style, measured: short functions, small files, imports that go leftwards, nothing left
undone.
"""

from __future__ import annotations

import ast
import os
import re
import statistics
import tokenize
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
ROOMS = ("modules", "configs", "data", "checkpoints", "eval", "train")
"""Left to right: a package imports from itself and from packages before it."""
FLOORS = {
    "modules": (
        {"contracts", "runtime"},
        {"layers", "losses", "target", "trees", "acceptance", "constraints"},
        {"sparse_kv"},
        {"byte_level", "decoding", "drafters", "judges", "tokenization"},
        {"cost_model", "preference"},
    ),
    "eval": (
        {"metrics", "methods"},
        {"tasks", "vllm", "rule_comparison"},
        {"run", "evaluate_metrics"},
        {"report"},
        {"serving"},
        {"evaluation"},
        {"cli"},
    ),
}
"""Lowest first: a folder imports from its own floor and from those below; commands stand on top."""
FAMILIES = ("modules.drafters", "modules.preference", "modules.judges")
NAMED = {
    "train/throughput.py": {"modules.drafters.feature.eagle3"},
    "eval/rules.py": {"modules.drafters.small_models.s2d"},
    "eval/bench_gpu.py": {
        "modules.drafters.feature.eagle3",
        "modules.drafters.heads.medusa",
        "modules.drafters.trained",
    },
}
"""Commands that are about one family (docs/design_decisions.md, `Components answer for
themselves`)."""
VAGUE = {"found", "told", "tell", "asked", "known", "given", "kept", "behind", "one", "own", "law"}
"""Words that name nothing."""
KEYS = {"eval/tasks/answer_checks.py: given", "eval/tasks/task_files.py: given"}
"""Names that stored files and digests have."""
MOST_FILES = 12
"""Python files in one folder."""
MOST_STATEMENTS = {"tests": 300}
"""In one file; 250 outside of tests."""
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


def statements(path: Path) -> int:
    """Statements of a file, docstrings left out."""
    return sum(
        isinstance(node, ast.stmt)
        and not (isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant))
        for node in ast.walk(ast.parse(path.read_text()))
    )


@pytest.mark.parametrize("folder", [*ROOMS, "tests"])
def test_no_file_does_too_much(folder: str) -> None:
    most = MOST_STATEMENTS.get(folder, 250)
    counts = {str(path): statements(path) for path in (ROOT / folder).rglob("*.py")}
    assert {name: count for name, count in counts.items() if count > most} == {}


def test_no_folder_is_crowded() -> None:
    folders = Counter(
        path.parent for room in (*ROOMS, "tests") for path in (ROOT / room).rglob("*.py")
    )
    assert {str(folder): count for folder, count in folders.items() if count > MOST_FILES} == {}


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


def module_name(path: Path) -> str:
    """Dotted name of a source file; a package's is its folder's."""
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def imported_files(path: Path, names: frozenset[str]) -> set[str]:
    """The source files among `names` that a file imports, for types alone too."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module:
            inside = {f"{node.module}.{alias.name}" for alias in node.names} & names
            found |= inside or {node.module} & names
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names} & names
    return found - {module_name(path)}


@pytest.fixture(scope="module")
def imports() -> dict[str, set[str]]:
    """What every source file imports, by dotted names."""
    names = frozenset(module_name(path) for path in SOURCES)
    return {module_name(path): imported_files(path, names) for path in SOURCES}


def test_no_files_import_each_other_in_a_circle(imports: dict[str, set[str]]) -> None:
    left = {name: set(found) for name, found in imports.items()}
    while free := [name for name, found in left.items() if not found & set(left)]:
        for name in free:
            del left[name]
    assert left == {}


def floor_of(name: str, floors: tuple[set[str], ...]) -> int:
    """The floor of a file by its folder; files that no floor names stand on top."""
    folder = name.split(".")[1] if "." in name else ""
    return next((i for i, floor in enumerate(floors) if folder in floor), len(floors))


@pytest.mark.parametrize("room", FLOORS)
def test_imports_go_down_the_floors(room: str, imports: dict[str, set[str]]) -> None:
    floors = FLOORS[room]
    upwards = [
        f"{name} imports {other}"
        for name, found in imports.items()
        for other in found
        if name.startswith(f"{room}.") and other.startswith(f"{room}.")
        if floor_of(other, floors) > floor_of(name, floors)
    ]
    assert upwards == []


def of_families(path: Path) -> dict[str, str]:
    """Names that a file imports from the folders of families, and the file each is from."""
    names = {}
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith(FAMILIES):
            names |= {alias.asname or alias.name: node.module for alias in node.names}
        elif isinstance(node, ast.Import):
            found = [alias.name for alias in node.names if alias.name.startswith(FAMILIES)]
            names |= dict(zip(found, found, strict=True))
    return names


def classes_checked(path: Path) -> set[str]:
    """Names in the second argument of `isinstance` and `issubclass`."""
    return {
        part.id
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)
        if node.func.id in ("isinstance", "issubclass") and len(node.args) == 2
        for part in ast.walk(node.args[1])
        if isinstance(part, ast.Name)
    }


@pytest.mark.parametrize("room", ["train", "eval"])
def test_no_family_is_known_by_name(room: str) -> None:
    """What differs between components is asked of them (`Trainable`, `Drafter`)."""
    named, checked = {}, []
    for path in sorted((ROOT / room).rglob("*.py")):
        place, names = str(path.relative_to(ROOT)), of_families(path)
        named |= {place: set(names.values())} if names else {}
        checked += [f"{place}: {name}" for name in sorted(classes_checked(path) & set(names))]
    assert named == {place: found for place, found in NAMED.items() if place.startswith(room)}
    assert checked == []


def names_given(tree: ast.AST) -> Iterator[str]:
    """Names that a file gives: to variables, arguments, functions and classes."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            yield node.id
        elif isinstance(node, ast.arg):
            yield node.arg
        elif isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            yield node.name


def test_names_say_what_a_thing_is() -> None:
    """Not that it was found, kept, given or told."""
    vague = [
        f"{path.relative_to(ROOT)}: {name}"
        for path in SOURCES
        for name in sorted(set(names_given(ast.parse(path.read_text()))) & VAGUE)
    ]
    assert set(vague) == KEYS


def test_docstrings_say_something_or_are_absent() -> None:
    short = [
        f"{path.relative_to(ROOT)}: {docstring}"
        for path in SOURCES
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, (ast.FunctionDef, ast.ClassDef, ast.Module))
        if (docstring := ast.get_docstring(node)) and len(docstring.split()) < 4
    ]
    assert short == []


def test_no_line_is_wider_than_100_columns() -> None:
    """Also where a linter excuses it, beside a comment of its own."""
    files = [*SOURCES, *sorted((ROOT / "tests").rglob("*.py"))]
    wide = [
        f"{path.relative_to(ROOT)}:{number}"
        for path in files
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1)
        if len(line) > 100
    ]
    assert wide == []


def test_steps_are_narrated() -> None:
    """Comments are at least 2 % of the lines."""
    lines = comments = 0
    for path in SOURCES:
        with path.open("rb") as file:
            comments += sum(
                part.type == tokenize.COMMENT for part in tokenize.tokenize(file.readline)
            )
        lines += len(path.read_text().splitlines())
    assert comments / lines >= 0.02


def test_no_object_is_changed_behind_its_back() -> None:
    """No assignment to `__class__`, none to or into `__dict__`, no `setattr` on another object."""
    writes = []
    for path in SOURCES:
        for node in ast.walk(ast.parse(path.read_text())):
            for place in assigned(node):
                if isinstance(place, ast.Subscript):
                    place = place.value
                if isinstance(place, ast.Attribute) and place.attr in ("__class__", "__dict__"):
                    writes.append(f"{path.relative_to(ROOT)}:{node.lineno}")
    assert writes == []


def assigned(node: ast.AST) -> list[ast.expr]:
    """What a statement assigns to; `__dict__.update` counts."""
    if isinstance(node, ast.Assign):
        return node.targets
    if isinstance(node, (ast.AugAssign, ast.AnnAssign)):
        return [node.target]
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
        return [node.func.value] if node.func.attr in ("update", "setdefault") else []
    return []


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
