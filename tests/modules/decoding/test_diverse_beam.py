"""Diverse beam search: its limits are beam search, and its groups a search written plainly."""

from __future__ import annotations

import math

import pytest
import torch

from modules.contracts.sampling import Sampling
from modules.decoding.loop import Trace
from modules.decoding.lossy.diverse_beam import Beam, DiverseBeamSearch, Group
from modules.decoding.lossy.several_answers import distinct_share
from tests.fakes import tiny_target

TARGET = tiny_target(vocab=24)
with torch.no_grad():
    # Flat distributions, so that beams compete.
    TARGET.architecture.head.weight.mul_(0.3)
PROMPT = [7, 8, 9, 7, 8]


def answers(limit: int = 10, **settings) -> list[list[int]]:
    decoder = DiverseBeamSearch(TARGET, **settings)
    return decoder.decode([PROMPT], Sampling(), limit)[0].answers


def log_probs(ids: list[int]) -> torch.Tensor:
    return TARGET.model(torch.tensor([PROMPT + ids])).logits[0, -1].log_softmax(-1)


def log_prob(ids: list[int]) -> float:
    logits_TV = TARGET.model(torch.tensor([PROMPT + ids])).logits[0, len(PROMPT) - 1 : -1]
    return float(logits_TV.log_softmax(-1).gather(1, torch.tensor(ids)[:, None]).sum())


@pytest.mark.parametrize("beams", [1, 3, 5])
def test_one_group_is_beam_search_of_the_library(
    beams: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where beams end early: any token of the best answers may be the end token."""
    best = answers(beams=beams, groups=1)[0]
    for end in dict.fromkeys((0, *best[1:6])):
        monkeypatch.setattr(type(TARGET), "eos_ids", frozenset([end]))
        rows = TARGET.stock.generate(
            torch.tensor([PROMPT]),
            max_new_tokens=10,
            num_beams=beams,
            num_return_sequences=beams,
            do_sample=False,
            length_penalty=0.0,
            pad_token_id=23,
            eos_token_id=end,
        )
        # Padding only stands behind the end token.
        wanted = [row[len(PROMPT) :].tolist() for row in rows]
        wanted = [ids[: ids.index(end) + 1] if end in ids else ids for ids in wanted]
        assert answers(beams=beams, groups=1) == wanted


def test_without_diversity_groups_are_copies_of_a_narrower_search() -> None:
    narrow = answers(beams=2, groups=1)
    for dissimilarity in ("hamming", "cumulative"):
        wide = answers(beams=6, groups=3, diversity=0.0, dissimilarity=dissimilarity)
        assert sorted(wide) == sorted(narrow * 3)


def test_with_much_diversity_groups_begin_differently() -> None:
    found = answers(beams=5, groups=5, diversity=1e6)
    assert len({ids[0] for ids in found}) == 5


def test_a_group_does_not_depend_on_later_ones() -> None:
    fewer, more = answers(beams=4, groups=2), answers(beams=6, groups=3)
    assert all(ids in more for ids in fewer)


def groups_of_one(count: int, limit: int, diversity: float, cumulative: bool) -> list[list[int]]:
    """Width 1: every group takes its best token after the penalty; no token ends an answer."""
    texts: list[list[int]] = [[] for _ in range(count)]
    for _ in range(limit):
        for g, text in enumerate(texts):
            scores_V = log_probs(text)
            for v in range(24):
                for other in texts[:g]:
                    gap = sum(a != b for a, b in zip([*text, v], other, strict=True))
                    same = float(v == other[-1])
                    scores_V[v] -= diversity * (math.exp(-gap / 1.5) if cumulative else same)
            text.append(int(scores_V.argmax()))
    return texts


@pytest.mark.parametrize("dissimilarity", ["hamming", "cumulative"])
def test_every_token_is_the_best_of_its_group_after_the_penalty(
    dissimilarity: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(type(TARGET), "eos_ids", frozenset())
    settings = {"diversity": 3.0, "dissimilarity": dissimilarity, "forgetting": 1.5}
    found = answers(8, beams=3, groups=3, **settings)
    wanted = groups_of_one(3, 8, 3.0, dissimilarity == "cumulative")
    assert sorted(found) == sorted(wanted) and len({tuple(ids) for ids in found}) == 3


def test_answers_are_ranked_by_plain_log_probability() -> None:
    decoder = DiverseBeamSearch(TARGET, beams=4, groups=4, diversity=3.0)
    trace = decoder.decode([PROMPT], Sampling(), 8)[0]
    values = [log_prob(ids) for ids in trace.answers]
    assert values == sorted(values, reverse=True) and trace.ids == trace.answers[0]
    figures = decoder.quality_of([trace])
    assert figures["log_prob_of_the_best"] == pytest.approx(values[0])
    assert figures["log_prob_of_all"] == pytest.approx(sum(values) / 4)
    assert figures["distinct_2"] == distinct_share(trace.answers, 2)
    assert len(trace.drafted) == len(trace.ids) and trace.time_to_first_token > 0
    assert decoder.quality_of([Trace(1)]) == {}


def test_a_group_is_done_when_nothing_can_enter_its_answers() -> None:
    group = Group([Beam((1,), -3.0)])
    group.finish(Beam((2, 0), -1.0), 2)
    assert not group.done(2) and group.done(1)
    group.finish(Beam((3, 0), -4.0), 2)
    assert not group.done(2)
    group.finish(Beam((4, 0), -2.0), 2)
    assert group.done(2) and [beam.ids for beam in group.finished] == [(2, 0), (4, 0)]


def test_different_n_grams_are_counted_over_all_answers() -> None:
    assert distinct_share([[1, 2, 3], [1, 2, 4]], 2) == 3 / 4
    assert distinct_share([[1]], 2) == 0.0


def test_mistakes_are_refused() -> None:
    for settings, message in (
        ({"beams": 4, "groups": 3}, "multiple of groups, got 4 and 3"),
        ({"dissimilarity": "embedding"}, "use 'hamming' or 'cumulative'"),
        ({"diversity": -1.0}, "got -1.0 and 4.0"),
    ):
        with pytest.raises(ValueError, match=message):
            DiverseBeamSearch(TARGET, **settings)
    decoder = DiverseBeamSearch(TARGET)
    with pytest.raises(ValueError, match="does not follow repetition_penalty: leave it out"):
        decoder.decode([PROMPT], Sampling(repetition_penalty=1.2), 4)
    with pytest.raises(ValueError, match="one prompt at a time"):
        decoder.decode([PROMPT, PROMPT], Sampling(), 4)
    with pytest.raises(ValueError, match="give the row temperature 0"):
        decoder.decode([PROMPT], Sampling(1.0), 4)
    with pytest.raises(ValueError, match="5 tokens and 508 new ones exceed"):
        decoder.decode([PROMPT], Sampling(), 508)
