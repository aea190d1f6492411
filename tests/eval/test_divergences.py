"""`python -m eval.divergences`: what it writes, going on after a stop, and mistakes in one line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from checkpoints.pretrained import save_pretrained
from checkpoints.provenance import Provenance
from data.labelled.labelled import LabelledData
from data.labelled.mining import mine
from data.reading.rows import questions_of
from eval import divergences
from eval.divergences import command
from eval.methods.rows import load_drafter
from modules.drafters.heads.medusa import Medusa
from tests.data.labelled.test_mining import Terse
from tests.fakes import tiny_target

QUESTIONS = [{"question": f"how many {letter}?"} for letter in "abcdefgh"]


@pytest.fixture
def terse(monkeypatch: pytest.MonkeyPatch) -> Terse:
    plain = tiny_target()
    target = Terse(plain.model, plain.tokenizer, "terse")
    monkeypatch.setattr(divergences, "load_target", lambda *_: target)
    monkeypatch.setattr("data.labelled.mining.final_number", lambda text: str(len(text) % 2))
    return target


@pytest.fixture
def arguments(terse: Terse, tmp_path: Path) -> list[str]:
    medusa = Medusa(terse.shape)
    medusa.initialise(terse)
    save_pretrained(medusa, tmp_path / "run" / "drafter", Provenance.of(terse))
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("".join(json.dumps(row) + "\n" for row in QUESTIONS), encoding="utf-8")
    return [
        "--drafter",
        str(tmp_path / "run"),
        "--prompts",
        str(prompts),
        "--output",
        str(tmp_path / "mined.jsonl"),
        "--max_new_tokens",
        "24",
        "--per_prompt",
        "2",
    ]


def test_it_writes_what_a_judge_can_learn_from_and_goes_on_after_a_stop(
    terse: Terse,
    arguments: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    asked: list[object] = []

    def once(*given):
        asked.append(given[2])
        if len(asked) == 4:
            raise KeyboardInterrupt
        return mine(*given)

    monkeypatch.setattr(divergences, "mine", once)
    with pytest.raises(KeyboardInterrupt):
        command(arguments)
    output = tmp_path / "mined.jsonl"
    assert not output.exists() and output.with_name("mined.jsonl.journal").exists()
    with pytest.raises(ValueError, match="was begun with per_prompt 2, not 3"):
        command([*arguments[:-1], "3"])
    assert command(arguments) == 0
    assert len(asked) == len(QUESTIONS) + 1 and not output.with_name("mined.jsonl.journal").exists()
    drafter = load_drafter(arguments[1], terse)
    expected = [
        row for row in QUESTIONS for row in mine(terse, drafter, questions_of(row)[0], 24, 2)
    ]
    found = [json.loads(line) for line in output.read_text(encoding="utf-8").splitlines()]
    assert found == expected and len(found) > 2
    printed = capsys.readouterr().out
    assert f"{len(found)} drafted tokens" in printed and f"of {len(QUESTIONS)} prompts" in printed
    data = LabelledData(train=str(output), validation=str(output), max_length=64, rows=2)
    data.bind(terse, ("pre_norm",))
    assert sum(int(batch.text.loss_mask.sum()) for batch in data.train_dataloader()) == len(
        data.documents
    )


def test_the_target_is_adapted_once(arguments: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[object] = []
    monkeypatch.setattr(Medusa, "adapt", lambda self, target: calls.append(target) or target)
    command(arguments)
    assert len(calls) == 1


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"--output": "mined.json"}, "must be a new file"),
        ({"--prompts": "none.jsonl"}, "does not exist"),
        ({"--drafter": "no/such/run"}, "no/such/run"),
    ],
)
def test_mistakes_are_named(arguments: list[str], change: dict[str, str], words: str) -> None:
    for key, value in change.items():
        arguments[arguments.index(key) + 1] = value
    with pytest.raises(ValueError, match=words):
        command(arguments)
