"""The preference loss on drafters: where it looks, against a slow reference, and that it helps."""

from __future__ import annotations

from math import exp, log

import pytest
import torch

from modules.alignment.aligned_drafting import AlignedDrafting
from modules.core.losses import training_rows
from modules.core.target import Target
from modules.feature_drafters.eagle3 import Eagle3
from modules.heads.clover import Clover
from modules.heads.medusa import Medusa
from modules.verifiers.judge import Judge
from tests.fakes import tiny_batch, tiny_target


@pytest.fixture(scope="module")
def target() -> Target:
    return tiny_target()


def drafter_and_batch(target: Target, kind=Medusa):
    torch.manual_seed(0)
    steps = {"steps": 3} if kind is Eagle3 else {"heads": 3}
    drafter = kind(target.shape, draft_vocabulary=None, **steps).double()
    drafter.initialise(target)
    with torch.no_grad():
        for parameter in drafter.parameters():
            parameter += 0.02 * torch.randn_like(parameter)
    batch = tiny_batch(target, rows=4)
    batch.states = dict(target.features(batch, drafter.training_states))
    return drafter, batch


def test_it_looks_at_the_first_divergence_of_each_row_alone(target):
    drafter, batch = drafter_and_batch(target)
    objective = AlignedDrafting(beta=0.7, anchor=0.0)
    objective.begin(drafter)
    with torch.no_grad():
        for parameter in drafter.parameters():
            parameter += 0.05 * torch.randn_like(parameter)
    rows = training_rows(batch, 3)
    for row in range(0, len(rows.tokens_MK1), 3):
        steps = list(drafter.steps(batch, target))
        with torch.no_grad():
            best = drafter.head(0, target)(steps[0].feature_MH[row]).argmax()
        batch.input_ids.view(-1)[rows.flat_MK1[row, 1] + 1] = best
    own, base = list(drafter.steps(batch, target)), list(objective.reference.steps(batch, target))
    expected, depths = [], []
    for row in range(len(rows.tokens_MK1)):
        for depth in range(3):
            if not bool(own[depth].counted_M[row]):
                break
            laws = [model.head(depth, target)(steps[depth].feature_MH[row]).log_softmax(-1).detach()
                    for model, steps in ((drafter, own), (objective.reference, base))]
            label, drafted = int(own[depth].labels_M[row]), int(laws[0].argmax())
            if label != drafted:
                margins = [float(law[label] - law[drafted]) for law in laws]
                expected.append(log(1 + exp(-0.7 * (margins[0] - margins[1]))))
                depths.append(depth)
                break
    assert len(set(depths)) > 1
    losses, margins = objective.preferences(drafter, batch, target)
    assert sorted(losses.tolist()) == pytest.approx(sorted(expected), rel=1e-5)
    assert bool((margins < 0).all())
    assert float(objective.loss(drafter, batch, target, 0.0).total.detach()) == pytest.approx(
        sum(expected) / len(expected), rel=1e-5)


def test_it_is_log_2_at_the_start_and_adds_the_drafters_own_loss(target):
    drafter, batch = drafter_and_batch(target)
    objective = AlignedDrafting(anchor=0.5)
    objective.begin(drafter)
    losses = objective.loss(drafter, batch, target, 0.0)
    own = drafter.loss(batch, target, 0.0)
    assert float(losses.total.detach()) == pytest.approx(log(2) + 0.5 * float(own.total.detach()), rel=1e-6)
    assert set(losses.metrics) == {*own.metrics, "alignment", "margin"}


@pytest.mark.parametrize("kind", [Medusa, Clover, Eagle3])
def test_training_on_it_alone_makes_the_texts_tokens_likelier(kind, target):
    drafter, batch = drafter_and_batch(target, kind)
    objective = AlignedDrafting(beta=1.0, anchor=0.0)
    objective.begin(drafter)
    optimizer = torch.optim.Adam(drafter.declared_parameters(), 3e-3)

    def hits() -> int:
        return int((next(iter(drafter.steps(batch, target))).ranks_M == 0).sum())
    before = hits()
    for _ in range(15):
        optimizer.zero_grad()
        objective.loss(drafter, batch, target, 0.0).total.backward()
        optimizer.step()
    assert hits() > before
    assert all(parameter.grad is None for parameter in (*objective.parameters(), *target.parameters()))


def test_wrong_uses_are_named(target):
    with pytest.raises(ValueError, match="objective.beta"):
        AlignedDrafting(beta=0.0)
    with pytest.raises(ValueError, match="objective.anchor"):
        AlignedDrafting(anchor=-1.0)
    with pytest.raises(ValueError, match="Judge does not draft step by step"):
        AlignedDrafting().begin(Judge(target.shape))
