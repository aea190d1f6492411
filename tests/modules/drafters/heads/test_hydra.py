"""Hydra: where it starts, and what the release does otherwise."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from checkpoints.pretrained import Provenance, load_pretrained, save_pretrained
from modules.drafters.heads.hydra import FirstBlock, Hydra
from modules.layers.token_scale import token_scale
from tests.fakes import tiny_target
from tests.modules.families import built, documents

TARGET = tiny_target("llama")


@torch.no_grad()
def test_hydra_starts_affine_in_its_inputs() -> None:
    drafter = built("hydra", TARGET)
    first, second = (torch.randn(32 * 4, dtype=torch.float64) for _ in range(2))
    zero, token = torch.zeros_like(first), torch.tensor(0)
    for head in range(3):
        a, b, both, none = (
            drafter.feature(head, x, token, TARGET) for x in (first, second, first + second, zero)
        )
        torch.testing.assert_close(a + b, both + none)


@torch.no_grad()
def test_embeddings_stand_behind_the_state_at_its_size() -> None:
    drafter, batch = built("hydra", TARGET, shake=0.05), documents([[9, 20, 31, 42, 53]])
    states = TARGET.features(batch, ("pre_norm",))["pre_norm"]
    start = drafter.begin(states, batch.input_ids.roll(-1, 1), TARGET, batch.rows(), None)[0, :2]
    tokens = torch.tensor([[20, 31], [31, 42]])
    memory = drafter.step(1, drafter.step(0, start, tokens[:, 0], TARGET), tokens[:, 1], TARGET)
    scale = token_scale(TARGET)
    assert drafter.token_scale == scale != 1
    torch.testing.assert_close(
        memory[:, :96], torch.cat([start[:, :32], scale * TARGET.embed(tokens).flatten(1)], 1)
    )
    assert not memory[:, 96:].any()


@torch.no_grad()
def test_the_released_prefix_reads_final_states_and_normalises_by_itself() -> None:
    drafter, batch = built("hydra_released", TARGET, shake=0.05), documents([[9, 20, 31, 42, 53]])
    assert drafter.training_states == drafter.decoding_states == ("final",)
    states = TARGET.features(batch, ("final",))["final"]
    hidden = drafter.layers[0](states, batch.rows())
    expected = (
        drafter.norm.weight
        * hidden
        / (hidden.square().mean(-1, keepdim=True) + TARGET.shape.norm_eps).sqrt()
    )
    found = drafter.begin(states, batch.input_ids.roll(-1, 1), TARGET, batch.rows(), None)
    torch.testing.assert_close(found[..., :32], expected)


def test_the_released_prefix_starts_at_random() -> None:
    torch.manual_seed(0)
    drafter, copied = (Hydra(TARGET.shape, 1, prefix_start=start) for start in ("random", "target"))
    for one in (drafter, copied):
        one.initialise(TARGET)
    widths = [
        parameter.detach().std() for parameter in drafter.layers.parameters() if parameter.dim() > 1
    ]
    assert all(0.015 < float(width) < 0.025 for width in widths) and bool(
        (drafter.norm.weight == 1).all()
    )
    for name, parameter in copied.layers[0].named_parameters():
        assert torch.equal(parameter, TARGET.copy_weight(f"layers.1.{name}").float())


@pytest.mark.parametrize("at", ["lm_head", "every_block"])
def test_dropout_in_front_of_the_lm_head_or_of_every_block(at: str) -> None:
    drafter = Hydra(TARGET.shape, 2, 3, dropout=0.25, dropout_at=at)
    for blocks in drafter.blocks:
        dropped = [part.p if isinstance(part, nn.Dropout) else None for part in blocks]
        assert dropped == (
            [None, None, None, 0.25] if at == "lm_head" else [0.25, None] * 3 + [0.25]
        )
        first = next(part for part in blocks if not isinstance(part, nn.Dropout))
        assert isinstance(first, FirstBlock)


def test_blocks_share_their_weights_where_asked(tmp_path: Path) -> None:
    own, shared = (Hydra(TARGET.shape, 2, 4, shared_block=one) for one in (False, True))
    assert own.trained_size - shared.trained_size == 2 * 2 * (32 * 32 + 32)
    blocks = [part for part in shared.blocks[0] if not isinstance(part, nn.Dropout)]
    assert blocks[1] is blocks[2] is blocks[3] and shared.blocks[0][1] is not shared.blocks[1][1]
    nn.init.normal_(blocks[1].linear.weight)
    loaded = load_pretrained(
        save_pretrained(shared, tmp_path / "drafter", Provenance.of(TARGET)), TARGET
    )
    assert loaded.blocks[0][1] is loaded.blocks[0][3] and loaded.trained_size == shared.trained_size
    assert torch.equal(loaded.blocks[0][1].linear.weight, blocks[1].linear.weight)
