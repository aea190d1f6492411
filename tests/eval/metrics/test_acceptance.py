"""Figures by hand, identities between them, and intervals that cover what they should."""

from __future__ import annotations

import numpy as np
import pytest

from eval.metrics import acceptance as metrics
from eval.metrics.acceptance import Speed

EMITTED = [1, 3, 2, 1, 3]  # drafts accepted: 0 2 1 0 2
OFFERED = [2, 2, 1, 0, 3]


def test_tau_counts_the_bonus_token_and_is_none_without_calls() -> None:
    assert metrics.mean_accepted_tokens(EMITTED) == 2.0
    assert metrics.mean_accepted_tokens([]) is None


def test_marginal_acceptance_by_hand_and_tau_is_one_plus_its_sum() -> None:
    assert metrics.acceptance_by_depth(EMITTED) == pytest.approx([3 / 5, 2 / 5])
    drawn = np.random.default_rng(0).integers(1, 7, 200).tolist()
    assert 1 + sum(metrics.acceptance_by_depth(drawn)) == pytest.approx(
        metrics.mean_accepted_tokens(drawn)
    )


def test_conditional_acceptance_counts_only_calls_that_got_so_far_and_offered_more() -> None:
    # Depth 1: four calls offered it, three accepted; depth 2: calls 1 and 4 got there and had it;
    # depth 3: call 4.
    assert metrics.conditional_acceptance_by_depth(EMITTED, OFFERED) == pytest.approx(
        [3 / 4, 1.0, 0.0]
    )
    assert metrics.conditional_acceptance_by_depth(EMITTED, []) == []


def test_conditional_is_the_ratio_of_marginals_when_every_tree_is_deep() -> None:
    marginal = metrics.acceptance_by_depth(EMITTED)
    conditional = metrics.conditional_acceptance_by_depth(EMITTED, [2] * 5)
    assert conditional == pytest.approx([marginal[0], marginal[1] / marginal[0]])


def test_histogram_of_accepted_drafts() -> None:
    assert metrics.accepted_length_histogram(EMITTED) == [2, 1, 2]
    assert metrics.accepted_length_histogram([]) == []


def test_micro_pools_tokens_and_seconds_and_macro_means_over_tasks() -> None:
    fast, slow = [Speed(30, 1), Speed(10, 1)], [Speed(10, 1), Speed(10, 1)]
    assert metrics.micro_speedup(fast, slow) == 2.0
    assert metrics.macro_speedup({"a": (fast[:1], slow[:1]), "b": (fast, slow)}) == pytest.approx(
        (3 + 2) / 2
    )
    assert metrics.micro_speedup(fast, [Speed(0, 0)]) is None


def test_interval_holds_the_estimate_is_seeded_and_collapses_without_variance() -> None:
    rng = np.random.default_rng(1)
    slow = [Speed(50, seconds) for seconds in rng.uniform(0.9, 1.1, 40)]
    fast = [
        Speed(50, speed.seconds / gain)
        for speed, gain in zip(slow, rng.uniform(1, 2, 40), strict=True)
    ]
    low, high = metrics.bootstrap_interval(fast, slow) or (0, 0)
    assert low < (metrics.micro_speedup(fast, slow) or 0) < high and high - low < 0.5
    assert metrics.bootstrap_interval(fast, slow) == (low, high)
    assert metrics.bootstrap_interval(slow, slow) == pytest.approx((1.0, 1.0))
    assert metrics.bootstrap_interval(slow[:1], slow[:1]) is None


def test_pairing_makes_the_interval_narrower_than_independent_rows_would() -> None:
    seconds = np.random.default_rng(2).uniform(0.1, 5, 30)
    slow, fast = [Speed(50, s) for s in seconds], [Speed(50, s / 1.5) for s in seconds]
    low, high = metrics.bootstrap_interval(fast, slow) or (0, 0)
    assert low == pytest.approx(1.5) and high == pytest.approx(1.5)


@pytest.mark.parametrize(
    ("expected", "actual", "where"),
    [
        ([1, 2, 3], [1, 2, 3], None),
        ([1, 2, 3], [1, 5, 3], 1),
        ([1, 2, 3], [1, 2], 2),
        ([], [4], 0),
        ([], [], None),
    ],
)
def test_first_divergence_counts_length(
    expected: list[int], actual: list[int], where: int | None
) -> None:
    assert metrics.first_divergence(expected, actual) == where


def test_ties_and_gaps() -> None:
    assert metrics.is_tie([0.0, 1.0, 1.0009], 1, 2)
    assert not metrics.is_tie([0.0, 1.0, 1.002], 1, 2)
    logits = np.array([[0.0, 2.0, 1.0], [3.0, 0.0, 2.5]])
    assert metrics.argmax_gaps(logits, [1, 2]).tolist() == [0.0, 0.5]
