"""A config names classes of a few packages and of the key's kind; nothing else is imported or
called.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from configs.command_line import class_paths as classes
from configs.command_line.class_paths import Kind, named_class
from configs.command_line.loading import parse, without_packages
from eval import cli, evaluation
from train.cli import command, make_parser

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def only_packages(monkeypatch: pytest.MonkeyPatch) -> None:
    """The packages that configs may name outside of tests."""
    monkeypatch.setattr(classes, "_allowed", list(classes.PACKAGES))


@pytest.fixture
def foreign(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A package that leaves a mark when it is imported; the mark's path."""
    mark = tmp_path / "imported"
    (tmp_path / "foreignpackage.py").write_text(
        f"open({str(mark)!r}, 'w').close()\nclass Thing:\n  pass\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    return mark


@pytest.mark.parametrize("kind", list(Kind))
@pytest.mark.parametrize(
    "path",
    [
        "os.system",
        "subprocess.Popen",
        "builtins.exec",
        "modulesque.Thing",
        "foreignpackage.Thing",
        "modules.target.loading.load_target",
        "modules.target.loading.Path",
        "modules.contracts.losses.Mean",
        "modules.trees.named_trees.optimised_size",
        "modules.nothing.Here",
        "modules.target.loading.missing",
        "modules..Thing",
        ".",
        "modules",
    ],
)
def test_what_a_key_does_not_hold_is_refused_without_importing_it(
    path: str, kind: Kind, foreign: Path, only_packages: None
) -> None:
    with pytest.raises(ValueError, match="class_path"):
        named_class(path, kind, "methods: x")
    assert not foreign.exists()


@pytest.mark.parametrize(
    ("path", "kind"),
    [
        ("modules.drafters.heads.medusa.Medusa", Kind.DRAFTER),
        ("modules.judges.judge.Judge", Kind.TRAINABLE),
        ("modules.trees.sampled.branching.chains", Kind.BUILDER),
        ("modules.trees.reranked.RerankedTree", Kind.BUILDER),
        ("modules.acceptance.relaxed.TopKRule", Kind.RULE),
        ("eval.methods.huggingface.HuggingFaceGenerate", Kind.DECODER),
    ],
)
def test_classes_of_the_kind_are_found(path: str, kind: Kind, only_packages: None) -> None:
    assert named_class(path, kind, "methods: x").__name__ == path.rsplit(".", 1)[1]
    for other in set(Kind) - {kind, Kind.TRAINABLE, Kind.DRAFTER}:
        with pytest.raises(ValueError, match="is no"):
            named_class(path, other, "methods: x")


def medusa(more: str) -> str:
    drafter = "drafter: {class_path: modules.drafters.heads.medusa.Medusa}"
    return f"{drafter}\ndata: {{train: embedded}}\n{more}"


@pytest.mark.parametrize(
    "text",
    [
        "drafter: {class_path: os.system, init_args: {command: touch MARK}}\ndata: {train: "
        "embedded}",
        "drafter: os.system\ndata: {train: embedded}",
        "drafter: {class_path: subprocess.Popen, init_args: {args: [touch, MARK]}}\ndata: {train: "
        "embedded}",
        medusa(
            "trainer: {logger: [{class_path: subprocess.Popen, init_args: {args: [touch, MARK]}}]}"
        ),
        medusa("objective: {class_path: subprocess.Popen, init_args: {args: [touch, MARK]}}"),
        "drafter: {class_path: modules.drafters.heads.medusa.Medusa}\n"
        "data: {class_path: subprocess.Popen, init_args: {args: [touch, MARK]}}",
        "drafter: modules.target.loading.load_target\ndata: {train: embedded}",
        "drafter: {class_path: modules.trees.static.StaticTree, init_args: {paths: [[0]]}}\ndata: "
        "{train: embedded}",
        medusa("allow_package: os"),
    ],
)
@pytest.mark.parametrize("flag", ["--plan", "--resume=last"])
def test_no_training_config_runs_code(text: str, flag: str, tmp_path: Path) -> None:
    mark, config = tmp_path / "MARK", tmp_path / "config.yaml"
    config.write_text(text.replace("MARK", str(mark)))
    with pytest.raises(ValueError) as caught:
        command(["--config", str(config), "--output", str(tmp_path / "run"), flag])
    print(caught.value)
    assert "\n" not in str(caught.value) and not mark.exists()


@pytest.mark.parametrize(
    "method",
    [
        {
            "builder": {"class_path": "os.system", "init_args": {"command": "touch MARK"}},
            "rule": "greedy",
        },
        {
            "builder": {"class_path": "subprocess.Popen", "init_args": {"args": ["touch", "MARK"]}},
            "rule": "greedy",
        },
        {"rule": {"class_path": "os.system", "init_args": {"command": "touch MARK"}}},
        {"drafter": {"class_path": "os.system", "init_args": {}}},
        {"drafter": None, "decoder": {"class_path": "os.system"}},
        {
            "drafter": {
                "class_path": "modules.drafters.retrieval.rasd.Rasd",
                "init_args": {
                    "builder": {"class_path": "os.system", "init_args": {"command": "touch MARK"}}
                },
            }
        },
        {
            "drafter": {
                "class_path": "modules.drafters.retrieval.rasd.Rasd",
                "init_args": {"partner": {"class_path": "os.system"}},
            }
        },
    ],
)
def test_no_row_of_an_evaluation_runs_code(
    method: dict[str, Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(evaluation, "load_target", lambda *_: pytest.fail("the target was loaded"))
    mark = tmp_path / "MARK"
    row = {
        "name": "x",
        "drafter": {"class_path": "modules.drafters.retrieval.prompt_lookup.PromptLookup"},
        **method,
    }
    rows = str([row]).replace("MARK", str(mark)).replace("None", "null")
    with pytest.raises(SystemExit) as caught:
        cli.main(["--methods", rows, "--output", str(tmp_path / "out")])
    said = capsys.readouterr().err
    print(said)
    assert (
        caught.value.code == 2
        and said.count("\n") == 1
        and "class_path" in said
        and not mark.exists()
    )


def test_a_package_is_allowed_on_the_command_line(foreign: Path, only_packages: None) -> None:
    assert without_packages(["--a", "1", "--allow_package", "foreignpackage", "--b"]) == [
        "--a",
        "1",
        "--b",
    ]
    assert without_packages(["--allow_package=foreignpackage"]) == []
    with pytest.raises(ValueError, match="is no drafter"):
        named_class("foreignpackage.Thing", Kind.DRAFTER, "x")
    assert foreign.exists()
    for wrong in (["--allow_package"], ["--allow_package", "*"], ["--allow_package=jsonargparse"]):
        with pytest.raises(ValueError, match="allow"):
            without_packages(wrong)


def test_the_command_line_refuses_in_a_line(tmp_path: Path) -> None:
    mark, config = tmp_path / "MARK", tmp_path / "e.yaml"
    config.write_text(f"drafter: {{class_path: os.system, init_args: {{command: touch {mark}}}}}")
    ended = subprocess.run(
        [sys.executable, "train.py", "--config", "clover.yaml", "--config", str(config), "--plan"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert ended.returncode == 2 and ended.stderr.count("\n") == 1 and "os.system" in ended.stderr
    assert not mark.exists()


@pytest.mark.parametrize(
    ("flag", "words"),
    [
        ("--optimizer.lr=.nan", "optimizer.lr"),
        ("--optimizer.lr=.inf", "optimizer.lr"),
        ("--optimizer.betas=[2, 3]", "optimizer.betas"),
        ("--optimizer.betas=[0.9, .nan]", "optimizer.betas"),
        ("--optimizer.weight_decay=.nan", "weight_decay"),
        ("--optimizer.warmup_steps=-1", "warmup_steps"),
        ("--trainer.gradient_clip_val=-1", "gradient_clip_val"),
        ("--trainer.gradient_clip_val=.nan", "gradient_clip_val"),
        ("--trainer.accumulate_grad_batches=0", "accumulate_grad_batches"),
        ("--probe.budget=1000000000", "probe.budget must lie between 1 and 65536"),
        ("--probe.max_new_tokens=0", "probe.max_new_tokens at least 1"),
    ],
)
def test_numbers_that_cannot_train_are_refused(flag: str, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        command(["--config", "clover.yaml", "--plan", flag])


def test_help_of_a_foreign_class_is_refused(foreign: Path) -> None:
    with pytest.raises(ValueError, match="foreignpackage"):
        parse(make_parser(), ["--drafter.help", "foreignpackage.Thing"])
    assert not foreign.exists()
