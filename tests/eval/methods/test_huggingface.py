"""Hugging Face's decoders give the same tokens as plain decoding with the raw model."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from checkpoints.pretrained import Provenance, save_pretrained
from eval.methods.huggingface import (
    HuggingFaceAssisted,
    HuggingFaceGenerate,
    HuggingFacePromptLookup,
    _Stopwatch,
)
from modules.contracts.sampling import Sampling
from modules.decoding.decoder import SpeculativeDecoder
from modules.drafters.heads.medusa import Medusa
from modules.drafters.small_models.independent import Independent
from tests.fakes import tiny_target

GREEDY = Sampling()
PROMPTS = [[10, 11, 12, 13, 10, 11], [20, 21, 22], [30, 31, 32, 33]]


@pytest.mark.parametrize("arch", ["llama", "gpt2", "qwen3"])
@pytest.mark.parametrize(
    "kind", [HuggingFaceGenerate, HuggingFacePromptLookup, HuggingFaceAssisted]
)
def test_greedy_tokens_equal_our_own_loop(kind: type, arch: str) -> None:
    target = tiny_target(arch)
    other = kind(target, layers=1) if kind is HuggingFaceAssisted else kind(target)
    for prompt in PROMPTS:
        expected = SpeculativeDecoder(target).decode([prompt], GREEDY, 20)[0]
        found = other.decode([prompt], GREEDY, 20)[0]
        assert found.ids == expected.ids and found.prompt_tokens == len(prompt)
        assert len(found.drafted) == len(found.ids)
        assert (
            found.time_to_first_token == found.seconds["prefill"] > 0 and found.decode_seconds >= 0
        )


def test_a_batch_is_padded_on_the_left_and_cut_at_the_end_token() -> None:
    target = tiny_target()
    together = HuggingFaceGenerate(target).decode(PROMPTS, GREEDY, 16)
    alone = [HuggingFaceGenerate(target).decode([prompt], GREEDY, 16)[0] for prompt in PROMPTS]
    assert [trace.ids for trace in together] == [trace.ids for trace in alone]


def test_calls_account_for_the_tokens_that_follow_the_first_call() -> None:
    trace = HuggingFaceAssisted(tiny_target(), layers=1, tokens=3).decode([PROMPTS[0]], GREEDY, 20)[
        0
    ]
    assert all(1 <= count <= 4 for count in trace.accepted)
    assert sum(trace.accepted) < len(trace.ids) <= sum(trace.accepted) + 4


def test_calls_end_with_the_answer() -> None:
    """As in our own loop: what a call gave behind the end token is not counted."""
    decoder = HuggingFacePromptLookup(tiny_target())
    watch = _Stopwatch()
    watch.counts = [1, 3, 4]
    trace = decoder._trace([7, 8], [5, 6, 7, 8, 9, 0], watch, {"prefill": 0.1, "other": 1.0})
    assert trace.accepted == [3, 2] and trace.drafted == [False, True, True, False, True, True]


def test_assistant_shares_the_targets_memory() -> None:
    target = tiny_target()
    assistant = HuggingFaceAssisted(target, layers=1).assistant
    weights = {parameter.data_ptr() for parameter in target.model.parameters()}
    assert all(parameter.data_ptr() in weights for parameter in assistant.parameters())
    assert not any(buffer.is_meta for buffer in assistant.buffers())


@pytest.mark.parametrize("draft_vocabulary", [None, 40])
def test_a_trained_drafter_assists_with_the_tokens_that_it_drafts_here(
    draft_vocabulary: int | None, tmp_path: Path
) -> None:
    target = tiny_target(layers=4)
    torch.manual_seed(0)
    drafter = Independent(target.shape, layers=3, draft_vocabulary=draft_vocabulary, draft_length=3)
    drafter.initialise(target)
    save_pretrained(drafter.double(), tmp_path / "drafter", Provenance.of(target))
    assisted = HuggingFaceAssisted(target, tokens=3, assistant=str(tmp_path))
    assert assisted.assistant.config.num_hidden_layers == 3
    for prompt in PROMPTS:
        ours = SpeculativeDecoder(target, drafter.eval()).decode([prompt], GREEDY, 21)[0]
        theirs = assisted.decode([prompt], GREEDY, 21)[0]
        assert theirs.ids == ours.ids
        assert theirs.accepted[:-1] == ours.accepted[-len(theirs.accepted) : -1], (
            "the last call may end at the limit"
        )
        assert len(theirs.accepted) >= len(ours.accepted) - 1, "its first call drafts too"


def test_sampling_is_seeded_and_leaves_the_global_generator_alone() -> None:
    decoder, state = HuggingFaceGenerate(tiny_target()), torch.get_rng_state()
    hot = Sampling(temperature=1.5, seed=3)
    first, again = (decoder.decode([PROMPTS[1]], hot, 20)[0].ids for _ in range(2))
    assert (
        first == again != decoder.decode([PROMPTS[1]], Sampling(temperature=1.5, seed=4), 20)[0].ids
    )
    assert torch.equal(state, torch.get_rng_state())


def test_what_cannot_be_done_is_refused(tmp_path: Path) -> None:
    target = tiny_target()
    with pytest.raises(ValueError, match="one prompt at a time"):
        HuggingFacePromptLookup(target).decode(PROMPTS, GREEDY, 4)
    with pytest.raises(ValueError, match="layers 2 must lie between 1 and 1"):
        HuggingFaceAssisted(target, layers=2)
    save_pretrained(Medusa(target.shape, 1), tmp_path / "medusa", Provenance.of(target))
    with pytest.raises(ValueError, match="is a Medusa: give a trained Independent drafter"):
        HuggingFaceAssisted(target, assistant=str(tmp_path / "medusa"))
    with pytest.raises(ValueError, match="does not exist"):
        HuggingFaceAssisted(target, assistant=str(tmp_path / "nothing"))
