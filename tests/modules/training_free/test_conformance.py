"""Every drafter of configs/eval/training_free.yaml: no token changed, whatever stands beside it in the batch."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from data.configfiles import CONFIGS
from eval.methods import load_drafter
from modules.core.drafter import Sampling
from modules.decoding.decoder import SpeculativeDecoder
from modules.training_free.datastore import Datastore
from tests.fakes import tiny_target

TARGET = tiny_target()
PROMPTS = [[7, 8, 9, 7, 8], [20, 30], [40, 41, 42, 40, 41, 42, 40]]
METHODS = {method["name"]: method["drafter"]
           for method in yaml.safe_load((CONFIGS / "eval" / "training_free.yaml").read_text())["methods"]
           if "drafter" in method}


@pytest.mark.parametrize("name", METHODS)
def test_a_batch_and_each_prompt_alone_are_plain_decoding(name: str, tmp_path: Path) -> None:
    Datastore.build([[7, 8, 9, 10], [20, 30, 31], [42, 40, 41]], TARGET.shape.vocab_size).save(tmp_path)
    arguments = dict(METHODS[name].get("init_args") or {})
    if "datastore" in arguments:
        arguments["datastore"] = str(tmp_path)
    drafter = load_drafter({"class_path": METHODS[name]["class_path"], "init_args": arguments}, TARGET)
    expected = [trace.ids for trace in SpeculativeDecoder(TARGET).decode(PROMPTS, Sampling(), 20)]
    decoder = SpeculativeDecoder(TARGET, drafter)
    assert [trace.ids for trace in decoder.decode(PROMPTS, Sampling(), 20)] == expected
    assert [decoder.decode([prompt], Sampling(), 20)[0].ids for prompt in PROMPTS] == expected
    assert not list(drafter.parameters())
