"""Every drafter of configs/eval/training_free.yaml: no token changed, whatever stands beside it in the batch."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from data.configfiles import CONFIGS
from eval.methods import load_drafter
from modules.core.drafter import Drafter, Sampling
from modules.decoding.decoder import SpeculativeDecoder
from modules.training_free.datastore import Datastore
from tests.fakes import ids_by_batch, many_prompts, tiny_target

TARGET = tiny_target()
PROMPTS = [[7, 8, 9, 7, 8], [20, 30], [40, 41, 42, 40, 41, 42, 40]]
METHODS = {method["name"]: method["drafter"]
           for method in yaml.safe_load((CONFIGS / "eval" / "training_free.yaml").read_text())["methods"]
           if "drafter" in method}


@pytest.fixture(params=METHODS)
def drafter(request: pytest.FixtureRequest, tmp_path: Path) -> Drafter:
    """The row's drafter, over a small datastore where it wants one."""
    Datastore.build([[7, 8, 9, 10], [20, 30, 31], [42, 40, 41]], TARGET.shape.vocab_size).save(tmp_path)
    spec = METHODS[request.param]
    arguments = dict(spec.get("init_args") or {})
    if "datastore" in arguments:
        arguments["datastore"] = str(tmp_path)
    return load_drafter({"class_path": spec["class_path"], "init_args": arguments}, TARGET)


def test_a_batch_and_each_prompt_alone_are_plain_decoding(drafter: Drafter) -> None:
    expected = [trace.ids for trace in SpeculativeDecoder(TARGET).decode(PROMPTS, Sampling(), 20)]
    decoder = SpeculativeDecoder(TARGET, drafter)
    assert [trace.ids for trace in decoder.decode(PROMPTS, Sampling(), 20)] == expected
    assert [decoder.decode([prompt], Sampling(), 20)[0].ids for prompt in PROMPTS] == expected
    assert not list(drafter.parameters())


def test_batches_of_4_and_16_decode_the_same_ids_as_each_prompt_alone(drafter: Drafter) -> None:
    decoder, prompts = SpeculativeDecoder(TARGET, drafter), many_prompts(16)
    alone, by_four, together = (ids_by_batch(decoder, prompts, size, 8) for size in (1, 4, 16))
    assert by_four == alone and together == alone
