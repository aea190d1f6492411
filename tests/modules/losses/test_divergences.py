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
    LEAST_ACCEPTANCE,
    acceptance,
    ended,
    forward_kl,
    jensen_shannon,
    lk,
    lk_hybrid,
    reverse_kl,
    total_variation,
)

ROWS, WIDTH = 6, 9


def kl(first: list[float], second: list[float]) -> float:
    return sum(x * (log(x) - log(y)) for x, y in zip(first, second, strict=True) if x > 0)


def mixed(p: list[float], q: list[float]) -> float:
    middle = [(x + y) / 2 for x, y in zip(p, q, strict=True)]
    return (kl(p, middle) + kl(q, middle)) / 2


def overlap(p: list[float], q: list[float]) -> float:
    return sum(map(min, zip(p, q, strict=True)))


def hybrid(p: list[float], q: list[float]) -> float:
    share, within = exp(-3 * overlap(p, q)), [x / sum(p) for x in p]
    return share * kl(within, q) + (1 - share) * (1 - overlap(p, q))


OBVIOUS = {
    "cross_entropy": lambda p, q: -sum(x * log(y) for x, y in zip(p, q, strict=True)),
    "lk": lambda p, q: -log(overlap(p, q)),
    "lk_hybrid": hybrid,
    "expected_length": lambda p, q: 1 - overlap(p, q),
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


@pytest.mark.parametrize("name", sorted(DIVERGENCES.keys() - {"cross_entropy"}))
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


@pytest.mark.parametrize("name", sorted(DIVERGENCES.keys() - {"lk_hybrid"}))
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


def slope(loss, logits: Tensor) -> Tensor:
    """Gradient of a loss per row by the logits [M,D]."""
    logits = logits.detach().requires_grad_()
    return torch.autograd.grad(loss(logits).sum(), logits)[0]


def test_minus_the_logarithm_of_the_acceptance_has_the_slope_of_total_variation_divided_by_it() -> (
    None
):
    logits, probs = pairs()
    part = probs * torch.linspace(0.1, 1, ROWS, dtype=probs.dtype)[:, None]
    alpha_M = acceptance(logits, part)
    assert bool(((alpha_M > 0) & (alpha_M < 1)).all())
    torch.testing.assert_close(alpha_M, 1 - total_variation(logits, part))
    torch.testing.assert_close(
        slope(lambda x: lk(x, part), logits),
        slope(lambda x: total_variation(x, part), logits) / alpha_M[:, None],
    )


def test_of_a_certain_target_it_is_cross_entropy_until_nothing_is_accepted() -> None:
    logits, labels = pairs()[0], torch.arange(ROWS)
    certain = torch.nn.functional.one_hot(labels, WIDTH).double()
    entropy = torch.nn.functional.cross_entropy(logits, labels, reduction="none")
    torch.testing.assert_close(lk(logits, certain), entropy)
    hopeless = -40 * certain
    assert float(lk(hopeless, certain)[0]) == pytest.approx(-log(LEAST_ACCEPTANCE))
    assert not slope(lambda x: lk(x, certain), hopeless).any()


def test_the_hybrid_goes_from_one_loss_to_the_other_with_weights_that_do_not_learn() -> None:
    logits, probs = pairs()
    part = probs * torch.linspace(0.1, 1, ROWS, dtype=probs.dtype)[:, None]

    def inside(x: Tensor) -> Tensor:
        return forward_kl(x, part / part.sum(-1, keepdim=True))

    torch.testing.assert_close(lk_hybrid(logits, part, 0.0), inside(logits))
    torch.testing.assert_close(lk_hybrid(logits, part, 1e6), total_variation(logits, part))
    share_M1 = (-2 * acceptance(logits, part)).exp()[:, None]
    torch.testing.assert_close(
        slope(lambda x: lk_hybrid(x, part, 2.0), logits),
        share_M1 * slope(inside, logits)
        + (1 - share_M1) * slope(lambda x: total_variation(x, part), logits),
    )


def test_mass_outside_the_draft_vocabulary_is_not_accepted() -> None:
    logits, probs = pairs()
    for name in ("lk", "lk_hybrid", "total_variation"):
        whole, part = (DIVERGENCES[name](logits, p) for p in (probs, 0.5 * probs))
        assert bool((part > whole).all()), name
    assert bool((acceptance(probs.log(), 0.5 * probs) - 0.5).abs().max() < 1e-12)


def test_chains_that_have_ended_sum_to_what_the_expected_length_leaves() -> None:
    """Against all outcomes of four draws, each with its probability; and the slope of a product."""
    alphas = torch.tensor([0.9, 0.5, 0.7, 0.2]).double().requires_grad_()
    before, total = torch.zeros(()), torch.zeros(()).double()
    for alpha in alphas:
        before = ended(before, 1 - alpha)
        total = total + before
    expected = 0.0
    for outcome in range(16):
        kept = [bool(outcome >> k & 1) for k in range(4)]
        chance, chain = 1.0, kept.index(False) if False in kept else 4
        for alpha, keep in zip(alphas.tolist(), kept, strict=True):
            chance *= alpha if keep else 1 - alpha
        expected += chance * (chain + 1)
    assert float(total.detach()) == pytest.approx(4 + 1 - expected)
    total.backward()
    slopes = [sum(float(alphas[:k].prod() / alphas[j]) for k in range(j + 1, 5)) for j in range(4)]
    assert alphas.grad is not None and alphas.grad.tolist() == pytest.approx([-x for x in slopes])
