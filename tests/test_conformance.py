"""What every shipped recipe must hold, whatever it trains: a new YAML under configs/ is tested here
without an edit.
"""

from __future__ import annotations

import importlib
import inspect
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

from checkpoints.pretrained import Provenance, load_pretrained, save_pretrained
from configs.command_line.loading import parse, recipes
from modules.contracts.drafter import Drafter
from modules.contracts.trainable import Trainable
from modules.decoding.decoder import SpeculativeDecoder
from modules.target.target import Target
from tests.fakes import tiny_target
from tests.modules.conformance import (
    RUNS,
    batch_for,
    check_batches,
    check_gradients,
    check_greedy,
    check_loss,
    check_no_labels,
    check_sampled,
    check_target_unchanged,
    decode,
)
from tests.modules.sampling import Counts, first_two_tokens, small_target
from train.cli import make_parser

RECIPES = recipes()
DRAFT_VOCABULARY = 48


@pytest.fixture(scope="module", params=RECIPES, ids=lambda path: path.stem)
def recipe(request) -> Path:
    return request.param


@pytest.fixture(scope="module")
def target() -> Target:
    return tiny_target()


@cache
def component(recipe: Path) -> tuple[Any, dict[str, Any]]:
    """The class that a recipe trains, and its arguments."""
    drafter = parse(make_parser(), ["--config", str(recipe)]).drafter
    module, name = drafter.class_path.rsplit(".", 1)
    return getattr(importlib.import_module(module), name), drafter.init_args.as_dict()


def build(recipe: Path, target: Target, shake: float = 0.05) -> Trainable:
    """The recipe's component for the tiny target, in float64, its weights moved off their special
    beginnings.
    """
    kind, given = component(recipe)
    arguments = dict(given)
    if arguments.get("draft_vocabulary"):
        arguments["draft_vocabulary"] = min(DRAFT_VOCABULARY, target.shape.vocab_size)
    torch.manual_seed(0)
    trainable = kind(target.shape, **arguments)
    if arguments.get("draft_vocabulary"):
        trainable.set_vocabulary(torch.randperm(target.shape.vocab_size)[:DRAFT_VOCABULARY])
    trainable.initialise(target)
    trainable.double()
    with torch.no_grad():
        for parameter in trainable.declared_parameters():
            parameter += shake * torch.randn_like(parameter)
    return trainable


def test_there_are_recipes():
    assert RECIPES


def test_the_loss_is_finite_and_its_metrics_are_sums_and_counts(recipe, target):
    check_loss(build(recipe, target), target)


def test_gradients_reach_exactly_the_declared_parameters(recipe, target):
    check_gradients(build(recipe, target), target)


def test_a_batch_without_labels_weighs_nothing_beside_other_processes_batches(recipe, target):
    check_no_labels(build(recipe, target), target)


def test_training_leaves_the_target_as_it_was(recipe):
    target = tiny_target()
    check_target_unchanged(build(recipe, target), target)


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


def drafter_of(recipe: Path, target: Target, shake: float) -> Drafter:
    """The recipe's drafter, ready to decode; other components skip the test."""
    drafter = build(recipe, target, shake).eval()
    if not isinstance(drafter, Drafter):
        pytest.skip("not a drafter")
    return drafter


def test_greedy_decoding_is_exactly_the_targets_own(recipe, target):
    check_greedy(drafter_of(recipe, target, 0.01), target)


def test_greedy_decoding_is_exactly_the_targets_own_when_drafts_are_coarse(recipe, target):
    check_greedy(drafter_of(recipe, target, 0.01), target, coarse=True)


@pytest.fixture(scope="module")
def plain_counts() -> Counts:
    return first_two_tokens(SpeculativeDecoder(small_target()), RUNS)


def test_sampled_decoding_keeps_the_targets_distribution(recipe, plain_counts):
    target = small_target()
    check_sampled(drafter_of(recipe, target, 0.2), target, plain_counts)


def test_batches_of_4_and_16_decode_the_same_ids_as_each_prompt_alone(recipe, target):
    check_batches(drafter_of(recipe, target, 0.01), target)


def test_the_constructor_says_what_each_argument_is(recipe):
    found, _ = component(recipe)
    arguments = list(inspect.signature(found.__init__).parameters)[1:]
    assert arguments[0] == "shape"
    described = inspect.getdoc(found) or ""
    assert all(argument in described for argument in arguments), (
        f"{found.__name__}: an argument lacks a description"
    )
