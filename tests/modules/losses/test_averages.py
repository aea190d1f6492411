"""Processes that hold unequal numbers of labels have, together, the loss and gradients of their
common batch.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import fields
from threading import Barrier, Lock
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from modules.contracts.batches import LabelledBatch, PreferenceBatch, TextBatch
from modules.contracts.trainable import Trainable
from modules.judges.judge import Judge
from modules.losses.averages import SharedCount, divisor, shared_counts
from modules.preference.aligned_drafting import AlignedDrafting
from modules.preference.cdpo import ContrastiveEstimator
from modules.preference.policy import PreferenceTrainable, Response
from modules.target.target import Target
from tests.fakes import tiny_batch, tiny_target
from tests.modules.families import FAMILIES, built

TARGET = tiny_target()
LOCK = Lock()
"""A target runs one batch at a time."""


def halves(batch: TextBatch) -> list[TextBatch]:
    """Each row as a batch of its own."""
    rows = [
        {
            field.name: getattr(batch, field.name)[i : i + 1]
            for field in fields(batch)
            if field.name not in ("states", "teacher")
        }
        for i in range(2)
    ]
    return [
        TextBatch(**row, states={name: state[i : i + 1] for name, state in batch.states.items()})
        for i, row in enumerate(rows)
    ]


def unequal(trainable: Trainable) -> TextBatch:
    """Of two rows the second has a third of the labels."""
    batch = tiny_batch(TARGET)
    batch.loss_mask[1, 7:] = False
    batch.states = TARGET.features(batch, trainable.training_states)
    return batch


def gradients(trainable: Trainable, loss: Callable[[], Tensor]) -> tuple[Tensor, list[Tensor]]:
    parameters = list(trainable.declared_parameters())
    total = loss()
    found = torch.autograd.grad(total, parameters, allow_unused=True)
    return total.detach(), [
        torch.zeros_like(p) if g is None else g for p, g in zip(parameters, found, strict=True)
    ]


def on_two_processes(trainable: Trainable, batches: list) -> tuple[Tensor, list[Tensor]]:
    """The mean of what two threads compute, which meet wherever counts are shared."""
    counts: dict[int, Tensor] = {}
    meetings = []
    barrier = Barrier(2, timeout=60)

    def process(rank: int) -> tuple[Tensor, list[Tensor]]:
        def mean(count: Tensor) -> Tensor:
            counts[rank] = count
            meetings.append(rank)
            barrier.wait()
            found = (counts[0] + counts[1]) / 2
            barrier.wait()
            return found

        with shared_counts(mean):
            return gradients(trainable, lambda: trainable.loss(batches[rank], TARGET, 0.5).total)

    with ThreadPoolExecutor(2) as pool:
        first, second = pool.map(process, range(2))
    assert sorted(meetings) == [0, 1]
    return (first[0] + second[0]) / 2, [
        (a + b) / 2 for a, b in zip(first[1], second[1], strict=True)
    ]


def agree(trainable: Trainable, whole: object, batches: list) -> None:
    expected = gradients(trainable, lambda: trainable.loss(whole, TARGET, 0.5).total)
    found = on_two_processes(trainable, batches)
    torch.testing.assert_close(found[0], expected[0], rtol=1e-6, atol=1e-9)
    for one, other in zip(found[1], expected[1], strict=True):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("name", FAMILIES)
def test_two_processes_have_the_loss_of_the_common_batch(name: str) -> None:
    drafter = built(name, TARGET, shake=0.1).eval()
    batch = unequal(drafter)
    agree(drafter, batch, halves(batch))


def test_a_judge_weighs_wrong_tokens_by_all_processes_labels() -> None:
    judge = Judge(TARGET.shape).double().eval()
    torch.nn.init.normal_(judge.linear.weight)
    batch = unequal(judge)
    labels = (
        torch.rand(batch.input_ids.shape, generator=torch.Generator().manual_seed(0)) < 0.7
    ).long()
    labels[1] = 1
    agree(
        judge,
        LabelledBatch(batch, labels),
        [LabelledBatch(text, labels[i : i + 1]) for i, text in enumerate(halves(batch))],
    )


def test_a_preference_and_its_anchor_are_shared_together() -> None:
    drafter = built("medusa", TARGET, shake=0.1)
    objective = AlignedDrafting()
    objective.begin(drafter)
    with torch.no_grad():
        for parameter in drafter.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    batch = unequal(drafter)
    whole: Any = SimpleNamespace(
        loss=lambda *given: objective.loss(drafter, *given),
        declared_parameters=drafter.declared_parameters,
    )
    agree(whole, batch, halves(batch))


def test_both_sides_of_an_estimator_are_shared_together() -> None:
    estimator = ContrastiveEstimator(TARGET.shape, 2, dropout=0.0).double()
    torch.manual_seed(0)
    for parameter in estimator.parameters():
        parameter.data.normal_(0, 0.1)
    chosen, rejected = tiny_batch(TARGET), tiny_batch(TARGET, seed=1)
    rejected.loss_mask[0, 5:] = False
    sides = zip(halves(chosen), halves(rejected), strict=True)
    agree(estimator, PreferenceBatch(chosen, rejected), [PreferenceBatch(*side) for side in sides])


class Pairs(PreferenceTrainable):
    """Each pair's loss is its chosen log-ratio."""

    def response(self, text: TextBatch, reference_BT: Tensor | None, target: Target) -> Response:
        with LOCK:
            return super().response(text, reference_BT, target)

    def pair_losses(self, batch, chosen, rejected, target):
        return chosen.ratio_BT.sum(1), {}


def test_pairs_count_alike_on_processes_with_more_and_fewer() -> None:
    torch.manual_seed(0)
    policy = Pairs(TARGET.shape, 2, 4.0, 0.0, 1.0).double()
    for parameter in policy.parameters():
        parameter.data.normal_(0, 0.1)
    two, one = tiny_batch(TARGET), tiny_batch(TARGET, rows=1, seed=1)
    whole = TextBatch(
        *(torch.cat([getattr(two, f.name), getattr(one, f.name)]) for f in fields(two)[:4])
    )
    agree(
        policy,
        PreferenceBatch(whole, whole),
        [PreferenceBatch(two, two), PreferenceBatch(one, one)],
    )


def test_counts_that_wait_are_shared_together_as_they_are() -> None:
    flat: list[Tensor] = []
    with shared_counts(lambda counts: flat.append(counts) or counts / 2):
        one = SharedCount(torch.tensor(3))
        many = SharedCount(torch.tensor([[1.5, 0.0], [4.0, 5.0]], dtype=torch.float64))
        assert float(one.divisor()) == 1.5
        assert many.divisor().tolist() == [[0.75, 1.0], [2.0, 2.5]]
        SharedCount(torch.tensor(6)).mean()
    assert [each.tolist() for each in flat] == [[3.0, 1.5, 0.0, 4.0, 5.0], [6.0]]
    assert many.mean().dtype == torch.float64 and SharedCount(torch.tensor(3)).mean() == 3


def test_nothing_counted_divides_by_one() -> None:
    assert int(divisor(torch.tensor(0))) == 1 and int(divisor(torch.tensor(3))) == 3
    with shared_counts(lambda count: count / 2):
        assert float(divisor(torch.tensor(1))) == 0.5
