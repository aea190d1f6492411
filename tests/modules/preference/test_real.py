"""One pair on the real target."""

from __future__ import annotations

from math import log

import pytest
import torch

from data.packing import collate
from data.preferences import EMBEDDED_PAIRS, read_preferences, tokenize_pair
from data.reading.files import read_jsonl
from modules.contracts.batches import PreferenceBatch
from modules.preference.dpo import DPO
from modules.target.loading import load_target


@pytest.mark.slow
def test_a_step_on_an_embedded_pair_prefers_its_chosen_answer() -> None:
    target = load_target("smollm2-135m")
    row = next(read_jsonl(EMBEDDED_PAIRS))
    pair = tokenize_pair(read_preferences(row)[0], target.tokenizer, 128, target.eos_ids)
    batch = PreferenceBatch(collate([[pair.chosen]]), collate([[pair.rejected]]))
    torch.manual_seed(0)
    policy = DPO(target.shape)
    optimizer = torch.optim.Adam(policy.declared_parameters(), 1e-3)
    first = policy.loss(batch, target, 0.0)
    first.total.backward()
    optimizer.step()
    with torch.no_grad():
        second = policy.loss(batch, target, 0.0)
    assert float(first.total.detach()) == pytest.approx(log(2), abs=1e-3)
    assert float(second.total) < log(2) - 0.01 and float(second.metrics["reward_margin"].total) > 0
    assert all(parameter.grad is None for parameter in target.parameters())
