"""Config names resolve, and mistakes on the command line are one line that names the key."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import pytest
import yaml

from configs.command_line.loading import (
    CONFIGS,
    config_parser,
    default_of,
    first_config,
    parse,
    recipes,
    resolve,
    resolve_arguments,
    run,
)
from eval.cli import make_parser as make_eval_parser
from eval.generate import command as generate
from train.cli import make_parser


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


def test_a_name_alone_finds_its_folder_unless_two_have_it(tmp_path: Path) -> None:
    for folder in ("drafters", "eval", "tasks"):
        (tmp_path / folder).mkdir()
    path = write(tmp_path / "drafters", "clover.yaml", "limit: 1\n")
    assert resolve("clover.yaml", tmp_path) == resolve("clover", tmp_path) == Path(path)
    for folder in ("eval", "tasks"):
        write(tmp_path / folder, "smoke.yaml", "limit: 1\n")
    words = "'smoke' may mean eval/smoke.yaml and tasks/smoke.yaml: give the folder too"
    with pytest.raises(ValueError, match=words):
        resolve("smoke", tmp_path)
    assert resolve("tasks/smoke", tmp_path) == tmp_path / "tasks" / "smoke.yaml"


def test_defaults_come_before_the_recipes_of_their_folder() -> None:
    """Right before them, so that they override what stands left of both; not before settings that
    lie beside recipes.
    """
    shared, drafters = CONFIGS / "defaults", CONFIGS / "drafters"
    words = resolve_arguments(
        ["--config", "budget/demo.yaml", "--config=clover.yaml", "--config", "aligned"]
    )
    assert words == [
        *("--config", str(CONFIGS / "budget" / "demo.yaml")),
        *("--config", str(shared / "drafter.yaml")),
        f"--config={drafters / 'clover.yaml'}",
        *("--config", str(CONFIGS / "preference" / "aligned.yaml")),
    ]
    assert resolve_arguments(["--config", "dpo"])[1] == str(shared / "preference.yaml")
    assert resolve_arguments(["--config", "judge"])[1:] == [str(CONFIGS / "judges" / "judge.yaml")]
    clover = [shared / "drafter.yaml", drafters / "clover.yaml"]
    assert first_config(clover) == drafters / "clover.yaml"


def test_recipes_leave_out_what_their_defaults_say() -> None:
    for path in recipes():
        shared = default_of(path)
        if shared is not None:
            own, common = (yaml.safe_load(file.read_text()) for file in (path, shared))
            assert [
                f"{path.stem}: {section}.{key}"
                for section in ("data", "optimizer", "trainer")
                for key, value in own.get(section, {}).items()
                if common[section].get(key) == value
            ] == []


def test_the_page_of_recipes_has_a_row_for_each() -> None:
    page = (CONFIGS / "README.md").read_text()
    rows = [f"| `{path.parent.name}/{path.stem}` |" for path in recipes()]
    assert len(rows) > 10 and [row for row in rows if page.count(row) != 1] == []


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
    ("text", "words"),
    [
        ("datta.train: x", "the key 'datta.train' is unknown: did you mean data.train?"),
        ("datta: {train: x}", "the key 'datta' is unknown: did you mean data?"),
        ("sead: 1", "the key 'sead' is unknown: did you mean seed?"),
        ("optimizer: {lrr: 1}", "the key 'optimizer.lrr' is unknown: did you mean optimizer.lr?"),
        ("optimizer.lrr: 1", "the key 'optimizer.lrr' is unknown: did you mean optimizer.lr?"),
        ("optimzer: {lr: 1}", "the key 'optimzer' is unknown: did you mean optimizer?"),
        ("max_steps: 1", "the key 'max_steps' is unknown: did you mean trainer.max_steps?"),
        ("zzz: 1", "the key 'zzz' is unknown"),
        ("optimizer: 1.5", "optimizer is a section, got 1.5: give keys with values"),
        ("probe: null", "probe is a section, got None: give keys with values"),
        ("trainer: [1]", "trainer is a section, got [1]: give keys with values"),
        (
            "drafter: {class_path: modules.drafters.heads.medusa.Medusa, init_args: {headz: 3}}",
            "the key 'drafter.headz' is unknown: did you mean heads?",
        ),
        (
            "data: {trian: x}",
            "the key 'data.trian' is unknown: did you mean train?",
        ),
    ],
)
def test_an_unknown_key_is_told_with_its_file_and_the_name_that_was_meant(
    tmp_path: Path, text: str, words: str
) -> None:
    file = write(tmp_path, "c.yaml", text)
    with pytest.raises(ValueError) as caught:
        parse(make_parser(), ["--config", "clover.yaml", "--config", file])
    assert str(caught.value) == f"--config {file}: {words}"


@pytest.mark.parametrize(
    ("flag", "words"),
    [
        ("--headz=3", "--headz is unknown: did you mean --drafter.heads?"),
        ("--drafter.headz=3", "the key 'drafter.headz' is unknown: did you mean heads?"),
        ("--optimizer.lrr=3", "--optimizer.lrr is unknown: did you mean --optimizer.lr?"),
        ("--datta.train=x", "--datta.train is unknown: did you mean --data.train?"),
        ("--outptu=x", "--outptu is unknown: did you mean --output?"),
        ("--optimizer.lr=nan", "optimizer.lr: expected a finite number, got nan"),
        ("--optimizer.lr=-inf", "optimizer.lr: expected a finite number, got -inf"),
    ],
)
def test_a_mistaken_flag_is_told_with_the_one_that_was_meant(flag: str, words: str) -> None:
    with pytest.raises(ValueError) as caught:
        parse(make_parser(), ["--config", "clover.yaml", flag])
    assert str(caught.value) == words


def test_unknown_keys_of_an_evaluation(tmp_path: Path) -> None:
    for text, words in (
        ("limt: 3", "the key 'limt' is unknown: did you mean limit?"),
        ("methods: [{nam: x}]", "the key 'methods.nam' is unknown: did you mean name?"),
        ("prompts: embedded", "prompts must be a list, got 'embedded': add brackets"),
        ("drafters: null", "drafters must be a list, got None: add brackets"),
    ):
        file = write(tmp_path, "c.yaml", text)
        with pytest.raises(ValueError) as caught:
            parse(make_eval_parser(), ["--config", file])
        assert str(caught.value) == f"--config {file}: {words}"


def test_choices_and_what_is_missing_are_told_without_the_librarys_words() -> None:
    words = "data.train_on: must be one of 'all', 'last_turn', 'answer_without_reasoning', got answ"
    with pytest.raises(ValueError, match=f"^{words}ers$"):
        parse(make_parser(), ["--config", "medusa", "--data.train_on", "answers"])
    with pytest.raises(ValueError, match="^give --drafter and --prompt$"):
        generate([])


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
