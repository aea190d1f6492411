"""A target at low precision beside a drafter in float32: loss, distributions and decoding."""

from __future__ import annotations

import sys

import pytest
import torch

import modules.target.target
from modules.contracts.sampling import Sampling
from modules.decoding.decoder import SpeculativeDecoder
from modules.drafters.heads.clover import Clover
from modules.drafters.heads.clover2 import Clover2
from modules.drafters.heads.hydra import Hydra
from modules.drafters.heads.medusa import Medusa
from modules.drafters.heads.medusa2 import Medusa2
from modules.losses.chunked import training_rows
from modules.target.target import Target
from tests.fakes import tiny_batch, tiny_target


@pytest.mark.parametrize("kind", [Medusa, Clover, Clover2, Hydra])
def test_bfloat16_target_with_a_float32_drafter(kind):
    target = tiny_target(dtype=torch.bfloat16)
    drafter = kind(target.shape, heads=3, draft_vocabulary=40)
    drafter.initialise(target)
    batch = tiny_batch(target)
    batch.states = {
        name: state.float()
        for name, state in target.features(batch, drafter.training_states).items()
    }
    loss = drafter.loss(batch, target, 0.0).total
    loss.backward()
    assert loss.isfinite() and all(parameter.grad is None for parameter in target.parameters())
    trace = SpeculativeDecoder(target, drafter.eval()).decode([[5, 6, 7]], Sampling(), 8)[0]
    assert trace.ids


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("self_distillation", [True, False])
def test_medusa_2_trains_float32_heads_on_its_adapted_target_at_16_bits(dtype, self_distillation):
    """Without autocast: it runs the target itself, whose states come at the target's precision."""
    target, exact = (tiny_target(dtype=kind) for kind in (dtype, torch.float64))
    losses, drafters = [], []
    for each in (target, exact):
        torch.manual_seed(0)
        drafter = Medusa2(
            target.shape, heads=2, rank=2, tree="optimised_4", self_distillation=self_distillation
        ).to(torch.promote_types(each.dtype, torch.float32))
        drafter.initialise(each)
        drafters.append(drafter)
        losses.append(drafter.loss(tiny_batch(each), each, 1.0).total)
    losses[0].backward()
    for parameter in drafters[0].declared_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all()
    torch.testing.assert_close(losses[0].double(), losses[1], rtol=0.1, atol=0.1)
    assert drafters[0].finish([tiny_batch(target)], target).figures


@pytest.mark.parametrize("arch", ["llama", "gemma2"])
@pytest.mark.parametrize("trimmed", [True, False])
@pytest.mark.parametrize("autocast", [True, False])
@torch.no_grad()
def test_distributions_of_a_target_at_16_bits_are_those_of_its_weights(
    arch, trimmed, autocast, monkeypatch
):
    """Against float64 on the same states and weights. Rounded logits are off by a thousandth and
    more.
    """
    monkeypatch.setattr(modules.target.target, "WIDENED_ROWS", 50)
    target = tiny_target(arch, torch.bfloat16)
    drafter = Hydra(target.shape, 2, draft_vocabulary=60 if trimmed else None)
    batch = tiny_batch(target)
    batch.states = {
        name: state.float()
        for name, state in target.features(batch, drafter.training_states).items()
    }
    rows = training_rows(batch, 2)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        distributions = drafter.distributions(batch, target, rows)
    assert distributions is not None
    flat_M = rows.flat_MK1[:, 1]
    expected = exact_probs(target, batch.states["final"].flatten(0, 1)[flat_M])
    chosen = expected[:, : 60 if trimmed else None]
    chosen = chosen / chosen.sum(-1, keepdim=True)
    torch.testing.assert_close(distributions(flat_M).double(), chosen, atol=1e-6, rtol=1e-5)


def exact_probs(target: Target, final_MH: torch.Tensor) -> torch.Tensor:
    """At float64, of the target's own weights and these states."""
    logits = final_MH.double() @ target.copy_weight("lm_head").double().T
    if target.architecture.softcap is not None:
        logits = torch.tanh(logits / target.architecture.softcap) * target.architecture.softcap
    return logits.softmax(-1)


@pytest.mark.parametrize(
    ("name", "autocast"), [("medusa2", True), ("clover2", True), ("clover2", False)]
)
def test_distributions_within_a_loss_are_those_of_the_targets_weights(name, autocast, monkeypatch):
    """Medusa-2's teacher and Clover-2's label mask."""
    target = tiny_target(dtype=torch.bfloat16)
    if name == "medusa2":
        drafter = Medusa2(target.shape, 2, self_distillation=True)
    else:
        drafter = Clover2(target.shape, 2, label_top_k=8, label_top_p=0.8)
    drafter.initialise(target)
    batch, module = tiny_batch(target), sys.modules[type(drafter).__module__]
    states = target.features(batch, ("pre_norm", "final"))
    batch.states = {state: values.float() for state, values in states.items()}
    compute, seen = module.target_distributions, []

    def watched(head, final_BTH, positions, width):
        seen.append((compute(head, final_BTH, positions, width), final_BTH, positions))
        return seen[-1][0]

    monkeypatch.setattr(module, "target_distributions", watched)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        drafter.train().loss(batch, target, 1.0)
    ((distributions, final_BTH, positions),) = seen
    expected = exact_probs(target, final_BTH.flatten(0, 1)[positions])
    torch.testing.assert_close(distributions(positions).double(), expected, atol=1e-6, rtol=1e-5)
