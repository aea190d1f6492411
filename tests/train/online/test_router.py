"""Several drafters: each learns from its own requests alone."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import DistilBertConfig, DistilBertForSequenceClassification

from modules.target.target import Target
from tests.fakes import tiny_tokenizer
from tests.train.online.conftest import questions, small_drafter
from train.online.router import Router
from train.online.service import Request, Service
from train.online.settings import DecodingSettings, LearningSettings, RoutingSettings
from train.online.update import Learner

SETTINGS = LearningSettings(interval=2, lr=1e-2)


def routed(target: Target, names: list[str], output: Path) -> Service:
    """A greedy service with a drafter for each topic."""
    learners = {
        name: Learner(small_drafter(target), target, SETTINGS, output / "online" / name)
        for name in names
    }
    router = Router(RoutingSettings(names))
    return Service(target, learners, DecodingSettings(8), None, output, router)


def test_each_drafter_learns_from_its_own_requests(markov: Target, tmp_path: Path) -> None:
    """As if it were alone with them."""
    both = routed(markov, ["first", "second"], tmp_path / "both")
    alone = routed(markov, ["first"], tmp_path / "alone")
    for request in questions(["first", "second", "second"] * 4):
        both.answer(request)
        both.learn()
        if request.labels["topic"] == "first":
            alone.answer(request)
            alone.learn()
    assert [line["drafter"] for line in both.lines] == ["first", "second", "second"] * 4
    pair = both.learners["first"].student, alone.learners["first"].student
    assert all(torch.equal(p, q) for p, q in zip(*(each.parameters() for each in pair)))
    assert [each.updates for each in both.learners.values()] == [2, 4]
    # Each goes on after a kill.
    again = routed(markov, ["first", "second"], tmp_path / "both")
    again.load()
    assert [each.updates for each in again.learners.values()] == [2, 4]


def test_a_request_without_a_label_goes_to_the_first_drafter() -> None:
    router = Router(RoutingSettings(["a", "b"], label="language"))
    turns = [{"role": "user", "content": "x"}]
    names = [
        router(Request(turns, labels=labels)) for labels in ({"language": "b"}, {}, {"b": "b"})
    ]
    assert names == ["b", "a", "a"]


def test_a_classifier_chooses(tmp_path: Path) -> None:
    """Its most likely label for the last turn."""
    torch.manual_seed(0)
    sizes = {"dim": 16, "hidden_dim": 16, "n_layers": 1, "n_heads": 2, "vocab_size": 128}
    config = DistilBertConfig(
        **sizes, id2label={0: "maths", 1: "code"}, label2id={"maths": 0, "code": 1}
    )
    model = DistilBertForSequenceClassification(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 0.5)
    model.save_pretrained(tmp_path)
    tokenizer = tiny_tokenizer()
    tokenizer.model_max_length = 64
    tokenizer.save_pretrained(tmp_path)
    router = Router(RoutingSettings(["code", "maths"], classifier=str(tmp_path)))
    chosen = []
    for text in ("one plus one", "def f():", "zzz", "aaaaaa", "12 45 3", "x" * 100):
        logits = model(**tokenizer(text[:64], return_tensors="pt")).logits[0]
        turns = [{"role": "user", "content": "def"}, {"role": "user", "content": text}]
        chosen.append(router(Request(turns, labels={"topic": "code"})))
        assert chosen[-1] == ("maths", "code")[int(logits.argmax())]
    assert len(set(chosen)) == 2
    with pytest.raises(ValueError, match="labels are maths, code: name drafters after them"):
        Router(RoutingSettings(["law"], classifier=str(tmp_path)))
