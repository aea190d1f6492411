"""A resumed evaluation is the same in everything, or is refused by the name of what changed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from eval import evaluation
from eval.methods.digests import changed, digest
from eval.methods.rows import Method, build_rows
from eval.run.identity import identify, questions
from eval.tasks.tasks import load_tasks
from modules.contracts.sampling import Sampling
from modules.drafters.heads.clover import Clover
from modules.drafters.retrieval.aded import Aded
from modules.drafters.retrieval.rasd import Rasd
from modules.drafters.retrieval.rest import Rest
from modules.drafters.retrieval.suffix_array import Datastore
from modules.drafters.retrieval.suffix_automaton import Suffix
from modules.judges.judge import Judge
from tests.eval.test_cli import config, run, tiny
from tests.fakes import tiny_target

__all__ = ["tiny"]
JOURNAL = Path("out/journal.jsonl")


def rewrite(**changes: Any) -> None:
    """The same prompts file with something else in the row of id 1."""
    rows = [json.loads(line) for line in Path("prompts.jsonl").read_text().splitlines()]
    rows[1] |= changes
    Path("prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


_MEASURED: dict[tuple[str, ...], dict[str, bytes]] = {}


def evaluated(tmp_path: Path, *more: str) -> str:
    """An evaluation in `out`, the same one in every test."""
    path = config(tmp_path, ["AlwaysRight"])
    if more not in _MEASURED:
        assert run("--config", path, "--output", "out", *more) == 0
        _MEASURED[more] = {file.name: file.read_bytes() for file in Path("out").iterdir()}
    Path("out").mkdir(exist_ok=True)
    for name, content in _MEASURED[more].items():
        (Path("out") / name).write_bytes(content)
    return path


def refused(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    capsys.readouterr()
    assert run(*arguments) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    return said


def test_another_question_is_refused_before_the_target_loads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = evaluated(tmp_path)
    rewrite(turns=["something else", "and?"])
    monkeypatch.setattr(evaluation, "load_target", lambda *_: pytest.fail("the target was loaded"))
    said = refused(capsys, "--config", path, "--output", "out", "--resume")
    assert "out/journal.jsonl was made with another prompt b/1 (" in said and "--overwrite" in said


def test_other_references_and_places_are_other_prompts(tmp_path: Path) -> None:
    task = tmp_path / "task.yaml"
    task.write_text(
        json.dumps(
            {
                "source": str(tmp_path / "prompts.jsonl"),
                "reference": "answer",
                "metric": "exact_match",
            }
        )
    )

    def asked(*rows: dict[str, Any]) -> dict[str, str]:
        (tmp_path / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        return questions(load_tasks([str(task)]))

    one, two = ({"id": i, "question": f"question {i}", "answer": f"#### {i}"} for i in (1, 2))
    before = asked(one, two)
    assert asked(one, two) == before and list(before) == ["prompts/1", "prompts/2"]
    other = changed(before, asked(one, {**two, "answer": "#### 3"}))
    assert other is not None and other[0] == "prompts/2"
    moved = asked(two, one)
    assert moved["prompts/1"] != before["prompts/1"] and moved["prompts/2"] != before["prompts/2"]
    assert changed(before, asked(one)) == ("prompts/2", before["prompts/2"], None)


def test_other_settings_and_another_template_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = evaluated(tmp_path, "--limit", "1")
    resumed = ["--config", path, "--output", "out", "--resume", "--limit"]
    assert "another limit (1, now 2)" in refused(capsys, *resumed, "2")
    assert "another method alwaysright control (false, now true)" in refused(
        capsys,
        *resumed,
        "1",
        "--methods",
        '[{"decoder": {"class_path": "tests.eval.fakes.AlwaysRight"}, "control": true}]',
    )
    target = tiny_target()
    target.tokenizer.chat_template = "X" + target.tokenizer.chat_template
    monkeypatch.setattr(evaluation, "load_target", lambda *_: target)
    assert "another rendered_prompts (" in refused(capsys, *resumed, "1")


def altered(kind: str, drafter: Clover) -> None:
    """Something that a sum of absolute weights does not see."""
    with torch.no_grad():
        if kind == "sign":
            for parameter in drafter.parameters():
                parameter.neg_()
        elif kind == "order":
            drafter.get_buffer("vocabulary").copy_(drafter.get_buffer("vocabulary").roll(1))
        else:
            drafter.arguments["draft_vocabulary"] = 40


@pytest.mark.parametrize("kind", ["sign", "order", "arguments"])
def test_every_part_of_a_drafter_is_its_identity(kind: str) -> None:
    target = tiny_target()
    torch.manual_seed(0)
    drafter = Clover(target.shape, 2, draft_vocabulary=48).double()
    before = digest(drafter)
    assert digest(drafter) == before
    altered(kind, drafter)
    assert digest(drafter) != before


@pytest.mark.parametrize("kind", [Rest, Rasd, Aded, Suffix])
def test_a_datastores_content_is_an_identity(tmp_path: Path, kind: Any) -> None:
    target, place = tiny_target(), str(tmp_path / "store")
    found = []
    for last in (9, 10, 10):
        store = Datastore.build([[7, 8, last, 7, 8]], target.shape.vocab_size)
        store.save(Path(place))
        found.append(digest(kind(target.shape, datastore=place)))
    assert found[0] != found[1] == found[2]


def test_a_judges_threshold_is_an_identity() -> None:
    target = tiny_target()
    judge = Judge(target.shape).double()
    rule = judge.acceptance_rule(target, threshold=0.5)
    before = digest(judge), digest(rule)
    judge.threshold.fill_(0.7)
    assert digest(judge) != before[0] and digest(rule) != before[1]
    assert digest(judge.acceptance_rule(target, threshold=0.9)) != digest(rule)


def test_rows_tell_what_changed_in_them() -> None:
    target = tiny_target()
    scripted = {"class_path": "tests.fakes.ScriptedDrafter", "init_args": {"depth": 2}}
    rows = build_rows([Method("a", scripted), Method("b", scripted, budget=1)], target, Sampling())
    plain, first, second = (identify(row) for row in rows)
    assert set(first) - set(plain) == {"drafter"} and first["target"] == target.fingerprint()
    assert changed(first, second) == ("budget", first["budget"], 1)
    assert identify(build_rows([Method("a", scripted)], target, Sampling())[1]) == first
