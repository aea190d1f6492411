"""SkipDecode: what its schedule runs, in training and in decoding, and that drafts are lossless."""

from __future__ import annotations

from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from modules.contracts.rows import Rows
from modules.contracts.sampling import Sampling
from modules.decoding.decoder import SpeculativeDecoder
from modules.drafters.self_speculative.schedule import Schedule, schedule_positions
from modules.drafters.self_speculative.skipdecode import SkipDecode
from modules.losses.chunked import next_token_rows
from modules.target.session import Session
from modules.trees.sampled.branching import DrawnTree
from tests.fakes import many_prompts, tiny_batch, tiny_target
from tests.modules.conformance import (
    check_batches,
    check_gradients,
    check_greedy,
    check_loss,
    check_no_labels,
)
from tests.modules.sampling import goodness

LAYERS = 6
BUDGETS = [6, 5, 5, 3, 3, 2]


def drafter_for(target: Any, shake: float = 0.1, **arguments: Any) -> SkipDecode:
    """A drafter in float64 whose weights have moved."""
    torch.manual_seed(3)
    drafter = SkipDecode(target.shape, **arguments)
    drafter.initialise(target)
    drafter.double()
    with torch.no_grad():
        for parameter in drafter.declared_parameters():
            parameter += shake * torch.randn_like(parameter)
    return drafter.eval()


def deep_target(arch: str = "llama", **more: Any) -> Any:
    return tiny_target(arch, layers=LAYERS, **more)


# -- the schedule ----------------------------------------------------------------------------------


def test_budgets_fall_linearly_and_then_stay():
    schedule = Schedule.linear(24, 1, 18, 6, 4)
    assert schedule.budgets == (18, 15, 12, 9, 6)
    assert [schedule.budget(t) for t in (-1, 0, 2, 4, 99)] == [24, 18, 12, 6, 6]
    assert Schedule.linear(24, 1, 0.75, 0.25, 4) == schedule
    # Nominal speed-ups of 24 layers: 2, 3, 4 and 4.8 on the way from k_max to k_min.
    for (most, least), speed in {(18, 6): 2, (10, 6): 3, (8, 4): 4, (6, 4): 4.8}.items():
        total = Schedule.linear(24, 1, most, least, 600).total(0, 601)
        assert 24 * 601 / total == pytest.approx(speed, rel=0.01)


def test_upper_layers_are_the_last_ones():
    schedule = Schedule(6, 2, (6, 5, 3))
    assert [schedule.first_upper(t) for t in (-1, 0, 1, 2, 3)] == [2, 2, 3, 5, 5]
    times = torch.tensor([[-1, 0, 1], [2, 3, 400]])
    assert schedule.first_uppers(times).tolist() == [[2, 2, 3], [5, 5, 5]]
    assert list(schedule.groups(False)) == [(2, 3), (3, 5), (5, 6)]
    assert list(Schedule(6, 2, (4, 3)).groups(False)) == [(4, 5), (5, 6)]
    assert list(Schedule(6, 2, (4, 3)).groups(True)) == [(2, 4), (4, 5), (5, 6)]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"budgets": [4, 5]}, "rise from 4 to 5"),
        ({"budgets": [7]}, "from 2 .* to 6 layers, got 7"),
        ({"budgets": []}, "got none"),
        ({"warm_up": 6}, "warm_up must lie between 1 and 5"),
        ({"warm_up": 0}, "warm_up must lie between 1 and 5"),
        ({"most": 0.2, "least": 0.5}, "most must be at least least"),
        ({"length": 0}, "length must be at least 1"),
        ({"draft_length": 0}, "draft_length must be at least 1"),
        ({"tuning": "some"}, "tuning"),
        ({"prompt": "some"}, "prompt"),
    ],
)
def test_wrong_settings_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        SkipDecode(deep_target().shape, **arguments)


def test_positions_are_counted_from_the_answer_or_from_the_start():
    batch = tiny_batch(tiny_target())
    t = schedule_positions(batch, whole_prompt=True)[0].tolist()
    assert t[:5] == [-4, -3, -2, -1, 0] and t[11:16] == [7, -3, -2, -1, 0] and min(t[-3:]) > 99
    t = schedule_positions(batch, whole_prompt=False)[0].tolist()
    assert t[:12] == list(range(12)) and t[12:21] == list(range(9)) and min(t[-3:]) > 99


# -- training --------------------------------------------------------------------------------------


@pytest.mark.parametrize("tuning", ["lora", "full", "none"])
def test_the_whole_budget_is_the_whole_model(tuning):
    """Bit for bit."""
    target = deep_target()
    drafter, batch = drafter_for(target, budgets=[LAYERS], tuning=tuning), tiny_batch(target)
    model = drafter.model(target)
    with torch.no_grad():
        expected = model.features(batch, ("final",))["final"]
        assert torch.equal(drafter.sliced_states(batch, model), expected)


def slow_states(model: Any, ids: list[int], starts: list[int], warm_up: int) -> Tensor:
    """`final` states [T,H] of one text, position by position and layer by layer: at layer l a
    position attends to the inputs of that layer of all positions up to its own."""
    inputs: list[list[Tensor]] = [[] for _ in range(LAYERS)]
    finals = []
    for t, token in enumerate(ids):
        hidden = model.embed(torch.tensor([[token]]))
        for layer in range(LAYERS):
            if warm_up <= layer < starts[t]:
                continue
            inputs[layer].append(hidden)
            assert len(inputs[layer]) == t + 1, "keys and values are missing"
            both = torch.cat(inputs[layer], 1)
            visible = torch.ones(1, t + 1, t + 1, dtype=torch.bool).tril()
            rows = Rows(torch.arange(t + 1)[None], visible)
            out = model.forward_rows(both, rows, ("pre_norm",), layers=(layer, layer + 1))
            hidden = out["pre_norm"][:, -1:]
        finals.append(model.final_norm(hidden)[0])
    return torch.cat(finals)


@pytest.mark.parametrize("prompt", ["full", "scheduled"])
def test_slices_are_what_each_position_computes_alone(prompt):
    target = deep_target()
    drafter = drafter_for(target, budgets=BUDGETS, warm_up=1, prompt=prompt)
    batch, model = tiny_batch(target), drafter.model(target)
    # The answer of one document starts later, so rows have unequally many active positions.
    batch.loss_mask[1, :9] = False
    states = drafter.sliced_states(batch, model)
    times = schedule_positions(batch, prompt == "full")
    for row, part in product((0, 1), (slice(0, 12), slice(12, 21))):
        starts = [drafter.schedule.first_upper(t) for t in times[row, part].tolist()]
        slow = slow_states(model, batch.input_ids[row, part].tolist(), starts, 1)
        torch.testing.assert_close(states[row, part], slow)


def test_the_loss_is_the_language_models_under_the_schedule():
    target = deep_target()
    drafter, batch = drafter_for(target, budgets=BUDGETS), tiny_batch(target)
    flat_M, labels_M = next_token_rows(batch)
    states = drafter.sliced_states(batch, drafter.model(target)).flatten(0, 1)[flat_M]
    expected = F.cross_entropy(target.logits(states), labels_M)
    torch.testing.assert_close(drafter.loss(batch, target, 1.0).total, expected)


@pytest.mark.parametrize("tuning", ["lora", "full"])
def test_soft_labels_are_the_targets_own_distributions(tuning):
    """Of all of its layers, untuned and without a schedule."""
    target = deep_target()
    drafter = drafter_for(target, budgets=BUDGETS, tuning=tuning, labels="soft")
    batch, model = tiny_batch(target), drafter.model(target)
    flat_M, _ = next_token_rows(batch)
    states = drafter.sliced_states(batch, model).flatten(0, 1)[flat_M]
    whole = target.features(batch, ("final",))["final"].flatten(0, 1)[flat_M]
    expected = F.cross_entropy(model.logits(states), target.logits(whole).softmax(-1))
    torch.testing.assert_close(drafter.loss(batch, target, 1.0).total, expected)


@pytest.mark.parametrize("prompt", ["full", "scheduled"])
@pytest.mark.parametrize("tuning", ["lora", "full"])
@pytest.mark.parametrize("labels", ["hard", "soft"])
def test_it_learns_what_runs(tuning, prompt, labels):
    """Layers that no position runs learn nothing, all others do."""
    target = deep_target()
    arguments = dict(budgets=[4, 2], tuning=tuning, prompt=prompt, labels=labels)
    check_loss(drafter_for(target, **arguments), target)
    check_gradients(drafter_for(target, **arguments), target)
    check_no_labels(drafter_for(target, **arguments), target)


# -- drafting --------------------------------------------------------------------------------------

KINDS = [
    {"tuning": "none"},
    {"tuning": "none", "prompt": "scheduled", "warm_up": 2},
    {"tuning": "lora"},
    {"tuning": "lora", "prompt": "scheduled", "warm_up": 2},
    {"tuning": "full"},
]


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: "-".join(map(str, kind.values())))
def test_drafts_are_lossless(kind):
    arguments = {"budgets": [5, 4, 4, 3], **kind}
    target = deep_target()
    plain = SpeculativeDecoder(target).decode(many_prompts(4), Sampling(), 12)
    drafter = drafter_for(target, 0.01, **arguments)
    traces = SpeculativeDecoder(target, drafter).decode(many_prompts(4), Sampling(), 12)
    assert [trace.ids for trace in traces] == [trace.ids for trace in plain]
    check_greedy(drafter_for(target, 0.01, **arguments), target, coarse=True)
    check_batches(drafter, target)
    small = tiny_target(vocab=6, seed=2, layers=4)
    builder = DrawnTree([(0,), (1,), (0, 0)])
    decoder = SpeculativeDecoder(
        small, drafter_for(small, 0.05, **{**kind, "budgets": [3]}), builder=builder,
        stop_ids=frozenset(),
    )  # fmt: skip
    assert goodness(decoder, [3, 1], Sampling(1.0), runs=1000) > 1e-4


def test_a_draft_vocabulary_limits_drafts_and_not_the_answer():
    target = deep_target()
    drafter = drafter_for(target, tuning="none", budgets=BUDGETS, draft_vocabulary=24)
    drafter.set_vocabulary(range(0, 48, 2))
    state = torch.randn(1, target.shape.hidden_size, dtype=torch.float64)
    whole = target.logits(state)
    torch.testing.assert_close(drafter.head(0, target)(state), whole[:, 0:48:2])
    prompts = [[7, 8, 9, 10], [20, 30, 40]]
    plain = SpeculativeDecoder(target).decode(prompts, Sampling(), 24)
    traces = SpeculativeDecoder(target, drafter).decode(prompts, Sampling(), 24)
    assert [trace.ids for trace in traces] == [trace.ids for trace in plain]
    drafted = {i for trace in traces for i, own in zip(trace.ids, trace.drafted) if own}
    assert all(i % 2 == 0 and i < 48 for i in drafted)


def test_all_layers_draft_the_targets_own_tokens():
    """A draft that skips nothing and is not tuned is always right, whoever's cache it reads."""
    target = deep_target()
    for tuning in ("none", "lora", "full"):
        drafter = drafter_for(target, 0.0, budgets=[LAYERS], tuning=tuning)
        decoder = SpeculativeDecoder(target, drafter, stop_ids=frozenset())
        for trace in decoder.decode(many_prompts(3), Sampling(), 13):
            assert trace.accepted == [4, 4, 4]


def test_shared_layers_run_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a chain of four nodes the last alone is new to the warm-up layers when it is verified."""
    target, calls = deep_target(), []
    run_layers = Session.run_layers

    def record(self: Session, rows: Rows, hidden: Tensor, start: int, stop: int, *more: Any) -> Any:
        calls.append((hidden.shape[1], start, stop))
        return run_layers(self, rows, hidden, start, stop, *more)

    monkeypatch.setattr(Session, "run_layers", record)
    drafter = drafter_for(target, budgets=[5, 4, 3], warm_up=2, tuning="none")
    SpeculativeDecoder(target, drafter, stop_ids=frozenset()).decode([[7, 8, 9]], Sampling(), 2)
    drafted = [(1, 0, 2), (1, 3, 6), (1, 0, 2), (1, 4, 6), (1, 0, 2), (1, 5, 6)]
    assert calls == [*drafted, (1, 0, 2), (4, 2, 6)]


@pytest.mark.parametrize("prompt", ["full", "scheduled"])
def test_a_tuned_draft_is_what_its_training_computes(prompt):
    """With a cache of its own, of ragged sequences, position by position; the shorter prompt's
    columns start late where the prompt is scheduled."""
    target = deep_target()
    drafter = drafter_for(target, 0.3, budgets=BUDGETS, prompt=prompt)
    model, seen = drafter.model(target), []
    expand = drafter.expand

    def record(state: Any, frontier: Any) -> Tensor:
        logits = expand(state, frontier)
        seen.append((frontier.depth, state.lengths_B.tolist(), frontier.tokens_BW[:, 0], logits))
        return logits

    drafter.expand = record  # type: ignore[method-assign]
    prompts = [[7, 8, 9, 10], [20, 21]]
    decoder = SpeculativeDecoder(target, drafter, stop_ids=frozenset())
    traces = decoder.decode(prompts, Sampling(), 4)
    assert [trace.accepted for trace in traces] == [[1, 1, 1]] * 2
    assert [depth for depth, *_ in seen] == [0, 1, 2] * 3
    for row, (ids, trace) in enumerate(zip(prompts, traces, strict=True)):
        text, chain = [*ids, *trace.ids], []
        shift = -len(ids) if prompt == "full" else 4 - len(ids)
        for depth, lengths, tokens, logits in seen:
            chain = [*chain[:depth], int(tokens[row])]
            whole = [*text[: lengths[row]], *chain]
            starts = [drafter.schedule.first_upper(t + shift) for t in range(len(whole))]
            slow = slow_states(model, whole, starts, 1)
            torch.testing.assert_close(logits[row, 0], target.logits(slow[-1]))
