"""What is recorded of an answer is what the target computes of its text, and losses on it are those
of a slow recomputation."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from modules.contracts.batches import TextBatch
from modules.contracts.sampling import Sampling
from modules.decoding.decoder import SpeculativeDecoder
from modules.drafters.feature.eagle3 import Eagle3
from modules.drafters.heads.clover2 import Clover2
from modules.drafters.heads.medusa import Medusa
from modules.drafters.same_pass.ppd import PPD
from modules.drafters.small_models.independent import Independent
from modules.drafters.small_models.s2d import S2D
from modules.losses.divergences import DIVERGENCES
from modules.trees.sampled.chain import SampledChain
from modules.trees.static import StaticTree
from tests.fakes import tiny_target
from train.online.buffer import Item, batch_of
from train.online.recorder import Recorder
from train.online.settings import LearningSettings
from train.online.update import Learner

TARGET = tiny_target(layers=4)
PROMPT = [7, 8, 9, 10, 11]
FULL = LearningSettings(top_k=None)
GREEDY, WARM = Sampling(), Sampling(1.0, seed=5)


def near(shake: float = 0.05, **arguments: Any) -> Independent:
    """The target's first two layers in float64, moved off its weights; or all of them as they
    are."""
    torch.manual_seed(0)
    made = Independent(TARGET.shape, **arguments)
    made.initialise(TARGET)
    with torch.no_grad():
        for parameter in made.double().parameters():
            parameter += shake * torch.randn_like(parameter)
    return made


def record(
    drafter: Any,
    settings: LearningSettings = FULL,
    sampling: Sampling = GREEDY,
    builder: Any = None,
    states: tuple = (),
    limit: int = 16,
) -> tuple[Recorder, list[int], Any]:
    """One answer, observed."""
    decoder = SpeculativeDecoder(TARGET, drafter.eval(), builder=builder)
    recorder = Recorder(PROMPT, sampling, settings, states)
    trace = decoder.decode([PROMPT], sampling, limit, recorder)[0]
    return recorder, trace.ids, trace


def slow_probs(item: Item) -> Tensor:
    """The target's distributions [P,V] of the item's labels, from one pass over its text."""
    logits_TV = TARGET.model(input_ids=item.ids_T[None]).logits[0].double()
    return logits_TV[item.positions_P - 1].softmax(-1)


@pytest.mark.parametrize("sampling", [GREEDY, WARM], ids=["greedy", "sampled"])
@pytest.mark.parametrize("positions", ["wrong", "all"])
def test_row_before_a_token_holds_its_distribution(sampling: Sampling, positions: Any) -> None:
    settings = LearningSettings(top_k=None, positions=positions)
    recorder, ids, trace = record(near(), settings, sampling, SampledChain(3))
    item = recorder.item(0, ids)
    dense = torch.zeros(len(item.positions_P), 128).double()
    dense.scatter_(1, item.tokens_PK, item.probs_PK)
    torch.testing.assert_close(dense, slow_probs(item), atol=1e-9, rtol=1e-6)
    if positions == "all":
        assert item.positions_P.tolist() == list(range(len(PROMPT), len(PROMPT) + len(ids)))
        return
    # The last token of each call (the limit may cut the last call), and at temperature 0 it is
    # the likeliest of its row.
    ends = (torch.tensor(trace.accepted).cumsum(0) + len(PROMPT)).tolist()
    assert item.positions_P.tolist() in (ends, ends[:-1])
    assert max(trace.accepted) > 1 and 1 in trace.accepted, "some drafts accepted, some rejected"
    if sampling is GREEDY:
        assert torch.equal(item.tokens_PK[:, 0], item.ids_T[item.positions_P])


def test_an_answer_that_is_cut_keeps_only_its_own_positions() -> None:
    recorder, ids, _ = record(near(0.0, layers=4), FULL, WARM, SampledChain(3), limit=13)
    short = recorder.item(0, ids[:7])
    assert short.positions_P.tolist() == [9] and short.probs_PK.shape == (1, 128)
    assert len(recorder.tested(ids)) == 9 and len(recorder.tested(ids[:7])) == 5


@pytest.mark.parametrize("bonus", [True, False])
def test_a_drafter_equal_to_its_target_learns_nothing(bonus: bool) -> None:
    """Every draft is accepted, every divergence is 0, and cross-entropy the target's entropy."""
    settings = LearningSettings(top_k=None, bonus=bonus)
    same = near(0.0, layers=4)
    recorder, ids, trace = record(same, settings, WARM, SampledChain(3), limit=13)
    assert recorder.tested(ids) == pytest.approx([1.0] * 9)
    assert trace.accepted == [4, 4, 4]
    item = recorder.item(0, ids)
    assert item.positions_P.tolist() == ([9, 13, 17] if bonus else [])
    entropy = float(torch.special.entr(item.probs_PK).sum(-1).mean()) if bonus else 0.0
    for name in DIVERGENCES if bonus else ():
        same.divergence_name = name
        batch = batch_of([item], 128, torch.float64, TARGET.device)
        expected = entropy if name == "cross_entropy" else 0.0
        assert same.loss(batch, TARGET, 1.0).total.item() == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("temperature", [1.0, 0.4, 0.0])
def test_acceptance_is_the_overlap_of_both_distributions(temperature: float) -> None:
    """At every tested position Σ_v min(p, q) at the request's temperature, of both models' passes
    over the text.
    """
    drafter = near()
    recorder, ids, trace = record(drafter, FULL, Sampling(temperature, seed=5), SampledChain(3))
    text = torch.tensor([[*PROMPT, *ids]])
    # At temperature 0 both are certain of a token.
    p, q = (
        (model(input_ids=text).logits[0] / max(temperature, 1e-6)).softmax(-1)
        for model in (TARGET.model, drafter.stock)
    )
    overlap = torch.minimum(p, q).sum(-1)
    # Tested: the tokens of a call, but not its bonus.
    places, start = [], len(PROMPT) + 1
    for count in trace.accepted:
        places += range(start, min(start + count, start + 3, text.shape[1]))
        start += count
    expected = overlap.detach()[torch.tensor(places) - 1].tolist()
    assert recorder.tested(ids) == pytest.approx(expected, abs=1e-6)


def test_acceptance_of_siblings_is_the_mass_of_their_tokens() -> None:
    """Chosen by value, the first of several children is accepted with the target's mass on all."""
    tree = StaticTree([(0,), (1,), (2,)])
    recorder, ids, _ = record(near(), FULL, WARM, tree)
    text, drafter = torch.tensor([[*PROMPT, *ids]]), near()
    p, q = (model(input_ids=text).logits[0].softmax(-1) for model in (TARGET.model, drafter.stock))
    mass = p.gather(1, q.topk(3).indices).sum(1)
    tested = recorder.tested(ids)
    assert tested[0] == pytest.approx(mass[len(PROMPT)].item(), abs=1e-6)
    assert len(tested) > 4 and max(tested) <= 1 + 1e-9


@pytest.mark.parametrize("name", DIVERGENCES)
@pytest.mark.parametrize("positions", ["wrong", "all"])
def test_gradients_are_those_of_a_second_pass_of_the_target(name: str, positions: Any) -> None:
    """The mean over the positions alone, each at the row before its token; for the forward KL the
    gradient in the logits is q - p there."""
    settings = LearningSettings(top_k=None, positions=positions)
    drafter = near(divergence=name)
    items = [
        record(drafter, settings, Sampling(1.0, seed=seed), SampledChain(3), limit=12 - seed)[0:2]
        for seed in range(2)
    ]
    items = [recorder.item(0, ids) for recorder, ids in items]
    batch = batch_of(items, 128, torch.float64, TARGET.device)
    drafter.train()
    losses = drafter.loss(batch, TARGET, 1.0)
    losses.total.backward()
    fast = {key: p.grad.clone() for key, p in drafter.named_parameters() if p.grad is not None}
    drafter.zero_grad()
    # Slowly: each text alone, by the library's own model.
    logits = [
        drafter.stock(input_ids=item.ids_T[None]).logits[0, item.positions_P - 1] for item in items
    ]
    probs = torch.cat([slow_probs(item) for item in items]).detach()
    values = DIVERGENCES[name](torch.cat(logits), probs)
    torch.testing.assert_close(losses.total, values.mean(), atol=1e-8, rtol=1e-6)
    if name == "forward_kl":
        q = torch.cat(logits)
        q.backward((q.softmax(-1) - probs).detach() / len(probs))
    else:
        values.mean().backward()
    for key, parameter in drafter.named_parameters():
        torch.testing.assert_close(fast[key], parameter.grad, atol=1e-8, rtol=1e-5)


def test_a_part_of_a_distribution_is_completed() -> None:
    """The 4 largest probabilities as they are; the rest evenly, or not at all."""
    whole = record(near(), FULL)[0].item(0, [])
    recorder, ids, _ = record(near(), FULL)
    exact = slow_probs(recorder.item(0, ids)).detach()
    for remainder in ("spread", "drop"):
        settings = LearningSettings(top_k=4, remainder=remainder)
        part = record(near(), settings)[0].item(0, ids)
        assert part.probs_PK.shape == (len(part.positions_P), 4) and len(whole.positions_P) == 0
        batch = batch_of([part], 128, torch.float64, TARGET.device)
        assert batch.teacher is not None
        dense = batch.teacher.over(part.positions_P - 1)
        top, tokens = exact.topk(4)
        rest = 1 - top.sum(-1, keepdim=True)
        scale = 1 if remainder == "spread" else 1 - rest
        torch.testing.assert_close(dense.gather(1, tokens), top / scale, atol=1e-9, rtol=1e-6)
        expected = rest / 124 if remainder == "spread" else torch.zeros_like(rest)
        others = dense.scatter(1, tokens, expected.expand(-1, 4).clone())
        torch.testing.assert_close(others, expected.expand(-1, 128), atol=1e-9, rtol=1e-6)


def of(kind: Any, **arguments: Any) -> Any:
    """A drafter in float64, its weights moved off their special beginnings."""
    torch.manual_seed(1)
    made = kind(TARGET.shape, **arguments)
    made.initialise(TARGET)
    made.double()
    with torch.no_grad():
        for parameter in made.declared_parameters():
            parameter += 0.05 * torch.randn_like(parameter)
    return made


DRAFTERS = {
    "independent": (Independent, {}),
    "medusa": (Medusa, {"heads": 2}),
    "clover2": (Clover2, {"heads": 2}),
    "eagle3": (Eagle3, {"steps": 2}),
    "s2d": (S2D, {}),
    "ppd": (PPD, {"prompts": 2}),
}


@pytest.mark.parametrize("name", DRAFTERS)
def test_every_drafter_learns_from_its_own_answers(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the states that decoding computed, so that the target runs once, in verification; the
    exception are losses that run it themselves."""
    kind, arguments = DRAFTERS[name]
    drafter = of(kind, **arguments)
    settings = LearningSettings(interval=2, positions="all", lr=1e-2)
    learner = Learner(drafter, TARGET, settings, tmp_path)
    for number in range(2):
        recorder, ids, _ = record(learner.serving, settings, states=learner.states)
        learner.add(recorder.item(number, ids))
    # The recorded states are those of a pass over the text.
    item = learner.buffer.waiting[0]
    batch = batch_of([item], 128, torch.float64, TARGET.device)
    text = TextBatch(batch.input_ids, batch.loss_mask, batch.position_ids, batch.document_ids)
    expected = TARGET.features(text, learner.states) if learner.states else {}
    for state in learner.states:
        torch.testing.assert_close(batch.states[state][:, :-1], expected[state][:, :-1])
    # One update changes the weights that learn, and a refresh those that draft.
    if not drafter.online:
        monkeypatch.setattr(TARGET, "features", None)
    before = {key: p.clone() for key, p in learner.serving.named_parameters()}
    assert learner.due and learner.update().loss > 0
    same = [torch.equal(before[k], p) for k, p in learner.serving.named_parameters()]
    assert all(same)
    learner.refresh()
    same = [torch.equal(before[k], p) for k, p in learner.serving.named_parameters()]
    assert not all(same)


def test_bfloat16_updates_lose_little(tmp_path: Path) -> None:
    """The same loss as in full precision, within its rounding."""
    settings, losses = LearningSettings(interval=1, positions="all"), []
    for mixed in (False, True):
        learner = Learner(near().float(), TARGET, settings, tmp_path, mixed=mixed)
        recorder, ids, _ = record(learner.serving, settings)
        learner.add(recorder.item(0, ids))
        losses.append(learner.update().loss)
    assert losses[0] != losses[1] and losses[1] == pytest.approx(losses[0], rel=0.03)
