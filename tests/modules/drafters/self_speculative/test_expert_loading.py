"""Experts that later layers need: predicted from an accelerated stream, loaded ahead of time."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from modules.drafters.self_speculative.expert_loading import (
    ExpertPredictor,
    FastMemory,
    Loading,
    simulate,
)
from tests.fakes import tiny_batch, tiny_target
from tests.modules.conformance import (
    check_gradients,
    check_loss,
    check_target_unchanged,
)

LAYERS = 5


def mixture(dtype: torch.dtype = torch.float64) -> Any:
    return tiny_target("mixtral", dtype, layers=LAYERS)


def predictor_for(target: Any, shake: float = 0.1, **arguments: Any) -> ExpertPredictor:
    torch.manual_seed(3)
    predictor = ExpertPredictor(target.shape, **{"rank": 8, "query_rank": 4, **arguments})
    predictor.initialise(target)
    predictor.to(target.dtype)
    with torch.no_grad():
        for parameter in predictor.parameters():
            parameter += shake * torch.randn_like(parameter)
    return predictor.eval()


def test_fast_memory_forgets_what_was_used_least_recently():
    memory = FastMemory(2)
    memory.load(0, 1)
    memory.load(0, 2)
    assert memory.holds(0, 1) and not memory.holds(1, 1)
    memory.load(0, 3)
    assert memory.holds(0, 1) and memory.holds(0, 3) and not memory.holds(0, 2)


def test_missing_experts_wait_and_predicted_ones_overlap():
    """Two tokens, three layers; compute 1, transfer 0.6 per expert."""
    needed = [[frozenset({0, 1})] * 3, [frozenset({2, 1})] * 3]
    loading, nothing = Loading(slots=12, transfer=0.6, compute=1.0), [{}, {}]
    # On demand: two per layer at the first token, one at the second.
    alone = simulate(needed, nothing, loading)
    assert alone.seconds == pytest.approx(6 + 0.6 * 9) and (alone.needed, alone.hits) == (12, 3)
    # Behind layer 0 the last layer is known: one expert hides in compute, two take 1.2 seconds.
    ahead = simulate(needed, [{0: {2: needed[0][2]}}, {0: {2: needed[1][2]}}], loading)
    assert ahead.seconds == pytest.approx(5 + 1.2 + 0.6 * 6) and ahead.hits == 6
    # A wrong guess costs time and brings nothing.
    wrong = simulate(needed, [{0: {2: frozenset({5, 6})}}, {}], loading)
    assert wrong.seconds == pytest.approx(alone.seconds + 0.2) and wrong.hits == alone.hits
    # One slot never holds what comes next.
    assert simulate(needed, nothing, Loading(1, 0.6, 1.0)).hits == 0
    assert ahead.hit_rate == 0.5
    with pytest.raises(ValueError, match="slots must be at least 1"):
        Loading(0, 1.0, 1.0)


def test_guesses_are_the_routers_own_at_the_rate():
    """Behind layer l of the stream, of the layers R·l to R·l + R − 1."""
    target = mixture()
    predictor, batch = predictor_for(target), tiny_batch(target)
    streams, chosen = predictor.both(batch, target)
    found = list(predictor.guesses(streams, target))
    assert [(behind, layer) for behind, layer, _ in found] == [(1, 2), (1, 3), (2, 4)]
    assert len(chosen) == LAYERS and chosen[0].shape == (2, 24, 2)
    for behind, layer, logits in found:
        block = target.architecture.layers[layer]
        state = block.post_attention_layernorm(streams.accelerated[0][behind])
        torch.testing.assert_close(logits, state @ block.mlp.gate.weight.T)
    # The stream passes attention and adapters alone.
    assert predictor.stream.cheap_layers == {0, 1} and predictor.stream.gates == [2, LAYERS]


def test_the_experts_are_those_that_ran():
    target, batch = mixture(), tiny_batch(mixture())
    _, chosen = predictor_for(target).both(batch, target)
    states: dict = target.features(batch, tuple(range(LAYERS)))
    for layer, experts in enumerate(chosen):
        block, hidden = target.architecture.layers[layer], states[layer]
        attended = block.post_attention_layernorm
        seen: list = []
        hook = attended.register_forward_hook(lambda *parts, seen=seen: seen.append(parts[2]))
        target.forward_rows(hidden, batch.rows(), ("pre_norm",), layers=(layer, layer + 1))
        hook.remove()
        best = (seen[0] @ block.mlp.gate.weight.T).topk(2).indices
        assert torch.equal(best.sort(-1).values, experts.sort(-1).values)


def test_it_trains_like_other_components():
    for check in (check_loss, check_gradients, check_target_unchanged):
        target = mixture()
        check(predictor_for(target), target)
    # All tokens count, so only padding has no label.
    target, batch = mixture(), tiny_batch(mixture())
    batch.document_ids[:] = -1
    losses = predictor_for(target).loss(batch, target, 1.0)
    assert losses.total == 0 and not any(int(mean.count) for mean in losses.metrics.values())


def test_a_few_hundred_steps_predict_experts():
    """Above what the routers say of the untrained stream, and worth simulated time."""
    target = mixture(torch.float32)
    held_out = [tiny_batch(target, rows=16, seed=1000 + i) for i in range(3)]
    results = []
    predictor = predictor_for(target, 0.0, rank=32, query_rank=8, slots=8)
    for steps in (0, 200):
        optimizer = torch.optim.AdamW(list(predictor.parameters()), lr=5e-3, weight_decay=0.0)
        for step in range(steps):
            optimizer.zero_grad()
            batch = tiny_batch(target, rows=8, seed=step)
            predictor.loss(batch, target, 1.0).total.backward()
            optimizer.step()
        results.append(predictor.finish(held_out, target).figures)
    before, after = results
    assert after["held_out/hit_rate"] > before["held_out/hit_rate"] + 0.01, results
    assert after["held_out/hit_rate"] > after["held_out/hit_rate_on_demand"] + 0.1, results
    assert after["held_out/loading_speedup"] > before["held_out/loading_speedup"] > 1, results


def test_other_targets_and_rates_are_refused():
    dense = tiny_target(layers=LAYERS)
    with pytest.raises(ValueError, match="without a router of experts"):
        ExpertPredictor(dense.shape).initialise(dense)
    for rate in (1, 5):
        with pytest.raises(ValueError, match="rate must lie between 2 and 4"):
            ExpertPredictor(dense.shape, rate=rate)
