"""Momentum decoding: resistances of n-grams, and the same choices with and without drafts."""

from __future__ import annotations

import random

import pytest
import torch

from modules.contracts.sampling import Sampling
from modules.contracts.token_tree import TokenTree, Topology
from modules.contracts.verification import Verified
from modules.decoding.decoder import SpeculativeDecoder
from modules.decoding.lossy.momentum import MomentumDecoder, MomentumDraws, MomentumRule, NGrams
from tests.fakes import ScriptedDrafter, many_prompts, tiny_target

TARGET = tiny_target(vocab=24)


def repeated_by_search(text: list[int], token: int, longest: int) -> int:
    ending = [*text, token]
    lengths = [
        n
        for n in range(1, longest + 1)
        if any(text[i : i + n] == ending[-n:] for i in range(len(text) - n + 1))
    ]
    return max(lengths, default=0) if len(ending) > 1 else 0


def chosen_by_search(prompt: list[int], limit: int, alpha: float, table: list[float]) -> list[int]:
    text = list(prompt)
    while len(text) < len(prompt) + limit and (len(text) == len(prompt) or text[-1] != 0):
        probs_V = TARGET.model(torch.tensor([text])).logits[0, -1].softmax(-1)
        scores = {
            v: float(probs_V[v]) - alpha * [0, *table][repeated_by_search(text, v, len(table))]
            for v in probs_V.topk(5).indices.tolist()
        }
        text.append(max(scores, key=lambda v: scores[v]))
    return text[len(prompt) :]


def test_the_length_of_a_repeated_n_gram() -> None:
    a, b, c = 1, 2, 3
    text = NGrams(5, [a, b, c, a, b])
    assert [text.repeated(token) for token in (a, b, c, 9)] == [1, 1, 3, 0]
    draw = random.Random(0)
    tokens = [draw.randrange(3) for _ in range(60)]
    text = NGrams(5)
    for place, token in enumerate(tokens):
        for other in range(4):
            assert text.repeated(other) == repeated_by_search(tokens[:place], other, 5)
        text.append(token)


@pytest.mark.parametrize("alpha", [0.05, 0.2])
def test_every_token_is_the_best_of_a_search_through_the_text(alpha: float) -> None:
    table = [1.0, 1.0, 2.0, 3.0, 4.0]
    decoder = MomentumDecoder(TARGET, alpha=alpha, resistances=table)
    prompts = many_prompts(2)
    prompts = [[token % 24 for token in prompt] for prompt in prompts]
    answers = [trace.ids for trace in decoder.decode(prompts, Sampling(), 24)]
    assert answers == [chosen_by_search(prompt, 24, alpha, table) for prompt in prompts]
    assert answers != [
        trace.ids for trace in SpeculativeDecoder(TARGET).decode(prompts, Sampling(), 24)
    ]


@pytest.mark.parametrize("decoys", [0, 2])
def test_drafts_change_no_token(decoys: int) -> None:
    prompts = [[token % 24 for token in prompt] for prompt in many_prompts(3)]
    drafter = ScriptedDrafter(TARGET.shape, right=0.9, decoys=decoys)
    for alpha in (0.03, 0.2):
        alone = MomentumDecoder(TARGET, alpha=alpha).decode(prompts, Sampling(), 24)
        drafted = MomentumDecoder(TARGET, drafter, budget=9, alpha=alpha)
        traces = drafted.decode(prompts, Sampling(), 24)
        assert [trace.ids for trace in traces] == [trace.ids for trace in alone]
        assert sum(map(sum, (trace.drafted for trace in traces))) > 0


def test_without_resistance_it_is_greedy() -> None:
    prompts = [[token % 24 for token in prompt] for prompt in many_prompts(3)]
    greedy = SpeculativeDecoder(TARGET).decode(prompts, Sampling(), 30)
    for decoder in (
        MomentumDecoder(TARGET, alpha=0.0),
        MomentumDecoder(TARGET, candidates=1),
        MomentumDecoder(TARGET, resistances=[0.0]),
    ):
        traces = decoder.decode(prompts, Sampling(), 30)
        assert [trace.ids for trace in traces] == [trace.ids for trace in greedy]


def test_a_token_outside_of_the_text_wins_from_the_top() -> None:
    draws = MomentumDraws(Sampling(), [NGrams(5, [1, 2])], 0.2, 3, [1.0] * 5)
    assert draws.next_token(0, [0.5, 0.3, 0.2], [7, 8, 9]) == 7
    assert draws.next_token(0, [0.35, 0.3, 0.2], [7, 1, 9]) == 9
    assert draws.next_token(0, [0.4, 0.4], [9, 8]) == 8
    both = MomentumDraws(Sampling(), [NGrams(5, [1]), NGrams(5, [2])], 0.2, 3, [1.0] * 5)
    assert both.select([1]).next_token(0, [0.5, 0.4], [1, 2]) == 1


def test_paths_through_equal_siblings_go_on_together() -> None:
    """The child of the second twin is accepted too."""
    tree = TokenTree(torch.tensor([[3, 5, 5, 6]]), Topology(torch.tensor([[-1, 0, 0, 2]])))
    logits_BNV = torch.zeros(1, 4, 10)
    logits_BNV[0, 0, 5], logits_BNV[0, 1:3, 6], logits_BNV[0, 3, 7] = 9.0, 9.0, 9.0
    draws = MomentumDraws(Sampling(), [NGrams(5, [3])], 0.2, 5, [1.0] * 5)
    accepted = MomentumRule()(tree, Verified(tree, logits_BNV), draws)
    assert accepted.paths == [[0, 2, 3]] and accepted.next_B.tolist() == [7]


def test_mistakes_are_refused() -> None:
    with pytest.raises(ValueError, match="draws nothing: give the row temperature 0"):
        MomentumDecoder(TARGET).decode([[1]], Sampling(1.0), 4)
    with pytest.raises(ValueError, match="a rule of its own"):
        MomentumDecoder(TARGET, rule=MomentumRule())
    with pytest.raises(ValueError, match="got 0, 0.2 and"):
        MomentumDecoder(TARGET, candidates=0)
    for wrong in ({"alpha": float("nan")}, {"resistances": []}, {"resistances": [1.0, -1.0]}):
        with pytest.raises(ValueError, match="needs candidates of at least 1"):
            MomentumDecoder(TARGET, **wrong)
