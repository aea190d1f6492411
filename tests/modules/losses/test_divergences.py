"""Distillation losses against sums written out token by token, and what must hold of them whatever
the distributions.
"""

from __future__ import annotations

from math import exp, log

import pytest
import torch
from torch import Tensor

from modules.losses.divergences import (
    DIVERGENCES,
    forward_kl,
    jensen_shannon,
    reverse_kl,
    total_variation,
)

ROWS, WIDTH = 6, 9


def kl(first: list[float], second: list[float]) -> float:
    return sum(x * (log(x) - log(y)) for x, y in zip(first, second, strict=True) if x > 0)


def mixed(p: list[float], q: list[float]) -> float:
    middle = [(x + y) / 2 for x, y in zip(p, q, strict=True)]
    return (kl(p, middle) + kl(q, middle)) / 2


OBVIOUS = {
    "forward_kl": kl,
    "reverse_kl": lambda p, q: kl(q, p),
    "kl_mixture": lambda p, q: 0.9 * kl(p, q) + 0.1 * kl(q, p),
    "jensen_shannon": mixed,
    "total_variation": lambda p, q: 1 - sum(map(min, zip(p, q, strict=True))),
}


def pairs(scale: float = 2.0) -> tuple[Tensor, Tensor]:
    """Draft logits and target distributions, float64."""
    generator = torch.Generator().manual_seed(0)
    logits, other = (
        scale * torch.randn(ROWS, WIDTH, generator=generator).double() for _ in range(2)
    )
    return logits, other.softmax(-1)


@pytest.mark.parametrize("name", DIVERGENCES)
def test_every_divergence_is_the_sum_over_tokens(name: str) -> None:
    logits, probs = pairs()
    found = DIVERGENCES[name](logits, probs)
    for m in range(ROWS):
        weights = [exp(float(x)) for x in logits[m]]
        q = [weight / sum(weights) for weight in weights]
        assert float(found[m]) == pytest.approx(OBVIOUS[name](probs[m].tolist(), q), abs=1e-12)


@pytest.mark.parametrize("name", DIVERGENCES)
def test_it_is_zero_where_the_distributions_agree_and_only_there(name: str) -> None:
    logits, probs = pairs()
    torch.testing.assert_close(
        DIVERGENCES[name](probs.log() + 3.0, probs), torch.zeros(ROWS).double(), atol=1e-12, rtol=0
    )
    assert bool((DIVERGENCES[name](logits, probs) > 1e-3).all())


@pytest.mark.parametrize("name", DIVERGENCES)
def test_certain_distributions_give_finite_losses_and_gradients(name: str) -> None:
    logits = (pairs()[0] * 50).float().requires_grad_()
    probs = torch.nn.functional.one_hot(torch.arange(ROWS), WIDTH).float()
    losses = DIVERGENCES[name](logits, probs)
    losses.sum().backward()
    assert logits.grad is not None
    assert bool(torch.isfinite(losses).all()) and bool(torch.isfinite(logits.grad).all())


@pytest.mark.parametrize("name", DIVERGENCES)
def test_its_gradient_is_the_slope_of_its_values(name: str) -> None:
    logits, probs = pairs()
    assert torch.autograd.gradcheck(lambda x: DIVERGENCES[name](x, probs), logits.requires_grad_())


def test_the_gradient_of_the_forward_divergence_is_the_difference_of_the_distributions() -> None:
    logits, probs = pairs()
    forward_kl(logits.requires_grad_(), probs).sum().backward()
    torch.testing.assert_close(logits.grad, (logits.softmax(-1) - probs).detach())


def test_turning_the_distributions_around() -> None:
    logits, probs = pairs(6.0)
    turned, draft = probs.log(), logits.softmax(-1)
    torch.testing.assert_close(reverse_kl(logits, probs), forward_kl(turned, draft))
    torch.testing.assert_close(jensen_shannon(logits, probs), jensen_shannon(turned, draft))
    torch.testing.assert_close(
        jensen_shannon(logits, probs, 0.2), jensen_shannon(turned, draft, 0.8)
    )
    torch.testing.assert_close(total_variation(logits, probs), total_variation(turned, draft))


def test_bounds_are_kept_and_reached() -> None:
    logits, probs = pairs(6.0)
    for divergence, most in ((jensen_shannon, log(2)), (total_variation, 1.0)):
        assert bool((divergence(logits, probs) <= most + 1e-12).all())
        apart = divergence(
            torch.tensor([[0.0, 800.0]]).double(), torch.tensor([[1.0, 0.0]]).double()
        )
        assert float(apart) == pytest.approx(most)


def test_total_variation_is_how_often_the_ratio_rule_rejects() -> None:
    """Draw from q, accept with probability min(1, p / q): 1 − the expectation over q of that, token
    by token.
    """
    logits, probs = pairs()
    for m in range(ROWS):
        q = logits[m].softmax(-1).tolist()
        accepted = sum(x * min(1.0, y / x) for x, y in zip(q, probs[m].tolist(), strict=True))
        assert float(total_variation(logits, probs)[m]) == pytest.approx(1 - accepted, abs=1e-12)


def test_total_variation_rejects_what_the_distribution_has_outside_the_draft_vocabulary() -> None:
    """A part of the target's distribution, which sums to less than 1."""
    logits, probs = pairs()
    part = probs * torch.linspace(0.1, 1, ROWS, dtype=probs.dtype)[:, None]
    accepted_M = torch.minimum(part, logits.softmax(-1)).sum(-1)
    torch.testing.assert_close(total_variation(logits, part), 1 - accepted_M)
