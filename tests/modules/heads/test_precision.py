"""A target at low precision beside a drafter in float32: loss and decoding."""

from __future__ import annotations

import pytest
import torch

from modules.core.drafter import Sampling
from modules.decoding.decoder import SpeculativeDecoder
from modules.heads.clover import Clover
from modules.heads.clover2 import Clover2
from modules.heads.hydra import Hydra
from modules.heads.medusa import Medusa
from tests.fakes import tiny_batch, tiny_target


@pytest.mark.parametrize("kind", [Medusa, Clover, Clover2, Hydra])
def test_bfloat16_target_with_a_float32_drafter(kind):
    target = tiny_target(dtype=torch.bfloat16)
    drafter = kind(target.shape, heads=3, draft_vocabulary=40)
    drafter.initialise(target)
    batch = tiny_batch(target)
    batch.states = {name: state.float() for name, state in target.features(batch, drafter.training_states).items()}
    loss = drafter.loss(batch, target, 0.0).total
    loss.backward()
    assert loss.isfinite() and all(parameter.grad is None for parameter in target.parameters())
    trace = SpeculativeDecoder(target, drafter.eval()).decode([[5, 6, 7]], Sampling(), 8)[0]
    assert trace.ids
