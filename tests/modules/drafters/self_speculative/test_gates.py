"""M2R2's gates: they draft without loss, and tokens may leave at them."""

from __future__ import annotations

from typing import Any, cast

import pytest
import torch
from torch import Tensor

from modules.contracts.rows import Rows
from modules.contracts.sampling import Sampling
from modules.decoding.decoder import SpeculativeDecoder
from modules.drafters.heads.medusa import Medusa
from modules.drafters.self_speculative.early_exit import EarlyExitDecoder
from modules.target.session import Session
from modules.trees.confident import ConfidentChain
from modules.trees.sampled.branching import DrawnTree
from modules.trees.static import StaticTree
from tests.fakes import many_prompts, tiny_batch, tiny_target
from tests.modules.conformance import (
    check_batches,
    check_greedy,
)
from tests.modules.drafters.self_speculative.test_m2r2 import (
    GATES,
    LAYERS,
    deep_target,
    drafter_for,
    plain,
)
from tests.modules.sampling import goodness

# -- drafting --------------------------------------------------------------------------------------

KINDS = [{}, {"cheap_layers": [0]}, {"least_confidence": 0.3, "draft_vocabulary": 40}]


@pytest.mark.parametrize("kind", KINDS, ids=["plain", "cheap", "confident"])
def test_drafts_are_lossless(kind):
    target = deep_target()
    for shake in (0.01, 0.3):
        drafter = drafter_for(target, shake, **kind)
        traces = SpeculativeDecoder(target, drafter).decode(many_prompts(4), Sampling(), 12)
        assert [trace.ids for trace in traces] == plain(target)
    check_greedy(drafter_for(target, 0.01, **kind), target, coarse=True)
    check_batches(drafter_for(target, 0.01, **kind), target)
    small = tiny_target(vocab=6, seed=2, layers=4)
    kind = {name: value for name, value in kind.items() if name != "draft_vocabulary"}
    drafter = drafter_for(small, 0.2, **{**kind, "gates": [1, 2, 4]})
    for builder in (
        DrawnTree([(0,), (1,), (0, 0)]),
        StaticTree([(0,), (1,), (0, 0), (1, 0)]),
        ConfidentChain(3, 0.3),
    ):
        decoder = SpeculativeDecoder(small, drafter, builder=builder, stop_ids=frozenset())
        assert goodness(decoder, [3, 1], Sampling(1.0), runs=1000) > 1e-4


def test_a_draft_is_the_first_gate_of_training():
    """Of drafted trees behind ragged prompts."""
    target, seen = deep_target(), []
    drafter = drafter_for(target, 0.3)
    expand = drafter.expand

    def record(state: Any, frontier: Any) -> Tensor:
        logits = expand(state, frontier)
        seen.append((state.lengths_B.tolist(), state.rows, logits))
        return logits

    drafter.expand = record  # type: ignore[method-assign]
    prompts = [[7, 8, 9, 10], [20, 21]]
    builder = StaticTree([(0,), (1,), (0, 0), (1, 0), (1, 0, 0)])
    decoder = SpeculativeDecoder(target, drafter, builder=builder, stop_ids=frozenset())
    traces = decoder.decode(prompts, Sampling(), 4)
    assert len(seen) >= 6
    for lengths, rows, logits in seen:
        for b, (ids, trace) in enumerate(zip(prompts, traces, strict=True)):
            text = [*ids, *trace.ids][: lengths[b]]
            for place in range(logits.shape[1]):
                row = rows.tokens_BM.shape[1] - logits.shape[1] + place
                above = rows.above_BMM[b, row].nonzero()[:, 0]
                whole = torch.tensor([[*text, *rows.tokens_BM[b, above].tolist()]])
                batch = tiny_batch(target, 1, whole.shape[1])
                batch.input_ids, batch.document_ids = whole, torch.zeros_like(whole)
                batch.position_ids = torch.arange(whole.shape[1])[None]
                final = drafter.stream.streams(batch, target).accelerated[0][-1][0, -1]
                expected = target.logits(target.final_norm(final))
                torch.testing.assert_close(logits[b, place], expected)


def test_a_drafted_row_runs_the_shared_layers_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Slow and accelerated rows in one call; the last of four nodes alone is new to them."""
    target, calls = deep_target(), []
    run_layers = Session.run_layers

    def record(self: Session, rows: Rows, hidden: Tensor, start: int, stop: int, *more: Any) -> Any:
        calls.append((hidden.shape[1], start, stop))
        return run_layers(self, rows, hidden, start, stop, *more)

    monkeypatch.setattr(Session, "run_layers", record)
    drafter = drafter_for(target, draft_length=3)
    SpeculativeDecoder(target, drafter, stop_ids=frozenset()).decode([[7, 8, 9]], Sampling(), 2)
    assert calls == [(2, 0, 2)] * 3 + [(1, 0, 2), (4, 2, 6)]


def test_a_budget_of_zero_is_plain_decoding():
    target = deep_target()
    decoder = SpeculativeDecoder(target, drafter_for(target), budget=0)
    trace = decoder.decode([[7, 8, 9]], Sampling(), 8)[0]
    assert trace.rows == [1] * 7 and trace.nodes == [0] * 7


def test_a_confident_chain_ends_where_it_is_unsure():
    target = deep_target()
    drafter = drafter_for(target, 0.01)
    counts = []
    for least in (0.0, 0.2, 1.0):
        decoder = SpeculativeDecoder(
            target, drafter, builder=ConfidentChain(3, least), stop_ids=frozenset()
        )
        traces = decoder.decode(many_prompts(4), Sampling(), 10)
        counts.append(sum(sum(trace.nodes) for trace in traces))
        assert [trace.ids for trace in traces] == [
            trace.ids
            for trace in SpeculativeDecoder(target, stop_ids=frozenset()).decode(
                many_prompts(4), Sampling(), 10
            )
        ]
    assert counts[0] > counts[1] > counts[2] == 0
    with pytest.raises(ValueError, match="confidence 0 or above"):
        ConfidentChain(3, -0.1)
    for wrong in (-0.1, 1.5):
        with pytest.raises(ValueError, match=f"least_confidence must be from 0 to 1, got {wrong}"):
            drafter_for(target, least_confidence=wrong)


# -- early exits -----------------------------------------------------------------------------------


@torch.no_grad()
def test_exits_are_those_of_the_training_pass():
    """Every token is the best one of the gate where it left, by the streams of the whole text, and
    leaves at the first gate above the threshold: lazily completed keys and values are exact."""
    target = deep_target()
    drafter, ids = drafter_for(target, 0.2), [7, 8, 9, 10]
    left = set()
    for router, accelerated, threshold in (
        ("arla", True, 0.5),
        ("max_probability", True, 0.25),
        ("max_probability", False, 0.25),
        ("cosine", True, 0.8),
    ):
        decoder = EarlyExitDecoder(target, drafter, threshold, cast(Any, router), accelerated)
        trace = decoder.decode([ids], Sampling(), 24)[0]
        text = torch.tensor([[*ids, *trace.ids]])
        batch = tiny_batch(target, 1, text.shape[1])
        batch.input_ids, batch.document_ids = text, torch.zeros_like(text)
        batch.position_ids = torch.arange(text.shape[1])[None]
        streams = drafter.stream.streams(batch, target)
        for place, (token, layer) in enumerate(zip(trace.ids, trace.layers, strict=True)):
            at = len(ids) + place - 1
            expected_layer, expected = LAYERS, streams.last_BTH
            for gate, (start, stop) in enumerate(drafter.stream.intervals if place else []):
                states = streams.accelerated[gate]
                if not accelerated:
                    states = [streams.slow[name] for name in range(start, stop + 1)]
                here = [state[:, at : at + 1] for state in states]
                logits = target.logits(target.final_norm(here[-1]))
                if decoder.confidence(gate, here, logits) > threshold:
                    expected_layer, expected = stop, states[-1]
                    break
            assert layer == expected_layer
            assert token == int(target.logits(target.final_norm(expected[0, at])).argmax())
            left.add(layer)
    assert left == set(GATES)


def test_layers_are_reported():
    target = deep_target()
    decoder = EarlyExitDecoder(target, drafter_for(target), 0.0, "max_probability")
    trace = decoder.decode([[7, 8]], Sampling(), 9)[0]
    assert trace.layers == [6, *[2] * 8]
    assert decoder.quality_of([trace]) == {"layers_per_token": 2.0, "nominal_speedup": 3.0}


def test_wrong_early_exits_are_refused():
    target = deep_target()
    drafter = drafter_for(target)
    with pytest.raises(ValueError, match="Medusa, which has no gates"):
        EarlyExitDecoder(target, Medusa(target.shape))
    with pytest.raises(ValueError, match="threshold must lie in"):
        EarlyExitDecoder(target, drafter, 1.5)
    with pytest.raises(ValueError, match="router"):
        EarlyExitDecoder(target, drafter, router=cast(Any, "some"))
    with pytest.raises(ValueError, match="arla reads the accelerated stream"):
        EarlyExitDecoder(target, drafter, accelerated=False)
    with pytest.raises(ValueError, match="one prompt at a time"):
        EarlyExitDecoder(target, drafter).decode([[7], [8]], Sampling(), 4)
