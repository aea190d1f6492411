"""Entropy adaptive decoding: who writes when, and that a change of model loses nothing of the
text.
"""

from __future__ import annotations

import itertools
import random

import pytest
import torch

from modules.constraints.predicate import Predicate
from modules.contracts.sampling import Sampling
from modules.decoding import entropy_adaptive
from modules.decoding.decoder import SpeculativeDecoder, Trace
from modules.decoding.entropy_adaptive import EntropyAdaptive, catch_up_tokens, entropy_bits
from modules.target.session import Session
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
    assert EntropyAdaptive(LARGE, SMALL, -1.0).decode([PROMPT], Sampling(), 30)[0].ids == plain(
        LARGE, PROMPT, 30
    )
    trace = EntropyAdaptive(LARGE, SMALL, float("inf"), shortest_run=4).decode(
        [PROMPT], Sampling(), 30
    )[0]
    begun = plain(LARGE, PROMPT, 4)
    assert trace.ids == begun + plain(SMALL, PROMPT + begun, 26) and sum(trace.drafted) == 26


@pytest.mark.parametrize("threshold", [0.5, 1.5, 2.5, 4.0])
def test_the_same_model_twice_is_plain_decoding_and_runs_are_long_enough(threshold: float) -> None:
    decoder = EntropyAdaptive(LARGE, tiny_target(), threshold, window=2, shortest_run=3)
    trace = decoder.decode([PROMPT], Sampling(), 40)[0]
    assert trace.ids == plain(LARGE, PROMPT, 40)
    runs = [len(list(group)) for _, group in itertools.groupby(trace.drafted)]
    assert min(runs[:-1], default=3) >= 3
    assert decoder.quality_of([trace])["large_share"] == pytest.approx(
        1 - sum(trace.drafted) / len(trace.ids)
    )
    assert decoder.quality_of([trace, plain_trace(10)])["large_share"] == pytest.approx(
        1 - sum(trace.drafted) / 50
    )
    assert decoder.quality_of([]) == {}


def test_temperature_does_not_change_the_entropy_that_decides(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """It is the raw distribution's: what is measured behind a text is the same at every
    temperature.
    """
    seen: dict[float, list[float]] = {}
    for temperature in (0.0, 0.3, 2.0):
        found = seen.setdefault(temperature, [])

        def noted(logits_V: torch.Tensor, found: list[float] = found) -> float:
            found.append(entropy_bits(logits_V))
            return found[-1]

        monkeypatch.setattr(entropy_adaptive, "entropy_bits", noted)
        EntropyAdaptive(LARGE, SMALL, -1.0).decode([PROMPT], Sampling(temperature), 1)
    with torch.no_grad():
        expected = entropy_bits(LARGE.model(torch.tensor([PROMPT])).logits[0, -1])
    assert all(found == [pytest.approx(expected, abs=1e-5)] for found in seen.values())


def test_a_model_that_came_in_has_read_the_whole_text(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every call's logits are those of a fresh reading of the text, whose length is then that of
    the cache.
    """
    decoder, models = EntropyAdaptive(LARGE, SMALL, 2.0, window=2, shortest_run=3), []
    stream = itertools.cycle([0.0] * 4 + [4.0] * 4)
    monkeypatch.setattr(entropy_adaptive, "entropy_bits", lambda logits_V: next(stream))
    original = EntropyAdaptive._read

    def read(self: EntropyAdaptive, session: Session, text: list[int]) -> torch.Tensor:
        logits_V, model = original(self, session, text), session.target
        assert session.cache.lengths == [len(text)]
        with torch.no_grad():
            torch.testing.assert_close(logits_V, model.model(torch.tensor([text])).logits[0, -1])
        models.append(model)
        return logits_V

    monkeypatch.setattr(EntropyAdaptive, "_read", read)
    trace = decoder.decode([PROMPT], Sampling(), 40)[0]
    assert [model is SMALL for model in models] == trace.drafted
    assert decoder.quality_of([trace])["switches"] >= 2


def test_the_large_model_writes_no_more_at_a_higher_threshold(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """On a fixed stream of entropies, whichever model they come from."""
    draw = random.Random(0)
    stream, shares = [draw.uniform(0, 4) for _ in range(60)], []
    for threshold in (-1.0, 0.5, 1.0, 1.5, 2.0, 2.5, 3.0, 5.0):
        waiting = iter(stream)
        monkeypatch.setattr(
            entropy_adaptive, "entropy_bits", lambda logits_V, waiting=waiting: next(waiting)
        )
        decoder = EntropyAdaptive(LARGE, SMALL, threshold, window=3, shortest_run=1)
        shares.append(decoder.quality_of(decoder.decode([PROMPT], Sampling(), 60))["large_share"])
    assert shares == sorted(shares, reverse=True) and shares[0] == 1.0 > shares[3] > shares[-1]


def test_what_is_told_of_switches_and_of_what_they_cost() -> None:
    trace = Trace(
        4,
        [9] * 6,
        [False, False, True, True, False, True],
        entropies=[1.0, 2.0, 3.0, 0.0, 0.0, 0.0],
    )
    assert catch_up_tokens(trace) == (4 + 2 - 1) + (4 + 4 - 5 - 1) + (4 + 5 - 7 - 1)
    told = EntropyAdaptive(LARGE, SMALL).quality_of([trace])
    sizes = [sum(p.numel() for p in model.parameters()) for model in (SMALL, LARGE)]
    assert told == {
        "large_share": 0.5,
        "small_share": 0.5,
        "switches": 3,
        "catch_up_tokens": 8,
        "relative_cost": pytest.approx(0.5 + 0.5 * sizes[0] / sizes[1]),
        "mean_entropy": 1.0,
    }


def test_the_entropy_that_each_token_was_chosen_at_is_told() -> None:
    """The raw distribution's of the model that wrote it, whatever the temperature."""
    decoder = EntropyAdaptive(LARGE, SMALL, 2.0, window=2, shortest_run=3)
    trace = decoder.decode([PROMPT], Sampling(temperature=0.5), 24)[0]
    assert len(trace.entropies) == len(trace.ids) and 0 < sum(trace.drafted) < len(trace.ids)
    for place, (small, bits) in enumerate(zip(trace.drafted, trace.entropies)):
        text = torch.tensor([PROMPT + trace.ids[:place]])
        with torch.no_grad():
            logits_V = (SMALL if small else LARGE).model(text).logits[0, -1]
        assert bits == pytest.approx(entropy_bits(logits_V), abs=1e-4)


def test_mistakes_are_refused() -> None:
    other = tiny_target(layers=1)
    other.tokenizer.add_tokens(["new piece"])
    with pytest.raises(ValueError, match="another tokenizer than the target tiny-llama"):
        EntropyAdaptive(LARGE, other)
    with pytest.raises(
        ValueError, match="5 tokens and 508 new ones exceed tiny-llama's context of 512"
    ):
        EntropyAdaptive(LARGE, SMALL).decode([PROMPT], Sampling(), 508)
    with pytest.raises(ValueError, match="one prompt at a time"):
        EntropyAdaptive(LARGE, SMALL).decode([PROMPT, PROMPT], Sampling(), 4)
    with pytest.raises(ValueError, match="a prompt has no tokens"):
        EntropyAdaptive(LARGE, SMALL).decode([[]], Sampling(), 4)
    for name, value in {
        "repetition_penalty": 1.2,
        "presence_penalty": 0.5,
        "frequency_penalty": 0.5,
        "logit_bias": {4: 1.0},
        "suppress_tokens": [4],
        "min_new_tokens": 2,
        "stop_strings": ["a"],
        "constraint": Predicate(lambda ids: True, 128),
    }.items():
        with pytest.raises(ValueError, match=f"does not apply {name}: leave it out"):
            EntropyAdaptive(LARGE, SMALL).decode([PROMPT], Sampling(**{name: value}), 4)
    with pytest.raises(ValueError, match="same tokenizer"):
        EntropyAdaptive(LARGE, tiny_target(vocab=96))
