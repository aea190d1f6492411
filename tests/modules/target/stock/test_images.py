"""Prompts with images: a vision-language target answers as its library's model does."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from modules.contracts.sampling import Sampling
from modules.decoding.decoder import SpeculativeDecoder
from modules.drafters.feature.eagle3 import Eagle3
from modules.target.stock.proof import prove
from modules.target.target import Target
from tests.architectures import SEEING
from tests.fakes import ScriptedDrafter, tiny_batch, tiny_target

IMAGE, BEFORE, AFTER = 120, 122, 123
PROMPTS = [[7, 8, BEFORE, *[IMAGE] * 4, AFTER, 30, 31], [9, 10, 11, 12]]


def pictured(arch: str, prompt: list[int], seed: int = 0) -> dict[str, Any]:
    """What a processor gives for a prompt with one image."""
    generator = torch.Generator().manual_seed(seed)
    types = torch.tensor([[int(token == IMAGE) for token in prompt]])
    if arch == "gemma3_vision":
        pixels = torch.randn(1, 3, 16, 16, generator=generator).double()
        return {"pixel_values": pixels, "token_type_ids": types}
    # 4 x 4 patches of 2 x 3 x 4 x 4 numbers, merged two by two.
    pixels = torch.randn(16, 96, generator=generator).double()
    grid = torch.tensor([[1, 4, 4]])
    return {"pixel_values": pixels, "image_grid_thw": grid, "mm_token_type_ids": types}


def answered(target: Target, arch: str, prompt: list[int], seed: int | None, count: int) -> list:
    """The library's greedy answer, every token by a call over the whole text."""
    text = list(prompt)
    for _ in range(count):
        given = {} if seed is None else pictured(arch, text, seed)
        logits: Tensor = target.stock(input_ids=torch.tensor([text]), **given).logits
        text.append(int(logits[0, -1].argmax()))
    return text[len(prompt) :]


@pytest.mark.parametrize("arch", SEEING)
def test_targets_that_see_are_proven_without_images(arch: str) -> None:
    target = tiny_target(arch)
    prove(target)
    assert target.shape.hidden_size == 32 and target.shape.num_layers == 2


@pytest.mark.parametrize("arch", ["qwen2_5_vl", "gemma3_vision"])
def test_answers_to_images_are_the_librarys(arch: str) -> None:
    """In a batch with a prompt without an image, whose drafts are accepted in part."""
    target = tiny_target(arch)
    drafter = ScriptedDrafter(target.shape, right=0.8, decoys=1)
    eagle = Eagle3(target.shape).double().eval()
    eagle.initialise(target)
    prompts = [*PROMPTS, PROMPTS[0]]
    images = [pictured(arch, PROMPTS[0], 0), None, pictured(arch, PROMPTS[0], 1)]
    expected = [
        answered(target, arch, prompt, seed, 8)
        for prompt, seed in zip(prompts, (0, None, 1), strict=True)
    ]
    assert expected[0] != expected[2]
    for each in (None, drafter, eagle):
        decoder = SpeculativeDecoder(target, each, stop_ids=frozenset())
        found = decoder.decode(prompts, Sampling(), 8, images=images)
        assert [trace.ids for trace in found] == expected


def test_what_follows_an_image_is_at_the_librarys_positions() -> None:
    """Four tokens of an image take two positions."""
    target = tiny_target("qwen2_5_vl")
    session = target.open(2, 64)
    ids = torch.tensor([PROMPTS[0], PROMPTS[1] + [0] * 6])
    images = [pictured("qwen2_5_vl", PROMPTS[0]), None]
    session.prefill_with_images(ids, torch.tensor([10, 4]), (), images)
    assert session.cache.offsets_B is not None
    assert session.cache.offsets_B.tolist() == [-2, 0]
    session.keep([1])
    assert session.cache.offsets_B.tolist() == [0]


def test_drafters_train_on_text_of_a_target_that_sees() -> None:
    target = tiny_target("qwen2_5_vl")
    drafter, batch = Eagle3(target.shape).double().train(), tiny_batch(target)
    drafter.initialise(target)
    batch.states.update(target.features(batch, drafter.training_states))
    loss = drafter.loss(batch, target, 0.0).total
    loss.backward()
    assert bool(torch.isfinite(loss))


def test_images_that_cannot_be_read_are_one_line() -> None:
    target, given = tiny_target("qwen2_5_vl"), pictured("qwen2_5_vl", PROMPTS[0])
    decoder = SpeculativeDecoder(target)
    with pytest.raises(ValueError, match="images do not fit the prompt") as caught:
        decoder.decode([PROMPTS[0][:5]], Sampling(), 4, images=[given])
    assert "\n" not in str(caught.value)
    with pytest.raises(ValueError, match="2 entries for 1 prompts"):
        decoder.decode(PROMPTS[:1], Sampling(), 4, images=[given, None])
    other = tiny_target("qwen3_vl")
    with pytest.raises(ValueError, match="reads .*deepstack_visual_embeds beside embeddings"):
        SpeculativeDecoder(other).decode(PROMPTS[:1], Sampling(), 4, images=[given])
    session = target.open(1, 64)
    session.prefill(torch.tensor([[5, 6]]), torch.tensor([2]))
    with pytest.raises(ValueError, match="first prompt of a session"):
        session.prefill_with_images(torch.tensor(PROMPTS[:1]), torch.tensor([10]), (), [given])
