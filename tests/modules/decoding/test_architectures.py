"""Drafters learn from and draft for targets of every kind of architecture, without changing what
these answer.
"""

from __future__ import annotations

import pytest
import torch

from modules.contracts.sampling import Sampling
from modules.decoding.decoder import SpeculativeDecoder
from modules.drafters.feature.eagle3 import Eagle3
from modules.drafters.heads.medusa import Medusa
from tests.architectures import MORE, RECURRENT
from tests.fakes import ScriptedDrafter, ids_by_batch, many_prompts, tiny_batch, tiny_target

KINDS = {"eagle3": Eagle3, "medusa": Medusa}
TRAINED_ON = (
    "qwen3_moe", "gpt_oss", "deepseek_v3", "gemma3", "granite", "gpt_neox", "cohere2",
    "qwen3_next", "granitemoehybrid", "lfm2",
)  # fmt: skip


@pytest.mark.parametrize("arch", TRAINED_ON)
@pytest.mark.parametrize("kind", KINDS)
def test_a_drafter_learns_and_decodes_without_loss(kind: str, arch: str) -> None:
    target = tiny_target(arch)
    torch.manual_seed(0)
    drafter, batch = KINDS[kind](target.shape).double().train(), tiny_batch(target)
    drafter.initialise(target)
    optimizer, losses = torch.optim.Adam(drafter.parameters(), 3e-3), []
    batch.states.update(target.features(batch, drafter.training_states))
    for _ in range(12):
        optimizer.zero_grad()
        loss = drafter.loss(batch, target, 0.0).total
        loss.backward()
        losses.append(float(loss.detach()))
        optimizer.step()
    assert losses[-1] < 0.985 * losses[0]
    prompts = [batch.input_ids[0, :9].tolist(), [20, 30], [7, 8, 9, 10]]
    plain = SpeculativeDecoder(target).decode(prompts, Sampling(), 12)
    drafted = SpeculativeDecoder(target, drafter.eval(), budget=6).decode(prompts, Sampling(), 12)
    assert [trace.ids for trace in drafted] == [trace.ids for trace in plain]


# The library's kimi_linear takes more than a minute; its layers are in the proof's tests.
@pytest.mark.parametrize("arch", sorted({*MORE, *RECURRENT} - {"kimi_linear"}))
def test_accepted_drafts_of_every_length_change_nothing(arch: str) -> None:
    target, prompts = tiny_target(arch), many_prompts(5)
    plain = ids_by_batch(SpeculativeDecoder(target), prompts, 1, 9)
    drafter = ScriptedDrafter(target.shape, right=0.7, decoys=1)
    decoder = SpeculativeDecoder(target, drafter)
    assert ids_by_batch(decoder, prompts, 3, 9) == plain
    traces = decoder.decode(prompts, Sampling(), 9)
    assert len({count for trace in traces for count in trace.accepted}) > 2
