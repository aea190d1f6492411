"""Every recipe at ZeRO-3 on two CPU processes, its weights truly in shards: it ends, with the
losses of one process.
"""

from __future__ import annotations

import csv
import json
import random
from pathlib import Path

import pytest
import torch

from checkpoints.pretrained import load_pretrained
from tests.fakes import tiny_target
from tests.train.conftest import WORDS
from tests.train.lightning.processes import launch
from tests.train.lightning.sharded_worker import CASES, STEPS, limit, train_case
from train.cli import command

WHOLE = ("judge", "gad")
"""Recipes without logits to cut into chunks, or with as many chunks on each process here."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Texts of very different lengths, so that rows hold one or several, and as different numbers
    of labels.
    """
    chance, path = random.Random(0), tmp_path_factory.mktemp("sharded")

    def words(count: int) -> str:
        return " ".join(chance.choices(WORDS, k=count))

    lengths = [chance.choice([2, 3, 4, 30]) for _ in range(60)]
    texts = [
        {"prompt": f"{words(1)} {i}?", "response": words(length)}
        for i, length in enumerate(lengths)
    ]
    pairs = [
        {"prompt": one["prompt"], "chosen": one["response"], "rejected": words(3)} for one in texts
    ]
    halves = [(len(one["response"]) // 2, len(one["response"])) for one in texts]
    spans = [[[0, half, 1], [half, end, 0]] for half, end in halves]
    labelled = [{**one, "spans": own} for one, own in zip(texts, spans, strict=True)]
    for name, rows in (("conversations", texts), ("pairs", pairs), ("labelled", labelled)):
        (path / f"{name}.jsonl").write_text(
            "".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8"
        )
    return path


@pytest.fixture(scope="module")
def trained(folder, request) -> Path:
    """The cases that are asked for, trained by one pair of processes."""
    names = [
        item.callspec.params["name"] for item in request.session.items if item.function is TEST
    ]
    ended = launch("tests.train.lightning.sharded_worker", folder, *names, limit=limit(names))
    said = "\n".join(text[-3000:] for _, text in ended)
    assert [status for status, _ in ended] == [0, 0], (
        f"{sorted(path.name for path in folder.glob('*-0.json'))}\n{said}"
    )
    return folder


def figures(run: Path, name: str) -> list[float]:
    """A figure that is logged in every step."""
    folder = max((run / "lightning").glob("version_*"))
    return [
        float(row[name]) for row in csv.DictReader((folder / "metrics.csv").open()) if row.get(name)
    ]


@pytest.mark.parametrize("name", CASES)
def test_weights_in_shards_train_as_one_process_does(trained, name):
    """Losses of steps and validations to 1e-4, relative; SparsePO's to 1e-3 (Adam makes much of the
    smallest gradients, where another order of a sum shows), in bfloat16 to 3e-3; with random
    numbers of their own they only end."""
    case, seen = (
        CASES[name],
        [json.loads((trained / f"{name}-{rank}.json").read_text()) for rank in range(2)],
    )
    if case.strategy == "deepspeed_3":
        assert [one["here"] for one in seen] == [0, 0]
    if case.recipe not in WHOLE:
        assert seen[0]["chunks"] != seen[1]["chunks"]
    found = figures(trained / "two" / name, "train/loss")
    assert len(found) == STEPS and load_pretrained(
        trained / "two" / name, tiny_target(dtype=torch.float32)
    )
    if case.drawn:
        assert case.recipe in WHOLE or seen[0]["groups"] != seen[1]["groups"]
        return
    train_case(name, trained, 1, {})
    tolerance = 3e-3 if case.precision == "bf16-mixed" else 1e-3 if name == "sparsepo" else 1e-4
    for figure in ("train/loss", "val/loss"):
        found, expected = (figures(trained / where / name, figure) for where in ("two", "alone"))
        assert len(found) >= 2 and found == pytest.approx(expected, rel=tolerance), figure
    # The last validation of the training, and that of the weights that are exported.
    assert found[-1] == pytest.approx(found[-2], rel=tolerance)


TEST = test_weights_in_shards_train_as_one_process_does


def test_text_of_ones_own_is_refused_in_shards_before_anything_is_loaded(monkeypatch):
    monkeypatch.setattr("train.cli.outline", lambda *_: tiny_target())
    monkeypatch.setattr("train.run.load_target", lambda *_: pytest.fail("the target was loaded"))
    asked = [
        "--config",
        "independent.yaml",
        "--drafter.own_text",
        "0.5",
        "--trainer.strategy",
        "deepspeed_3",
    ]
    with pytest.raises(
        ValueError, match="deepspeed_3, but drafter.own_text is 0.5: .* use deepspeed_2"
    ):
        command(asked)
