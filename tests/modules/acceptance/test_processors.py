"""Penalties, biases, minimum lengths and stop strings: the tokens and the distribution are those of
plain decoding, which are those of Hugging Face's `generate`.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import GenerationConfig

from modules.acceptance.processors import StopStrings, prefix_processors
from modules.acceptance.relaxed import UnverifiedRule
from modules.contracts.sampling import Prefixes, Sampling
from modules.contracts.token_tree import SiblingDraw
from modules.decoding.decoder import SpeculativeDecoder
from modules.drafters.small_models.independent import Independent
from modules.target.generation_config import stock_generate, with_config
from modules.trees.sampled.branching import branching_tree
from modules.trees.sampled.chain import SampledChain
from modules.trees.static import StaticTree
from tests.fakes import ScriptedDrafter, tiny_target
from tests.modules.sampling import goodness, small_target

PROMPTS = [[7, 9, 11, 30], [12, 8], [9, 9, 9]]
SETTINGS: dict[str, dict[str, Any]] = {
    "repetition": {"repetition_penalty": 1.6},
    "occurrence": {"frequency_penalty": 0.9, "presence_penalty": -0.3},
    "suppressed": {"suppress_tokens": list(range(5, 60))},
    "length": {"min_new_tokens": 9, "logit_bias": {0: 8.0}},
    "all": {
        "repetition_penalty": 1.3,
        "frequency_penalty": 0.4,
        "logit_bias": {0: 3.0, 61: 2.0},
        "suppress_tokens": [70, 71],
        "min_new_tokens": 4,
    },
}


@pytest.fixture(scope="module")
def target():
    return tiny_target(seed=3)


@pytest.mark.parametrize("name", SETTINGS)
def test_greedy_answers_are_those_of_generate(name: str, target) -> None:
    sampling = Sampling(**SETTINGS[name])
    plain, drafting = (
        SpeculativeDecoder(target, drafter)
        for drafter in (None, ScriptedDrafter(target.shape, right=0.6, decoys=2))
    )
    expected = [
        stock_generate(target.stock, [prompt], sampling, 12, target.eos_ids)[0]
        for prompt in PROMPTS
    ]
    unchanged = [trace.ids for trace in plain.decode(PROMPTS, Sampling(), 12)]
    assert expected != unchanged, "else the settings would change nothing here"
    for decoder in (plain, drafting):
        alone = [decoder.decode([prompt], sampling, 12)[0].ids for prompt in PROMPTS]
        together = [trace.ids for trace in decoder.decode(PROMPTS, sampling, 12)]
        assert alone == expected == together


def test_a_right_draft_is_kept_under_penalties_too(target) -> None:
    """Without a penalty for what the path itself holds, the second of two equal tokens would
    be."""
    sampling = Sampling(suppress_tokens=[3], presence_penalty=2.0)
    decoder = SpeculativeDecoder(target, ScriptedDrafter(target.shape, 1.0, depth=4))
    plain = SpeculativeDecoder(target).decode(PROMPTS, sampling, 20)
    assert [trace.ids for trace in decoder.decode(PROMPTS, sampling, 20)] == [
        trace.ids for trace in plain
    ]


def test_every_node_is_judged_by_its_own_path(target) -> None:
    """The processed logits of a tree's rows equal those of a chain of the same tokens."""
    sampling = Sampling(**SETTINGS["all"])
    (chain,) = prefix_processors(sampling, target.eos_ids, target.device)
    paths = [[5], [5, 61], [5, 70], [5, 61, 61], [5, 61, 9]]
    logits_BNV = torch.randn(1, 5, 128, dtype=torch.float64, generator=torch.manual_seed(0))
    together = chain(logits_BNV, [Prefixes(0, [8, 9, 10], [61, 7], paths)])[0]
    for row, path in enumerate(paths):
        text = Prefixes(0, [8, 9, 10], [61, 7, *path], [[]])
        single = chain(logits_BNV[:, row : row + 1], [text])
        torch.testing.assert_close(together[row], single[0, 0], rtol=0, atol=0)
    counts = [[8, 9, 10, 61, 7, *path].count(61) for path in paths]
    assert len(set(counts)) == 3 and not torch.equal(together[1], together[3])


LAWS = {
    "point": (None, StaticTree([[0], [1], [0, 0], [0, 1], [1, 0]])),
    "ratio": (None, SampledChain(3)),
    "recursive": ("recursive", branching_tree([2, 2])),
}


@pytest.mark.parametrize("name", LAWS)
def test_sampled_answers_keep_the_changed_distribution(name: str) -> None:
    """Against `generate`'s own distributions, two tokens of the answer."""
    target = small_target()
    drafter = Independent(target.shape, layers=1)
    drafter.initialise(target)
    sampling = Sampling(
        temperature=1.2,
        repetition_penalty=1.7,
        logit_bias={2: 1.0},
        suppress_tokens=[5],
        min_p=0.05,
    )
    decoder = SpeculativeDecoder(
        target,
        drafter.double().eval(),
        builder=LAWS[name][1],
        budget=6,
        stop_ids=frozenset({-1}),
    )
    assert decoder.rule_for(sampling).name == ("point" if name == "point" else "ratio")
    assert goodness(decoder, [3, 1], sampling, 1000) > 1e-3
    assert name == "point" or decoder.sibling_draw is not SiblingDraw.BY_VALUE


def test_a_relaxed_rule_accepts_no_suppressed_token(target) -> None:
    suppressed = SpeculativeDecoder(target).decode([PROMPTS[0]], Sampling(), 16)[0].ids[1::2]
    decoder = SpeculativeDecoder(target, ScriptedDrafter(target.shape, 1.0), UnverifiedRule())
    trace = decoder.decode([PROMPTS[0]], Sampling(suppress_tokens=suppressed), 16)[0]
    assert not set(trace.ids) & set(suppressed)


# -- ends of answers -------------------------------------------------------------------------------


@pytest.mark.parametrize("right", [None, 1.0, 0.5])
def test_stop_strings_end_an_answer_where_they_are_complete(right: float | None, target) -> None:
    full = SpeculativeDecoder(target).decode(PROMPTS, Sampling(), 20)
    texts = [target.tokenizer.decode(trace.ids[4:7]) for trace in full[:3]]
    sampling = Sampling(stop_strings=texts)
    drafter = None if right is None else ScriptedDrafter(target.shape, right, depth=4)
    traces = SpeculativeDecoder(target, drafter).decode(PROMPTS, sampling, 20)
    for prompt, trace, longer in zip(PROMPTS, traces, full, strict=True):
        texts_so_far = [target.tokenizer.decode(trace.ids[:n]) for n in range(len(trace.ids) + 1)]
        ends = [any(text in so_far for text in texts) for so_far in texts_so_far]
        assert not any(ends[:-1]) and (ends[-1] or trace.ids == longer.ids), prompt
        assert sum(trace.accepted) == len(trace.ids) - 1
        assert trace.ids == longer.ids[: len(trace.ids)]
    assert [len(trace.ids) for trace in traces[:3]] == [7, 7, 7]


def test_a_stop_string_is_seen_across_tokens_and_inside_them() -> None:
    pieces = {1: "ab", 2: "cd", 3: "c", 4: " stop", 5: "x"}
    strings = StopStrings(["bc", " st"], lambda ids: "".join(pieces[i] for i in ids))
    assert strings.end([5, 1, 5, 1, 2, 5]) == 5 and strings.end([5, 5, 4]) == 3
    assert strings.end([5, 1, 5]) is None


# -- the target's own settings ---------------------------------------------------------------------


def test_settings_of_a_generation_config_are_taken_where_the_caller_has_none() -> None:
    config = GenerationConfig(
        repetition_penalty=1.1,
        suppress_tokens=[4],
        sequence_bias=[[[7], 2.0]],
        min_p=0.2,
        do_sample=True,
        top_k=20,
        top_p=0.8,
        temperature=0.7,
    )
    found = with_config(Sampling(1.0, top_p=0.5, min_p=0.3), config)
    assert found == Sampling(1.0, 20, 0.5, 0, 0.3, 1.1, logit_bias={7: 2.0}, suppress_tokens=[4])
    for option, value in {"num_beams": 3, "no_repeat_ngram_size": 2, "typical_p": 0.5}.items():
        with pytest.raises(ValueError, match=rf"^generation_config asks for {option}, "):
            with_config(Sampling(), GenerationConfig(**{option: value}))
    with pytest.raises(ValueError, match="sequence_bias of several tokens"):
        with_config(Sampling(), GenerationConfig(sequence_bias=[[[7, 8], 2.0]]))


@pytest.mark.parametrize(
    "wrong",
    [
        {"min_p": 1.5},
        {"repetition_penalty": 0.0},
        {"presence_penalty": float("nan")},
        {"min_new_tokens": -1},
        {"suppress_tokens": [-3]},
        {"logit_bias": {4: float("inf")}},
        {"stop_strings": [""]},
        {"stop_strings": "end"},
    ],
)
def test_settings_that_cannot_be_are_refused_by_name(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(wrong))):
        Sampling(**wrong)


def test_a_token_that_the_target_has_not_is_refused(target) -> None:
    with pytest.raises(ValueError, match="suppress_tokens has token 128, beyond the vocabulary"):
        SpeculativeDecoder(target).decode([[5]], Sampling(suppress_tokens=[128]), 2)
