"""The preference loss on drafters: where it looks, against a slow reference, and that it helps."""

from __future__ import annotations

from math import exp, log

import pytest
import torch

from modules.contracts.batches import TextBatch
from modules.drafters.blocks.falcon import Falcon
from modules.drafters.feature.eagle import Eagle
from modules.drafters.feature.eagle3 import Eagle3
from modules.drafters.heads.clover import Clover
from modules.drafters.heads.medusa import Medusa
from modules.judges.judge import Judge
from modules.losses.chunked import training_rows
from modules.preference.aligned_drafting import AlignedDrafting, greedy_table
from modules.target.target import Target
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


def own_text(target: Target, batch: TextBatch, share: float) -> TextBatch:
    """The batch with so much of its assistant's text said by the target greedily, the rest as it
    was.
    """
    generator = torch.Generator().manual_seed(0)
    for place in range(1, batch.input_ids.shape[1]):
        final = target.features(batch, ("final",))["final"][:, place - 1]
        said = batch.loss_mask[:, place] & (torch.rand(len(final), generator=generator) < share)
        batch.input_ids[said, place] = target.logits(final).argmax(-1)[said]
    return batch


def memorised(kind, target: Target, share: float = 0.8):
    """A drafter that has learnt its batch in part, which the target said in part."""
    drafter, batch = drafter_and_batch(target, kind)
    batch = own_text(target, tiny_batch(target, rows=4), share)
    batch.states = dict(target.features(batch, drafter.training_states))
    optimizer = torch.optim.Adam(drafter.declared_parameters(), 3e-3)
    for _ in range(12):
        optimizer.zero_grad()
        drafter.loss(batch, target, 0.0).total.backward()
        optimizer.step()
    return drafter, batch


@pytest.mark.parametrize("kind", [Medusa, Eagle3])
def test_it_looks_at_the_first_divergence_of_each_row_from_the_target_alone(kind, target):
    drafter, batch = memorised(kind, target)
    objective = AlignedDrafting(beta=0.7, anchor=0.0)
    objective.begin(drafter)
    with torch.no_grad():
        for parameter in drafter.declared_parameters():
            parameter += 0.01 * torch.randn_like(parameter)
    rows, final = training_rows(batch, 3), target.features(batch, ("final",))["final"].flatten(0, 1)
    own, base = list(drafter.steps(batch, target)), list(objective.reference.steps(batch, target))
    expected, depths, left = [], [], 0
    for row in range(len(rows.tokens_MK1)):
        for depth in range(3):
            if not bool(own[depth].valid_M[row]):
                break
            distributions = [
                model.head(depth, target)(steps[depth].feature_MH[row]).log_softmax(-1).detach()
                for model, steps in ((drafter, own), (objective.reference, base))
            ]
            better = int(target.logits(final[rows.flat_MK1[row, depth + 1]]).argmax())
            label, drafted = int(own[depth].labels_M[row]), int(distributions[0].argmax())
            if better != drafted:
                margins = [float(probs[better] - probs[drafted]) for probs in distributions]
                expected.append(log(1 + exp(-0.7 * (margins[0] - margins[1]))))
                depths.append(depth)
                left += label != better
                break
            if label != better:
                break
    assert len(set(depths)) > 1 and left
    losses, margins = objective.preferences(drafter, batch, target)
    assert sorted(losses.tolist()) == pytest.approx(sorted(expected), rel=1e-5)
    assert bool((margins < 0).all())
    assert float(objective.loss(drafter, batch, target, 0.0).total.detach()) == pytest.approx(
        sum(expected) / len(expected), rel=1e-5
    )


@pytest.mark.parametrize("kind", [Eagle, Falcon])
def test_the_reference_sees_the_drafters_noise(kind, target):
    torch.manual_seed(0)
    drafter = kind(target.shape, draft_vocabulary=None, noise=5.0).double().train()
    drafter.initialise(target)
    batch = tiny_batch(target, rows=4)
    batch.states = dict(target.features(batch, drafter.training_states))
    objective = AlignedDrafting(anchor=0.0).train()
    objective.begin(drafter)
    for training in (True, False):
        losses, _ = objective.preferences(drafter.train(training), batch, target)
        torch.testing.assert_close(losses, torch.full_like(losses, log(2)))
        assert objective.reference.training == training


def test_a_target_token_that_cannot_be_drafted_is_not_preferred(target):
    _, batch = memorised(Medusa, target)
    drafter = Medusa(target.shape, heads=3, draft_vocabulary=8).double()
    greedy = greedy_table(batch, target)
    common = greedy[greedy > 0].unique()[:4].tolist()
    drafter.set_vocabulary(
        [*common, *[token for token in range(20) if token not in common][: 8 - len(common)]]
    )
    drafter.initialise(target)
    objective = AlignedDrafting()
    objective.begin(drafter)
    batch.states = dict(target.features(batch, drafter.training_states))
    _, margins = objective.preferences(drafter, batch, target)
    first = next(iter(drafter.steps(batch, target)))
    assert (
        0
        < len(margins)
        <= int(torch.isin(greedy[first.flat_M[first.valid_M]], torch.tensor(common)).sum())
    )


def test_it_is_log_2_at_the_start_and_adds_the_drafters_own_loss(target):
    drafter, batch = drafter_and_batch(target)
    objective = AlignedDrafting(anchor=0.5)
    objective.begin(drafter)
    losses = objective.loss(drafter, batch, target, 0.0)
    own = drafter.loss(batch, target, 0.0)
    assert float(losses.total.detach()) == pytest.approx(
        log(2) + 0.5 * float(own.total.detach()), rel=1e-6
    )
    assert set(losses.metrics) == {*own.metrics, "alignment", "margin"}


@pytest.mark.parametrize("kind", [Medusa, Clover, Eagle3])
def test_training_on_it_alone_makes_the_targets_tokens_likelier(kind, target):
    """Whatever the text says: here it is random, and hardly ever what the target would say."""
    drafter, batch = drafter_and_batch(target, kind)
    objective = AlignedDrafting(beta=1.0, anchor=0.0)
    objective.begin(drafter)
    optimizer = torch.optim.Adam(drafter.declared_parameters(), 3e-3)

    def hits() -> int:
        step = next(iter(drafter.steps(batch, target)))
        best = drafter.head(0, target)(step.feature_MH).argmax(-1)
        return int((best == greedy_table(batch, target)[step.flat_M])[step.valid_M].sum())

    before = hits()
    for _ in range(15):
        optimizer.zero_grad()
        objective.loss(drafter, batch, target, 0.0).total.backward()
        optimizer.step()
    assert hits() > before
    assert all(
        parameter.grad is None for parameter in (*objective.parameters(), *target.parameters())
    )


def test_wrong_uses_are_named(target):
    with pytest.raises(ValueError, match="objective.beta"):
        AlignedDrafting(beta=0.0)
    with pytest.raises(ValueError, match="objective.anchor"):
        AlignedDrafting(anchor=-1.0)
    with pytest.raises(ValueError, match="Judge does not draft step by step"):
        AlignedDrafting().begin(Judge(target.shape))
