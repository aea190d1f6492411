"""JSON schemas, regular expressions, grammars and lists of texts, by llguidance."""

from __future__ import annotations

import json
import math
from pathlib import Path

import jsonschema
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from tokenizers.decoders import ByteLevel
from transformers import PreTrainedTokenizerFast

from modules.constraints.grammar import json_schema, lark, one_of, read_constraint, regex
from modules.contracts.sampling import Sampling
from modules.decoding.decoder import SpeculativeDecoder
from modules.decoding.particles import ParticleDecoder
from modules.target.target import Target
from tests.fakes import ScriptedDrafter, tiny_target

SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 5},
        "age": {"type": "integer", "minimum": 0, "maximum": 120},
        "colors": {"type": "array", "items": {"enum": ["red", "blue"]}, "maxItems": 2},
    },
    "required": ["name", "age", "colors"],
    "additionalProperties": False,
}


@pytest.fixture(scope="module")
def target() -> Target:
    """A random model of one token per byte."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    pieces = {"<|end|>": 0, **{piece: i + 1 for i, piece in enumerate(alphabet)}}
    backend = Tokenizer(models.BPE(pieces, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = ByteLevel()
    plain = tiny_target(vocab=260, seed=1)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|end|>")
    return Target(plain.model, tokenizer, "bytes")


def answer(target: Target, constraint, drafting: bool = False, heat: float = 0.0) -> str:
    drafter = ScriptedDrafter(target.shape, 0.5, decoys=1) if drafting else None
    sampling = Sampling(heat, constraint=constraint)
    trace = SpeculativeDecoder(target, drafter).decode([[5, 6, 7]], sampling, 120)[0]
    assert trace.ids[-1] in target.eos_ids
    return target.tokenizer.decode(trace.ids, skip_special_tokens=True)


def test_answers_are_json_of_the_schema(target) -> None:
    constraint = json_schema(SCHEMA, target)
    greedy = answer(target, constraint)
    assert greedy == answer(target, constraint, drafting=True)
    for text in (greedy, answer(target, constraint, heat=1.5)):
        jsonschema.validate(json.loads(text), SCHEMA)
    state = constraint.start()
    assert target.tokenizer.decode(state.forced()) == '{"name":"'
    # One mask and single questions agree, before and after the mask was made.
    token = state.forced()[0]
    assert [state.allows(token), state.allows(token + 1)] == [True, False]
    assert state.allowed().nonzero()[:, 0].tolist() == [token] and state.allows(token)
    assert state.advance(token + 1) is None and state.advance(token) is not None
    assert state.advance(token) is not None, "states do not change"


def test_end_tokens_are_allowed_alone_as_in_masks(target) -> None:
    """A state that is asked before its mask was made; particles ask so."""
    begun = regex("[ab]{2}", target).start()
    for _ in range(3):
        assert [begun.allows(end) for end in target.eos_ids] == [
            bool(begun.allowed()[end]) for end in target.eos_ids
        ]
        last, begun = begun, begun.advance(int(begun.allowed().nonzero()[-1])) or begun
    assert last.allows(0)
    for heat in (0.0, 1.0):
        sampling = Sampling(heat, constraint=regex("[ab]{2}", target))
        (traces,) = ParticleDecoder(target, particles=2).weighted([[5, 6, 7]], sampling, 9)
        for trace in traces:
            assert trace.log_weight > -math.inf and len(trace.ids) == 3


def test_a_target_without_end_tokens_is_refused(target, monkeypatch) -> None:
    monkeypatch.setattr(Target, "eos_ids", frozenset())
    with pytest.raises(ValueError, match="has no token that ends an answer"):
        regex("[ab]", target)


def test_the_other_kinds(target, tmp_path: Path) -> None:
    assert answer(target, regex("[ab]{3}c?", target)) in {
        a + b + c + end for a in "ab" for b in "ab" for c in "ab" for end in ("", "c")
    }
    assert answer(target, one_of(["yes", 'no "really"'], target)) in ("yes", 'no "really"')
    assert answer(target, lark('start: "<" start ">" | "x"', target)).strip("<>") == "x"
    for name, text in {
        "a.json": json.dumps(SCHEMA),
        "a.regex": "ab\n",
        "a.txt": "ab\n\ncd",
    }.items():
        (tmp_path / name).write_text(text)
        assert read_constraint(str(tmp_path / name), target).start().allowed().any()


@pytest.mark.parametrize(
    ("name", "text", "wrong"),
    [
        ("a.json", "{", "cannot be read"),
        ("a.json", '{"type": "nonsense"}', "nonsense"),
        ("a.regex", "(ab", "unclosed group"),
        ("a.lark", "start: other", "other"),
        ("a.txt", "\n", "has no text"),
        ("a.yaml", "", "is no file of a constraint"),
    ],
)
def test_files_that_cannot_be_used_are_refused(name, text, wrong, target, tmp_path: Path) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(ValueError, match=wrong) as refused:
        read_constraint(str(tmp_path / name), target)
    assert "\n" not in str(refused.value)
