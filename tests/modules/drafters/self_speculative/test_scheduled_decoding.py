"""Decoding with a schedule of layers: what runs, what is cached, what tuning is worth."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import yaml
from torch import Tensor

from checkpoints.pretrained import Provenance, save_pretrained
from configs.command_line.loading import CONFIGS
from eval.methods.rows import Method, build_rows
from modules.contracts.batches import TextBatch
from modules.contracts.rows import Rows
from modules.contracts.sampling import Sampling
from modules.decoding.decoder import SpeculativeDecoder
from modules.drafters.heads.medusa import Medusa
from modules.drafters.self_speculative.scheduled_decoding import ScheduledDecoder
from modules.drafters.self_speculative.skipdecode import SkipDecode
from tests.fakes import many_prompts, tiny_target
from tests.modules.drafters.self_speculative.test_skipdecode import (
    BUDGETS,
    LAYERS,
    deep_target,
    drafter_for,
)

PROMPTS = [[7, 8, 9, 10], [20, 21]]


def text_batch(ids: list[int], prompt: int) -> TextBatch:
    """One document whose tokens after the prompt are an answer."""
    positions = torch.arange(len(ids))[None]
    return TextBatch(
        torch.tensor([ids]), positions >= prompt, positions, torch.zeros_like(positions)
    )


@pytest.mark.parametrize("tuning", ["lora", "full", "none"])
@pytest.mark.parametrize("prompt", ["full", "scheduled"])
def test_the_whole_budget_decodes_as_the_whole_model(tuning, prompt):
    target = deep_target()
    drafter = drafter_for(target, 0.0, budgets=[LAYERS], tuning=tuning, prompt=prompt)
    for sampling in (Sampling(), Sampling(1.0)):
        plain = SpeculativeDecoder(target).decode(many_prompts(4), sampling, 12)
        traces = ScheduledDecoder(target, drafter).decode(many_prompts(4), sampling, 12)
        assert [trace.ids for trace in traces] == [trace.ids for trace in plain]


@pytest.mark.parametrize("prompt", ["full", "scheduled"])
@pytest.mark.parametrize("budgets", [BUDGETS, [4, 4, 3, 3, 3, 2]])
def test_every_step_is_what_training_computes(monkeypatch, prompt, budgets):
    """Decoding with caches gives the logits of the sliced pass over the same text, in a batch too:
    its columns are those of the longest prompt."""
    target = deep_target()
    drafter, seen = drafter_for(target, 0.1, budgets=budgets, prompt=prompt), []
    decoder = ScheduledDecoder(target, drafter)
    opened = decoder.opened

    def watched(batch_size: int, capacity: int) -> Any:
        session = opened(batch_size, capacity)
        verify = session.verify

        def record(*arguments: Any) -> Any:
            verified = verify(*arguments)
            seen.append(verified.logits_BNV[:, 0])
            return verified

        monkeypatch.setattr(session, "verify", record)
        return session

    monkeypatch.setattr(decoder, "opened", watched)
    traces = decoder.decode(PROMPTS, Sampling(), 7)
    for row, (ids, trace) in enumerate(zip(PROMPTS, traces, strict=True)):
        text = [*ids, *trace.ids[:-1]]
        if prompt == "scheduled":
            states = left_padded_states(drafter, text, len(PROMPTS[0]) - len(ids), target)
        else:
            states = drafter.sliced_states(text_batch(text, len(ids)), drafter.model(target))[0]
        logits = target.logits(states[len(ids) :])
        torch.testing.assert_close(torch.stack([step[row] for step in seen]), logits)
        assert trace.ids[1:] == logits.argmax(-1).tolist()


def left_padded_states(drafter: Any, text: list[int], pad: int, target: Any) -> Tensor:
    """States [T,H] of a text that starts so many columns later than the schedule does."""
    model, columns = drafter.model(target), torch.arange(pad + len(text))
    visible = (columns[:, None] >= columns) & (columns >= pad) | torch.eye(len(columns)).bool()
    rows = Rows((columns - pad).clamp(min=0)[None], visible[None])
    hidden = model.embed(torch.tensor([[5] * pad + text]))
    for layer in range(LAYERS):
        active = drafter.schedule.first_uppers(columns) <= layer
        active |= torch.tensor(layer < drafter.schedule.warm_up)
        out = model.forward_rows(hidden, rows, ("pre_norm",), layers=(layer, layer + 1))
        hidden = torch.where(active[None, :, None], out["pre_norm"], hidden)
    return model.final_norm(hidden)[0, pad:]


def test_layers_that_run_are_counted():
    """Σ k_t of a hook counter; L / mean k is the nominal speed-up."""
    target, runs = deep_target(), []
    drafter = drafter_for(target, budgets=BUDGETS)
    decoder = ScheduledDecoder(target, drafter)
    for layer in drafter.model(target).architecture.layers:
        layer.register_forward_hook(lambda *_: runs.append(1))
    trace = decoder.decode([PROMPTS[0]], Sampling(), 9)[0]
    assert trace.layers == [6, *BUDGETS, 2, 2] and len(runs) == sum(trace.layers)
    figures = decoder.quality_of([trace])
    mean = sum(trace.layers[1:]) / 8
    assert figures == {"layers_per_token": mean, "nominal_speedup": LAYERS / mean}
    assert decoder.quality_of([]) == {} and not decoder.claims_lossless


@pytest.mark.parametrize("prompt", ["full", "scheduled"])
def test_each_layer_caches_the_positions_that_it_ran(monkeypatch, prompt):
    target, sessions = deep_target(), []
    drafter = drafter_for(target, budgets=BUDGETS, prompt=prompt)
    decoder = ScheduledDecoder(target, drafter)
    opened = decoder.opened

    def watched(*arguments: int) -> Any:
        sessions.append(opened(*arguments))
        return sessions[-1]

    monkeypatch.setattr(decoder, "opened", watched)
    ids = PROMPTS[0]
    decoder.decode([ids], Sampling(), 9)
    start = -len(ids) if prompt == "full" else 0
    firsts = [drafter.schedule.first_upper(start + i) for i in range(len(ids) + 8)]
    expected = [sum(layer < 1 or layer >= first for first in firsts) for layer in range(LAYERS)]
    cache = sessions[0].cache
    assert cache.lengths_by_layer == expected
    assert all(cache._stores[k].shape[-2] < 2 * expected[k] for k in range(LAYERS) if expected[k])


def test_an_evaluation_decodes_with_a_trained_run(tmp_path):
    target = deep_target()
    drafter = drafter_for(target, budgets=BUDGETS)
    save_pretrained(drafter, tmp_path / "drafter", Provenance.of(target))
    spec = {
        "class_path": "modules.drafters.self_speculative.scheduled_decoding.ScheduledDecoder",
        "init_args": {"drafter": str(tmp_path)},
    }
    method = Method(decoder=spec)
    method.check()
    row = build_rows([method], target, Sampling())[-1]
    assert not row.claims_lossless and row.drafter_parameters == drafter.trained_size > 0
    wrong = {**spec, "init_args": {"drafter": {"class_path": "os.path.Join"}}}
    with pytest.raises(ValueError, match="drafter: class_path 'os.path.Join'"):
        Method(decoder=wrong).check()
    traces = row.decoder.decode(PROMPTS, Sampling(), 8)
    expected = ScheduledDecoder(target, drafter).decode(PROMPTS, Sampling(), 8)
    assert [trace.ids for trace in traces] == [trace.ids for trace in expected]


@pytest.mark.parametrize("name", ["scheduled", "early_exit"])
def test_shipped_evaluations_name_what_exists(name):
    """Their decoders, and drafters without training; runs are made first."""
    entries = yaml.safe_load((CONFIGS / "eval" / f"{name}.yaml").read_text())["methods"]
    for entry in entries:
        if not isinstance(entry.get("drafter"), str):
            Method(**entry).check()
    assert len({Method(**entry).label for entry in entries}) == len(entries)


def test_another_drafter_is_refused():
    target = tiny_target()
    with pytest.raises(ValueError, match="Medusa, which has no schedule"):
        ScheduledDecoder(target, Medusa(target.shape))


# -- what tuning is worth --------------------------------------------------------------------------


def symbol_chains(seed: int, rows: int = 16, length: int = 12) -> TextBatch:
    """Every symbol of 192 is followed by the one 37 further on."""
    generator = torch.Generator().manual_seed(seed)
    first = torch.randint(8, 200, (rows, 1), generator=generator)
    ids = 8 + (first - 8 + 37 * torch.arange(length)) % 192
    positions = torch.arange(length).expand(rows, -1)
    return TextBatch(ids, positions > 1, positions, torch.zeros_like(ids))


def tune(drafter: SkipDecode, target: Any, steps: int) -> None:
    optimizer = torch.optim.AdamW(list(drafter.declared_parameters()), lr=5e-3)
    for step in range(steps):
        optimizer.zero_grad()
        drafter.loss(symbol_chains(step), target, 1.0).total.backward()
        torch.nn.utils.clip_grad_norm_(list(drafter.declared_parameters()), 1.0)
        for group in optimizer.param_groups:
            group["lr"] = 5e-3 * min(1.0, (step + 1) / 20) * (1 - 0.9 * step / steps)
        optimizer.step()


@torch.no_grad()
def right(drafter: SkipDecode, target: Any) -> float:
    """Share of the next symbols that are right under the schedule."""
    batch, model = symbol_chains(999, rows=64), drafter.model(target)
    best = model.logits(drafter.sliced_states(batch, model)).argmax(-1)
    return float((best[:, 1:-1] == batch.input_ids[:, 2:]).float().mean())


def test_a_tuned_schedule_of_half_the_layers_is_as_good_as_all_of_them():
    """Twelve layers; without tuning for the schedule the same weights are much worse."""
    torch.manual_seed(0)
    target = tiny_target(layers=12, vocab=200, dtype=torch.float32)
    with torch.no_grad():
        for parameter in target.parameters():
            parameter.normal_(0, 0.08) if parameter.dim() > 1 else parameter.fill_(1)
    whole = SkipDecode(target.shape, budgets=[12], tuning="full")
    whole.initialise(target)
    tune(whole, target, 150)
    target.model.load_state_dict(whole.tuned.weights.state_dict())  # type: ignore[union-attr]
    half = SkipDecode(target.shape, budgets=[6], tuning="full")
    half.initialise(target)
    untuned = right(half, target)
    tune(half, target, 60)
    assert right(whole, target) > 0.99 and right(half, target) > right(whole, target) - 0.01
    assert untuned < 0.9
