"""DPO, cDPO and SparsePO on tiny targets: what makes each one itself."""

from __future__ import annotations

from dataclasses import replace
from math import log
from typing import Any

import pytest
import torch

from modules.contracts.batches import PreferenceBatch, TextBatch
from modules.contracts.losses import Losses
from modules.losses.chunked import next_token_rows
from modules.preference.cdpo import CDPO, PAGE, ContrastiveEstimator
from modules.preference.dpo import DPO
from modules.preference.losses import contrastive_probs
from modules.preference.policy import (
    PreferenceTrainable,
    at_tokens,
    counted,
    log_probabilities,
)
from modules.preference.sparsepo import SparsePO
from modules.target.target import Target
from tests.fakes import tiny_batch, tiny_target


@pytest.fixture(scope="module")
def target() -> Target:
    return tiny_target()


@pytest.fixture(scope="module")
def batch(target) -> PreferenceBatch:
    return PreferenceBatch(tiny_batch(target), tiny_batch(target, seed=1))


def made(
    kind: type[PreferenceTrainable], target: Target, shake: float = 0.1, **arguments: Any
) -> Any:
    """A component in float64 whose policy has moved away from the reference."""
    torch.manual_seed(0)
    trainable = kind(target.shape, rank=4, **arguments).double()
    with torch.no_grad():
        for parameter in trainable.policy.parameters():
            parameter += shake * torch.randn(
                parameter.shape, generator=torch.Generator().manual_seed(7)
            )
    return trainable.eval()


def total(trainable: PreferenceTrainable, batch: PreferenceBatch, target: Target) -> Losses:
    return trainable.loss(batch, target, 0.5)


def same_loss_and_gradient(one: Any, other: Any, batch: PreferenceBatch, target: Target) -> None:
    losses = [total(trainable, batch, target).total for trainable in (one, other)]
    torch.testing.assert_close(*losses)
    found = [
        torch.autograd.grad(loss, list(trainable.policy.parameters()))
        for loss, trainable in zip(losses, (one, other))
    ]
    for first, second in zip(*found):
        torch.testing.assert_close(first, second)


@pytest.mark.parametrize(
    ("kind", "arguments"),
    [
        (DPO, {}),
        (CDPO, {}),
        (CDPO, {"positionwise": True}),
        (SparsePO, {"masks": "ones"}),
        (SparsePO, {"masks": "activations"}),
    ],
)
def test_the_loss_is_log_2_before_training(kind, arguments, target, batch):
    losses = total(made(kind, target, shake=0.0, **arguments), batch, target)
    assert float(losses.total.detach()) == pytest.approx(log(2))
    assert float(losses.metrics["reward_margin"].total) == pytest.approx(0)
    assert float(losses.metrics["preference_accuracy"].count) == 2


def test_cdpo_with_scores_of_0_is_dpo(target, batch, monkeypatch):
    critical = made(CDPO, target, gamma=0.3)
    monkeypatch.setattr(
        critical, "scores", lambda text, _: torch.zeros(text.input_ids.shape, dtype=torch.float64)
    )
    same_loss_and_gradient(critical, made(DPO, target, beta=0.3), batch, target)


def test_cdpo_with_scores_of_1_does_not_look_at_the_rejected_response(target, batch, monkeypatch):
    critical = made(CDPO, target, gamma=0.3)
    monkeypatch.setattr(
        critical, "scores", lambda text, _: torch.ones(text.input_ids.shape, dtype=torch.float64)
    )
    other = PreferenceBatch(batch.chosen, tiny_batch(target, seed=5))
    torch.testing.assert_close(
        total(critical, batch, target).total, total(critical, other, target).total
    )


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_log_ratios_and_divergences_at_16_bits_are_not_of_rounded_logits(dtype):
    """Against float64 on the same states and weights. A policy that has moved little differs from
    its reference by less than what logits of 16 bits are rounded by."""
    target = tiny_target(dtype=dtype)
    text, size = tiny_batch(target), target.shape.vocab_size
    sparse = SparsePO(target.shape, rank=4, masks="ones")
    for parameter in sparse.policy.parameters():
        parameter += 0.02 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(7))
    sparse.eval()
    weight_VH = target.architecture.head.weight.double()

    def head(hidden: torch.Tensor) -> torch.Tensor:
        return hidden.double() @ weight_VH.T

    found = sparse.response(text, None, target)
    reference_BTH = target.features(text, ("final",))["final"]
    close = {"rtol": 0.0, "atol": 1e-4}
    for given_BT, final_BTH in (
        (found.log_probability_BT, found.final_BTH),
        (found.reference_BT, reference_BTH),
    ):
        exact_BT = log_probabilities(text, final_BTH, head, size)
        torch.testing.assert_close(given_BT.double(), exact_BT, **close)
    policy, reference = head(found.final_BTH).log_softmax(-1), head(reference_BTH).log_softmax(-1)
    exact_BT = torch.nn.functional.pad((reference.exp() * (reference - policy)).sum(-1), (1, 0))[
        :, :-1
    ] * counted(text)
    given_BT = sparse.divergences(text, found, reference_BTH, target)
    torch.testing.assert_close(given_BT.double(), exact_BT, **close)


@torch.no_grad()
def test_the_contrast_at_16_bits_is_not_of_rounded_logits():
    target = tiny_target(dtype=torch.bfloat16)
    text = tiny_batch(target)
    estimator = ContrastiveEstimator(target.shape, rank=4).eval()
    for parameter in estimator.parameters():
        parameter += 0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(7))
    found_BT = estimator.scores(text, target)
    positive, negative = (
        adapters.twin(target, training=False).features(text, ("final",))["final"].double()
        @ target.architecture.head.weight.double().T
        for adapters in (estimator.positive, estimator.negative)
    )
    distributions = contrastive_probs(
        positive.flatten(0, 1), negative.flatten(0, 1), estimator.contrast
    )
    flat_M, labels_M = next_token_rows(text)
    exact_BT = at_tokens(text, distributions[flat_M].gather(1, labels_M[:, None])[:, 0])
    torch.testing.assert_close(found_BT.double(), exact_BT, rtol=0, atol=1e-4)


def test_the_reference_is_run_once_per_row_whatever_the_padding(target, batch, monkeypatch):
    plain, calls = made(DPO, target), []
    features = target.features
    monkeypatch.setattr(
        target, "features", lambda *args, **options: calls.append(1) or features(*args, **options)
    )
    total(plain, batch, target)
    assert len(calls) == 2

    def padded(text: TextBatch) -> TextBatch:
        wider = [
            torch.nn.functional.pad(part, (0, 4), value=value)
            for part, value in (
                (text.input_ids, 0),
                (text.loss_mask, False),
                (text.position_ids, 0),
                (text.document_ids, -1),
            )
        ]
        return TextBatch(*wider)

    first = total(plain, batch, target).total
    second = total(
        plain, PreferenceBatch(padded(batch.chosen), padded(batch.rejected)), target
    ).total
    assert len(calls) == 2
    torch.testing.assert_close(first, second)
    given = replace(
        batch,
        **{
            f"{side}_reference": plain.response(getattr(batch, side), None, target).reference_BT
            for side in ("chosen", "rejected")
        },
    )
    torch.testing.assert_close(first, total(made(DPO, target), given, target).total)


def test_dpo_learns_its_pairs_and_the_adapted_target_prefers_them(target, batch):
    plain = made(DPO, target, shake=0.0, beta=0.5).train()
    optimizer = torch.optim.Adam(plain.policy.parameters(), 1e-2)
    for _ in range(12):
        optimizer.zero_grad()
        total(plain, batch, target).total.backward()
        optimizer.step()
    metrics = total(plain, batch, target).metrics
    assert (
        float(metrics["preference_accuracy"].total) == 2
        and float(metrics["reward_margin"].total) > 1
    )
    adapted = plain.adapt(target)
    assert adapted.name.endswith("+dpo") and adapted.fingerprint() != target.fingerprint()
    assert all("policy" in name for name in plain.state_dict())


# -- the contrastive estimator ---------------------------------------------------------------------

PLANTED, RIGHT, WRONG = 9, 70, 71


def trajectories(seed: int, wrong: bool) -> TextBatch:
    """Prompts of six random tokens that the answer repeats; its planted token is RIGHT or WRONG,
    the rest is shared.
    """
    generator = torch.Generator().manual_seed(seed)
    asked = torch.randint(5, 60, (8, 6), generator=generator)
    ids = torch.cat([asked, asked], 1)
    ids[:, PLANTED] = WRONG if wrong else RIGHT
    mask = torch.zeros_like(ids, dtype=torch.bool)
    mask[:, 6:] = True
    return TextBatch(ids, mask, torch.arange(12).expand(8, -1), torch.zeros_like(ids))


def test_a_planted_error_gets_the_lowest_score(target):
    torch.manual_seed(0)
    estimator = ContrastiveEstimator(target.shape, rank=8, dropout=0.0).double()
    optimizer = torch.optim.Adam(estimator.parameters(), 2e-2)
    for step in range(40):
        pairs = PreferenceBatch(trajectories(step, False), trajectories(step, True))
        optimizer.zero_grad()
        estimator.loss(pairs, target, 0.0).total.backward()
        optimizer.step()
    unseen = trajectories(1000, True)
    scores = estimator.scores(unseen, target)
    assert not scores[:, :6].any() and float(scores.min()) >= 0 and float(scores.max()) <= 1
    lowest = scores[:, 6:].argmin(1) + 6
    assert float((lowest == PLANTED).double().mean()) >= 0.8
    assert all(parameter.grad is None for parameter in target.parameters())


def test_scores_are_those_of_the_contrast_and_cost_one_pass(target, batch, monkeypatch):
    critical = made(CDPO, target)
    with torch.no_grad():
        for parameter in critical.estimator.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    positive, negative = (
        adapters.merged(target)
        for adapters in (critical.estimator.positive, critical.estimator.negative)
    )
    with torch.no_grad():
        probs = (
            2
            * positive.logits(positive.features(batch.rejected, ("final",))["final"]).log_softmax(
                -1
            )
            - negative.logits(negative.features(batch.rejected, ("final",))["final"]).log_softmax(
                -1
            )
        ).softmax(-1)
    found = critical.scores(batch.rejected, target)
    for b, t in counted(batch.rejected).nonzero().tolist():
        assert float(found[b, t]) == pytest.approx(
            float(probs[b, t - 1, batch.rejected.input_ids[b, t]]), abs=1e-6
        )
    monkeypatch.setattr(critical.estimator, "scores", None)
    torch.testing.assert_close(found, critical.scores(batch.rejected, target))


def test_the_estimator_is_a_stage_of_its_own_and_frozen_behind_it(target):
    critical = made(CDPO, target, estimator_epochs=3, estimator_lr=0.5)
    (stage,) = critical.stages
    assert (stage.part, stage.epochs, stage.lr) == (critical.estimator, 3, 0.5)
    own = {id(parameter) for parameter in critical.declared_parameters()}
    assert own == {id(parameter) for parameter in critical.policy.parameters()}
    assert {name.rsplit(".", 2)[-2] for name, _ in critical.estimator.named_parameters()} == {
        "gate_proj",
        "up_proj",
        "down_proj",
    }


def test_the_page_shows_every_token_of_the_wrong_response(target, batch):
    page = made(CDPO, target).finish([batch], target).pages[PAGE]
    assert page.startswith("<!doctype html>") and page.count('class="lowest"') == 2
    assert page.count('title="s = ') == int(counted(batch.rejected).sum())
    assert "http" not in page and "<script" not in page


def test_known_errors_are_found_by_their_scores_or_not(target, batch, monkeypatch):
    """Two responses, one of them with a known error: the figures are about that one alone."""
    critical, scored = made(CDPO, target), counted(batch.rejected)
    errors = torch.zeros_like(scored)
    places = scored[0].nonzero()[:, 0]
    errors[0, places[3]] = True
    known = replace(batch, errors=errors)
    for at_error, area, first in ((0.0, 1.0, 1.0), (0.5, 0.5, 0.0), (1.0, 0.0, 0.0)):
        scores = torch.where(errors, at_error, 0.5) * scored
        scores[0, places[0]] = scores[0, places[0]] - 1e-3 if first == 0 else 0.5
        monkeypatch.setattr(critical, "scores", lambda *_, scores=scores: scores)
        outcome = critical.finish([known], target)
        assert outcome.figures["held_out/criticality_auc"] == pytest.approx(area, abs=0.06)
        assert outcome.figures["held_out/most_critical_is_error"] == first
        assert outcome.figures["held_out/known_errors"] == 1
    assert outcome.pages[PAGE].count('class="error"') == 1
    figures = critical.finish(
        [replace(known, inferred=torch.tensor([True, False]))], target
    ).figures
    assert figures == {
        name.replace("/", "/inferred_"): value for name, value in outcome.figures.items()
    }
    with torch.no_grad():
        own = target.logits(target.features(batch.rejected, ("final",))["final"]).log_softmax(-1)
    surprise = [-float(own[0, t - 1, batch.rejected.input_ids[0, t]]) for t in places.tolist()]
    above = sum(value < surprise[3] for value in surprise) / (len(surprise) - 1)
    assert outcome.figures["held_out/surprise_auc"] == pytest.approx(above)
    assert critical.finish([batch], target).figures == {}


def test_wrong_settings_are_named(target):
    for kind, arguments, key in (
        (DPO, {"beta": 0.0}, "beta"),
        (DPO, {"rank": 0}, "rank"),
        (CDPO, {"contrast": -1.0}, "contrast"),
        (CDPO, {"estimator_epochs": 0}, "epochs"),
        (CDPO, {"estimator_lr": 0.0}, "estimator_lr"),
        (SparsePO, {"masks": "none"}, "masks"),
        (SparsePO, {"activations": ["keys"]}, "activations"),
        (SparsePO, {"sparsity": -1.0}, "sparsity"),
    ):
        with pytest.raises(ValueError, match=key):
            kind(target.shape, **arguments)
    with pytest.raises(ValueError, match="dpo needs a Llama-type target"):
        DPO(tiny_target("gpt2").shape).adapt(tiny_target("gpt2"))
