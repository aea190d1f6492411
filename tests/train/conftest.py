import json
import random
from pathlib import Path

import pytest
import torch

from tests.fakes import tiny_target

WORDS = [
    "the",
    "cat",
    "sat",
    "on",
    "a",
    "mat",
    "and",
    "ate",
    "nine",
    "red",
    "figs",
    "then",
    "ran",
    "home",
]


@pytest.fixture(scope="session")
def conversations(tmp_path_factory) -> Path:
    """Forty prompts with answers, as JSON lines."""
    chance = random.Random(0)
    file = tmp_path_factory.mktemp("data") / "conversations.jsonl"
    rows = [
        {
            "prompt": f"{' '.join(chance.choices(WORDS, k=4))} {i}?",
            "response": " ".join(chance.choices(WORDS, k=8)),
        }
        for i in range(40)
    ]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return file


@pytest.fixture
def tiny(monkeypatch):
    """`load_target` and `outline` give a tiny random target."""
    target = tiny_target(dtype=torch.float32)
    monkeypatch.setattr("train.cli.outline", lambda *_: target)
    monkeypatch.setattr("train.run.load_target", lambda *_: target)
    return target


@pytest.fixture
def recipe(conversations, tmp_path) -> Path:
    """A config that trains Medusa heads on the tiny target in a second."""
    file = tmp_path / "tiny.yaml"
    file.write_text(
        f"""\
drafter:
  class_path: modules.drafters.heads.medusa.Medusa
  init_args: {{heads: 2, draft_vocabulary: 48}}
data: {{train: {conversations}, validation_fraction: 0.2, max_length: 128, rows: 1}}
optimizer: {{lr: 0.01}}
trainer:
  {{max_steps: 6, max_epochs: -1, val_check_interval: 3, accelerator: cpu, log_every_n_steps: 1}}
probe: {{prompts: 2, max_new_tokens: 8}}
checkpoint: {{every_n_steps: 1}}
""",
        encoding="utf-8",
    )
    return file
