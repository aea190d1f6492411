"""Settings of a model's `generation_config` that decoding ignores, and Hugging Face's `generate`
without them.

Decoding supports temperature, top-k and top-p, which the caller sets (`Sampling`). All other
settings of a `generation_config` are ignored everywhere, so that answers are compared on the
model's own probabilities: `unapplied` names them, `stock_generate` and `SERVED_NEUTRAL` switch them
off.

Shape legend: B sequences, T tokens.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from transformers import GenerationConfig

from modules.contracts.sampling import Sampling

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
            f"its generation_config asks for {', '.join(named)}: no command here applies that, and "
            "answers are those of the model without it"
        )
    )


def sampling_options(sampling: Sampling) -> dict[str, Any]:
    """The arguments of `generate` for the same sampling."""
    if sampling.temperature == 0:
        return {"do_sample": False}
    return {
        "do_sample": True,
        "temperature": sampling.temperature,
        "top_k": sampling.top_k,
        "top_p": sampling.top_p,
    }


@torch.no_grad()
def stock_generate(
    model: Any,
    prompts: list[list[int]],
    sampling: Sampling,
    limit: int,
    eos_ids: frozenset[int],
    options: Mapping[str, Any] | None = None,
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
    devices = [device] if device.type == "cuda" else []
    with _without_its_config(model), torch.random.fork_rng(devices=devices):
        torch.manual_seed(sampling.seed)
        text_BT = model.generate(
            ids_BT.to(device),
            attention_mask=mask_BT.to(device),
            generation_config=config,
            **arguments,
        )
    return [_through_end(row, eos_ids) for row in text_BT[:, width:].tolist()]


@contextmanager
def _without_its_config(model: Any) -> Iterator[None]:
    """An empty `generation_config` while the block lasts: `generate` takes from it what a call
    leaves open, so that passing another config is not enough."""
    original, model.generation_config = model.generation_config, GenerationConfig()
    try:
        yield
    finally:
        model.generation_config = original


def _through_end(ids: list[int], ends: frozenset[int]) -> list[int]:
    stop = next((i for i, token in enumerate(ids) if token in ends), len(ids))
    return ids[: stop + 1]
