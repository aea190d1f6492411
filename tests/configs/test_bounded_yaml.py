"""YAML that would take all memory or the stack is refused in a line; anchors as configs use them
are not.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from configs.command_line.bounded_yaml import MOST_CHARACTERS, MOST_NODES, check_yaml, load_yaml
from configs.command_line.loading import CONFIGS, parse
from train.cli import make_parser

LAUGHS = "a: &a [x,x,x,x,x,x,x,x,x]\n" + "".join(
    f"{now}: &{now} [{','.join(['*' + before] * 9)}]\n"
    for before, now in zip("abcdefgh", "bcdefghi")
)
HOSTILE = {
    "laughs": (LAUGHS, "aliases written out"),
    "deep": ("drafter: " + "[" * 3000 + "]" * 3000, "deeper"),
    "deep mappings": ("a: {" * 200 + "}" * 200, "deeper"),
    "long": ("a: " + "x" * MOST_CHARACTERS, "characters"),
    "many": ("a: [" + "1," * MOST_NODES + "]", "values"),
    "cycle": ("a: &a [*a]", "inside of itself"),
    "python": ("a: !!python/object/apply:os.system [true]", "constructor"),
    "latin-1": ("a: \xff", "utf-8"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_yaml_is_one_line(name: str, tmp_path: Path) -> None:
    text, words = HOSTILE[name]
    file = tmp_path / "c.yaml"
    file.write_text(text, encoding="latin-1" if name == "latin-1" else "utf-8")
    with pytest.raises(ValueError, match=words) as caught:
        load_yaml(file)
    assert "\n" not in str(caught.value) and str(file) in str(caught.value)
    with pytest.raises(ValueError) as caught:
        parse(make_parser(), ["--config", str(file)])
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("seed: 1\n\nseed: 2", "the key 'seed' is given twice, in lines 1 and 3"),
        ("data: {train: a}\ndata: {rows: 2}", "the key 'data' is given twice, in lines 1 and 2"),
        (
            "optimizer:\n  lr: 1\n  floor: 0\n  lr: 2",
            "the key 'optimizer.lr' is given twice, in lines 2 and 4",
        ),
        (
            "optimizer: {lr: 1}\noptimizer.lr: 2",
            "the key 'optimizer.lr' is given twice, in lines 1 and 2",
        ),
        ("methods: [{name: a, name: b}]", "the key 'name' is given twice, in lines 1 and 1"),
        ("seed: 1\n'seed': 2", "the key 'seed' is given twice"),
        ("", "holds nothing: give keys"),
        ("# seed: 1", "holds nothing: give keys"),
        ("---\n", "holds nothing: give keys"),
        ("[seed, 1]", "holds a list: give keys"),
        ("- seed: 1", "holds a list: give keys"),
        ("seed", "holds a single value: give keys"),
        ("seed: 1\n---\nseed: 2", "has 2 documents"),
    ],
)
def test_a_config_is_one_mapping_with_every_key_once(text: str, words: str, tmp_path: Path) -> None:
    file = tmp_path / "c.yaml"
    file.write_text(text)
    with pytest.raises(ValueError) as caught:
        parse(make_parser(), ["--config", str(file)])
    said = str(caught.value)
    assert said.startswith(f"--config {file}: the ") and words in said and "\n" not in said


@pytest.mark.parametrize(
    "text",
    [
        "a: [{b: 1}, {b: 1}]\nb: 1",
        "a: {b: {c: 1}}\nb: {c: 1, b: 2}\nc: 1",
        "a: &x {c: 1}\nb: *x\nc: {a: *x}",
        "a.b: 1\na: {c: 2}\nb: 1",
        "? [x]\n: 1\nx: 2",
        "a: b\nb: a",
    ],
)
def test_equal_keys_of_different_places_are_no_repetition(text: str) -> None:
    check_yaml(text)


@pytest.mark.parametrize("name", ["laughs", "deep"])
def test_hostile_values_of_flags_are_one_line(name: str) -> None:
    with pytest.raises(ValueError) as caught:
        parse(
            make_parser(),
            ["--config", "clover.yaml", "--data", HOSTILE[name][0].removeprefix("drafter: ")],
        )
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("file", sorted(CONFIGS.rglob("*.yaml")), ids=lambda file: file.stem)
def test_shipped_configs_are_within_bounds(file: Path) -> None:
    check_yaml(file.read_text())
    assert load_yaml(file) == yaml.safe_load(file.read_text())
