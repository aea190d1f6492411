"""What every shipped recipe must hold, whatever it trains: a new YAML under configs/ is tested here
without an edit.
"""

from __future__ import annotations

import importlib
import inspect
from pathlib import Path
from typing import Any

import pytest
import torch

from checkpoints.pretrained import Provenance, load_pretrained, save_pretrained
from configs.command_line.loading import CONFIGS
from modules.contracts.batches import LabelledBatch, PreferenceBatch
from modules.contracts.drafter import Drafter
from modules.contracts.sampling import Sampling
from modules.contracts.trainable import Trainable
from modules.decoding.decoder import SpeculativeDecoder
from modules.losses.averages import shared_counts
from modules.target.target import Target
from modules.trees.static import StaticTree
from tests.fakes import ids_by_batch, many_prompts, tiny_batch, tiny_target
from tests.modules.sampling import Counts, first_two_tokens, homogeneous, small_target
from train.cli import make_parser
from train.lightning.module import text_batches

RECIPES = sorted(CONFIGS.glob("*.yaml"))
DRAFT_VOCABULARY = 48
PROMPTS = [[7, 8, 9, 10, 11], [20, 21], [30, 31, 32]]


@pytest.fixture(scope="module", params=RECIPES, ids=lambda path: path.stem)
def recipe(request) -> Path:
    return request.param


@pytest.fixture(scope="module")
def target() -> Target:
    return tiny_target()


def build(recipe: Path, target: Target, shake: float = 0.05) -> Trainable:
    """The recipe's component for the tiny target, in float64, its weights moved off their special
    beginnings.
    """
    drafter = make_parser().parse_args(["--config", str(recipe)]).drafter
    module, name = drafter.class_path.rsplit(".", 1)
    arguments = dict(drafter.init_args.as_dict())
    if arguments.get("draft_vocabulary"):
        arguments["draft_vocabulary"] = min(DRAFT_VOCABULARY, target.shape.vocab_size)
    torch.manual_seed(0)
    trainable = getattr(importlib.import_module(module), name)(target.shape, **arguments)
    if arguments.get("draft_vocabulary"):
        trainable.set_vocabulary(torch.randperm(target.shape.vocab_size)[:DRAFT_VOCABULARY])
    trainable.initialise(target)
    trainable.double()
    with torch.no_grad():
        for parameter in trainable.declared_parameters():
            parameter += shake * torch.randn_like(parameter)
    return trainable


def batch_for(trainable: Trainable, target: Target) -> Any:
    """A tiny batch of the kind the component wants, with the states it reads."""
    first, second = tiny_batch(target), tiny_batch(target, seed=1)
    batch: Any = {
        "text": first,
        "preference": PreferenceBatch(first, second),
        "labelled": LabelledBatch(first, (first.input_ids % 2)),
    }[trainable.batch_kind]
    if not trainable.online:
        for text in text_batches(batch):
            text.states = dict(target.features(text, trainable.training_states))
    return batch


def decode(drafter: Drafter | None, target: Target) -> list[Any]:
    return SpeculativeDecoder(target, drafter).decode(PROMPTS, Sampling(), 24)


def test_there_are_recipes():
    assert RECIPES


def test_the_loss_is_finite_and_its_metrics_are_sums_and_counts(recipe, target):
    trainable = build(recipe, target)
    losses = trainable.loss(batch_for(trainable, target), target, 0.5)
    assert torch.isfinite(losses.total) and losses.total.dim() == 0
    for total, count in losses.metrics.values():
        assert torch.isfinite(total) and count >= 0 and not total.requires_grad


def test_gradients_reach_exactly_the_declared_parameters(recipe, target):
    trainable = build(recipe, target)
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


def test_a_batch_without_labels_weighs_nothing_beside_other_processes_batches(recipe, target):
    """It has no loss and no count, and every parameter a gradient of zero, which DDP waits for."""
    trainable = build(recipe, target)
    batch = batch_for(trainable, target)
    for text in text_batches(batch):
        text.loss_mask = torch.zeros_like(text.loss_mask)
    with shared_counts(lambda count: count + 5):
        losses = trainable.loss(batch, target, 0.5)
    losses.total.backward()
    assert losses.total == 0 and not any(bool(mean.count) for mean in losses.metrics.values())
    assert all(p.grad is not None and not p.grad.any() for p in trainable.declared_parameters())


def test_training_leaves_the_target_as_it_was(recipe):
    target = tiny_target()
    before = {name: tensor.clone() for name, tensor in target.state_dict().items()}
    trainable = build(recipe, target)
    optimizer = torch.optim.SGD(list(trainable.declared_parameters()), lr=0.1)
    trainable.loss(batch_for(trainable, target), target, 0.5).total.backward()
    optimizer.step()
    assert all(torch.equal(before[name], tensor) for name, tensor in target.state_dict().items())
    assert not {id(p) for p in trainable.parameters()} & {id(p) for p in target.parameters()}


def test_what_is_saved_loads_the_same(recipe, target, tmp_path):
    trainable = build(recipe, target).eval()
    save_pretrained(trainable, tmp_path / "drafter", Provenance.of(target))
    loaded = load_pretrained(tmp_path / "drafter", target)
    assert loaded.config() == trainable.config()
    before, after = trainable.state_dict(), loaded.state_dict()
    assert set(before) == set(after) and all(
        torch.equal(before[name], after[name]) for name in before
    )
    loaded.double()
    batch = batch_for(trainable, target)
    assert torch.equal(
        loaded.loss(batch, target, 0.5).total, trainable.loss(batch, target, 0.5).total
    )
    if isinstance(trainable, Drafter) and isinstance(loaded, Drafter):
        first, second = (decode(one, one.adapt(target)) for one in (trainable, loaded))
        assert [trace.ids for trace in first] == [trace.ids for trace in second]
        assert [trace.accepted for trace in first] == [trace.accepted for trace in second]


def test_greedy_decoding_is_exactly_the_targets_own(recipe, target):
    drafter = build(recipe, target, shake=0.01).eval()
    if not isinstance(drafter, Drafter):
        pytest.skip("not a drafter")
    own = drafter.adapt(target)
    assert [trace.ids for trace in decode(drafter, own)] == [
        trace.ids for trace in decode(None, own)
    ]


def test_greedy_decoding_is_exactly_the_targets_own_when_drafts_are_coarse(recipe, target):
    drafter = build(recipe, target, shake=0.01).eval()
    if not isinstance(drafter, Drafter):
        pytest.skip("not a drafter")
    own = drafter.adapt(target)
    drafter.to(torch.bfloat16)
    assert [trace.ids for trace in decode(drafter, own)] == [
        trace.ids for trace in decode(None, own)
    ]


@pytest.fixture(scope="module")
def plain_counts() -> Counts:
    return first_two_tokens(SpeculativeDecoder(small_target()), 1000)


def test_sampled_decoding_keeps_the_targets_law(recipe, plain_counts):
    """Through the whole loop at temperature 1, with a tree that a vocabulary of six tokens can
    fill.
    """
    target = small_target()
    drafter = build(recipe, target, shake=0.2).eval()
    if not isinstance(drafter, Drafter):
        pytest.skip("not a drafter")
    own = drafter.adapt(target)
    plain = plain_counts if own is target else first_two_tokens(SpeculativeDecoder(own), 1000)
    decoder = SpeculativeDecoder(own, drafter, builder=StaticTree([(0,), (1,), (0, 0), (0, 1)]))
    assert homogeneous(plain, first_two_tokens(decoder, 1000)) > 1e-4


def test_batches_of_4_and_16_decode_the_same_ids_as_each_prompt_alone(recipe, target):
    drafter = build(recipe, target, shake=0.01).eval()
    if not isinstance(drafter, Drafter):
        pytest.skip("not a drafter")
    decoder, prompts = SpeculativeDecoder(drafter.adapt(target), drafter), many_prompts(16)
    alone, by_four, together = (ids_by_batch(decoder, prompts, size, 6) for size in (1, 4, 16))
    assert by_four == alone and together == alone


def test_the_constructor_says_what_each_argument_is(recipe):
    drafter = make_parser().parse_args(["--config", str(recipe)]).drafter
    module, name = drafter.class_path.rsplit(".", 1)
    found = getattr(importlib.import_module(module), name)
    arguments = list(inspect.signature(found.__init__).parameters)[1:]
    assert arguments[0] == "shape"
    described = inspect.getdoc(found) or ""
    assert all(argument in described for argument in arguments), (
        f"{name}: an argument lacks a description"
    )
