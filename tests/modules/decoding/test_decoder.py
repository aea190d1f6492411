"""Greedy speculation is token-identical to plain decoding, for any drafter; oracle and never-right controls."""

from __future__ import annotations

import pytest
import torch

from modules.core.drafter import Sampling
from modules.decoding.decoder import SpeculativeDecoder
from tests.fakes import ScriptedDrafter, tiny_target

PROMPTS = [[7, 9, 11, 30], [12, 8], [40, 41, 42, 43, 44, 45, 46], [99]]
GREEDY = Sampling()


def reference(target, prompt, limit):
    ids = list(prompt)
    while len(ids) < len(prompt) + limit:
        ids.append(int(target.model(input_ids=torch.tensor([ids])).logits[0, -1].argmax()))
        if ids[-1] in target.eos_ids:
            break
    return ids[len(prompt):]


@pytest.mark.parametrize("arch", ["llama", "gemma2", "gpt2", "qwen3"])
@pytest.mark.parametrize("right,decoys", [(1.0, 0), (0.0, 0), (0.6, 2)])
def test_output_equals_plain_decoding(arch, right, decoys):
    target = tiny_target(arch)
    drafter = ScriptedDrafter(target.shape, right=right, decoys=decoys)
    expected = [reference(target, prompt, 20) for prompt in PROMPTS]
    alone = [SpeculativeDecoder(target, drafter).decode([prompt], GREEDY, 20)[0].ids for prompt in PROMPTS]
    together = [trace.ids for trace in SpeculativeDecoder(target, drafter).decode(PROMPTS, GREEDY, 20)]
    assert alone == expected and together == expected


def test_autoregressive_is_the_one_node_tree():
    target = tiny_target()
    traces = SpeculativeDecoder(target).decode(PROMPTS, GREEDY, 15)
    assert [trace.ids for trace in traces] == [reference(target, prompt, 15) for prompt in PROMPTS]
    assert all(call == 1 for trace in traces for call in trace.accepted)
    assert not any(any(trace.drafted) for trace in traces)


def test_a_perfect_drafter_emits_depth_plus_one_and_a_wrong_one_emits_one():
    target = tiny_target(seed=3)
    perfect = SpeculativeDecoder(target, ScriptedDrafter(target.shape, 1.0, depth=4)).decode([[7, 9]], GREEDY, 21)[0]
    assert perfect.accepted[:4] == [5, 5, 5, 5] and perfect.offered == [4] * len(perfect.offered)
    wrong = SpeculativeDecoder(target, ScriptedDrafter(target.shape, 0.0)).decode([[7, 9]], GREEDY, 9)[0]
    assert wrong.accepted == [1] * 8


def test_cuts_come_after_verification():
    target = tiny_target(seed=3)
    full = reference(target, [7, 9], 12)
    stop = full[5]
    cut = full[:full.index(stop) + 1]
    decoder = SpeculativeDecoder(target, ScriptedDrafter(target.shape, 1.0), stop_ids=frozenset({stop}))
    trace = decoder.decode([[7, 9]], GREEDY, 12)[0]
    assert trace.ids == cut and len(trace.drafted) == len(cut)
    assert len(SpeculativeDecoder(target, ScriptedDrafter(target.shape)).decode([[7, 9]], GREEDY, 6)[0].ids) == 6


def test_stream_yields_what_decode_returns():
    target = tiny_target()
    decoder = SpeculativeDecoder(target, ScriptedDrafter(target.shape, 0.7))
    streamed = list(decoder.stream(PROMPTS[0], GREEDY, 10))
    decoder = SpeculativeDecoder(target, ScriptedDrafter(target.shape, 0.7))
    trace = decoder.decode([PROMPTS[0]], GREEDY, 10)[0]
    assert streamed == list(zip(trace.ids, trace.drafted, strict=True))


def test_phases_add_up():
    trace = SpeculativeDecoder(tiny_target()).decode([[5, 6]], GREEDY, 5)[0]
    assert set(trace.seconds) == {"prefill", "draft", "verify", "accept", "commit", "other"}
    assert trace.decode_seconds == pytest.approx(sum(trace.seconds.values()) - trace.seconds["prefill"])
    assert 0 < trace.time_to_first_token <= sum(trace.seconds.values())


def test_bad_input_is_refused_before_anything_runs():
    target = tiny_target()
    with pytest.raises(ValueError, match="shorten the prompt"):
        SpeculativeDecoder(target).decode([[5] * 510], GREEDY, 10)
    with pytest.raises(ValueError, match="no tokens"):
        SpeculativeDecoder(target).decode([[]], GREEDY, 10)
    with pytest.raises(ValueError, match="temperature"):
        Sampling(temperature=-1)
