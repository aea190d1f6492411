"""Lookahead: its pool, its window of rows that only compute, and that it changes no token."""

from __future__ import annotations

import random

import pytest
import torch
from torch.nn.functional import one_hot

from modules.acceptance.rules import Draws, GreedyRule
from modules.contracts.drafter import Context
from modules.contracts.sampling import Sampling
from modules.contracts.verification import Verified
from modules.decoding.decoder import SpeculativeDecoder
from modules.drafters.retrieval.lookahead import Lookahead, Pool
from tests.fakes import tiny_target

TARGET = tiny_target()
PROMPTS = [[7, 8, 9, 7, 8], [20, 30], [40, 41, 42, 40, 41, 42, 40]]


def test_the_pool_forgets_what_was_added_longest_ago() -> None:
    pool = Pool(2)
    for ngram in ([1, 2, 3], [1, 4, 5], [1, 2, 3], [1, 6, 7], [2, 9, 9]):
        pool.add(ngram)
    assert pool.continuations(1) == [(6, 7), (2, 3)] and pool.continuations(3) == []


def test_the_window_only_computes_and_ngrams_do_not_see_it() -> None:
    drafter = Lookahead(TARGET.shape, ngram=3, window=2)
    text = torch.tensor([[5, 6, 7, 8]])
    tree = drafter.propose(
        drafter.start(Context(TARGET, text, torch.tensor([4]), torch.tensor([5]))), 12
    )
    assert tree.tokens_BN[0].tolist() == [5, 5, 6, 7, 8, 6, 7]
    assert tree.parents_BN[0].tolist() == [-1, 0, 1, 1, 2, 0, 5]
    assert tree.acceptable_BN[0].tolist() == [True, False, False, False, False, True, True]
    with pytest.raises(ValueError, match="budget 4"):
        drafter.propose(
            drafter.start(Context(TARGET, text, torch.tensor([4]), torch.tensor([5]))), 4
        )


def test_the_window_holds_the_text_to_come_and_completes_its_ngrams() -> None:
    """A distribution of the place alone, over texts without a repeated token, so that only the
    window can know what comes. Every call, one level of guesses is right for good; it moves up a
    level, and to the left by what was accepted, and drops out at the top."""
    levels, columns, begin = 3, 5, 6
    texts = [random.Random(seed).sample(range(100), 100) for seed in range(2)]
    drafter = Lookahead(TARGET.shape, ngram=levels + 1, window=columns)
    whole = torch.tensor(texts)
    lengths = torch.tensor([begin] * 2)
    state = drafter.start(Context(TARGET, whole[:, :begin], lengths, whole[:, begin]))
    right = [[[False] * columns for _ in range(levels)] for _ in texts]
    accepted_counts: list[list[int]] = [[], []]
    while int(state.lengths_B.max()) < 80:
        tree = drafter.propose(state, drafter.default_budget)
        places_BN = state.lengths_B[:, None] + tree.topology.depth + 1
        predicted_BN = whole.gather(1, places_BN)
        verified = Verified(tree, one_hot(predicted_BN, TARGET.shape.vocab_size).double())
        accepted = GreedyRule()(tree, verified, Draws(Sampling(), []))
        state = drafter.absorb(state, verified, accepted)
        for row, (text, count) in enumerate(zip(texts, accepted.lengths)):
            accepted_counts[row].append(count)
            grown = [*right[row], [True] * columns]
            right[row] = [
                [
                    i + count - 1 < columns and grown[level + 1][i + count - 1]
                    for i in range(columns)
                ]
                for level in range(levels)
            ]
            cells, place = state.window_BLW[row].tolist(), int(state.lengths_B[row])
            for level, i in ((level, i) for level in range(levels) for i in range(columns)):
                assert not right[row][level][i] or cells[level][i] == text[place + 1 + level + i]
    for counts in accepted_counts:
        assert counts[:levels] == [1] * levels and max(counts) == levels + 1
        assert sum(counts) / len(counts) > 2


@pytest.mark.parametrize("count", [1, 3])
def test_greedy_output_is_the_targets_own(count: int) -> None:
    plain = SpeculativeDecoder(TARGET).decode(PROMPTS[:count], Sampling(), 24)
    drafted = SpeculativeDecoder(TARGET, Lookahead(TARGET.shape)).decode(
        PROMPTS[:count], Sampling(), 24
    )
    assert [trace.ids for trace in drafted] == [trace.ids for trace in plain]


def test_the_rows_of_a_call_count_the_window_and_padding() -> None:
    """Nodes are candidates; rows are what the target computes."""
    traces = SpeculativeDecoder(TARGET, Lookahead(TARGET.shape)).decode(PROMPTS, Sampling(), 40)
    assert all(
        rows >= 13 + nodes
        for trace in traces
        for rows, nodes in zip(trace.rows, trace.nodes, strict=True)
    )
    assert any(
        rows > 13 + nodes
        for trace in traces
        for rows, nodes in zip(trace.rows, trace.nodes, strict=True)
    )
    assert SpeculativeDecoder(TARGET).decode(PROMPTS[:1], Sampling(), 5)[0].rows == [1] * 4
