"""Lookahead: its pool, its window of rows that only compute, and that it changes no token."""

from __future__ import annotations

import pytest
import torch

from modules.core.drafter import Context, Sampling
from modules.decoding.decoder import SpeculativeDecoder
from modules.training_free.lookahead import Lookahead, Pool
from tests.fakes import tiny_target

TARGET = tiny_target()
PROMPTS = [[7, 8, 9, 7, 8], [20, 30], [40, 41, 42, 40, 41, 42, 40]]


def test_the_pool_forgets_what_was_added_longest_ago() -> None:
    pool = Pool(2)
    for ngram in ([1, 2, 3], [1, 4, 5], [1, 2, 3], [1, 6, 7], [2, 9, 9]):
        pool.add(ngram)
    assert pool.behind(1) == [(6, 7), (2, 3)] and pool.behind(3) == []


def test_the_window_only_computes_and_ngrams_do_not_see_it() -> None:
    drafter = Lookahead(TARGET.shape, ngram=3, window=2)
    text = torch.tensor([[5, 6, 7, 8]])
    tree = drafter.propose(drafter.start(Context(TARGET, text, torch.tensor([4]), torch.tensor([5]))), 12)
    assert tree.tokens_BN[0].tolist() == [5, 5, 6, 7, 8, 6, 7]
    assert tree.parents_BN[0].tolist() == [-1, 0, 1, 1, 2, 0, 5]
    assert tree.acceptable_BN[0].tolist() == [True, False, False, False, False, True, True]
    with pytest.raises(ValueError, match="budget 4"):
        drafter.propose(drafter.start(Context(TARGET, text, torch.tensor([4]), torch.tensor([5]))), 4)


@pytest.mark.parametrize("count", [1, 3])
def test_greedy_output_is_the_targets_own(count: int) -> None:
    plain = SpeculativeDecoder(TARGET).decode(PROMPTS[:count], Sampling(), 24)
    drafted = SpeculativeDecoder(TARGET, Lookahead(TARGET.shape)).decode(PROMPTS[:count], Sampling(), 24)
    assert [trace.ids for trace in drafted] == [trace.ids for trace in plain]


def test_the_rows_of_a_call_count_the_window_and_padding() -> None:
    """Nodes are candidates; rows are what the target computes."""
    traces = SpeculativeDecoder(TARGET, Lookahead(TARGET.shape)).decode(PROMPTS, Sampling(), 40)
    assert all(rows >= 13 + nodes for trace in traces for rows, nodes in zip(trace.rows, trace.nodes, strict=True))
    assert any(rows > 13 + nodes for trace in traces for rows, nodes in zip(trace.rows, trace.nodes, strict=True))
    assert SpeculativeDecoder(TARGET).decode(PROMPTS[:1], Sampling(), 5)[0].rows == [1] * 4
