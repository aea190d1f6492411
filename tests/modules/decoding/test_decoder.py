"""Greedy speculation is token-identical to plain decoding, for any drafter; oracle and never-right
controls.
"""

from __future__ import annotations

import pytest
import torch

from eval.metrics.acceptance import conditional_acceptance_by_depth
from modules.contracts.sampling import Sampling
from modules.decoding.decoder import SpeculativeDecoder
from modules.decoding.loop import kept_calls
from modules.drafters.heads.medusa import Medusa
from modules.trees.sampled.chain import SampledChain
from modules.trees.static import StaticTree
from tests.fakes import ScriptedDrafter, tiny_target

PROMPTS = [[7, 9, 11, 30], [12, 8], [40, 41, 42, 43, 44, 45, 46], [99]]
GREEDY = Sampling()


def reference(target, prompt, limit):
    ids = list(prompt)
    while len(ids) < len(prompt) + limit:
        ids.append(int(target.model(input_ids=torch.tensor([ids])).logits[0, -1].argmax()))
        if ids[-1] in target.eos_ids:
            break
    return ids[len(prompt) :]


@pytest.mark.parametrize("arch", ["llama", "gemma2", "gpt2", "qwen3"])
@pytest.mark.parametrize("right,decoys", [(1.0, 0), (0.0, 0), (0.6, 2)])
def test_output_equals_plain_decoding(arch, right, decoys):
    target = tiny_target(arch)
    drafter = ScriptedDrafter(target.shape, right=right, decoys=decoys)
    expected = [reference(target, prompt, 20) for prompt in PROMPTS]
    alone = [
        SpeculativeDecoder(target, drafter).decode([prompt], GREEDY, 20)[0].ids
        for prompt in PROMPTS
    ]
    together = [
        trace.ids for trace in SpeculativeDecoder(target, drafter).decode(PROMPTS, GREEDY, 20)
    ]
    assert alone == expected and together == expected


def test_autoregressive_is_the_one_node_tree():
    target = tiny_target()
    traces = SpeculativeDecoder(target).decode(PROMPTS, GREEDY, 15)
    assert [trace.ids for trace in traces] == [reference(target, prompt, 15) for prompt in PROMPTS]
    assert all(call == 1 for trace in traces for call in trace.accepted)
    assert not any(any(trace.drafted) for trace in traces)


def test_a_perfect_drafter_emits_depth_plus_one_and_a_wrong_one_emits_one():
    target = tiny_target(seed=3)
    perfect = SpeculativeDecoder(target, ScriptedDrafter(target.shape, 1.0, depth=4)).decode(
        [[7, 9]], GREEDY, 21
    )[0]
    assert perfect.accepted[:4] == [5, 5, 5, 5] and perfect.offered == [4] * len(perfect.offered)
    wrong = SpeculativeDecoder(target, ScriptedDrafter(target.shape, 0.0)).decode(
        [[7, 9]], GREEDY, 9
    )[0]
    assert wrong.accepted == [1] * 8


def test_cuts_come_after_verification():
    target = tiny_target(seed=3)
    full = reference(target, [7, 9], 12)
    stop = full[5]
    cut = full[: full.index(stop) + 1]
    decoder = SpeculativeDecoder(
        target, ScriptedDrafter(target.shape, 1.0), stop_ids=frozenset({stop})
    )
    trace = decoder.decode([[7, 9]], GREEDY, 12)[0]
    assert trace.ids == cut and len(trace.drafted) == len(cut)
    assert (
        len(
            SpeculativeDecoder(target, ScriptedDrafter(target.shape))
            .decode([[7, 9]], GREEDY, 6)[0]
            .ids
        )
        == 6
    )


@pytest.mark.parametrize("limit", [12, 6, 5, 2, 1])
def test_calls_add_up_to_the_answer(limit):
    """What stands behind the end of an answer was neither accepted nor rejected."""
    target = tiny_target(seed=3)
    full = reference(target, [7, 9], 12)
    for stop in (full[2], full[5], -1):
        decoder = SpeculativeDecoder(
            target, ScriptedDrafter(target.shape, 1.0, depth=3), stop_ids=frozenset({stop})
        )
        trace = decoder.decode([[7, 9]], GREEDY, limit)[0]
        assert sum(trace.accepted) == len(trace.ids) - 1 and 0 not in trace.accepted
        assert set(trace.accepted[:-1]) <= {4} and set(trace.offered[:-1]) <= {3}
        calls = zip(trace.accepted, trace.offered, strict=True)
        assert all(tokens == depth + 1 for tokens, depth in calls), "no draft was wrong"
        shares = conditional_acceptance_by_depth(trace.accepted, trace.offered)
        assert shares == [1.0] * len(shares)


def test_calls_that_are_not_kept_are_left_out():
    assert kept_calls([1, 4, 4, 2], 11) == [1, 4, 4, 2] == kept_calls([1, 4, 4, 2], 20)
    assert kept_calls([1, 4, 4, 2], 7) == [1, 4, 2]
    assert kept_calls([3, 2], 2) == [2] and kept_calls([], 3) == []


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
    assert trace.decode_seconds == pytest.approx(
        sum(trace.seconds.values()) - trace.seconds["prefill"]
    )
    assert 0 < trace.time_to_first_token <= sum(trace.seconds.values())


def test_bad_input_is_refused_before_anything_runs():
    target = tiny_target()
    with pytest.raises(ValueError, match="shorten the prompt"):
        SpeculativeDecoder(target).decode([[5] * 510], GREEDY, 10)
    with pytest.raises(ValueError, match="no tokens"):
        SpeculativeDecoder(target).decode([[]], GREEDY, 10)
    with pytest.raises(
        ValueError, match="has token 128, beyond the vocabulary of 128 of 'tiny-llama'"
    ):
        SpeculativeDecoder(target).decode([[5, 127], [5, 128]], GREEDY, 10)
    for limit in (0, -1):
        with pytest.raises(ValueError, match=f"limit must be at least 1 new token, got {limit}"):
            SpeculativeDecoder(target).decode([[5, 6]], GREEDY, limit)
    with pytest.raises(ValueError, match="temperature"):
        Sampling(temperature=-1)


def test_no_token_ends_an_answer_where_none_is_named():
    target = tiny_target(seed=3)
    stop = reference(target, [7, 9], 12)[5]
    target.model.generation_config.eos_token_id = stop
    assert stop in target.eos_ids
    ended, endless = (SpeculativeDecoder(target, stop_ids=ids) for ids in (None, frozenset[int]()))
    assert ended.decode([[7, 9]], GREEDY, 12)[0].ids[-1] == stop
    assert len(endless.decode([[7, 9]], GREEDY, 12)[0].ids) == 12
    assert endless.fresh().stop_ids == frozenset() and ended.fresh().stop_ids == target.eos_ids


def test_a_builder_deeper_than_the_heads_is_refused():
    target = tiny_target()
    with pytest.raises(ValueError, match="has 3 heads"):
        SpeculativeDecoder(target, Medusa(target.shape, heads=3), builder=StaticTree.chain(4))


def test_two_answers_can_be_streamed_at_once():
    target = tiny_target()
    decoders = [
        SpeculativeDecoder(target),
        SpeculativeDecoder(target, ScriptedDrafter(target.shape, 0.7)),
    ]
    streams = [decoder.stream(PROMPTS[i], GREEDY, 12) for i, decoder in enumerate(decoders)]
    told: list[list[int]] = [[], []]
    for _ in range(12):
        for ids, stream in zip(told, streams, strict=True):
            ids += [token for token, _ in [next(stream, (None, None))] if token is not None]
    assert told == [reference(target, PROMPTS[i], 12) for i in range(2)]


@pytest.mark.parametrize("arch", ["gpt2", "llama"])
def test_an_answer_may_fill_the_context(arch):
    target = tiny_target(arch)
    prompt = [5 + i % 90 for i in range(500)]
    trace = SpeculativeDecoder(target, ScriptedDrafter(target.shape, 1.0, depth=5)).decode(
        [prompt], GREEDY, 12
    )[0]
    assert trace.ids == reference(target, prompt, 12)


def test_sampled_text_does_not_depend_on_the_batch():
    target = tiny_target(vocab=20, seed=2)
    drafter = Medusa(target.shape, heads=3).double().eval()
    decoder = SpeculativeDecoder(target, drafter, builder=SampledChain(3), stop_ids=frozenset({-1}))
    together = decoder.decode([[3, 1], [4, 2, 9], [7]], Sampling(temperature=1.0), 12)
    for i, prompt in enumerate([[3, 1], [4, 2, 9], [7]]):
        alone = decoder.decode([prompt], Sampling(temperature=1.0, seed=i), 12)[0]
        assert alone.ids == together[i].ids and alone.accepted == together[i].accepted
