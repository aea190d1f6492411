"""Merged prompts: none merged costs nothing, merged ones are shorter; errors come early."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from checkpoints.folders import write_json
from eval.analysis.dynamic_prefill import Prefill, command, run
from modules.target.loading import load_target
from modules.tokenization.transfer.frozen_base import Base
from modules.tokenization.transfer.hypernetwork import Hypernetwork, load_network, save_network
from tests.modules.tokenization.folders import model_folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run's folder with an untrained hypernetwork, and chats."""
    place = tmp_path_factory.mktemp("run")
    model = model_folder(place / "base", 0)
    base = Base(load_target(str(model), "float32", "cpu"))
    save_network(Hypernetwork(base.embedding.float(), None, 16, 1, 2, 4), place)
    write_json(place / "metrics.json", {"settings": {"target": str(model)}})
    rows = [{"prompt": "The cat sat on the mat.", "response": "The cat."}] * 2
    (place / "chats.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return place


def test_more_merges_are_shorter_and_none_changes_nothing(folder: Path, tmp_path: Path) -> None:
    output = tmp_path / "lines.json"
    chats = str(folder / "chats.jsonl")
    arguments = ["--transfer", str(folder), "--prompts", chats, "--output", str(output)]
    assert command([*arguments, "--boundary", "sentence", "--merges", "[0, 2, 40]"]) == 0
    lines = json.loads(output.read_text())
    assert [line["merges"] for line in lines] == [0, 2, 40]
    assert lines[0]["length"] == 1 and lines[0]["more_nats"] == pytest.approx(0, abs=1e-6)
    assert 1 > lines[1]["length"] > lines[2]["length"]
    with pytest.raises(ValueError, match="exists already: delete it or give another"):
        command(arguments)
    predicted = run(Prefill(str(folder), chats, merges=(0,), originals=False))
    assert predicted[0].nats != pytest.approx(lines[0]["nats"], abs=1e-4)


def test_mistakes_are_named_before_anything_is_loaded(folder: Path, tmp_path: Path) -> None:
    for wrong, words in (
        ({"merges": ()}, "merges"),
        ({"limit": 0}, "limit must be at least 1"),
        ({"boundary": "line"}, "boundary 'line' is unknown"),
    ):
        with pytest.raises(ValueError, match=words):
            Prefill("x", "y", **wrong)  # type: ignore[arg-type]
    (tmp_path / "metrics.json").write_text("{}")
    with pytest.raises(ValueError, match="is no run of train.tokenizer_transfer"):
        run(Prefill(str(tmp_path), "y"))
    write_json(tmp_path / "metrics.json", {"settings": {"target": "no such model"}})
    with pytest.raises(ValueError, match=r"missing\.jsonl"):
        run(Prefill(str(tmp_path), "missing.jsonl"))
    base = Base(load_target(str(folder / "base"), "float32", "cpu"))
    with pytest.raises(ValueError, match="no hypernetwork of this model"):
        load_network(folder, base.embedding[:, :16].float(), None)
