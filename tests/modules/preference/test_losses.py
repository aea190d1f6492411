"""The losses against slow references that go pair by pair and token by token, and the identities
between them.
"""

from __future__ import annotations

from math import exp, log

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from modules.preference.losses import (
    Side,
    activation_mask,
    contrastive_probs,
    critical_dpo_loss,
    dpo_loss,
    positionwise_dpo_loss,
    sparse_loss,
)

PAIRS, TOKENS = 4, 9


def minus_log_sigmoid(x: float) -> float:
    return log(1 + exp(-x))


def responses(seed: int) -> tuple[Tensor, Tensor]:
    """Log-ratios [B,T], 0 where no token counts, and where tokens count: a prompt of three, then 2
    to 6 tokens.
    """
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(2, 7, (PAIRS, 1), generator=generator)
    order = torch.arange(TOKENS)
    counted = (order >= 3) & (order < 3 + lengths)
    return torch.randn(PAIRS, TOKENS, generator=generator, dtype=torch.float64) * counted, counted


@pytest.fixture
def pair():
    (chosen, chosen_counted), (rejected, rejected_counted) = responses(0), responses(1)
    scores = torch.rand(
        PAIRS, TOKENS, generator=torch.Generator().manual_seed(2), dtype=torch.float64
    )
    return chosen, chosen_counted, rejected, rejected_counted, scores * rejected_counted


def test_dpo_and_cdpo_match_a_slow_reference(pair):
    chosen, chosen_counted, rejected, rejected_counted, scores = pair
    plain, critical = (
        dpo_loss(chosen, rejected, 0.3),
        critical_dpo_loss(chosen, rejected, scores, 0.7),
    )
    for b in range(PAIRS):
        better = sum(float(chosen[b, t]) for t in range(TOKENS) if chosen_counted[b, t])
        worse = sum(float(rejected[b, t]) for t in range(TOKENS) if rejected_counted[b, t])
        weighted = sum(
            (1 - float(scores[b, t])) * float(rejected[b, t])
            for t in range(TOKENS)
            if rejected_counted[b, t]
        )
        assert float(plain[b]) == pytest.approx(minus_log_sigmoid(0.3 * (better - worse)))
        assert float(critical[b]) == pytest.approx(minus_log_sigmoid(0.7 * (better - weighted)))


def test_the_positionwise_form_matches_a_slow_reference(pair):
    chosen, chosen_counted, rejected, rejected_counted, scores = pair
    found = positionwise_dpo_loss(*pair, gamma=0.7)
    for b in range(PAIRS):
        better = [float(r) for r, counts in zip(chosen[b], chosen_counted[b]) if counts]
        worse = [
            (1 - float(s)) * float(r)
            for s, r, counts in zip(scores[b], rejected[b], rejected_counted[b])
            if counts
        ]
        length = max(len(better), len(worse))
        better, worse = (one + [0.0] * (length - len(one)) for one in (better, worse))
        losses = [minus_log_sigmoid(0.7 * (w - r)) for w, r in zip(better, worse)]
        assert float(found[b]) == pytest.approx(sum(losses) / length)


def test_cdpo_without_scores_is_dpo_and_with_full_scores_forgets_the_rejected_side(pair):
    chosen, _, rejected, _, _ = pair
    zeros, ones = torch.zeros_like(chosen), torch.ones_like(chosen)
    torch.testing.assert_close(
        critical_dpo_loss(chosen, rejected, zeros, 0.4), dpo_loss(chosen, rejected, 0.4)
    )
    torch.testing.assert_close(
        critical_dpo_loss(chosen, rejected, ones, 0.4),
        critical_dpo_loss(chosen, 3 - rejected, ones, 0.4),
    )


def test_the_contrastive_distribution_is_a_distribution_and_without_contrast_the_positive_one():
    generator = torch.Generator().manual_seed(0)
    positive, negative = (
        torch.randn(5, 11, generator=generator, dtype=torch.float64) for _ in range(2)
    )
    probs = contrastive_probs(positive, negative, 1.0)
    torch.testing.assert_close(probs.sum(-1), torch.ones(5, dtype=torch.float64))
    torch.testing.assert_close(probs, (2 * positive - negative).softmax(-1))
    torch.testing.assert_close(contrastive_probs(positive, negative, 0.0), positive.softmax(-1))


def sides(reward_mask: float, divergence_mask: float) -> tuple[Side, Side]:
    """Two sides that need gradient, under constant masks."""
    made = []
    for seed in (0, 1):
        ratio, counted = responses(seed)
        divergence = torch.rand(
            ratio.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64
        )
        masks = (value * counted.double() for value in (reward_mask, divergence_mask))
        made.append(Side(ratio.requires_grad_(), (divergence * counted).requires_grad_(), *masks))
    return made[0], made[1]


def gradients(loss_B: Tensor, *leaves: Tensor) -> list[Tensor]:
    found = torch.autograd.grad(loss_B.sum(), leaves, allow_unused=True)
    return [torch.zeros_like(leaf) if one is None else one for one, leaf in zip(found, leaves)]


def same_where_tokens_count(own_B: Tensor, other_B: Tensor, leaves: tuple[Tensor, ...]) -> None:
    torch.testing.assert_close(own_B, other_B)
    for one, other, leaf in zip(gradients(own_B, *leaves), gradients(other_B, *leaves), leaves):
        torch.testing.assert_close(one * (leaf != 0), other * (leaf != 0))


def tdpo_loss(
    chosen_BT: Tensor,
    rejected_BT: Tensor,
    chosen_divergence_BT: Tensor,
    rejected_divergence_BT: Tensor,
    beta: float,
    alpha: float,
    second: bool,
) -> Tensor:
    """−log σ(β (Σ r_w − Σ r_l) − α β (Σ KL_l − Σ KL_w)) -> [B] (Zeng et al. 2024, equations 15 and
    18); in the second form without a gradient through the chosen side's divergence."""
    chosen_B = chosen_divergence_BT.sum(1)
    chosen_B = chosen_B.detach() if second else chosen_B
    margin_B = beta * (chosen_BT.sum(1) - rejected_BT.sum(1))
    return -F.logsigmoid(margin_B - alpha * beta * (rejected_divergence_BT.sum(1) - chosen_B))


@pytest.mark.parametrize("detach", [False, True])
def test_sparsepo_is_dpo_without_the_divergence_and_tdpo_with_all_of_it(detach):
    for divergence in (0.0, 1.0):
        chosen, rejected = sides(1.0, divergence)
        leaves = (chosen.ratio_BT, rejected.ratio_BT, chosen.divergence_BT, rejected.divergence_BT)
        other = tdpo_loss(*leaves, 0.5, 1.0, detach) if divergence else dpo_loss(*leaves[:2], 0.5)
        same_where_tokens_count(sparse_loss(chosen, rejected, 0.5, detach), other, leaves)


def test_sparsepo_matches_a_slow_reference():
    chosen, rejected = sides(0.8, 0.3)
    found = sparse_loss(chosen, rejected, 0.5)
    for b in range(PAIRS):
        u, d = [], []
        for side in (chosen, rejected):
            u.append(sum(0.8 * r for r in side.ratio_BT[b].tolist()))
            d.append(sum(-0.3 * k for k in side.divergence_BT[b].tolist()))
        assert float(found[b].detach()) == pytest.approx(
            minus_log_sigmoid(0.5 * ((u[0] - u[1]) - (d[0] - d[1])))
        )
        assert max(d) <= 0


def test_every_loss_is_log_2_where_the_policy_is_the_reference():
    zeros = torch.zeros(PAIRS, TOKENS, dtype=torch.float64)
    counted = zeros == 0
    side = Side(zeros, zeros, zeros + 0.7, zeros + 0.2)
    for loss in (
        dpo_loss(zeros, zeros, 0.3),
        critical_dpo_loss(zeros, zeros, zeros + 0.5, 0.3),
        positionwise_dpo_loss(zeros, counted, zeros, counted, zeros + 0.5, 0.3),
        sparse_loss(side, side, 0.3),
    ):
        torch.testing.assert_close(loss, torch.full((PAIRS,), log(2), dtype=torch.float64))


def test_activation_masks_run_from_0_to_1_over_the_response_whatever_the_scale():
    _, counted = responses(3)
    activations = torch.randn(
        2, PAIRS, TOKENS, generator=torch.Generator().manual_seed(1), dtype=torch.float64
    )
    one = activation_mask([activations[:1]], counted)
    for b in range(PAIRS):
        assert float(one[b][counted[b]].min()) == 0 and float(one[b][counted[b]].max()) == 1
        assert not one[b][~counted[b]].any()
    torch.testing.assert_close(one, activation_mask([5 * activations[:1] - 3], counted))
    both = activation_mask([activations[:1], activations[1:]], counted)
    torch.testing.assert_close(both, activation_mask([activations], counted))
    assert not activation_mask([torch.ones_like(activations)], counted).any()
