"""Losses that aim at acceptance, in drafters of every kind, against sums over tokens."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from math import exp, log
from typing import Any

import pytest
import torch
from torch import Tensor

from modules.contracts.batches import TeacherProbs, TextBatch
from modules.drafters.block_diffusion.dflash import DFlash
from modules.drafters.blocks.falcon import Falcon
from modules.drafters.feature.eagle import Eagle
from modules.drafters.feature.eagle3 import Eagle3
from modules.drafters.feature.fspad import Fspad
from modules.drafters.heads.chimera import Chimera
from modules.drafters.heads.clover import Clover
from modules.drafters.heads.clover2 import Clover2
from modules.drafters.heads.hydra import Hydra
from modules.drafters.heads.medusa import Medusa
from modules.drafters.same_pass.hidden_transfer import HiddenTransfer
from modules.drafters.same_pass.ppd import PPD
from modules.drafters.trained import DraftStep, TrainedDrafter
from modules.losses import chunked
from tests.fakes import tiny_batch, tiny_target
from tests.modules.conformance import check_gradients, check_no_labels
from tests.modules.families import filled

TARGET = tiny_target()
DRAFTED = 40
KINDS: dict[str, Callable[..., TrainedDrafter]] = {
    "eagle": lambda **more: Eagle(TARGET.shape, DRAFTED, steps=3, **more),
    "eagle3": lambda **more: Eagle3(TARGET.shape, DRAFTED, **more),
    "fspad": lambda **more: Fspad(TARGET.shape, DRAFTED, steps=3, **more),
    "medusa": lambda **more: Medusa(TARGET.shape, 3, draft_vocabulary=DRAFTED, **more),
    "clover": lambda **more: Clover(TARGET.shape, 3, DRAFTED, **more),
    "clover2": lambda **more: Clover2(TARGET.shape, 3, draft_vocabulary=DRAFTED, **more),
    "hydra": lambda **more: Hydra(TARGET.shape, 3, draft_vocabulary=DRAFTED, dropout=0, **more),
    "chimera": lambda **more: Chimera(
        TARGET.shape, 3, draft_vocabulary=DRAFTED, labels="soft", **more
    ),
    "falcon": lambda **more: Falcon(
        TARGET.shape, 3, DRAFTED, hard_weight=0, glancing=0, dropout=0, **more
    ),
    "dflash": lambda **more: DFlash(TARGET.shape, 3, 1, DRAFTED, anchors=99, labels="soft", **more),
    "ppd": lambda **more: PPD(TARGET.shape, 3, draft_vocabulary=DRAFTED, **more),
    "hidden_transfer": lambda **more: HiddenTransfer(
        TARGET.shape, 3, draft_vocabulary=DRAFTED, **more
    ),
}
ROW_LOSSES: dict[str, Callable[[list[float], list[float], list[float]], float]] = {
    # p as it is, p renormalised, q; all over the draft vocabulary
    "cross_entropy": lambda p, r, q: -sum(x * log(y) for x, y in zip(r, q, strict=True)),
    "forward_kl": lambda p, r, q: sum(x * log(x / y) for x, y in zip(r, q, strict=True)),
    "total_variation": lambda p, r, q: 1 - sum(map(min, p, q)),
    "lk": lambda p, r, q: -log(sum(map(min, p, q))),
    "lk_hybrid": lambda p, r, q: (
        (share := exp(-3 * sum(map(min, p, q)))) * ROW_LOSSES["forward_kl"](p, r, q)
        + (1 - share) * (1 - sum(map(min, p, q)))
    ),
}


def made(kind: str, **more: Any) -> TrainedDrafter:
    """A drafter of 40 random tokens in float64, its weights shaken."""
    torch.manual_seed(0)
    drafter = KINDS[kind](**more).double()
    drafter.set_vocabulary(torch.randperm(128)[:DRAFTED])
    drafter.initialise(TARGET)
    with torch.no_grad():
        for parameter in drafter.declared_parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.05)
    return drafter.eval()


def prepared(drafter: TrainedDrafter) -> TextBatch:
    batch = tiny_batch(TARGET)
    return batch if drafter.online else filled(batch, drafter, TARGET)


def slow_rows(
    drafter: TrainedDrafter, batch: TextBatch, step: DraftStep, loss: str
) -> dict[int, float]:
    """The loss of every valid row, from the target's whole distribution."""
    final = TARGET.features(batch, ("final",))["final"].flatten(0, 1)
    vocabulary, found = drafter.vocabulary_D, {}
    assert vocabulary is not None
    for m in step.valid_M.nonzero()[:, 0].tolist():
        p = TARGET.logits(final[step.flat_M[m]]).softmax(-1)[vocabulary].tolist()
        q = drafter.head(step.depth, TARGET)(step.feature_MH[m]).softmax(-1).tolist()
        found[m] = ROW_LOSSES[loss](p, [x / sum(p) for x in p], q)
    return found


@pytest.mark.parametrize("divergence", ROW_LOSSES)
@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_every_drafter_has_every_loss(kind: str, divergence: str) -> None:
    """Total variation counts every label, the others those that can be drafted."""
    drafter = made(kind, divergence=divergence)
    batch = prepared(drafter)
    for step in drafter.steps(batch, TARGET):
        slowly = slow_rows(drafter, batch, step, divergence)
        draftable = {
            m
            for m in slowly
            if bool((drafter.vocabulary_D == batch.input_ids.flatten()[step.flat_M[m] + 1]).any())
        }
        counted = slowly.keys() if divergence == "total_variation" else draftable
        assert draftable and len(draftable) < len(slowly)
        assert step.counted_M.nonzero()[:, 0].tolist() == sorted(counted)
        for m, expected in slowly.items():
            loss = float(step.losses_M[m])
            assert loss == pytest.approx(expected if m in counted else 0.0, rel=1e-6)
        total, count = step.metrics()[f"{divergence}_{step.depth}"]
        assert int(count) == len(counted)
        assert float(total) == pytest.approx(sum(slowly[m] for m in counted), rel=1e-6)


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_expected_length_counts_how_far_chains_are_accepted(kind: str) -> None:
    drafter = made(kind, divergence="expected_length")
    batch, reached = prepared(drafter), {}
    for step in drafter.steps(batch, TARGET):
        for m, rejected in slow_rows(drafter, batch, step, "total_variation").items():
            reached[m] = reached.get(m, 1.0) * (1 - rejected)
            assert float(step.losses_M[m]) == pytest.approx(1 - reached[m], rel=1e-6)


def test_with_a_decay_of_1_eagle_3_maximises_the_expected_length_itself() -> None:
    """Σ_k mean(1 − Π_{j≤k} α_j), and its gradient through all steps at once."""
    drafter = made("eagle3", divergence="expected_length", decay=1.0)
    batch = prepared(drafter)
    losses = drafter.loss(batch, TARGET, 0.0)
    losses.total.backward()
    fast = {name: p.grad.clone() for name, p in drafter.named_parameters() if p.grad is not None}
    drafter.zero_grad()
    # Slowly: all logits at once.
    rows = drafter.rows(batch, TARGET)
    final, kept, total = batch.states["final"].flatten(0, 1), torch.ones(()).double(), 0.0
    for j, (feature, _) in enumerate(drafter.unrolled(batch, TARGET, rows)):
        p = TARGET.logits(final[rows.flat_MK1[:, j + 1]]).softmax(-1)[:, drafter.vocabulary_D]
        q, valid = drafter.head(j, TARGET)(feature).softmax(-1), rows.valid_MK[:, j]
        kept = kept * torch.where(valid, torch.minimum(p, q).sum(-1), 1.0)
        total = total + (1 - kept[valid]).mean()
    torch.testing.assert_close(losses.total, total)
    total.backward()
    for name, parameter in drafter.named_parameters():
        torch.testing.assert_close(fast[name], parameter.grad, msg=name)


@pytest.mark.parametrize("divergence", ["lk", "total_variation", "expected_length"])
@pytest.mark.parametrize("kind", ["eagle3", "medusa", "clover", "falcon", "dflash"])
def test_they_train_like_any_loss(kind: str, divergence: str) -> None:
    check_gradients(made(kind, divergence=divergence), TARGET)
    check_no_labels(made(kind, divergence=divergence), TARGET)


@pytest.mark.parametrize("divergence", ["total_variation", "lk_hybrid"])
def test_chunks_of_rows_change_nothing(monkeypatch: pytest.MonkeyPatch, divergence: str) -> None:
    def gradients() -> list[Tensor]:
        drafter = made("clover2", divergence=divergence)
        drafter.loss(prepared(drafter), TARGET, 0.0).total.backward()
        return [p.grad for p in drafter.declared_parameters() if p.grad is not None]

    whole = gradients()
    monkeypatch.setattr(chunked, "MAX_LOGITS", 3 * DRAFTED)
    monkeypatch.setattr(chunked, "MAX_PROBS", DRAFTED)
    for one, other in zip(gradients(), whole, strict=True):
        torch.testing.assert_close(one, other)


@torch.no_grad()
def test_distributions_that_come_with_the_batch_are_not_renormalised() -> None:
    drafter = made("eagle3", divergence="lk")
    batch = prepared(drafter)
    expected = drafter.loss(batch, TARGET, 0.0).total
    final = batch.states["final"].flatten(0, 1)
    every = torch.arange(len(final))
    tokens = torch.arange(128).expand(len(final), -1)
    teacher = TeacherProbs(every, tokens, TARGET.logits(final).softmax(-1), 128)
    found = drafter.loss(replace(batch, teacher=teacher), TARGET, 0.0).total
    torch.testing.assert_close(found, expected)


@torch.no_grad()
def test_the_whole_vocabulary_needs_no_mass_outside() -> None:
    drafter = Eagle3(TARGET.shape, steps=1, divergence="total_variation").double().eval()
    batch = filled(tiny_batch(TARGET), drafter, TARGET)
    step = next(iter(drafter.steps(batch, TARGET)))
    assert step.distributions is not None
    sums = step.distributions(step.flat_M).sum(-1)
    torch.testing.assert_close(sums, torch.ones_like(sums))


def test_heads_learn_tokens_or_distributions() -> None:
    assert (
        not Medusa(TARGET.shape).soft_labels and Medusa(TARGET.shape, divergence="lk").soft_labels
    )
    assert Clover(TARGET.shape, divergence="cross_entropy").training_states == ("pre_norm", "final")


def test_mistakes_are_one_line() -> None:
    for build, words in (
        (lambda: Eagle3(TARGET.shape, divergence="x"), "divergence 'x' is unknown: use one of "),
        (lambda: Medusa(TARGET.shape, divergence="x"), "divergence 'x' is unknown: use one of "),
        (
            lambda: Hydra(TARGET.shape, labels="hard", divergence="lk"),
            "divergence 'lk' compares with the target's distributions, but labels is 'hard': set "
            "labels to 'soft', or divergence to 'cross_entropy'",
        ),
        (
            lambda: PPD(TARGET.shape, labels="hard", divergence="lk"),
            "set labels to 'soft', or divergence to 'forward_kl'",
        ),
    ):
        with pytest.raises(ValueError, match=words):
            build()
