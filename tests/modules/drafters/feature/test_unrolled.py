"""Training's draft steps against their equations, row by row and step by step over sequences
written out in full.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from modules.contracts.rows import causal_rows
from modules.losses.chunked import training_rows
from tests.fakes import tiny_batch, tiny_target
from tests.modules.families import built, filled

TARGET = tiny_target()


def normed(hidden: Tensor, gain: Tensor) -> Tensor:
    return gain * hidden / (hidden.square().mean(-1, keepdim=True) + TARGET.shape.norm_eps).sqrt()


def eagles_inputs(drafter, vector: Tensor, feature: Tensor) -> tuple[Tensor, Tensor]:
    fused = drafter.fc.weight @ torch.cat([drafter.token_scale * vector, feature])
    if drafter.fc.bias is not None:
        fused = fused + drafter.fc.bias
    if hasattr(drafter, "gate"):
        gate = F.silu(drafter.gate.weight @ (drafter.token_scale * vector))
        fused = fused + drafter.down.weight @ (
            gate * (drafter.up.weight @ normed(fused, drafter.norm.weight))
        )
    return fused, fused


def eagle3s_inputs(drafter, vector: Tensor, feature: Tensor) -> tuple[Tensor, Tensor]:
    token, state = (
        normed(vector, drafter.input_layernorm.weight),
        normed(feature, drafter.hidden_norm.weight),
    )
    return torch.cat([token, state]), feature


def mtps_inputs(drafter, vector: Tensor, feature: Tensor) -> tuple[Tensor, Tensor]:
    parts = [normed(vector, drafter.enorm.weight), normed(feature, drafter.hnorm.weight)]
    fused = drafter.eh_proj.weight @ torch.cat(parts)
    return fused, fused


INPUTS = {"eagle3": eagle3s_inputs, "mtp": mtps_inputs, "mtp_on_policy": mtps_inputs}


@pytest.mark.parametrize("name", ["eagle", "fspad", "eagle3", "mtp", "mtp_on_policy"])
@torch.no_grad()
def test_every_step_reads_the_features_before_it_and_its_own_outputs_after(name: str) -> None:
    drafter, batch = built(name, TARGET, shake=0.05), tiny_batch(TARGET, rows=1)
    filled(batch, drafter, TARGET)
    inputs = INPUTS.get(name, eagles_inputs)
    if name == "eagle3":
        features = (
            torch.cat([batch.states[k][0] for k in drafter.fused_layers], -1) @ drafter.fc.weight.T
        )
    else:
        features = batch.states[drafter.reads][0]
    rows, ids, documents = training_rows(batch, 3), batch.input_ids[0], batch.document_ids[0]
    steps, checked = list(drafter.unrolled(batch, TARGET, rows)), 0
    for m, t in enumerate(rows.flat_MK1[:, 0].tolist()):
        first = documents.tolist().index(int(documents[t]))
        read = [(int(ids[s + 1]), features[s]) for s in range(first, t + 1)]
        for step in range(3):
            if not rows.valid_MK[m, step]:
                break
            pairs = [
                inputs(drafter, TARGET.embed(torch.tensor(token)), feature)
                for token, feature in read
            ]
            asked, residual = (torch.stack(part)[None] for part in zip(*pairs, strict=True))
            seen = causal_rows(torch.zeros(1, dtype=torch.long), len(read))
            out = drafter.layer(asked, seen, residual_BNH=residual)[0, -1]
            feature, carried = out[:32], out[-32:]
            if name in INPUTS:
                feature = normed(out, drafter.norm.weight)
            carried = feature if name == "mtp" else carried
            torch.testing.assert_close(steps[step][0][m], feature, atol=3e-6, rtol=1e-5)
            torch.testing.assert_close(steps[step][1][m], carried, atol=3e-6, rtol=1e-5)
            read.append((int(ids[t + 2 + step]), carried))
            checked += 1
    assert checked > 12
