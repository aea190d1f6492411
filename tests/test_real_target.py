"""The real 135M target: tree verification rounds like plain decoding, and speculation gives the
same tokens.
"""

from __future__ import annotations

import pytest
import torch

from data.conversations import prompt_ids
from data.reading.files import read_jsonl
from eval.methods.rows import TRAINING_PROMPTS
from modules.contracts.sampling import Sampling
from modules.contracts.token_tree import TokenTree, Topology
from modules.decoding.decoder import SpeculativeDecoder
from modules.drafters.heads.clover import Clover
from modules.drafters.heads.medusa import Medusa
from modules.drafters.retrieval.prompt_lookup import PromptLookup
from modules.drafters.self_speculative.m2r2 import M2R2
from modules.drafters.self_speculative.skipdecode import SkipDecode
from modules.target.generation_config import stock_generate
from modules.target.loading import load_target, locate
from tests.fakes import ScriptedDrafter

pytestmark = pytest.mark.slow
TOKENS = 16
QUESTIONS = ("Name three fruits.", "What is 12 times 3?")
PROMPTS = 10
"""Of the training data, of which settings are tried on."""


@pytest.fixture(scope="module")
def target():
    return load_target("smollm2-135m")


@pytest.fixture(scope="module")
def prompts(target):
    return [
        prompt_ids([{"role": "user", "content": question}], target.tokenizer)
        for question in QUESTIONS
    ]


def test_tree_and_chain_agree_to_rounding(target, prompts):
    ids = torch.tensor([prompts[0]])
    tree = TokenTree(
        torch.randint(100, 40000, (1, 8), generator=torch.Generator().manual_seed(0)),
        Topology(torch.tensor([[-1, 0, 0, 1, 1, 2, 3, 6]])),
    )
    session = target.open(1, 128)
    session.prefill(ids, torch.tensor([ids.shape[1]]))
    verified = session.verify(tree).logits_BNV[0]
    for node, path in ((7, [0, 1, 3, 6, 7]), (5, [0, 2, 5])):
        chain = torch.cat([ids, tree.tokens_BN[:, path]], dim=1)
        with torch.no_grad():
            plain = target.model(input_ids=chain).logits[0, -1]
        assert (verified[node] - plain).abs().max() < 1e-3


def test_greedy_speculation_is_token_identical(target, prompts):
    expected = [
        target.model.generate(torch.tensor([ids]), max_new_tokens=TOKENS, do_sample=False)[
            0, len(ids) :
        ].tolist()
        for ids in prompts
    ]
    drafters = [None, ScriptedDrafter(target.shape, right=0.7, decoys=1)]
    for kind in (Medusa, Clover):
        drafter = kind(target.shape, heads=3, draft_vocabulary=1024)
        drafter.initialise(target)
        drafters.append(drafter.eval())
    # Drafters made of its own layers, in its KV cache.
    drafters += [SkipDecode(target.shape, tuning="none").eval(), M2R2(target.shape).eval()]
    for drafter in drafters:
        traces = [
            SpeculativeDecoder(target, drafter).decode([ids], Sampling(), TOKENS)[0]
            for ids in prompts
        ]
        assert [trace.ids for trace in traces] == expected
    together = SpeculativeDecoder(target, drafters[-1]).decode(prompts, Sampling(), TOKENS)
    assert [trace.ids for trace in together] == expected


def test_a_gguf_file_is_converted_under_any_device_context(tmp_path, monkeypatch, target):
    """On a machine that has converted nothing yet, with the weights of one that has."""
    monkeypatch.setenv("SLIPSTREAM_CACHE", str(tmp_path))
    with torch.device("meta"):
        folder = locate("smollm2-135m")
    assert load_target(folder).fingerprint() == target.fingerprint()


SETTINGS = {
    "processors": {
        "repetition_penalty": 1.2,
        "presence_penalty": 0.7,
        "frequency_penalty": 0.3,
        "logit_bias": {1: 2.0, 30: -4.0, 253: 1.5},
        "suppress_tokens": [260, 28],
    },
    "ends": {"stop_strings": ["\n", ", a", "ing "], "min_new_tokens": 6},
}


@pytest.mark.parametrize("name", SETTINGS)
def test_settings_give_the_tokens_of_generate(name, target):
    sampling, limit = Sampling(**SETTINGS[name]), 16
    texts = [
        row["prompt"] for row, _ in zip(read_jsonl(TRAINING_PROMPTS), range(PROMPTS), strict=False)
    ]
    ids = [prompt_ids([{"role": "user", "content": text}], target.tokenizer) for text in texts]
    plain = SpeculativeDecoder(target)
    drafting = SpeculativeDecoder(target, PromptLookup(target.shape))
    expected = [
        stock_generate(
            target.stock, [prompt], sampling, limit, target.eos_ids, tokenizer=target.tokenizer
        )[0]
        for prompt in ids
    ]
    assert [drafting.decode([prompt], sampling, limit)[0].ids for prompt in ids] == expected
    together = plain.decode(ids, sampling, limit)
    assert [trace.ids for trace in together] == expected
    unchanged = plain.decode(ids, Sampling(), limit)
    assert len(ids) == PROMPTS and [trace.ids for trace in unchanged] != expected
