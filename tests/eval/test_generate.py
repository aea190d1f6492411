"""`python -m eval.generate`: the answer, the speeds, and mistakes in one line."""

from __future__ import annotations

from pathlib import Path

import pytest

from checkpoints.pretrained import save_pretrained
from checkpoints.provenance import Provenance
from eval import generate
from modules.drafters.heads.medusa import Medusa
from tests.fakes import tiny_target


@pytest.fixture
def drafter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    target = tiny_target()
    monkeypatch.setattr(generate, "load_target", lambda *_: target)
    medusa = Medusa(target.shape)
    medusa.initialise(target)
    save_pretrained(medusa, tmp_path / "run" / "drafter", Provenance.of(target))
    return str(tmp_path / "run")


def run(*arguments: str) -> int:
    with pytest.raises(SystemExit) as caught:
        generate.main(list(arguments))
    return int(caught.value.code or 0)


def test_the_answer_and_both_speeds(drafter: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert (
        run(
            "--drafter",
            drafter,
            "--prompt",
            "hello",
            "--max_new_tokens",
            "10",
            "--dtype",
            "float64",
        )
        == 0
    )
    out = capsys.readouterr().out
    assert "with the drafter: " in out and "without: " in out and "the same tokens" in out


def test_sampled_and_without_comparison(drafter: str, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = [
        "--drafter",
        drafter,
        "--prompt",
        "hello",
        "--max_new_tokens",
        "6",
        "--dtype",
        "float64",
    ]
    assert run(*arguments, "--temperature", "1") == 0
    assert "their distribution is the same" in capsys.readouterr().out
    assert run(*arguments, "--compare", "false") == 0
    assert "without" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--prompt", " "], "prompt is empty"),
        (["--prompt", "x" * 600], "context"),
        (["--prompt", "x", "--budgt", "3"], "budgt"),
    ],
)
def test_mistakes_are_one_line(
    drafter: str, arguments: list[str], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("--drafter", drafter, *arguments, "--dtype", "float64") == 2
    error = capsys.readouterr().err
    assert words in error and error.count("\n") == 1


def test_no_such_drafter(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("--drafter", "no/such/run", "--prompt", "x") == 2
    assert "'no/such/run'" in capsys.readouterr().err
