"""`python -m train.online`: its recipe, its mistakes, its output, and going on with it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from checkpoints.pretrained import load_pretrained
from configs.command_line.loading import CONFIGS, parse, run
from data.conversations import prompt_ids
from modules.contracts.sampling import Sampling
from modules.decoding.decoder import SpeculativeDecoder
from modules.target.target import Target
from tests.fakes import tiny_target
from train.online.__main__ import command, make_parser, recipe_of
from train.online.service import ANSWERS


def lines(output: Path) -> list[dict]:
    return [json.loads(line) for line in (output / ANSWERS).read_text().splitlines()]


def test_a_stream_is_answered_in_its_order(
    serve: Callable[..., int], tiny: Target, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    """Later questions follow our answers to the earlier ones; what cannot be asked is counted."""
    assert serve() == 0
    answers = lines(tmp_path / "run")
    assert [line["place"] for line in answers] == [0, 1, 2, 4, 5]
    assert answers[0]["labels"] == {"topic": "numbers"}
    plain = SpeculativeDecoder(tiny)
    turns = [
        {"role": "user", "content": "one"},
        {"role": "assistant", "content": answers[1]["response"]},
        {"role": "user", "content": "two"},
    ]
    expected = plain.decode([prompt_ids(turns, tiny.tokenizer)], Sampling(), 8)[0].ids
    assert answers[2]["response_ids"] == expected
    printed = capsys.readouterr().out
    assert (
        "drafter                 5" in printed and "exceed the target's context of 512" in printed
    )
    assert "`tools`" in printed


def test_its_drafter_is_one_like_any_other(
    serve: Callable[..., int], tiny: Target, tmp_path: Path
) -> None:
    serve()
    drafter = load_pretrained(tmp_path / "run", tiny)
    assert type(drafter).__name__ == "Independent"
    provenance = json.loads((tmp_path / "run" / "drafter" / "provenance.json").read_text())
    assert provenance["data"] == {"requests": 5, "train": str(tmp_path / "chats.jsonl")}
    serve("--overwrite", "--init_from", str(tmp_path / "run"), "--learning.interval", "0")
    again = load_pretrained(tmp_path / "run", tiny)
    assert all(torch.equal(p, q) for p, q in zip(drafter.parameters(), again.parameters()))


def test_a_stopped_stream_goes_on(
    serve: Callable[..., int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    serve()
    whole, weights = lines(tmp_path / "run"), load_pretrained(tmp_path / "run").state_dict()

    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("train.online.update.Learner.save", stop)
        serve("--overwrite")
    assert len(lines(tmp_path / "run")) == 2
    assert serve("--resume") == 0
    assert lines(tmp_path / "run") == whole
    resumed = load_pretrained(tmp_path / "run").state_dict()
    assert all(torch.equal(weights[name], resumed[name]) for name in weights)


PPD = "modules.drafters.same_pass.ppd.PPD"
MISTAKES = {
    "--learning.intervall 3": "learning.interval",
    "--learning.interval -1": "learning.interval must be at least 0, got -1",
    "--learning.lr 0": "learning.lr must be above 0",
    "--learning.top_k 0": "learning.top_k must be at least 1 or null, got 0",
    "--learning.replay 300": "learning.replay is 300, but learning.capacity 256",
    "--learning.positions some": "learning.positions",
    "--decoding.max_new_tokens 0": "decoding.max_new_tokens must be at least 1",
    "--decoding.temperature -1": "temperature must be 0",
    "--decoding.builder.class_path os.system": "decoding.builder",
    "--stream.limit 0": "stream.limit must be at least 1",
    "--stream.requests nowhere.jsonl": "'nowhere.jsonl' does not exist",
    "--dtype 4bit": "4bit",
    "--drafter.draft_vocabulary 32": "drafter.draft_vocabulary is 32",
    "--drafter.class_path modules.judges.judge.Judge": "is no drafter",
    "--drafter.class_path modules.drafters.heads.medusa2.Medusa2": "changes its target",
    "--resume": "holds no run",
    "--resume --overwrite": "contradict each other",
    "--init_from nowhere": "'nowhere' does not exist",
    "--server.port 0": "server.port must lie between 1 and 65535",
    f"--server.port 63999 --drafter.class_path {PPD}": "requests would have to wait",
    "--routing.drafters [online]": "other than online, got 'online'",
    "--routing.drafters [a,a]": "names one twice: a, a",
    "--routing.classifier nowhere": "routing.drafters names none",
    "--routing.drafters [a] --routing.classifier ./nowhere": "routing.classifier",
}


@pytest.mark.parametrize("words", MISTAKES)
def test_a_mistake_is_one_line_and_leaves_nothing(
    words: str, serve: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    assert run(lambda _: serve(*words.split()), []) == 2
    printed = capsys.readouterr().err
    assert MISTAKES[words] in printed and printed.count("\n") == 1
    assert not (tmp_path / "run").exists()


def test_its_config_serves_the_same_again(serve: Callable[..., int], tmp_path: Path) -> None:
    """Every key is in it, also those that are null."""
    serve("--learning.top_k", "null", "--stream.limit", "1")
    saved = tmp_path / "run" / "config.yaml"
    assert command(["--config", str(saved), "--output", str(tmp_path / "again")]) == 0
    again = tmp_path / "again"
    assert (again / "config.yaml").read_text() == saved.read_text()
    assert lines(again) == lines(tmp_path / "run")


def test_a_second_run_needs_a_word(
    serve: Callable[..., int], capsys: pytest.CaptureFixture
) -> None:
    serve()
    assert run(lambda _: serve(), []) == 2
    assert "add --resume or --overwrite" in capsys.readouterr().err
    assert run(lambda _: serve("--resume", "--learning.lr", "0.5"), []) == 2
    assert "learning.lr is 0.5, but the run was begun with 0.01" in capsys.readouterr().err


def test_an_unknown_key_of_a_file_is_named(tmp_path: Path) -> None:
    file = tmp_path / "typo.yaml"
    file.write_text("learning: {intervals: 3}\n", encoding="utf-8")
    with pytest.raises(ValueError, match="'learning.intervals' is unknown.*learning.interval"):
        parse(make_parser(), ["--config", "online.yaml", "--config", str(file)])


@pytest.mark.parametrize("path", sorted((CONFIGS / "online").glob("*.yaml")), ids=lambda p: p.stem)
def test_shipped_recipes_parse(path: Path) -> None:
    parser = make_parser()
    recipe = recipe_of(parser, parse(parser, ["--config", str(path)]))
    assert recipe.learning.interval and recipe.drafter(tiny_target().shape) is not None


def test_a_resumed_run_remembers_what_it_began_from(
    serve: Callable[..., int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed before any state was saved, it starts from the same weights."""
    serve()
    (tmp_path / "run").rename(tmp_path / "first")
    began = ("--init_from", str(tmp_path / "first"))
    serve(*began)
    whole = lines(tmp_path / "run")

    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("train.online.update.Learner.update", stop)
        serve(*began, "--overwrite")
    assert serve("--resume") == 0 and lines(tmp_path / "run") == whole
