"""A Markov chain as the target, a small language model as the drafter, and services of both."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from modules.drafters.small_models.independent import Independent
from modules.target.hf_models import dict_of_config
from modules.target.target import Target
from modules.trees.sampled.chain import SampledChain
from tests.fakes import tiny_target
from train.online.__main__ import command
from train.online.service import Request, Service, Watch
from train.online.settings import DecodingSettings, LearningSettings
from train.online.update import Learner

LETTERS = {"first": "abcdefghijklm", "second": "nopqrstuvwxyz"}
"""Two topics, whose letters the chain never mixes."""


def markov_target(dtype: torch.dtype = torch.float32) -> Target:
    """A target whose next letter depends on the last one alone, and stays in its half of the
    alphabet."""
    target = tiny_target(vocab=32, layers=1, dtype=dtype)
    target.tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    table = 2.5 * torch.randn(32, 32, generator=torch.Generator().manual_seed(0))
    half = torch.arange(32) >= 18
    table[:, :5] = table[:, 31] = table[half[:, None] != half] = -40.0
    with torch.no_grad():
        for name, parameter in target.model.named_parameters():
            if name.endswith(("o_proj.weight", "down_proj.weight")):
                parameter.zero_()
            elif parameter.dim() == 1:
                parameter.fill_(32**-0.5)
        target.model.get_input_embeddings().weight.copy_(torch.eye(32))
        target.model.get_output_embeddings().weight.copy_(table.T)
    return target


def small_drafter(target: Target, seed: int = 3, **arguments: Any) -> Independent:
    """A one-layer model with random weights."""
    config = dict_of_config(tiny_target(vocab=target.shape.vocab_size, layers=1).model.config)
    torch.manual_seed(seed)
    drafter = Independent(target.shape, model=config, **arguments)
    with torch.no_grad():
        for parameter in drafter.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, 0.05)
    return drafter


def questions(topics: list[str], seed: int = 0) -> Iterator[Request]:
    """A short prompt of each topic in turn."""
    chance = random.Random(seed)
    for place, topic in enumerate(topics):
        text = "".join(chance.choices(LETTERS[topic], k=3))
        yield Request([{"role": "user", "content": text}], labels={"topic": topic}, place=place)


def make_service(
    target: Target,
    drafter: Any,
    output: Path,
    update: LearningSettings,
    watch: Watch | None = None,
    **decoding: Any,
) -> Service:
    """A service of one drafter with a sampled chain of two."""
    settings = DecodingSettings(**{"max_new_tokens": 8, "temperature": 1.0, **decoding})
    learner = Learner(drafter, target, update, output / "online" / "drafter")
    learners = {"drafter": learner}
    builder = SampledChain(2)
    return Service(target, learners, settings, builder, output, lambda _: "drafter", watch)


@pytest.fixture(scope="session")
def markov() -> Target:
    return markov_target()


CHATS = [
    {"prompt": "how many?", "topic": "numbers"},
    {"messages": [{"role": "user", "content": "one"}, {"role": "assistant", "content": "x"},
                  {"role": "user", "content": "two"}]},
    {"prompt": "word " * 200},
    {"tools": [{}], "prompt": "weather"},
    {"prompt": "why?"},
    {"prompt": "when?"},
]  # fmt: skip


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> Target:
    target = tiny_target(dtype=torch.float32)
    monkeypatch.setattr("train.online.__main__.outline", lambda *_: target)
    monkeypatch.setattr("train.online.__main__.load_target", lambda *_: target)
    return target


@pytest.fixture
def serve(tiny: Target, tmp_path: Path) -> Callable[..., int]:
    """Runs a small recipe with further words."""
    stream, recipe = tmp_path / "chats.jsonl", tmp_path / "small.yaml"
    stream.write_text("".join(json.dumps(chat) + "\n" for chat in CHATS), encoding="utf-8")
    recipe.write_text(
        f"""\
drafter:
  class_path: modules.drafters.small_models.independent.Independent
  init_args: {{layers: 1}}
accelerator: cpu
stream: {{requests: {stream}}}
decoding: {{max_new_tokens: 8}}
learning: {{interval: 2, lr: 0.01}}
""",
        encoding="utf-8",
    )
    return lambda *words: command(
        ["--config", str(recipe), "--output", str(tmp_path / "run"), *words]
    )
