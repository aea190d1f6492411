"""M2R2: what the accelerated stream sees and leaves untouched, what it learns, how it decodes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from checkpoints.pretrained import Provenance, load_pretrained, save_pretrained
from modules.contracts.rows import Rows
from modules.contracts.sampling import Sampling
from modules.contracts.trainable import Trainable
from modules.decoding.decoder import SpeculativeDecoder
from modules.drafters.self_speculative.accelerated import AcceleratedStream, GateLabels
from modules.drafters.self_speculative.early_exit import EarlyExitDecoder
from modules.drafters.self_speculative.gate_report import calibration_error
from modules.drafters.self_speculative.m2r2 import M2R2, LatentRouter
from modules.losses.chunked import next_token_rows
from tests.fakes import many_prompts, tiny_batch, tiny_target
from tests.modules.conformance import (
    check_gradients,
    check_greedy,
    check_loss,
    check_no_labels,
    check_target_unchanged,
)

LAYERS, GATES = 6, [2, 4, 6]
CHEAP = [None, "attention", "feed_forward", "layer"]


def deep_target(arch: str = "llama") -> Any:
    return tiny_target(arch, layers=LAYERS)


def drafter_for(target: Any, shake: float = 0.1, **arguments: Any) -> M2R2:
    """A drafter in float64 whose weights have moved, those of the stream too."""
    torch.manual_seed(3)
    options = {"gates": GATES, "rank": 8, "query_rank": 4, "latent": 8, **arguments}
    drafter = M2R2(target.shape, **options)
    drafter.initialise(target)
    drafter.double()
    with torch.no_grad():
        for parameter in drafter.parameters():
            parameter += shake * torch.randn_like(parameter)
    return drafter.eval()


def plain(target: Any, count: int = 4, limit: int = 12) -> list[list[int]]:
    traces = SpeculativeDecoder(target).decode(many_prompts(count), Sampling(), limit)
    return [trace.ids for trace in traces]


# -- the streams -----------------------------------------------------------------------------------


@pytest.mark.parametrize("arch", ["llama", "qwen3", "gemma2", "opt"])
def test_the_stream_is_the_slow_one_at_the_start(arch):
    """B = 0: equal at every layer, and a gate is the logit lens."""
    target = deep_target(arch)
    torch.manual_seed(0)
    stream, batch = AcceleratedStream(target.shape, GATES).double(), tiny_batch(target)
    streams = stream.streams(batch, target)
    assert stream.intervals == [(0, 2), (2, 4)]
    for (start, _), states in zip(stream.intervals, streams.accelerated, strict=True):
        for place, state in enumerate(states):
            torch.testing.assert_close(state, streams.slow[start + place])


def test_the_slow_stream_is_the_targets_own():
    target = deep_target()
    drafter, batch = drafter_for(target, 0.3), tiny_batch(target)
    names = (*range(1, LAYERS), "pre_norm")
    slow, own = drafter.stream.streams(batch, target).slow, target.features(batch, names)
    assert all(torch.equal(slow[name], own[name]) for name in names)


def slow_interval(drafter: M2R2, target: Any, batch: Any, start: int, stop: int) -> Tensor:
    """a [B,T,H] at a gate, from the formula: keys and values are recomputed from the slow inputs
    of each layer."""
    stream, rows = drafter.stream, batch.rows()
    slow: dict = target.features(batch, tuple(range(LAYERS)))
    a = slow[start]
    for index in range(start, stop):
        layer, adapter = target.architecture.layers[index], stream.adapters[index]
        thin = index in stream.cheap_layers
        attention, total = layer.self_attn, a
        if not (thin and stream.cheap in ("attention", "layer")):
            # Queries of a, everything else of h.
            rotary = target.architecture.decoder.rotary_emb(a, rows.position_ids_BN)
            heads = (*a.shape[:2], -1, attention.head_dim)
            normed, keyed = layer.input_layernorm(a), layer.input_layernorm(slow[index])
            low = adapter.query
            asked = attention.q_proj(normed) + normed @ low.down.T @ low.up.T
            queries, keys = (x.view(heads) for x in (asked, attention.k_proj(keyed)))
            values = attention.v_proj(keyed).view(heads)
            cosine, sine = (part[:, :, None] for part in rotary)
            queries, keys = (x * cosine + half_turned(x) * sine for x in (queries, keys))
            groups = queries.shape[2] // keys.shape[2]
            keys, values = (x.repeat_interleave(groups, 2) for x in (keys, values))
            scores = torch.einsum("btqd,bsqd->bqts", queries, keys) * attention.scaling
            scores = scores.masked_fill(~rows.visible_BNJ[:, None], -torch.inf).softmax(-1)
            mixed = torch.einsum("bqts,bsqd->btqd", scores, values).flatten(2)
            total = total + attention.o_proj(mixed)
        if not (thin and stream.cheap in ("feed_forward", "layer")):
            total = total + layer.mlp(layer.post_attention_layernorm(total))
        unit = a / (a.pow(2).mean(-1, keepdim=True) + torch.finfo(a.dtype).eps).sqrt()
        low = adapter.residual
        a = total + F.silu(unit @ low.down.T) @ low.up.T
    return a


def half_turned(x: Tensor) -> Tensor:
    one, other = x.chunk(2, dim=-1)
    return torch.cat([-other, one], dim=-1)


@pytest.mark.parametrize("cheap", CHEAP)
def test_the_stream_is_the_formula(cheap):
    target = deep_target()
    thin = {} if cheap is None else {"cheap_layers": [1, 2], "cheap": cheap}
    drafter, batch = drafter_for(target, 0.3, **thin), tiny_batch(target)
    streams = drafter.stream.streams(batch, target)
    for (start, stop), states in zip(drafter.stream.intervals, streams.accelerated, strict=True):
        torch.testing.assert_close(states[-1], slow_interval(drafter, target, batch, start, stop))
    layer = target.architecture.layers[1]
    assert not layer._forward_hooks and not layer.self_attn.q_proj._forward_hooks
    assert type(layer.mlp).__name__ == "LlamaMLP"


@pytest.mark.parametrize("cheap", CHEAP)
def test_decoding_runs_the_streams_of_training(cheap):
    """Behind committed text, the newest rows of several."""
    target = deep_target()
    thin = {} if cheap is None else {"cheap_layers": [1, 2], "cheap": cheap}
    drafter, batch = drafter_for(target, 0.3, **thin), tiny_batch(target)
    batch.document_ids = torch.zeros_like(batch.document_ids)
    batch.position_ids = torch.arange(24).expand(2, -1)
    whole = drafter.stream.streams(batch, target)
    session = target.open(2, 40)
    session.prefill(batch.input_ids[:, :20], torch.tensor([20, 20]))
    rows = Rows(torch.arange(20, 24).expand(2, -1), torch.ones(2, 4, 4).tril().bool())
    for (start, stop), states in zip(drafter.stream.intervals, whole.accelerated, strict=True):
        hidden = whole.slow[start][:, 20:]
        reached, found = drafter.stream.decoded(session, rows, hidden, 2, start, stop)
        torch.testing.assert_close(reached, whole.slow[stop][:, 20:])
        for state, part in zip(states, found, strict=True):
            torch.testing.assert_close(part, state[:, 22:])


def test_routers_attend_from_the_gate_to_the_interval():
    torch.manual_seed(0)
    router, states = LatentRouter(16, 4).double(), torch.randn(5, 3, 16).double()
    c = router.compress(states / states.pow(2).mean(-1, keepdim=True).sqrt())
    expected = []
    for row in c:
        scores = (router.key(row) @ router.query(row[-1])) / 2
        expected.append(router.out(scores.softmax(0) @ router.value(row)))
    torch.testing.assert_close(router(states), torch.cat(expected))


# -- training --------------------------------------------------------------------------------------


@pytest.mark.parametrize("weights", ["depth", "equal"])
def test_the_streams_loss_is_the_sum_over_gates(weights):
    target = deep_target()
    arguments = {"kl": 0.7, "feature": 0.3, "weights": weights}
    drafter, batch = drafter_for(target, 0.2, **arguments), tiny_batch(target)
    flat_M, labels_M = next_token_rows(batch)
    last = target.features(batch, ("pre_norm",))["pre_norm"].flatten(0, 1)[flat_M]
    p = target.logits(target.final_norm(last)).log_softmax(-1)
    expected = torch.zeros(()).double()
    for gate, weight in enumerate([1 / 3, 2 / 3] if weights == "depth" else [0.5, 0.5]):
        a = slow_interval(drafter, target, batch, 2 * gate, 2 * gate + 2).flatten(0, 1)[flat_M]
        logits = target.logits(target.final_norm(a))
        loss = F.cross_entropy(logits, labels_M)
        loss = loss + 0.7 * (p.exp() * (p - logits.log_softmax(-1))).sum(-1).mean()
        expected = expected + weight * (loss + 0.3 * F.smooth_l1_loss(a, last))
    torch.testing.assert_close(drafter.stream.loss(batch, target, 1.0).total, expected)


@pytest.mark.parametrize("cheap", CHEAP)
def test_each_stage_learns_its_own_part(cheap):
    """The stream alone in its stage, the routers alone after it."""
    target = deep_target()
    thin = {} if cheap is None else {"cheap_layers": [1, 2], "cheap": cheap, "query_rank": 0}
    (stage,) = drafter_for(target, **thin).stages
    assert (stage.name, stage.epochs, stage.lr) == ("stream", 2, 2e-4)
    makers: list[Any] = [
        lambda: drafter_for(target, **thin),
        lambda: drafter_for(target, **thin).stream.requires_grad_(True),
    ]
    for make in makers:
        trainable: Trainable = make()
        check_loss(trainable, target)
        check_gradients(make(), target)
        check_no_labels(make(), target)
        check_target_unchanged(make(), deep_target())
    drafter = drafter_for(target)
    trained = sum(parameter.numel() for parameter in drafter.parameters())
    assert drafter.trained_size == trained > drafter.stream.trained_size


def test_the_routers_loss_is_that_of_agreement():
    target = deep_target()
    drafter, batch = drafter_for(target, 0.2), tiny_batch(target)
    losses = drafter.loss(batch, target, 1.0)
    streams = drafter.stream.streams(batch, target)
    flat_M, _ = next_token_rows(batch)
    best = target.logits(target.final_norm(streams.last_BTH)).argmax(-1).flatten()[flat_M]
    expected = torch.zeros(()).double()
    for gate, (router, states) in enumerate(zip(drafter.routers, streams.accelerated, strict=True)):
        chosen = torch.stack([state.flatten(0, 1)[flat_M] for state in states], 1)
        right = target.logits(target.final_norm(chosen[:, -1])).argmax(-1) == best
        expected = expected + F.binary_cross_entropy_with_logits(
            router(chosen), right.double()
        ) / len(drafter.routers)
        total, count = losses.metrics[f"agreement_{GATES[gate]}"]
        assert int(total) == int(right.sum()) and int(count) == len(right)
    torch.testing.assert_close(losses.total, expected)


def train(trainable: Any, target: Any, steps: int, lr: float) -> None:
    trainable.train()
    optimizer = torch.optim.AdamW(list(trainable.declared_parameters()), lr=lr, weight_decay=0.0)
    for step in range(steps):
        optimizer.zero_grad()
        trainable.loss(tiny_batch(target, rows=8, seed=step), target, 1.0).total.backward()
        optimizer.step()
    trainable.eval()


def test_training_brings_gates_nearer_and_calibrates_routers():
    """Agreement grows with the gate's depth and is above the logit lens at every gate; held-out
    calibration error below 0.05; no token leaves early at threshold 1."""
    target = deep_target().float()
    torch.manual_seed(0)
    drafter = M2R2(target.shape, GATES, rank=32, query_rank=8, latent=16, kl=20.0, feature=0.0)
    stream = drafter.stream.requires_grad_(True)
    train(stream, target, 150, 1e-2)
    stream.requires_grad_(False)
    train(drafter, target, 40, 5e-3)
    held_out = [tiny_batch(target, rows=32, seed=1000 + i) for i in range(8)]
    result = drafter.finish(held_out, target)
    figures = {name.removeprefix("held_out/"): value for name, value in result.figures.items()}
    for gate in GATES[:-1]:
        assert figures[f"agreement_{gate}"] > figures[f"lens_agreement_{gate}"] + 0.02
        assert figures[f"calibration_error_{gate}"] < 0.05
    assert figures["agreement_4"] > figures["agreement_2"]
    assert "| 2 (gate) |" in result.pages["gates.md"]
    prompt = many_prompts(1)
    exits = EarlyExitDecoder(target, drafter, threshold=1.0).decode(prompt, Sampling(), 12)
    assert [trace.ids for trace in exits] == plain(target, 1)


def test_calibration_error_is_the_bins_mean_gap():
    probability = torch.tensor([0.05, 0.05, 0.95, 0.95, 1.0])
    right = torch.tensor([False, True, True, True, False])
    # Bins [0, 0.1) and [0.9, 1]: |1 − 0.1| and |2 − 2.9|.
    assert calibration_error(probability, right) == pytest.approx((0.9 + 0.9) / 5, abs=1e-6)
    assert calibration_error(probability[:0], right[:0]) == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"gates": [2, 4]}, "ascend to 6"),
        ({"gates": [6]}, "at least two"),
        ({"gates": [4, 2, 6]}, "ascend to 6"),
        ({"rank": 0}, "rank must be at least 1"),
        ({"cheap_layers": [4]}, "cheap_layers has 4: name layers from 0 to 3"),
        ({"cheap": "norm"}, "cheap"),
        ({"weights": "some"}, "weights"),
        ({"latent": 0}, "latent"),
        ({"stream_lr": 0.0}, "stream_lr"),
    ],
)
def test_wrong_settings_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        M2R2(deep_target().shape, **{"gates": GATES, **arguments})


def test_a_target_without_query_projections_needs_no_query_adapter():
    target = tiny_target("gpt2", layers=LAYERS)
    with pytest.raises(ValueError, match="no self_attn.q_proj .* set query_rank to 0"):
        M2R2(target.shape, GATES).initialise(target)
    check_greedy(drafter_for(target, query_rank=0), target)


def test_a_saved_run_has_both_stages(tmp_path):
    target = deep_target()
    drafter, batch = drafter_for(target), tiny_batch(target)
    save_pretrained(drafter, tmp_path / "drafter", Provenance.of(target))
    loaded = load_pretrained(tmp_path / "drafter", target).double()
    assert isinstance(loaded, M2R2)
    assert torch.equal(
        loaded.loss(batch, target, 1.0).total, drafter.loss(batch, target, 1.0).total
    )
    assert not any(parameter.requires_grad for parameter in loaded.stream.parameters())


def test_labels_are_the_rows_that_predict_answers():
    target = deep_target()
    drafter, batch = drafter_for(target), tiny_batch(target)
    labels = GateLabels.of(batch, drafter.stream.streams(batch, target), target)
    flat_M, labels_M = next_token_rows(batch)
    assert torch.equal(labels.flat_M, flat_M) and torch.equal(labels.labels_M, labels_M)
