"""The checks that every component passes, each for a given one: recipes and drafters that tests
make are held against the same contract.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from modules.contracts.batches import LabelledBatch, PreferenceBatch, TextBatch
from modules.contracts.drafter import Drafter
from modules.contracts.sampling import Sampling
from modules.contracts.trainable import Trainable
from modules.decoding.decoder import SpeculativeDecoder
from modules.losses.averages import shared_counts
from modules.target.target import Target
from modules.trees.static import StaticTree
from tests.fakes import ids_by_batch, many_prompts, tiny_batch, tiny_target
from tests.modules.sampling import Counts, first_two_tokens, homogeneous, small_target

PROMPTS = [[7, 8, 9, 10, 11], [20, 21], [30, 31, 32]]
SMALL_TREE = [(0,), (1,), (0, 0), (0, 1)]
"""Paths of a tree that a vocabulary of six tokens can fill."""
RUNS = 1000
"""Answers that a sampled distribution is estimated from."""


def check_decoding(build: Callable[[Target], Drafter]) -> None:
    """All checks of decoding, for a drafter that `build` makes in float64 for a target."""
    target, small = tiny_target(), small_target()
    check_greedy(build(target), target)
    check_greedy(build(target), target, coarse=True)
    check_batches(build(target), target)
    check_sampled(build(small), small)


def batch_for(trainable: Trainable, target: Target) -> Any:
    """A tiny batch of the kind the component wants, with the states it reads."""
    first, second = tiny_batch(target), tiny_batch(target, seed=1)
    batch: Any = {
        TextBatch: first,
        PreferenceBatch: PreferenceBatch(first, second),
        LabelledBatch: LabelledBatch(first, (first.input_ids % 2)),
    }[trainable.batch_type]
    if not trainable.online:
        for text in batch.texts():
            text.states = dict(target.features(text, trainable.training_states))
    return batch


def decode(drafter: Drafter | None, target: Target) -> list[Any]:
    """Greedy answers to three prompts, decoded together."""
    return SpeculativeDecoder(target, drafter).decode(PROMPTS, Sampling(), 24)


def check_loss(trainable: Trainable, target: Target) -> None:
    """The loss is finite, and its metrics are sums and counts without gradients."""
    losses = trainable.loss(batch_for(trainable, target), target, 0.5)
    assert torch.isfinite(losses.total) and losses.total.dim() == 0
    for total, count in losses.metrics.values():
        assert torch.isfinite(total) and count >= 0 and not total.requires_grad


def check_gradients(trainable: Trainable, target: Target) -> None:
    """Gradients reach exactly the declared parameters, which are those of the optimiser groups."""
    trainable.loss(batch_for(trainable, target), target, 0.5).total.backward()
    declared = {id(parameter) for parameter in trainable.declared_parameters()}
    grouped = [
        id(parameter) for group in trainable.parameter_groups() for parameter in group["params"]
    ]
    assert sorted(grouped) == sorted(declared), (
        "parameter_groups and declared_parameters name different parameters"
    )
    for name, parameter in trainable.named_parameters():
        reached = parameter.grad is not None and bool(parameter.grad.abs().sum() > 0)
        assert reached == (id(parameter) in declared), name
    assert all(parameter.grad is None for parameter in target.parameters())


def check_no_labels(trainable: Trainable, target: Target) -> None:
    """A batch without labels weighs nothing beside the batches of other processes: it has no loss
    and no count, and every parameter a gradient of zero, which DDP waits for. Processes meet once.
    """
    batch = batch_for(trainable, target)
    for text in batch.texts():
        text.loss_mask = torch.zeros_like(text.loss_mask)
    shared = []
    with shared_counts(lambda counts: shared.append(counts) or counts + 5):
        losses = trainable.loss(batch, target, 0.5)
    assert len(shared) == 1, f"{len(shared)} collectives: make every SharedCount before one is read"
    losses.total.backward()
    assert losses.total == 0 and not any(bool(mean.count) for mean in losses.metrics.values())
    assert all(p.grad is not None and not p.grad.any() for p in trainable.declared_parameters())


def check_target_unchanged(trainable: Trainable, target: Target) -> None:
    """A training step changes nothing of the target and shares no parameter with it."""
    before = {name: tensor.clone() for name, tensor in target.state_dict().items()}
    optimizer = torch.optim.SGD(list(trainable.declared_parameters()), lr=0.1)
    trainable.loss(batch_for(trainable, target), target, 0.5).total.backward()
    optimizer.step()
    assert all(torch.equal(before[name], tensor) for name, tensor in target.state_dict().items())
    assert not {id(p) for p in trainable.parameters()} & {id(p) for p in target.parameters()}


def check_greedy(drafter: Drafter, target: Target, coarse: bool = False) -> None:
    """Greedy decoding is plain decoding, token by token; `coarse`: with drafts in bfloat16."""
    served = drafter.adapt(target)
    if coarse:
        drafter.to(torch.bfloat16)
    expected = [trace.ids for trace in decode(None, served)]
    assert [trace.ids for trace in decode(drafter, served)] == expected


def check_batches(drafter: Drafter, target: Target, limit: int = 6) -> None:
    """Batches of 4 and of 16 decode the same ids as each prompt alone; one prompt of each batch of
    four is decoded alone.
    """
    decoder, prompts = SpeculativeDecoder(drafter.adapt(target), drafter), many_prompts(16)
    by_four, together = (ids_by_batch(decoder, prompts, size, limit) for size in (4, 16))
    assert together == by_four
    assert ids_by_batch(decoder, prompts[::5], 1, limit) == by_four[::5]


def check_sampled(drafter: Drafter, target: Target, plain: Counts | None = None) -> None:
    """Sampling at temperature 1 keeps the distribution of `small_target`, through the whole loop.

    plain: counts of plain decoding with this target, where they are there already.
    """
    served = drafter.adapt(target)
    if plain is None or served is not target:
        plain = first_two_tokens(SpeculativeDecoder(served), RUNS)
    decoder = SpeculativeDecoder(served, drafter, builder=StaticTree(SMALL_TREE))
    assert homogeneous(plain, first_two_tokens(decoder, RUNS)) > 1e-4
