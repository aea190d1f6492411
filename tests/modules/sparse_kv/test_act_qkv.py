"""ActQKV: probes, how blocks are divided, and what rows read."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from modules.sparse_kv.act_qkv import (
    ActQKV,
    ActSelection,
    activation_weights,
    block_share,
    entropy,
)
from modules.sparse_kv.policy import LayerCall
from tests.fakes import tiny_target
from tests.modules.sparse_kv.checks import (
    Opened,
    check_batches,
    check_tree,
    check_whole,
    differs,
    prompts_of,
    tree_of,
)
from tests.modules.sparse_kv.test_reader import random_call


@pytest.fixture(scope="module")
def target() -> Any:
    return tiny_target(layers=4)


def small(**more: Any) -> ActQKV:
    settings = {"blocks": 2, "block": 3, "initial": 2, "local": 7, "window": 10}
    return ActQKV(**(settings | more))


@pytest.mark.parametrize("more", [{}, {"mass": 0.6}, {"probe": "mean", "window": 64}])
def test_rows_decode_as_alone(more: dict[str, Any], target: Any) -> None:
    policy = small(**more)
    check_tree(policy, target)
    check_batches(policy, target)
    assert differs(policy, target)


def test_a_budget_of_the_whole_history_is_full_attention(target: Any) -> None:
    check_whole(small(blocks=40, probe="mean", window=64), target)
    check_whole(small(blocks=40), target)
    # 11 blocks are the history, whatever the layers' densities are.
    check_whole(small(blocks=11), target)


def test_weights_are_uniform_for_equal_states_and_point_at_an_outlier() -> None:
    states = torch.randn(8, generator=torch.Generator().manual_seed(0)).expand(2, 6, -1).clone()
    real = torch.ones(2, 6, dtype=torch.bool)
    torch.testing.assert_close(activation_weights(states, real, 1.0), torch.full((2, 6), 1 / 6))
    # Padding has no weight, and does not count.
    real[1, 4:] = False
    states[1, 5] = 50.0
    expected = torch.tensor([1 / 4] * 4 + [0.0] * 2)
    torch.testing.assert_close(activation_weights(states, real, 1.0)[1], expected)
    # One of many that are nearly equal.
    states = torch.randn(1, 64, 8, generator=torch.Generator().manual_seed(0)) * 0.01
    states[0, 17] += 3.0
    weights = activation_weights(states, torch.ones(1, 64, dtype=torch.bool), 1.0)
    assert weights[0, 17] > 0.99
    # By the definition.
    states = torch.randn(1, 5, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    deviation = (states - states.mean(1)) / states.std(1, correction=0)
    bias = deviation.square().sum(-1) / 3
    found = activation_weights(states, torch.ones(1, 5, dtype=torch.bool), 0.5)
    torch.testing.assert_close(found, (bias / 0.5).softmax(-1))


def test_blocks_are_divided_in_proportion_and_none_is_lost() -> None:
    coin = torch.Generator().manual_seed(0)
    densities, layers, total = torch.rand(50, 7, generator=coin), 7, 700
    present = torch.tensor(1000)
    for expected in (densities, torch.rand(50, 7, generator=coin), torch.zeros(50, 7)):
        left, counts = torch.full((50,), total), []
        for layer in range(layers):
            later = expected[:, layer + 1 :].sum(1)
            counts.append(block_share(left, densities[:, layer], later, layers - layer, present))
            left = left - counts[-1]
        found = torch.stack(counts, 1)
        # Whatever later layers were expected to have, all are given out.
        assert (found.sum(1) == total).all() and (found >= 0).all()
        if expected is densities:
            exact = densities / densities.sum(1, keepdim=True) * total
            assert ((found - exact).abs() < 2).all()
    # Without any density, evenly.
    none, left = torch.zeros(1), torch.full((1,), 14)
    assert block_share(left, none, none, 7, present).tolist() == [2]
    # No layer gets more than there are, and later layers no more than they can recall.
    left, density = torch.tensor([20, 20, 6]), torch.tensor([9.0, 0.1, 0.1])
    later, present = torch.tensor([1.0, 9.9, 9.9]), torch.tensor([8, 8, 8])
    assert block_share(left, density, later, 3, present).tolist() == [8, 4, 0]
    # Flat scores are dense, and blocks that are not there count for nothing.
    scores = torch.tensor([[[1.0, 1.0, -torch.inf], [9.0, 1.0, 1.0]], [[-torch.inf] * 3] * 2])
    values = entropy(scores)
    assert values[0, 0] == pytest.approx(0.6931, abs=1e-4) and values[0, 1] < 0.02
    assert values[1].tolist() == [0, 0]


def test_a_row_reads_the_block_that_it_points_at_and_all_that_is_new(target: Any) -> None:
    call, _ = random_call(rows=1, slots=24)
    # Blocks of slots 2–4, 5–7, …; the second is what the query points at.
    call.keys_BKSD[:, :, 5:8] = call.query_BQND[:, ::2] * 5
    call.query_BQND[:, 1::2] = call.query_BQND[:, ::2]
    selection = small(blocks=1, local=4).start(target, 2)
    chosen = selection.choose(call)
    assert chosen is not None
    for row, position in ((0, 23), (1, 19)):
        slots = [slot for slot in sorted(chosen[row, 0, 0].tolist()) if slot >= 0]
        # Blocks end at 5, 8, 11, 14, 17, 20: the newest that leaves four positions.
        newest = max(end for end in (5, 8, 11, 14, 17, 20) if end <= position - 3)
        assert slots == [0, 1, 5, 6, 7, *range(newest, position + 1)]


def test_layers_share_all_blocks_by_their_own_densities(
    target: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    policy, counts = small(), []
    share = ActSelection._share

    def watched(self: ActSelection, call: LayerCall, *scores: torch.Tensor) -> torch.Tensor:
        counts.append(share(self, call, *scores))
        return counts[-1]

    session = Opened(target, policy).session(prompts_of((60,)))
    selection: Any = session.reader.selection
    assert len(set(selection.densities_BL[0].tolist())) == 4
    monkeypatch.setattr(ActSelection, "_share", watched)
    session.verify(tree_of(1))
    # Every row of the tree shares 2 · 4 blocks, some rows in another way than others.
    shares = torch.stack(counts, -1)[0]
    assert shares.shape == (8, 4) and (shares.sum(-1) == 8).all()
    assert len({tuple(row) for row in shares.tolist()}) > 1


def test_bad_settings_are_refused() -> None:
    for wrong in ({"blocks": 0}, {"local": 0}, {"probe": "max"}, {"mass": 0.0}):
        with pytest.raises(ValueError, match="must be|unknown"):
            small(**wrong)
