"""The scale of token embeddings beside final states: sizes as they are, an exact multiplication."""

from __future__ import annotations

import pytest
import torch

from modules.layers.token_scale import token_scale
from tests.fakes import tiny_target


@pytest.mark.parametrize("arch", ["llama", "gemma2", "gpt2"])
@pytest.mark.parametrize("gain", [0.25, 1.0, 60.0])
def test_scaled_embeddings_are_as_large_as_final_states(arch: str, gain: float) -> None:
    target = tiny_target(arch)
    with torch.no_grad():
        weight = target.architecture.norm.weight
        offset = 1.0 if arch == "gemma2" else 0.0
        weight.copy_((weight + offset) * gain - offset)
    ids = torch.arange(target.shape.vocab_size)
    # What a final norm puts out for inputs of many directions, beside every embedding.
    states = target.final_norm(torch.randn(500, target.shape.hidden_size, dtype=torch.float64))
    scale = token_scale(target)
    ratio = float(
        states.square().mean().sqrt() / (scale * target.embed(ids)).square().mean().sqrt()
    )
    assert 2**-0.6 < ratio < 2**0.6
    assert scale == 2.0 ** round(torch.tensor(scale).log2().item())


def test_a_power_of_two_is_exact_at_every_precision() -> None:
    scale = token_scale(tiny_target(dtype=torch.float32))
    values = torch.randn(1000)
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        assert torch.equal((values.to(dtype) * scale).double(), values.to(dtype).double() * scale)


def test_without_a_final_norm_embeddings_stay_as_they_are() -> None:
    target = tiny_target()
    target.architecture.norm = None
    assert token_scale(target) == 1.0
