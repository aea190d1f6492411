"""Config names resolve, and mistakes on the command line are one line that names the key."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import pytest

from configs.command_line.loading import config_parser, parse, resolve, run


@dataclass(frozen=True)
class Item:
    """One entry of a list."""

    name: str = ""
    budget: int | None = None


@dataclass(frozen=True)
class Options:
    """What the parser is made from."""

    limit: int | None = None
    dtype: str = "float32"
    entries: list[Item] = field(default_factory=list)


def read(arguments: list[str]) -> Options:
    parser = config_parser("test", "a test")
    parser.add_class_arguments(Options)
    return Options(
        **{
            k: v
            for k, v in vars(parser.instantiate(parse(parser, arguments))).items()
            if k != "config"
        }
    )


def write(folder: Path, name: str, text: str) -> str:
    (folder / name).write_text(text)
    return str(folder / name)


def test_a_name_is_a_path_or_a_file_under_the_folder(tmp_path: Path) -> None:
    (tmp_path / "eval").mkdir()
    path = write(tmp_path / "eval", "smoke.yaml", "limit: 1\n")
    assert all(
        resolve(name, tmp_path) == Path(path) for name in ("eval/smoke.yaml", "eval/smoke", path)
    )


def test_an_unknown_name_lists_the_closest(tmp_path: Path) -> None:
    for name in ("clover.yaml", "medusa.yaml"):
        write(tmp_path, name, "")
    with pytest.raises(ValueError, match=r"'clver.yaml' .*clover.yaml"):
        resolve("clver.yaml", tmp_path)


def test_several_configs_merge_left_to_right_and_the_command_line_wins(tmp_path: Path) -> None:
    first = write(tmp_path, "a.yaml", "limit: 1\ndtype: float64\n")
    second = write(tmp_path, "b.yaml", "limit: 2\nentries: [{name: x, budget: 4}]\n")
    assert read(["--config", first, f"--config={second}"]) == Options(2, "float64", [Item("x", 4)])
    assert read(["--config", second, "--config", first, "--limit", "7"]).limit == 7


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("limt: 3", ["limt"]),
        ("limit: abc", ["limit", "int", "abc"]),
        ("entries:\n  - name: x\n    budgt: 3", ["entries", "budgt"]),
        ("entries:\n  - budget: many", ["entries.budget", "int", "many"]),
    ],
)
def test_mistakes_in_a_file_are_one_line_naming_the_key(
    tmp_path: Path, text: str, words: list[str]
) -> None:
    with pytest.raises(ValueError) as caught:
        read(["--config", write(tmp_path, "c.yaml", text)])
    print(caught.value)
    assert "\n" not in str(caught.value) and all(word in str(caught.value) for word in words)


@pytest.mark.parametrize(
    "arguments", [["--limt", "3"], ["--limit", "abc"], ["--config", "no/such/file.yaml"]]
)
def test_mistakes_on_the_command_line_are_one_line(arguments: list[str]) -> None:
    with pytest.raises(ValueError) as caught:
        read(arguments)
    print(caught.value)
    assert "\n" not in str(caught.value)


def test_a_mistake_gives_exit_status_two(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(lambda arguments: read(list(arguments)) and 0, ["--limit", "abc"]) == 2
    assert capsys.readouterr().err.count("\n") == 1
