"""Entropy adaptive decoding: who writes when, and that a change of model loses nothing of the text."""

from __future__ import annotations

import itertools

import pytest
import torch

from modules.core.drafter import Sampling
from modules.decoding.decoder import SpeculativeDecoder, Trace
from modules.decoding.entropy_adaptive import EntropyAdaptive, entropy_bits
from tests.fakes import tiny_target

LARGE, SMALL = tiny_target(), tiny_target(layers=1, seed=3)
PROMPT = [7, 8, 9, 7, 8]


def plain(target, prompt: list[int], limit: int) -> list[int]:
    return SpeculativeDecoder(target).decode([prompt], Sampling(), limit)[0].ids


def plain_trace(tokens: int) -> Trace:
    return Trace(1, [9] * tokens, [False] * tokens)


def test_entropy_is_in_bits() -> None:
    assert entropy_bits(torch.zeros(8)) == pytest.approx(3.0)
    assert entropy_bits(torch.tensor([1e4, 0.0, 0.0])) == pytest.approx(0.0)


def test_the_extremes_are_one_model() -> None:
    assert EntropyAdaptive(LARGE, SMALL, -1.0).decode([PROMPT], Sampling(), 30)[0].ids == plain(LARGE, PROMPT, 30)
    trace = EntropyAdaptive(LARGE, SMALL, float("inf"), shortest_run=4).decode([PROMPT], Sampling(), 30)[0]
    begun = plain(LARGE, PROMPT, 4)
    assert trace.ids == begun + plain(SMALL, PROMPT + begun, 26) and sum(trace.drafted) == 26


@pytest.mark.parametrize("threshold", [0.5, 1.5, 2.5, 4.0])
def test_the_same_model_twice_is_plain_decoding_and_runs_are_long_enough(threshold: float) -> None:
    decoder = EntropyAdaptive(LARGE, tiny_target(), threshold, window=2, shortest_run=3)
    trace = decoder.decode([PROMPT], Sampling(), 40)[0]
    assert trace.ids == plain(LARGE, PROMPT, 40)
    runs = [len(list(group)) for _, group in itertools.groupby(trace.drafted)]
    assert min(runs[:-1], default=3) >= 3
    assert decoder.quality_of([trace])["large_share"] == pytest.approx(1 - sum(trace.drafted) / len(trace.ids))
    assert decoder.quality_of([trace, plain_trace(10)])["large_share"] == pytest.approx(1 - sum(trace.drafted) / 50)
    assert decoder.quality_of([]) == {}


def test_mistakes_are_refused() -> None:
    with pytest.raises(ValueError, match="one prompt at a time"):
        EntropyAdaptive(LARGE, SMALL).decode([PROMPT, PROMPT], Sampling(), 4)
    with pytest.raises(ValueError, match="same tokenizer"):
        EntropyAdaptive(LARGE, tiny_target(vocab=96))
