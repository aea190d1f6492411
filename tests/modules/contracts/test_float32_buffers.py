"""Rotary frequencies stay float32 in every cast, so a drafter in 16 bits keeps its distribution at
long contexts.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from checkpoints.pretrained import Provenance, load_pretrained, save_pretrained
from eval.methods.huggingface import trained
from modules.drafters.small_models.independent import Independent
from modules.drafters.small_models.s2d import S2D
from modules.drafters.trained import TrainedDrafter
from modules.target.target import Target
from tests import fakes
from tests.fakes import tiny_target
from tests.modules.families import FAMILIES, Reader, built, documents

THETA = 15.75
"""Gives the frequencies 1, 0.502, 0.252, 0.126: the middle ones lie halfway between two of
bfloat16.
"""
CONTEXT = 1500
ROTARY = [
    "clover",
    "clover_attention_block",
    "clover2",
    "hydra",
    "eagle",
    "eagle3",
    "fspad",
    "falcon",
    "independent",
]


@pytest.fixture(scope="module")
def target() -> Iterator[Target]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(fakes.DIMENSIONS, "max_position_embeddings", 2048)
        patch.setitem(
            fakes.ARCHITECTURES,
            "llama",
            ("llama", {"rope_parameters": {"rope_type": "default", "rope_theta": THETA}}),
        )
        yield tiny_target()


def made(name: str, target: Target) -> TrainedDrafter:
    """In float64, its weights such as bfloat16 holds exactly."""
    if name in FAMILIES:
        drafter = built(name, target, shake=0.05)
    else:
        drafter = {"independent": Independent, "s2d": S2D}[name](target.shape)
        drafter.initialise(target)
        drafter.double().eval()
    with torch.no_grad():
        for parameter in drafter.parameters():
            parameter.copy_(parameter.bfloat16())
    return drafter


def frequencies(module: nn.Module) -> list[Tensor]:
    return [buffer for name, buffer in module.named_buffers() if name.endswith("inv_freq")]


CASTS: dict[str, Callable[[nn.Module], object]] = {
    "to": lambda module: module.to(torch.bfloat16),
    "to_device": lambda module: module.to("cpu", torch.float16),
    "half": lambda module: module.half(),
    "bfloat16": lambda module: module.bfloat16(),
    "double": lambda module: module.double(),
    "inside": lambda module: nn.Sequential(nn.ModuleList([module])).half(),
    "twice": lambda module: module.half().float(),
}


@pytest.mark.parametrize("cast", CASTS)
@pytest.mark.parametrize("name", [*ROTARY, "s2d"])
def test_no_cast_rounds_a_frequency(name: str, cast: str, target: Target) -> None:
    drafter = made(name, target)
    before = copy.deepcopy(frequencies(drafter))
    CASTS[cast](drafter)
    assert before and all(tensor.dtype == torch.float32 for tensor in before)
    assert all(map(torch.equal, before, frequencies(drafter)))
    assert all(found.dtype == torch.float32 for found in frequencies(drafter))


def probs(drafter: TrainedDrafter, target: Target) -> Tensor:
    """Of the first drafted token behind CONTEXT tokens [D]."""
    ids = torch.randint(5, 128, (CONTEXT + 8,), generator=torch.Generator().manual_seed(3)).tolist()
    return Reader(drafter, target, documents([ids]), [CONTEXT]).logits()[0, 0].double().softmax(-1)


@pytest.mark.parametrize("name", ROTARY)
@torch.no_grad()
def test_the_distribution_in_16_bits_at_position_1500(name: str, target: Target) -> None:
    drafter = made(name, target)
    exact = probs(drafter, target)
    kept = probs(drafter.bfloat16(), target)
    # Tables of cosines are made of the frequencies once: another drafter has the rounded ones.
    coarse = made(name, target).bfloat16()
    for tensor in frequencies(coarse):
        tensor.copy_(tensor.bfloat16())
    rounded = probs(coarse, target)
    off, before = ((one - exact).abs().sum() / 2 for one in (kept, rounded))
    assert off < 0.05 and off < before / 5


@torch.no_grad()
def test_a_drafter_saved_in_16_bits_loads_with_whole_frequencies(
    target: Target, tmp_path: Path
) -> None:
    """Into our classes, and as the stock model that Hugging Face's own assisted generation runs."""
    coarse = tiny_target(dtype=torch.bfloat16)
    for name in ("eagle3", "independent"):
        drafter = made(name, target)
        save_pretrained(drafter.bfloat16(), tmp_path / name, Provenance.of(target))
        loaded = load_pretrained(tmp_path / name, target)
        assert next(loaded.parameters()).dtype == torch.bfloat16
        assert all(map(torch.equal, frequencies(loaded), frequencies(made(name, target))))
    stock = trained(str(tmp_path / "independent"), coarse)
    assert next(stock.parameters()).dtype == torch.bfloat16
    assert frequencies(stock) and all(map(torch.equal, frequencies(stock), frequencies(loaded)))


def test_a_target_keeps_its_frequencies() -> None:
    cast = tiny_target(dtype=torch.float32)
    before = copy.deepcopy(frequencies(cast))
    cast.to(torch.bfloat16)
    assert before and all(map(torch.equal, before, frequencies(cast)))
