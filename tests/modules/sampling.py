"""Sampled decoding through the whole loop, counted and compared with plain decoding."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from itertools import product
from typing import Any

import numpy as np
import torch
from scipy import stats
from torch import Tensor
from transformers import GenerationConfig

from modules.contracts.sampling import Sampling
from modules.decoding.decoder import SpeculativeDecoder
from modules.target.generation_config import sampling_options
from modules.target.target import Target
from tests.fakes import tiny_target

Counts = Mapping[tuple[int, ...], int]


def small_target() -> Target:
    """Six tokens, so that pairs of them can be counted."""
    return tiny_target(vocab=6, seed=2)


def first_two_tokens(decoder: SpeculativeDecoder, runs: int, batch: int = 250) -> Counts:
    """How often each pair follows the first emitted token, in `runs` answers of temperature 1, so
    many at a time.
    """
    counts: dict[tuple[int, ...], int] = {}
    for seed in range(runs // batch):
        for trace in decoder.decode(
            [[3, 1]] * batch, Sampling(temperature=1.0, seed=seed * 1000), 3
        ):
            key = tuple(trace.ids[1:3])
            counts[key] = counts.get(key, 0) + 1
    return counts


def homogeneous(one: Counts, other: Counts) -> float:
    """Two-sample chi-square p-value, rare cells pooled."""
    keys = sorted(set(one) | set(other))
    table = np.array([[counts.get(key, 0) for key in keys] for counts in (one, other)], dtype=float)
    rare = table.sum(0) < 20
    pooled = np.concatenate([table[:, ~rare], table[:, rare].sum(1, keepdims=True)], axis=1)
    return float(stats.chi2_contingency(pooled[:, pooled.sum(0) > 0]).pvalue)


def pair_probs(target: Target, prompt: list[int], sampling: Sampling, start: int) -> Tensor:
    """The exact distribution of new tokens `start` and `start + 1` [V * V], what comes before
    summed out, by the distributions that Hugging Face's `generate` draws from."""
    size = target.shape.vocab_size
    texts = [
        [[*prompt, *more] for more in product(range(size), repeat=count)] for count in range(3)
    ]
    first, second, third = (generate_probs(target, each, sampling, len(prompt)) for each in texts)
    pairs, third = first[0][:, None] * second, third.reshape(size, size, size)
    return (pairs if start == 0 else torch.einsum("ab,abc->bc", pairs, third)).flatten()


def goodness(
    decoder: SpeculativeDecoder,
    prompt: list[int],
    sampling: Sampling,
    runs: int,
    start: int = 1,
    batch: int = 500,
) -> float:
    """Chi-square p-value of two tokens of the text that decoding gives, under their exact
    distribution; 0 where a token of distribution 0 came out."""
    size = decoder.target.shape.vocab_size
    probs, counts = pair_probs(decoder.target, prompt, sampling, start), torch.zeros(size * size)
    for part in range(runs // batch):
        seeded = replace(sampling, seed=part * 1000)
        for trace in decoder.decode([prompt] * batch, seeded, start + 2):
            counts[trace.ids[start] * size + trace.ids[start + 1]] += 1
    if counts[probs == 0].any():
        return 0.0
    rare = probs * runs < 10
    seen = [*counts[~rare].tolist(), float(counts[rare].sum())]
    wanted = [*(probs[~rare] * runs).tolist(), float(probs[rare].sum()) * runs]
    cells = len(seen) if wanted[-1] > 0 else -1
    return float(stats.chisquare(seen[:cells], wanted[:cells], sum_check=False).pvalue)


def allowed_after(constraint: Any, prompt_length: int) -> Any:
    """Hugging Face's form of a constraint: the tokens that may follow a text."""

    def allowed(_: int, ids_T: Tensor) -> list[int]:
        state = constraint.start()
        for token in ids_T[prompt_length:].tolist():
            state = None if state is None else state.advance(token)
        # After a text that is not allowed anything goes: its own probability is 0.
        return [0] if state is None else state.allowed().nonzero()[:, 0].tolist()

    return None if constraint is None else allowed


def generate_probs(
    target: Target, texts: list[list[int]], sampling: Sampling, prompt_length: int = 0
) -> Tensor:
    """The distributions [B,V] that Hugging Face's own `generate` draws the next token from, in
    float64.
    """
    config = GenerationConfig(
        max_new_tokens=1,
        **sampling_options(sampling),
        output_scores=True,
        return_dict_in_generate=True,
        pad_token_id=0,
    )
    model: Any = target.stock
    ids = torch.tensor(texts)
    found = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        generation_config=config,
        prefix_allowed_tokens_fn=allowed_after(sampling.constraint, prompt_length),
    )
    return found.scores[0].double().softmax(-1)
