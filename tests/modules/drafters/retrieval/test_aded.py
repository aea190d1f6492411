"""ADED: its table, its updates, its search, and that it changes no token."""

from __future__ import annotations

import math
import random
from pathlib import Path

import numpy as np
import pytest
import torch

from modules.contracts.drafter import Context
from modules.contracts.sampling import Sampling
from modules.decoding.decoder import SpeculativeDecoder
from modules.drafters.retrieval.aded import (
    Adaptive,
    Aded,
    Search,
    Trigrams,
    _best_child,
    _Node,
    best_first,
)
from modules.drafters.retrieval.suffix_array import Datastore
from tests.fakes import tiny_target

TARGET = tiny_target()
PROMPTS = [[7, 8, 9, 7, 8], [20, 30], [40, 41, 42, 40, 41, 42, 40]]


def adaptive(*tokens: int) -> Adaptive:
    return Adaptive(Trigrams(np.array(tokens, dtype=np.int32)))


def test_the_table_holds_conditional_distributions_and_twelve_successors() -> None:
    table = Trigrams(np.array([1, 2, 3, -1, 1, 2, 3, -1, 1, 2, 4, -1, 2, 3, 5], dtype=np.int32))
    assert table.successors((1, 2)) == pytest.approx({3: 2 / 3, 4: 1 / 3}) and table.successors(
        (2, 3)
    ) == {5: 1}
    assert table.successors((3, 1)) == {} and Trigrams().successors((1, 2)) == {}
    wide = Trigrams(
        np.array([t for third in range(20) for t in (1, 2, 10 + third, -1)], dtype=np.int32)
    )
    assert len(wide.successors((1, 2))) == 12


def test_rewards_saturate_at_three_and_end_with_the_window() -> None:
    table = adaptive()
    for _ in range(200):
        table.reward([5, 5, 5])
    assert table.successors((5, 5)) == {5: 3.0}
    table = adaptive()
    for last in range(30):
        table.reward([1, 2, 3, *range(50, 50 + last)])
    assert table.successors((1, 2))[3] == pytest.approx(14 * 0.04)


def test_puct() -> None:
    """Mean score and a bonus for what is likely and seldom tried; a child without visits first."""
    parent = _Node(1, 1.0, None)
    parent.visits, parent.children = 100, []
    for visits, total, prior in ((10, 15.0, 0.2), (50, 300.0, 0.7), (20, 100.0, 0.1)):
        child = _Node(2, prior, parent)
        child.visits, child.total = visits, total
        parent.children.append(child)
    scores = [
        child.total / child.visits
        + (32 + math.log(109 / 8)) * child.prior * 10 / (1 + child.visits)
        for child in parent.children
    ]
    assert scores[0] == pytest.approx(7.793, abs=1e-3) and scores[1] > scores[0] > scores[2]
    assert _best_child(parent) is parent.children[1]
    parent.children.append(_Node(3, 0.01, parent))
    assert _best_child(parent) is parent.children[3]


def test_visits_are_conserved_and_follow_the_prior() -> None:
    table = adaptive()
    table.successors((1, 2)).update({10: 0.6, 11: 0.3, 12: 0.1})
    search = Search(table, 1, 2, random.Random(0))
    search.run(150)
    children = search.root.children
    assert children is not None and search.root.visits == 150 == sum(
        child.visits for child in children
    )
    assert [child.visits / 150 for child in children] == pytest.approx([0.6, 0.3, 0.1], abs=0.05)


def test_a_chain_comes_back_with_four_tokens() -> None:
    table = adaptive(1, 2, 3, 4, 5, 6, 7, 8)
    search = Search(table, 1, 2, random.Random(0))
    search.run(150)
    assert max(search.paths(), key=len) == [3, 4, 5, 6]
    assert best_first(table, 1, 2, 9)[-1] == [3, 4, 5, 6]


def test_the_seed_decides_the_tree_and_never_the_answer() -> None:
    drafter = Aded(TARGET.shape, tokens=12)
    state = drafter.start(
        Context(TARGET, torch.tensor([[7, 8, 9, 7, 8]]), torch.tensor([5]), torch.tensor([9]))
    )
    again = drafter.start(state.context)
    assert (
        drafter.propose(state, 12).tokens_BN.tolist()
        == drafter.propose(again, 12).tokens_BN.tolist()
    )
    answers = [
        SpeculativeDecoder(TARGET, drafter).decode(PROMPTS[:1], Sampling(seed=seed), 20)[0].ids
        for seed in (0, 1)
    ]
    assert answers[0] == answers[1]


@pytest.mark.parametrize("simulations", [0, 150])
@pytest.mark.parametrize("count", [1, 3])
def test_greedy_output_is_the_targets_own(simulations: int, count: int, tmp_path: Path) -> None:
    plain = SpeculativeDecoder(TARGET).decode(PROMPTS[:count], Sampling(), 30)
    Datastore.build([prompt + trace.ids for prompt, trace in zip(PROMPTS, plain)], 128).save(
        tmp_path
    )
    for folder, adapt in ((None, True), (str(tmp_path), False)):
        drafter = Aded(TARGET.shape, folder, simulations, adapt, tokens=16)
        drafted = SpeculativeDecoder(TARGET, drafter).decode(PROMPTS[:count], Sampling(), 30)
        assert [trace.ids for trace in drafted] == [trace.ids for trace in plain]
    assert len(drafted[0].accepted) < len(plain[0].accepted)


def test_a_repeated_text_is_learnt_only_by_a_table_that_adapts() -> None:
    text = torch.tensor([[5, 6, 7, 8, 5, 6, 7, 8, 5]])
    context = Context(TARGET, text, torch.tensor([9]), torch.tensor([6]))
    found = [
        drafter.propose(drafter.start(context), 8).tokens_BN[0].tolist()
        for drafter in (Aded(TARGET.shape), Aded(TARGET.shape, adapt=False))
    ]
    assert found == [[6, 7, 8, 5, 6], [6]]
