"""What a `generation_config` asks for: named once, and switched off in everything that decodes."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import GenerationConfig

from data.reading.files import Place, Row
from data.regenerate import Generation, regenerate
from eval.methods.huggingface import (
    HuggingFaceAssisted,
    HuggingFaceGenerate,
    HuggingFacePromptLookup,
)
from modules.contracts.sampling import Sampling
from modules.decoding.decoder import SpeculativeDecoder
from modules.target.generation_config import NEUTRAL, stock_generate, unapplied, unapplied_notice
from modules.target.loading import load_target
from modules.target.target import Target
from tests.fakes import tiny_target

SUPPRESSED = [*range(5, 110)]
ASKED: dict[str, Any] = {
    "repetition_penalty": 5.0,
    "encoder_repetition_penalty": 3.0,
    "no_repeat_ngram_size": 1,
    "encoder_no_repeat_ngram_size": 1,
    "bad_words_ids": [[i] for i in SUPPRESSED],
    "sequence_bias": [[[101], 90.0]],
    "suppress_tokens": SUPPRESSED,
    "begin_suppress_tokens": SUPPRESSED,
    "min_length": 22,
    "min_new_tokens": 12,
    "forced_bos_token_id": 101,
    "forced_eos_token_id": 101,
    "guidance_scale": 4.0,
    "exponential_decay_length_penalty": [1, 9.0],
    "watermarking_config": {"bias": 90.0},
    "token_healing": True,
    "min_p": 0.9,
    "top_h": 0.05,
    "typical_p": 0.01,
    "epsilon_cutoff": 0.5,
    "eta_cutoff": 0.9,
    "stop_strings": ["a"],
    "max_time": 1e-9,
    "num_beams": 3,
    "num_beam_groups": 2,
    "num_return_sequences": 2,
    "constraints": [1],
    "force_words_ids": [[5]],
    "penalty_alpha": 0.6,
    "dola_layers": "low",
    "assistant_ensemble_weight": 0.5,
}
"""Of every option a value that asks for something."""
WARPERS = ("min_p", "top_h", "typical_p", "epsilon_cutoff", "eta_cutoff")
PROCESSORS = (
    "repetition_penalty",
    "encoder_repetition_penalty",
    "no_repeat_ngram_size",
    "encoder_no_repeat_ngram_size",
    "bad_words_ids",
    "sequence_bias",
    "suppress_tokens",
    "begin_suppress_tokens",
    "watermarking_config",
    "guidance_scale",
    "forced_eos_token_id",
)
HARMLESS = {
    # What the caller sets here, or the target's end tokens.
    "max_length",
    "max_new_tokens",
    "do_sample",
    "temperature",
    "top_k",
    "top_p",
    "pad_token_id",
    "bos_token_id",
    "eos_token_id",
    "decoder_start_token_id",
    # Of beams alone, which are named themselves.
    "early_stopping",
    "length_penalty",
    "diversity_penalty",
    "low_memory",
    # The same tokens in another way, in another form, or from logits that are broken.
    "use_mtp",
    "use_cache",
    "cache_implementation",
    "cache_config",
    "max_cache_len",
    "renormalize_logits",
    "remove_invalid_values",
    "output_attentions",
    "output_hidden_states",
    "output_scores",
    "output_logits",
    "return_dict_in_generate",
    "prefill_chunk_size",
    "compile_config",
    "disable_compile",
    "continuous_batching_config",
    # Of assistants, whose drafts are verified.
    "is_assistant",
    "num_assistant_tokens",
    "num_assistant_tokens_schedule",
    "assistant_confidence_threshold",
    "prompt_lookup_num_tokens",
    "max_matching_ngram_size",
    "assistant_early_exit",
    "assistant_lookbehind",
    "target_lookbehind",
    "speculation_type",
    "transformers_version",
}
PROMPT, LIMIT = "one two", 12


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("target")
    target = tiny_target(layers=3, seed=3)
    target.model.save_pretrained(folder)
    target.tokenizer.save_pretrained(folder)
    return folder


def asking(folder: Path, **options: Any) -> Target:
    """The saved target with these options in its generation_config.json."""
    asked = {"eos_token_id": 0, "pad_token_id": 0, **options}
    (folder / "generation_config.json").write_text(json.dumps(asked))
    return load_target(str(folder), "float64")


def prompt(target: Target) -> list[int]:
    chat = [{"role": "user", "content": PROMPT}]
    return target.tokenizer.apply_chat_template(chat, add_generation_prompt=True)["input_ids"]


def decoded(target: Target, ids: list[int]) -> list[int]:
    return SpeculativeDecoder(target).decode([ids], Sampling(), LIMIT)[0].ids


def regenerated(target: Target, temperature: float, folder: Path) -> list[int]:
    output = folder / f"{temperature}.jsonl"
    generation = Generation(LIMIT, (temperature,), seed=1)
    row = Row(Place("rows", "row", 1), {"prompt": PROMPT})
    regenerate(target, [row], output, generation, progress=False)
    return json.loads(output.read_text())["response_ids"]


@pytest.fixture(scope="module")
def plain(saved: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The target that asks for nothing, its greedy answer and one that was sampled."""
    target = asking(saved)
    sampled = regenerated(target, 1.0, tmp_path_factory.mktemp("plain"))
    return target, decoded(target, prompt(target)), sampled


def test_every_option_of_the_library_is_switched_off_or_known_to_change_nothing() -> None:
    """A new one of a later release fails here, and wants a decision."""
    known = {name for name in vars(GenerationConfig()) if not name.startswith("_")}
    assert not known - set(NEUTRAL) - HARMLESS and not set(NEUTRAL) & HARMLESS
    assert set(ASKED) == set(NEUTRAL)


def test_the_librarys_own_defaults_ask_for_nothing() -> None:
    defaults = GenerationConfig._get_default_generation_params()
    set_here = {"do_sample": True, "temperature": 0.6, "top_k": 20, "top_p": 0.9}
    for options in ({}, defaults, {**set_here, "suppress_tokens": []}):
        assert not unapplied(GenerationConfig(**options))
    assert not unapplied(None) and unapplied_notice(GenerationConfig()) == ""
    assert unapplied(GenerationConfig(forced_bos_token_id=0)) == {"forced_bos_token_id": 0}


@pytest.mark.parametrize("option", ASKED)
def test_an_option_is_named_and_changes_no_answer(
    option: str, saved: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, plain
) -> None:
    """Regenerated answers and every row of Hugging Face's say what the decoder says."""
    _, greedy, sampled = plain
    asked = {option: ASKED[option], "do_sample": option == "num_return_sequences"}
    with caplog.at_level(logging.WARNING, "modules.target.loading"):
        target = asking(saved, **asked)
    own = [record for record in caplog.records if record.name == "modules.target.loading"]
    warned = [record.getMessage() for record in own]
    assert len(warned) == 1 and f" {option} " in warned[0]
    assert "\n" not in warned[0] and len(warned[0]) < 400
    ids = prompt(target)
    assert decoded(target, ids) == greedy == regenerated(target, 0.0, tmp_path)
    assert regenerated(target, 1.0, tmp_path) == sampled
    for row in (
        HuggingFaceGenerate(target),
        HuggingFacePromptLookup(target),
        HuggingFaceAssisted(target, layers=1),
    ):
        assert row.decode([ids], Sampling(), LIMIT)[0].ids == greedy
    assert unapplied(target.model.generation_config), "the target's own config stays as it was"


@pytest.mark.parametrize("option", [*PROCESSORS, *WARPERS])
def test_the_values_asked_for_would_change_answers(option: str, saved: Path, plain) -> None:
    """Otherwise the test above would show nothing."""
    target, answers = asking(saved, **{option: ASKED[option]}), []
    ids, drawn = torch.tensor([prompt(target)]), option in WARPERS
    for one in (plain[0], target):
        torch.manual_seed(0)
        with torch.no_grad():
            answers.append(
                one.stock.generate(
                    ids, do_sample=drawn, temperature=2.0, top_k=0, max_new_tokens=LIMIT
                )
            )
    assert not torch.equal(*answers)


@pytest.mark.parametrize(
    ("option", "ids"), [("min_length", []), ("min_new_tokens", []), ("forced_bos_token_id", [7])]
)
def test_beginnings_and_ends_are_the_models_own(option: str, ids: list[int], saved: Path) -> None:
    """A second end token comes fourth in the answer; a first token is forced only behind a prompt
    of one token."""
    target = asking(saved, **{option: ASKED[option], "eos_token_id": [0, 53]})
    ids = ids or prompt(target)
    own = decoded(target, ids)
    assert stock_generate(target.stock, [ids], Sampling(), LIMIT, target.eos_ids) == [own]
    with torch.no_grad():
        text = target.stock.generate(torch.tensor([ids]), max_new_tokens=LIMIT)
    assert text[0, len(ids) :].tolist() != own and (len(ids) == 1 or own[3:] == [53])


def test_a_model_that_returns_more_than_its_text_is_asked_for_that_alone(saved: Path) -> None:
    target = asking(
        saved,
        return_dict_in_generate=True,
        output_scores=True,
        max_length=3,
        num_return_sequences=2,
        do_sample=True,
        prompt_lookup_num_tokens=3,
    )
    prompts = [prompt(target), prompt(target)[:2]]
    found = stock_generate(target.stock, prompts, Sampling(), LIMIT, target.eos_ids)
    assert found == [decoded(target, ids) for ids in prompts]
