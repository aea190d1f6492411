"""Acceptance rises over a stream, text never depends on updates, and killed runs go on exactly."""

from __future__ import annotations

import json
import pkgutil
from pathlib import Path
from typing import Any

import pytest
import torch

from modules.contracts.sampling import Sampling
from modules.decoding.decoder import SpeculativeDecoder
from modules.target.target import Target
from modules.trees.sampled.chain import SampledChain
from tests.modules.sampling import first_two_tokens, homogeneous, small_target
from tests.train.online.conftest import make_service, markov_target, questions, small_drafter
from train.online.recorder import Recorder
from train.online.service import ANSWERS, Service
from train.online.settings import LearningSettings
from train.online.update import STATE, Learner

FAST = LearningSettings(interval=2, lr=1e-2)


def serve(service: Service, topics: list[str]) -> list[dict[str, Any]]:
    """Answer the questions that are not answered yet, with updates between them."""
    for request in list(questions(topics))[len(service.lines) :]:
        service.answer(request)
        service.learn()
    return service.lines


def rate(lines: list[dict[str, Any]]) -> float:
    """Acceptance over some requests."""
    return sum(line["accepted"] for line in lines) / sum(line["tested"] for line in lines)


# -- acceptance over the stream --------------------------------------------------------------------


def test_acceptance_rises_dips_at_a_shift_and_recovers(markov: Target, tmp_path: Path) -> None:
    topics = ["first"] * 30 + ["second"] * 30
    learning = serve(make_service(markov, small_drafter(markov), tmp_path / "a", FAST), topics)
    thirds = [rate(learning[start : start + 10]) for start in range(0, 60, 10)]
    assert thirds[0] < thirds[1] < thirds[2], "it rises"
    assert thirds[2] > thirds[0] + 0.2
    after_shift = rate(learning[30:34])
    assert after_shift < thirds[2] - 0.2, "it dips"
    assert thirds[5] > after_shift + 0.2, "it recovers"


def test_without_updates_acceptance_stays(markov: Target, tmp_path: Path) -> None:
    never = LearningSettings(interval=0)
    lines = serve(make_service(markov, small_drafter(markov), tmp_path, never), ["first"] * 20)
    assert abs(rate(lines[:10]) - rate(lines[10:])) < 0.05
    assert {line["updates"] for line in lines} == {0}
    assert [file.name for file in tmp_path.iterdir()] == [ANSWERS]


def test_replay_remembers_the_first_topic(markov: Target, tmp_path: Path) -> None:
    """After a stay with the second topic, a drafter that saw earlier requests again is better at
    the first."""
    topics, rates = ["first"] * 15 + ["second"] * 15 + ["first"] * 4, {}
    for replay in (0, 3):
        settings = LearningSettings(interval=3, lr=1e-2, replay=replay)
        place = tmp_path / str(replay)
        rates[replay] = rate(
            serve(make_service(markov, small_drafter(markov), place, settings), topics)[-4:]
        )
    assert rates[3] > rates[0] + 0.1


# -- the text --------------------------------------------------------------------------------------


def test_greedy_text_is_plain_decoding_throughout(tmp_path: Path) -> None:
    target = markov_target(torch.float64)
    service = make_service(target, small_drafter(target), tmp_path, FAST, temperature=0.0)
    lines = serve(service, ["first", "second"] * 6)
    plain = SpeculativeDecoder(target)
    for request, line in zip(questions(["first", "second"] * 6), lines, strict=True):
        expected = plain.decode([service.prompt(request)], Sampling(), 8)[0].ids
        assert line["response_ids"] == expected
    assert lines[-1]["updates"] > 2 and service.learners["drafter"].updates == 6


def test_sampled_text_keeps_the_distribution_throughout(tmp_path: Path) -> None:
    """Answers of drafters between many updates, counted together."""
    target = small_target()
    learner = Learner(small_drafter(target), target, LearningSettings(interval=1, lr=0.1), tmp_path)
    decoder = SpeculativeDecoder(target, learner.serving, builder=SampledChain(3))
    counts: dict[tuple[int, ...], int] = {}
    for update in range(8):
        learner.refresh()
        for trace in decoder.decode([[3, 1]] * 250, Sampling(1.0, seed=update * 1000), 3):
            key = tuple(trace.ids[1:3])
            counts[key] = counts.get(key, 0) + 1
        recorder = Recorder([3, 1], Sampling(1.0, seed=update), learner.settings)
        trace = decoder.decode([[3, 1]], Sampling(1.0, seed=update), 8, recorder)[0]
        learner.add(recorder.item(update, trace.ids))
        learner.update()
    plain = first_two_tokens(SpeculativeDecoder(target), 2000)
    assert homogeneous(counts, plain) > 0.001


# -- resuming --------------------------------------------------------------------------------------


class PowerCut(Exception):
    """The process is killed."""


TOPICS = ["first"] * 6 + ["second"] * 4
KILLED = {
    "before an item": ("train.online.buffer.Item.write", 4),
    "between an item and its line": ("train.online.service.append_lines", 4),
    "before an update": ("train.online.update.Learner.update", 1),
    "inside of an update": ("train.online.update.Learner._step", 2),
    "before an update is saved": ("train.online.update.Learner.save", 1),
    "before items are deleted": ("train.online.buffer.Buffer.prune", 1),
}


SETTINGS = {
    "plain": LearningSettings(interval=3, lr=1e-2),
    "replay": LearningSettings(interval=2, lr=1e-2, replay=2, capacity=3, save_every=2),
}


@pytest.fixture(scope="module")
def unbroken(markov: Target, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Service]:
    """Runs that nothing interrupts."""
    made = {}
    for name, settings in SETTINGS.items():
        place = tmp_path_factory.mktemp(name)
        made[name] = make_service(markov, small_drafter(markov), place, settings)
        serve(made[name], TOPICS)
        made[name].save()
    return made


@pytest.mark.parametrize("kind", SETTINGS)
@pytest.mark.parametrize("moment", KILLED)
def test_a_killed_run_goes_on_exactly(
    moment: str,
    kind: str,
    unbroken: dict[str, Service],
    markov: Target,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The same answers, acceptance, weights and optimiser as without the kill."""
    # 1. Killed at the call of a function, once it has been called some times.
    place, calls = KILLED[moment]
    broken = make_service(markov, small_drafter(markov), tmp_path, SETTINGS[kind])
    with monkeypatch.context() as patch, pytest.raises(PowerCut):
        patch.setattr(place, killing(place, calls))
        serve(broken, TOPICS)
    assert len(broken.lines) < len(TOPICS)
    # 2. Go on; where there is a state, the first weights do not matter.
    saved = (tmp_path / "online" / "drafter" / STATE).exists()
    fresh = small_drafter(markov, seed=9 if saved else 3)
    resumed = make_service(markov, fresh, tmp_path, SETTINGS[kind])
    resumed.load()
    serve(resumed, TOPICS)
    resumed.save()
    # 3. Everything is as it would have been.
    assert resumed.lines == unbroken[kind].lines
    first, second = unbroken[kind].learners["drafter"], resumed.learners["drafter"]
    assert same(first.student.state_dict(), second.student.state_dict())
    states = [learner.optimizer.state_dict()["state"] for learner in (first, second)]
    assert all(same(states[0][index], states[1][index]) for index in states[0])
    files = [sorted(file.name for file in each.buffer.folder.iterdir()) for each in (first, second)]
    assert files[0] == files[1]


def same(first: Any, second: Any) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[k], second[k]) for k in first)


def killing(place: str, calls: int) -> Any:
    """The function at a dotted path, which raises after so many calls."""
    owner, name = place.rsplit(".", 1)
    original, made = getattr(pkgutil.resolve_name(owner), name), [0]

    def call(*arguments: Any, **options: Any) -> Any:
        made[0] += 1
        if made[0] > calls:
            raise PowerCut
        return original(*arguments, **options)

    return call


def test_a_line_that_was_cut_is_dropped(
    markov: Target, unbroken: dict[str, Service], tmp_path: Path
) -> None:
    whole, settings = unbroken["plain"].lines, SETTINGS["plain"]
    serve(make_service(markov, small_drafter(markov), tmp_path, settings), TOPICS[:5])
    file = tmp_path / ANSWERS
    file.write_bytes(file.read_bytes()[:-20])
    resumed = make_service(markov, small_drafter(markov), tmp_path, settings)
    resumed.load()
    assert len(resumed.lines) == 4
    assert serve(resumed, TOPICS) == whole
    assert [json.loads(line) for line in file.read_text().splitlines()] == whole


def test_a_gradient_that_is_not_finite_changes_nothing(
    markov: Target, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    service = make_service(markov, small_drafter(markov), tmp_path, FAST)
    learner = service.learners["drafter"]
    before = {name: p.clone() for name, p in learner.student.named_parameters()}
    loss = learner.student.loss

    def broken(*arguments: Any) -> Any:
        made = loss(*arguments)
        return type(made)(made.total * float("nan"), made.metrics)

    learner.student.loss = broken  # type: ignore[method-assign]
    serve(service, ["first"] * 2)
    assert same(before, dict(learner.student.named_parameters())) and learner.updates == 1
    assert "update 1: the gradient is not finite" in caplog.text
