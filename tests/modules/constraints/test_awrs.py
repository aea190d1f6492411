"""Adaptive weighted rejection sampling, by enumeration of everything it may draw."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from functools import cache
from itertools import permutations

import numpy as np
import pytest
import torch
from torch import Tensor

from modules.constraints.awrs import (
    DEAD,
    Generated,
    best_token,
    geometric,
    recursive,
    weighted_token,
)

PROBS = torch.tensor([0.05, 0.3, 0.2, 0.35, 0.1], dtype=torch.float64)
SHARP = torch.tensor([0.03, 0.04, 0.75, 0.13, 0.05], dtype=torch.float64)
MASKS = [
    [True] * 5,
    [False, True, False, False, True],
    [True, False, False, False, False],
    [False, False, True, True, False],
    [True, True, False, True, True],
]


class Scripted:
    """Orders that are named beforehand; counts no repeats, but notes where they would be drawn."""

    def __init__(self, *orders: tuple[int, ...]) -> None:
        self.orders, self.rejected = iter(orders), []

    def order(self, probs_V: Tensor) -> Iterator[int]:
        return iter([token for token in next(self.orders) if probs_V[token] > 0])

    def repeats(self, rejected: float) -> int:
        self.rejected.append(rejected)
        return 0


def chance(order: tuple[int, ...], probs_V: Tensor) -> float:
    """Of an order without replacement (Plackett-Luce)."""
    product, left = 1.0, float(probs_V.sum())
    for token in order:
        product *= float(probs_V[token]) / left
        left -= float(probs_V[token])
    return product


def oracle(mask: list[bool]) -> Callable[[int], bool]:
    return lambda token: mask[token]


@pytest.mark.parametrize("mask", MASKS)
def test_recursive_weights_are_proper(mask: list[bool]) -> None:
    """Σ over all orders of chance · weight · 1(token = y) is p(y) ok(y), for every y."""
    for probs in (PROBS, SHARP):
        mean, total = [0.0] * 5, 0.0
        for order in permutations(range(5)):
            drawn = recursive(probs, oracle(mask), Scripted(order))
            assert drawn.token is not None and mask[drawn.token]
            assert 0 <= math.exp(drawn.log_weight) <= 1
            mean[drawn.token] += chance(order, probs) * math.exp(drawn.log_weight)
            total += chance(order, probs)
        assert total == pytest.approx(1)
        expected = [float(p) if ok else 0.0 for p, ok in zip(probs, mask)]
        assert mean == pytest.approx(expected, abs=1e-12)


@cache
def mean_weight(rejections: int, rejected: tuple[float, ...], most: int = 300) -> float:
    """E[1 / (1 + n)] of n rejections and a geometric number of repeats at each visit."""
    places = np.arange(most)
    counts = (places == rejections).astype(float)
    for mass in rejected:
        counts = np.convolve(counts, (1 - mass) * mass**places)[:most]
    return float((counts / (1 + places)).sum())


@pytest.mark.parametrize("mask", [MASKS[0], MASKS[1], MASKS[4]])
def test_geometric_weights_are_proper(mask: list[bool]) -> None:
    """Over both rounds' orders; what is drawn of repeats is summed out."""
    mean = [0.0] * 5
    for first in permutations(range(5)):
        tried = first[: next(i for i, token in enumerate(first) if mask[token]) + 1]
        if first != (*tried, *sorted(set(range(5)) - set(tried))):
            continue
        # One order stands for all that begin like it; so does one of the second round.
        begins = chance(tried, PROBS)
        left = PROBS.clone()
        left[list(tried[:-1])] = 0
        others = [token for token in range(5) if left[token] > 0]
        for second in permutations(others):
            randomness = Scripted(first, second)
            drawn = geometric(PROBS, oracle(mask), randomness)
            assert drawn.token == tried[-1]
            rejections = round(math.exp(-drawn.log_weight)) - 1
            weight = mean_weight(rejections, tuple(randomness.rejected))
            mean[drawn.token] += begins * chance(second, left) * weight
    expected = [float(p) if ok else 0.0 for p, ok in zip(PROBS, mask)]
    assert mean == pytest.approx(expected, abs=1e-6)


def test_calls_of_the_constraint() -> None:
    calls: list[int] = []

    def asked_of(mask: list[bool]) -> Callable[[int], bool]:
        calls.clear()
        return lambda token: calls.append(token) or mask[token]

    randomness = Generated(torch.Generator().manual_seed(0))
    assert weighted_token(PROBS, asked_of([True] * 5), randomness).log_weight == 0
    assert len(calls) == 2, "the token, and the one after it"
    for method in (recursive, geometric):
        assert method(PROBS, asked_of([False] * 5), randomness) == DEAD
        assert sorted(calls) == [0, 1, 2, 3, 4], "no rejected token is tried twice"
    sure = torch.tensor([0.0, 1.0, 0.0], dtype=torch.float64)
    assert weighted_token(sure, asked_of([True] * 3), randomness) == (1, 0.0)
    assert weighted_token(sure, asked_of([True, False, True]), randomness) == DEAD
    logits = torch.tensor([0.1, 3.0, 2.0, -1.0, -torch.inf])
    assert best_token(logits, asked_of([True, False, True, True, True])) == (2, 0.0)
    assert calls == [1, 2]
    assert best_token(logits, asked_of([False] * 4 + [True])) == DEAD


def test_generated_orders_and_repeats_have_their_distributions() -> None:
    randomness = Generated(torch.Generator().manual_seed(1))
    runs, seen = 2000, torch.zeros(5, 5)
    for _ in range(runs):
        first, second, *rest = randomness.order(PROBS)
        seen[first, second] += 1
        assert sorted([first, second, *rest]) == [0, 1, 2, 3, 4]
    for first in range(5):
        for second in set(range(5)) - {first}:
            expected = runs * chance((first, second), PROBS)
            assert abs(float(seen[first, second]) - expected) < 4.5 * expected**0.5 + 1
    repeats = torch.tensor([randomness.repeats(0.6) for _ in range(runs)], dtype=torch.float64)
    assert abs(float(repeats.mean()) - 1.5) < 0.2 and randomness.repeats(0.0) == 0
    assert abs(float((repeats == 0).double().mean()) - 0.4) < 0.05


def test_wide_vocabularies_are_not_cut() -> None:
    """More than the first chunk of tokens is tried."""
    probs = torch.full((300,), 1 / 300, dtype=torch.float64)
    randomness = Generated(torch.Generator().manual_seed(2))
    assert sorted(randomness.order(probs)) == list(range(300))
    assert best_token(-torch.arange(300.0), lambda token: token == 250) == (250, 0.0)


def test_of_equal_logits_the_first_is_best() -> None:
    """As in `argmax` under a mask; none is left out."""
    logits = torch.zeros(300, dtype=torch.bfloat16)
    logits[100:200], logits[280:] = 1.0, -torch.inf
    for first in (0, 3, 99, 130, 199, 200, 279):
        masked = torch.where(torch.arange(300) >= first, logits, -torch.inf)
        expected = int(masked.argmax())
        assert best_token(logits, lambda token, first=first: token >= first) == (expected, 0.0)
        assert best_token(logits, lambda token, first=first: token == first) == (first, 0.0)
    assert best_token(logits, lambda token: token >= 280) == DEAD
    assert best_token(torch.full((9,), -torch.inf), lambda token: True) == DEAD
