"""Settings of a model's `generation_config`, and `generate` with the caller's settings alone.

Nothing of a `generation_config` is applied unless it is asked for (`with_config`), so that answers
are compared on the model's own probabilities: `unapplied` names what it says, `stock_generate` and
`SERVED_NEUTRAL` switch it off. Settings that decoding has (`Sampling`) can be taken from it, the
others are refused by name.

Shape legend: B sequences, T tokens.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from transformers import GenerationConfig, LogitsProcessorList

from modules.acceptance.processors import StopStrings, occurrence_penalties
from modules.constraints.masking import States
from modules.contracts.sampling import EXTRA_OPTIONS, Sampling

NEUTRAL: dict[str, Any] = {
    # Logits processors, at any temperature.
    "repetition_penalty": 1.0,
    "encoder_repetition_penalty": 1.0,
    "no_repeat_ngram_size": 0,
    "encoder_no_repeat_ngram_size": 0,
    "bad_words_ids": None,
    "sequence_bias": None,
    "suppress_tokens": None,
    "begin_suppress_tokens": None,
    "min_length": 0,
    "min_new_tokens": 0,
    "forced_bos_token_id": None,
    "forced_eos_token_id": None,
    "guidance_scale": 1.0,
    "exponential_decay_length_penalty": None,
    "watermarking_config": None,
    "token_healing": False,
    # Warpers, which act on sampling alone.
    "min_p": 0.0,
    "top_h": None,
    "typical_p": 1.0,
    "epsilon_cutoff": 0.0,
    "eta_cutoff": 0.0,
    # Ends of an answer beside its end tokens, and searches other than greedy and sampled decoding.
    "stop_strings": None,
    "max_time": None,
    "num_beams": 1,
    "num_beam_groups": 1,
    "num_return_sequences": 1,
    "constraints": None,
    "force_words_ids": None,
    "penalty_alpha": 0.0,
    "dola_layers": None,
    "assistant_ensemble_weight": None,
}
"""Options of a `generation_config` that influence which tokens are chosen, at their neutral values
(transformers 5.23, `GenerationConfig`)."""
SERVED_NEUTRAL: dict[str, Any] = {"repetition_penalty": 1.0, "min_p": 0.0, "top_k": -1}
"""What vLLM and SGLang take from a model's `generation_config` where a request leaves it open
(beside temperature and top_p), at their neutral values there."""


def unapplied(config: Any) -> dict[str, Any]:
    """Settings of a `generation_config` that decoding does not apply, with their values."""
    values = {name: getattr(config, name, None) for name in NEUTRAL}
    return {
        name: value
        for name, value in values.items()
        if value is not None and value != NEUTRAL[name] and value not in ([], {}, "")
    }


def unapplied_notice(config: Any) -> str:
    """One line that names what is not applied, long values cut; empty if there is nothing."""
    settings = {name: " ".join(str(value).split()) for name, value in unapplied(config).items()}
    named = [
        f"{name} {value if len(value) <= 40 else value[:40] + ' …'}"
        for name, value in settings.items()
    ]
    return (
        ""
        if not named
        else (
            f"its generation_config asks for {', '.join(named)}: this is applied only where "
            "`generation_config` is set to true, and answers are those of the model without it"
        )
    )


APPLICABLE = {
    "repetition_penalty": "repetition_penalty",
    "sequence_bias": "logit_bias",
    "suppress_tokens": "suppress_tokens",
    "min_new_tokens": "min_new_tokens",
    "min_p": "min_p",
    "stop_strings": "stop_strings",
}
"""Options of a `generation_config` that can be applied, and the settings of `Sampling` they are."""


def with_config(sampling: Sampling, config: Any) -> Sampling:
    """These settings, and those of a `generation_config` where they are at their defaults. Of a
    config that samples (`do_sample`) also top-k and top-p; the temperature stays as it is.

    Raises:
        ValueError: the config asks for something that decoding does not have, by name.
    """
    options = unapplied(config)
    # 1. What cannot be applied.
    refused = [name for name in options if name not in APPLICABLE]
    biases = _single_biases(options.pop("sequence_bias", {}))
    if refused or biases is None:
        raise ValueError(
            f"generation_config asks for {', '.join(refused) or 'sequence_bias of several tokens'},"
            f" which is not supported: set generation_config to false, or edit the target's file "
            f"(supported: {', '.join(APPLICABLE)})"
        )
    # 2. What the caller has left at its default.
    options_taken = {APPLICABLE[name]: value for name, value in options.items()}
    options_taken |= {"logit_bias": biases} if biases else {}
    if isinstance(options_taken.get("stop_strings"), str):
        options_taken["stop_strings"] = [options_taken["stop_strings"]]
    if getattr(config, "do_sample", False):
        warpers = {"top_k": 0, "top_p": 1.0}
        values = {name: getattr(config, name, None) for name in warpers}
        options_taken |= {name: value for name, value in values.items() if value is not None}
    free = {"top_k": 0, "top_p": 1.0, **EXTRA_OPTIONS}
    options_taken = {
        name: value
        for name, value in options_taken.items()
        if getattr(sampling, name) == free[name]
    }
    return replace(sampling, **options_taken)


def _single_biases(option: Any) -> dict[int, float] | None:
    """Biases by token of a `sequence_bias`; None where one is of several tokens."""
    pairs = option.items() if isinstance(option, Mapping) else option
    biases = [(list(tokens), float(bias)) for tokens, bias in pairs]
    if any(len(tokens) != 1 for tokens, _ in biases):
        return None
    return {tokens[0]: bias for tokens, bias in biases}


def sampling_options(sampling: Sampling) -> dict[str, Any]:
    """The entries of a `GenerationConfig` for the same sampling."""
    options: dict[str, Any] = {"do_sample": False}
    if sampling.temperature > 0:
        options = {
            "do_sample": True,
            "temperature": sampling.temperature,
            "top_k": sampling.top_k,
            "top_p": sampling.top_p,
        }
    # What acts on sampling alone is left out when greedy; what has no entry is `extra_arguments`.
    extra = sampling.extra_options()
    extra.pop("constraint", None)
    if sampling.temperature == 0:
        extra.pop("min_p", None)
    for name in ("presence_penalty", "frequency_penalty"):
        extra.pop(name, None)
    if biases := extra.pop("logit_bias", {}):
        extra["sequence_bias"] = [[[token], float(bias)] for token, bias in biases.items()]
    for name in ("suppress_tokens", "stop_strings"):
        extra |= {name: list(extra[name])} if name in extra else {}
    return {**options, **extra}


def extra_arguments(
    sampling: Sampling,
    width: int,
    prompts: int,
    vocabulary: int,
    tokenizer: Any,
    eos_ids: Collection[int] = (),
) -> dict[str, Any]:
    """Arguments of `generate` for settings without an entry in its config.

    Args:
        sampling: the settings.
        width, prompts: tokens of the padded prompts, and their number.
        vocabulary: V.
        tokenizer: whose text stop strings are.
        eos_ids: end tokens, of which one is left where a constraint allows no token.
    """
    arguments: dict[str, Any] = {"tokenizer": tokenizer} if sampling.stop_strings else {}
    if penalties := occurrence_penalties(sampling, width):
        arguments["logits_processor"] = LogitsProcessorList(penalties)
    if sampling.constraint is not None:
        constraints = [sampling.constraint_of(sequence) for sequence in range(prompts)]
        states = States(constraints, eos_ids)

        def allowed(sequence: int, ids_T: torch.Tensor) -> list[int]:
            if states.follow(sequence, ids_T[width:].tolist()) is None:
                return list(range(vocabulary))
            state = states.after(sequence, ())
            # Behind its end token a row is padded.
            if state is None:
                return list(range(vocabulary))
            return state.allowed().nonzero()[:, 0].tolist() or sorted(eos_ids)[:1]

        arguments["prefix_allowed_tokens_fn"] = allowed
    return arguments


@torch.no_grad()
def stock_generate(
    model: Any,
    prompts: list[list[int]],
    sampling: Sampling,
    limit: int,
    eos_ids: frozenset[int],
    options: Mapping[str, Any] | None = None,
    tokenizer: Any = None,
    **arguments: Any,
) -> list[list[int]]:
    """New ids of every prompt by `generate`, as one left-padded batch, each up to its end token.
    Nothing is taken from the model's `generation_config`, and torch's own generators stay as they
    were.

    Args:
        model: a Hugging Face causal LM.
        prompts: token ids.
        sampling: how tokens are chosen; its seed is that of the whole batch.
        limit: new tokens at most.
        eos_ids: tokens that end an answer.
        options: further entries of the generation config.
        tokenizer: for stop strings, and for an assistant of another tokenizer.
        arguments: further arguments of `generate`.
    """
    # 1. Pad the prompts on the left.
    padding, width, device = min(eos_ids, default=0), max(map(len, prompts)), model.device
    missing = [width - len(prompt) for prompt in prompts]
    ids_BT = torch.tensor([[padding] * count + prompt for count, prompt in zip(missing, prompts)])
    mask_BT = torch.tensor([[0] * count + [1] * (width - count) for count in missing])
    # 2. Settings that the model cannot override.
    config = GenerationConfig(
        max_new_tokens=limit,
        eos_token_id=sorted(eos_ids) or None,
        pad_token_id=padding,
        **sampling_options(sampling),
        **options or {},
    )
    # 3. Generate with a seed that does not touch torch's generators.
    vocabulary = model.config.get_text_config().vocab_size
    extra = extra_arguments(sampling, width, len(prompts), vocabulary, tokenizer, eos_ids)
    if "assistant_tokenizer" in arguments:
        extra["tokenizer"] = tokenizer
    devices = [device] if device.type == "cuda" else []
    with _without_its_config(model), torch.random.fork_rng(devices=devices):
        torch.manual_seed(sampling.seed)
        text_BT = model.generate(
            ids_BT.to(device),
            attention_mask=mask_BT.to(device),
            generation_config=config,
            **extra,
            **arguments,
        )
    strings = StopStrings.of(sampling.stop_strings, tokenizer)
    return [_through_end(row, eos_ids, strings) for row in text_BT[:, width:].tolist()]


@contextmanager
def _without_its_config(model: Any) -> Iterator[None]:
    """An empty `generation_config` while the block lasts: `generate` takes from it what a call
    leaves open, so that passing another config is not enough."""
    original, model.generation_config = model.generation_config, GenerationConfig()
    try:
        yield
    finally:
        model.generation_config = original


def _through_end(ids: list[int], ends: frozenset[int], strings: StopStrings | None) -> list[int]:
    stop = next((i + 1 for i, token in enumerate(ids) if token in ends), len(ids))
    text_end = None if strings is None else strings.end(ids[:stop])
    return ids[: stop if text_end is None else text_end]
