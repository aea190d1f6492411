"""Distillation losses against sums written out token by token, and what must hold of them whatever
the laws.
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
    """Draft logits and target laws, float64."""
    generator = torch.Generator().manual_seed(0)
    logits, other = (
        scale * torch.randn(ROWS, WIDTH, generator=generator).double() for _ in range(2)
    )
    return logits, other.softmax(-1)


@pytest.mark.parametrize("name", DIVERGENCES)
def test_every_divergence_is_the_sum_over_tokens(name: str) -> None:
    logits, law = pairs()
    found = DIVERGENCES[name](logits, law)
    for m in range(ROWS):
        weights = [exp(float(x)) for x in logits[m]]
        q = [weight / sum(weights) for weight in weights]
        assert float(found[m]) == pytest.approx(OBVIOUS[name](law[m].tolist(), q), abs=1e-12)


@pytest.mark.parametrize("name", DIVERGENCES)
def test_it_is_zero_where_the_laws_agree_and_only_there(name: str) -> None:
    logits, law = pairs()
    torch.testing.assert_close(
        DIVERGENCES[name](law.log() + 3.0, law), torch.zeros(ROWS).double(), atol=1e-12, rtol=0
    )
    assert bool((DIVERGENCES[name](logits, law) > 1e-3).all())


@pytest.mark.parametrize("name", DIVERGENCES)
def test_certain_laws_give_finite_losses_and_gradients(name: str) -> None:
    logits = (pairs()[0] * 50).float().requires_grad_()
    law = torch.nn.functional.one_hot(torch.arange(ROWS), WIDTH).float()
    losses = DIVERGENCES[name](logits, law)
    losses.sum().backward()
    assert logits.grad is not None
    assert bool(torch.isfinite(losses).all()) and bool(torch.isfinite(logits.grad).all())


@pytest.mark.parametrize("name", DIVERGENCES)
def test_its_gradient_is_the_slope_of_its_values(name: str) -> None:
    logits, law = pairs()
    assert torch.autograd.gradcheck(lambda x: DIVERGENCES[name](x, law), logits.requires_grad_())


def test_the_gradient_of_the_forward_divergence_is_the_difference_of_the_laws() -> None:
    logits, law = pairs()
    forward_kl(logits.requires_grad_(), law).sum().backward()
    torch.testing.assert_close(logits.grad, (logits.softmax(-1) - law).detach())


def test_turning_the_laws_around() -> None:
    logits, law = pairs(6.0)
    turned, draft = law.log(), logits.softmax(-1)
    torch.testing.assert_close(reverse_kl(logits, law), forward_kl(turned, draft))
    torch.testing.assert_close(jensen_shannon(logits, law), jensen_shannon(turned, draft))
    torch.testing.assert_close(jensen_shannon(logits, law, 0.2), jensen_shannon(turned, draft, 0.8))
    torch.testing.assert_close(total_variation(logits, law), total_variation(turned, draft))


def test_bounds_are_kept_and_reached() -> None:
    logits, law = pairs(6.0)
    for divergence, most in ((jensen_shannon, log(2)), (total_variation, 1.0)):
        assert bool((divergence(logits, law) <= most + 1e-12).all())
        apart = divergence(
            torch.tensor([[0.0, 800.0]]).double(), torch.tensor([[1.0, 0.0]]).double()
        )
        assert float(apart) == pytest.approx(most)


def test_total_variation_is_how_often_the_ratio_rule_rejects() -> None:
    """Draw from q, accept with probability min(1, p / q): 1 − the expectation over q of that, token
    by token.
    """
    logits, law = pairs()
    for m in range(ROWS):
        q = logits[m].softmax(-1).tolist()
        accepted = sum(x * min(1.0, y / x) for x, y in zip(q, law[m].tolist(), strict=True))
        assert float(total_variation(logits, law)[m]) == pytest.approx(1 - accepted, abs=1e-12)


def test_total_variation_rejects_what_the_law_has_outside_the_draft_vocabulary() -> None:
    """A part of the target's law, which sums to less than 1."""
    logits, law = pairs()
    part = law * torch.linspace(0.1, 1, ROWS, dtype=law.dtype)[:, None]
    accepted_M = torch.minimum(part, logits.softmax(-1)).sum(-1)
    torch.testing.assert_close(total_variation(logits, part), 1 - accepted_M)
