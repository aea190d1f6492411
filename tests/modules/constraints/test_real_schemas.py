"""JSON schemas on the real 135M target, with and without drafters; `eval/json_schemas.yaml` has all
forty.
"""

from __future__ import annotations

import json

import jsonschema
import pytest

from data.conversations import prompt_ids
from data.reading.files import read_jsonl
from eval.methods.rows import TRAINING_PROMPTS
from modules.constraints.forced import ForcedTokens
from modules.constraints.grammar import json_schema
from modules.contracts.sampling import Sampling
from modules.decoding.decoder import SpeculativeDecoder
from modules.drafters.retrieval.prompt_lookup import PromptLookup
from modules.target.loading import load_target
from tests.fakes import ScriptedDrafter

pytestmark = pytest.mark.slow


def test_answers_are_valid_and_those_of_plain_constrained_decoding() -> None:
    """Greedy, every fifth schema; jsonschema decides what is valid."""
    target = load_target("smollm2-135m")
    plain = SpeculativeDecoder(target)
    drafting = {
        "lookup": SpeculativeDecoder(target, PromptLookup(target.shape)),
        "forced": SpeculativeDecoder(target, ForcedTokens(target.shape)),
        "scripted": SpeculativeDecoder(target, ScriptedDrafter(target.shape, right=0.7, decoys=1)),
    }
    rows, forced = list(read_jsonl(TRAINING_PROMPTS.parent / "json_schemas.jsonl")), 0
    for number, row in enumerate(rows[::5]):
        sampling = Sampling(constraint=json_schema(row["schema"], target))
        ids = prompt_ids([{"role": "user", "content": row["question"]}], target.tokenizer)
        expected = plain.decode([ids], sampling, 160)[0].ids
        text = target.tokenizer.decode(expected, skip_special_tokens=True)
        jsonschema.validate(json.loads(text), row["schema"])
        for name, decoder in drafting.items():
            if number % {"lookup": 1, "forced": 2, "scripted": 4}[name]:
                continue
            trace = decoder.decode([ids], sampling, 160)[0]
            assert trace.ids == expected, (row["id"], name)
            forced += trace.forced
    assert len(rows) == 40 and forced > 60
