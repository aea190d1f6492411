"""The dynamic sparse tree: what it promises, and that calls keep their size and the text."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest
import torch

from modules.contracts.drafter import DraftState
from modules.contracts.sampling import Sampling
from modules.contracts.verification import Accepted, Verified
from modules.cost_model.budget import best_budget, try_budgets
from modules.cost_model.latency_table import LatencyTable
from modules.decoding.decoder import SpeculativeDecoder
from modules.drafters.same_pass.base import GuessState
from modules.drafters.same_pass.ppd import PPD
from modules.drafters.same_pass.sparse_tree import (
    Accuracies,
    SparseTrees,
    assumed,
    grown,
    pruned,
    random_trees,
    sparse_trees,
    whole_trees,
)
from tests.fakes import tiny_batch, tiny_target
from tests.modules.sampling import goodness, small_target

TABLE: Accuracies = ((0.5, 0.2, 0.1, 0.05), (0.4, 0.2, 0.1, 0.05), (0.3, 0.2, 0.05, 0.05))
TEXT = [1, 2, 3, 4, 5, 3]


def drafter_for(target, **arguments) -> PPD:
    torch.manual_seed(3)
    drafter = PPD(target.shape, **arguments)
    drafter.initialise(target)
    return drafter.double().eval()


# -- what it promises ------------------------------------------------------------------------------


def test_a_tree_stops_somewhere_and_its_tokens_follow_from_where():
    tree = grown(TABLE, 3, 12)
    assert sum(tree.stops) == pytest.approx(1) and min(tree.stops) >= 0
    lengths = [len(path) + 1 for path in tree.paths]
    assert tree.tokens == pytest.approx(sum(np.array(lengths) * tree.stops))
    assert grown(TABLE, 0, 12).paths == ((),) and max(map(len, grown(TABLE, 2, 12).paths)) == 2
    assert len(grown(TABLE, 1, 12).paths) == 1 + 4


def test_prompt_tokens_are_removed_where_the_loss_is_least():
    """Held against every way to leave as many."""
    gains = [grown(TABLE, state, 5).tokens for state in range(4)]
    tree = grown(TABLE, 3, 4)
    for prompts in range(3 + 4, 3 * 5 + 1):
        found = pruned(tree, gains, prompts)
        assert sum(found.prompts) == prompts and found.prompts[0] == 3
        ways = [way for way in product((1, 2, 3), repeat=4) if 3 + sum(way) == prompts]
        worth = [sum(np.array(tree.stops[1:]) * [gains[c] for c in way]) for way in ways]
        own = sum(np.array(tree.stops[1:]) * [gains[c] for c in found.prompts[1:]])
        assert own == pytest.approx(max(worth))


def simulated(trees: SparseTrees, calls: int) -> float:
    """Tokens per call where every rank of a level is right as often as the table says."""
    draws, state, tokens = np.random.default_rng(0), 3, 0
    for _ in range(calls):
        tree, path = trees.trees[state], ()
        index = {one: i for i, one in enumerate(tree.paths)}
        for level in range(3):
            odds = [*TABLE[level], 1 - sum(TABLE[level])]
            path = (*path, int(draws.choice(len(odds), p=odds)))
            if path not in index:
                path = path[:-1]
                break
        tokens, state = tokens + len(path) + 1, tree.prompts[index[path]]
    return tokens / calls


@pytest.mark.parametrize("rows", [6, 12, 20, 40])
def test_the_markov_chain_predicts_the_tokens_of_a_call(rows):
    trees = sparse_trees(TABLE, rows)
    assert sum(trees.states) == pytest.approx(1) and min(trees.states) > -1e-9
    assert simulated(trees, 20000) == pytest.approx(trees.tokens, rel=0.02)


@pytest.mark.parametrize("ensemble", [1, 2])
def test_calls_keep_their_size_and_are_worth_more_with_fewer_prompt_tokens(ensemble):
    """Trees with all prompt tokens behind every node are among those searched."""
    gained, before = 0.0, 0.0
    for rows in range(2 + 4 * ensemble, 50):
        trees = sparse_trees(assumed(3), rows, ensemble)
        assert trees.rows(ensemble) <= rows and trees.tokens >= before - 1e-6
        before, whole = trees.tokens, whole_trees(assumed(3), rows, ensemble)
        assert whole.rows(ensemble) <= rows and trees.tokens >= whole.tokens - 1e-9
        assert all(min(tree.prompts) >= 1 and tree.prompts[0] == 3 for tree in trees.trees)
        gained = max(gained, trees.tokens - whole.tokens)
    assert gained > 0.1
    with pytest.raises(ValueError, match="no room for a draft"):
        sparse_trees(assumed(3), 1 + 4 * ensemble, ensemble)


@pytest.mark.parametrize("rows", [12, 24, 48])
def test_dynamic_trees_promise_more_than_full_and_random_ones_of_equal_size(rows):
    dynamic, full, random = (
        make(TABLE, rows) for make in (sparse_trees, whole_trees, random_trees)
    )
    assert dynamic.tokens > max(full.tokens, random.tokens)
    for tree, best in zip(random.trees, dynamic.trees, strict=True):
        assert len(tree.paths) == len(best.paths) and sum(tree.prompts) == sum(best.prompts)
        assert all(path[:-1] in tree.paths for path in tree.paths[1:])
        assert min(tree.prompts) >= 1 and max(tree.prompts) <= 3


@pytest.mark.parametrize("sparse", ["full", "random"])
def test_other_sparse_trees_decode_the_targets_own_text(sparse):
    target = small_target()
    drafter = drafter_for(target, sparse=sparse, rows=20)
    expected = SpeculativeDecoder(target).decode([TEXT, [5]], Sampling(), 24)
    found = SpeculativeDecoder(target, drafter).decode([TEXT, [5]], Sampling(), 24)
    assert [trace.ids for trace in found] == [trace.ids for trace in expected]


# -- decoding with it ------------------------------------------------------------------------------


@pytest.mark.parametrize("ensemble", [1, 2])
def test_sequences_in_other_states_decode_together(ensemble):
    """Six tokens, so that drafts are accepted; no call has more rows than were asked for, and each
    node's tokens are those that its level's prompt token says."""
    target = small_target()
    drafter = drafter_for(target, ensemble=ensemble, rows=30)
    states, absorb = [], drafter.absorb

    def record(state: DraftState, verified: Verified, accepted: Accepted) -> GuessState:
        after = absorb(state, verified, accepted)
        states.append(tuple(after.available))
        return after

    drafter.absorb = record  # type: ignore[method-assign]
    prompts = [TEXT, [3, 1], [4], [5, 5, 5]]
    plain = SpeculativeDecoder(target, stop_ids=frozenset())
    decoder = SpeculativeDecoder(target, drafter, stop_ids=frozenset())
    expected = plain.decode(prompts, Sampling(), 40)
    found = decoder.decode(prompts, Sampling(), 40)
    assert [trace.ids for trace in found] == [trace.ids for trace in expected]
    assert any(len(set(one)) > 1 for one in states) and {1, 3} <= {s for one in states for s in one}
    for trace, prompt in zip(found, prompts, strict=True):
        assert max(trace.rows) <= 30 + 4 and max(trace.accepted) > 1
        assert decoder.decode([prompt], Sampling(), 40)[0].ids == trace.ids
    assert goodness(decoder, [3, 1], Sampling(1.0), runs=1500) > 1e-4


def test_drafts_are_the_likeliest_tokens_of_their_level():
    target = tiny_target()
    drafter = drafter_for(target, rows=24, draft_vocabulary=40)
    drafter.set_vocabulary(torch.arange(0, 80, 2))
    seen, prepare = [], drafter.prepare

    def record(state: DraftState, tree):
        seen.append((state, tree))
        return prepare(state, tree)

    drafter.prepare = record  # type: ignore[method-assign]
    SpeculativeDecoder(target, drafter, stop_ids=frozenset()).decode([TEXT], Sampling(), 4)
    state, tree = seen[1]
    assert isinstance(state, GuessState) and state.states_BKX is not None
    shape = drafter.sparse_trees(23).trees[3]
    best_KR = target.logits(state.states_BKX[0])[:, ::2][:, :40].topk(10).indices * 2
    for node, path in enumerate(shape.paths[1:], 1):
        assert int(tree.tokens_BN[0, node]) == int(best_KR[len(path) - 1, path[-1]])
        parent = int(tree.parents_BN[0, node])
        assert shape.paths[parent] == path[:-1]


def test_training_ends_with_measured_accuracies(tmp_path):
    target = tiny_target()
    drafter = drafter_for(target)
    before = drafter.sparse_trees(20)
    result = drafter.finish([tiny_batch(target)], target)
    table = drafter.arguments["accuracies"]
    assert [len(row) for row in table] == [10] * 3 and table == [
        list(row) for row in drafter.accuracies
    ]
    assert all(row == sorted(row, reverse=True) for row in table)
    assert result.figures["tree/expected_tokens"] == drafter.sparse_trees(11).tokens
    assert "| 12 |" in result.pages["sparse_trees.md"] and drafter.sparse_trees(20) != before
    again = PPD(**{**drafter.arguments, "shape": target.shape})
    assert again.accuracies == drafter.accuracies


def test_a_fixed_tree_is_measured_too():
    target = tiny_target()
    drafter = drafter_for(target, tree="optimised_4")
    assert drafter.least_budget == 1
    assert drafter.finish([tiny_batch(target)], target).figures["tree/expected_tokens"] >= 1
    assert len(drafter.arguments["tree"]) == 4


def test_the_latency_table_chooses_the_rows_of_a_call():
    """The rows that calls really compute count, prompt tokens too."""
    target = small_target()
    decoder = SpeculativeDecoder(target, drafter_for(target), stop_ids=frozenset())
    flat = LatencyTable(8, {rows: 1.0 for rows in range(1, 65)})
    steep = LatencyTable(8, {rows: 1.0 + 10 * max(0, rows - 8) for rows in range(1, 65)})
    wide, narrow = (
        best_budget(try_budgets(decoder, table, [TEXT, [3, 1]], Sampling(), 24, (3, 7, 31)))
        for table in (flat, steep)
    )
    assert (wide, narrow) == (31, 7)


@pytest.mark.parametrize("arguments", [{"rows": 5}, {"accuracies": [[0.5]]}])
def test_what_has_no_tree_is_refused(arguments):
    with pytest.raises(ValueError, match=next(iter(arguments))):
        PPD(tiny_target().shape, **arguments)
