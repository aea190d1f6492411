"""A small T5 from scratch: its folder is a target, and it learns what it is shown."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from configs.command_line.loading import CONFIGS
from data.conversations import prompt_ids
from modules.contracts.sampling import Sampling
from modules.decoding.decoder import SpeculativeDecoder
from modules.target.loading import load_target
from modules.target.seq2seq.target import Seq2SeqTarget
from train.encoder_decoder import EncoderDecoderSettings, command

MODEL = {"d_model": 16, "d_kv": 8, "num_heads": 2, "d_ff": 32, "num_layers": 1}


def test_the_command_writes_a_target_that_answers_as_it_was_trained(tmp_path: Path) -> None:
    rows = [("one two", "two one"), ("three", "three three")]
    pairs = tmp_path / "pairs.jsonl"
    lines = [json.dumps({"prompt": prompt, "response": said}) for prompt, said in rows * 2]
    pairs.write_text("\n".join(lines))
    settings = {"train": str(pairs), "model": {**MODEL, "dropout_rate": 0.0}, "vocabulary": 270}
    settings |= {"steps": 120, "batch": 4, "lr": 1e-2, "warmup_steps": 5}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump({"settings": settings}))
    arguments = ["--config", str(tmp_path / "config.yaml"), "--output", str(tmp_path / "t5")]
    assert command(arguments) == 0
    target = load_target(str(tmp_path / "t5"), "float32", "cpu")
    assert isinstance(target, Seq2SeqTarget)
    prompts = [
        prompt_ids([{"role": "user", "content": prompt}], target.tokenizer) for prompt, _ in rows
    ]
    traces = SpeculativeDecoder(target).decode(prompts, Sampling(), 20)
    said = [target.tokenizer.decode(trace.ids, skip_special_tokens=True) for trace in traces]
    assert said == [answer for _, answer in rows]


def test_the_shipped_recipe_is_one_of_its_settings() -> None:
    stored = yaml.safe_load((CONFIGS / "targets" / "editing_t5.yaml").read_text())
    settings = EncoderDecoderSettings(**stored["settings"])
    assert settings.model["num_decoder_layers"] == 2 and settings.steps == 3000


@pytest.mark.parametrize("name", ["steps", "batch", "vocabulary"])
def test_counts_below_one_are_refused(name: str) -> None:
    with pytest.raises(ValueError, match=f"{name} must be at least 1, got 0"):
        EncoderDecoderSettings("x", **{name: 0})
