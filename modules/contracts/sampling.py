"""The distribution that tokens are drawn from, and drawing them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from math import inf, isfinite
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import (
    LogitsProcessorList,
    MinPLogitsWarper,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

_SEARCHED_WHOLE, _BLOCK = 1 << 13, 128
"""Rows of fewer logits are searched at once; the others in blocks of so many."""


class ConstraintState(Protocol):
    """What may follow a text. States do not change, so that the nodes of a tree share those above
    them."""

    def allows(self, token: int) -> bool:
        """Whether the token may follow; an end token, whether the answer may end."""
        ...

    def allowed(self) -> Tensor:
        """bool [V] on the CPU: the same for every token."""
        ...

    def advance(self, token: int) -> ConstraintState | None:
        """The state after one more token; None if it may not follow."""
        ...

    def forced(self) -> list[int]:
        """Tokens that follow next, as far as they are known; often none. They are drafted, and
        verified like any draft."""
        ...


class Constraint(Protocol):
    """Which answers there may be (`modules.constraints`)."""

    def start(self) -> ConstraintState:
        """The state before the first token of an answer."""
        ...


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen: what depends on the text so far, then temperature, top-k, top-p
    and min-p, as in `generate`.

    `temperature` 0 is greedy; the warpers (top-k, top-p, min-p) then have no effect. Drafts that
    are drawn from a drafter's distribution are drawn under the same temperature and warpers. All
    other settings change the target's distribution after each prefix, and so what drafts are
    verified by (`modules.acceptance.processors`).

    Args:
        temperature, top_k, top_p, seed: of drawing.
        min_p: leave out tokens below this share of the likeliest one's probability.
        repetition_penalty: divides positive logits of tokens of prompt and answer, and multiplies
            negative ones (Keskar et al. 2019, arXiv 1909.05858, equation 1). 1 is off.
        presence_penalty: subtracted from the logits of tokens of the answer.
        frequency_penalty: subtracted as often as the token occurs in the answer.
        logit_bias: added to the logits of these token ids.
        suppress_tokens: token ids that are never chosen.
        min_new_tokens: no end token before so many tokens.
        stop_strings: an answer ends with the token that completes one of them.
        constraint: which answers there may be; one for all prompts, or one (or None) for each.

    Raises:
        ValueError: a value that no warper accepts, a penalty or an id that cannot be.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] = field(default_factory=dict, hash=False)
    suppress_tokens: Sequence[int] = ()
    min_new_tokens: int = 0
    stop_strings: Sequence[str] = ()
    constraint: Constraint | Sequence[Constraint | None] | None = field(default=None, hash=False)

    def __post_init__(self) -> None:
        """Refuse bad values; whole numbers are taken for the floats that the warpers ask for."""
        # 1. Check the ranges.
        if not 0 <= self.temperature < inf:
            raise ValueError(
                f"temperature must be 0 (greedy) or a finite number above, got {self.temperature}"
            )
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p must lie in (0, 1], got {self.top_p}")
        if not 0 <= self.top_k < inf or self.top_k != int(self.top_k):
            raise ValueError(f"top_k must be 0 (off) or a whole number above, got {self.top_k}")
        if not 0 <= self.min_p <= 1:
            raise ValueError(f"min_p must lie in [0, 1], got {self.min_p}")
        self._check_processors()
        # 2. A YAML `1` is an integer, but the warpers ask for floats; lists become hashable.
        for name, kind in (("temperature", float), ("top_p", float), ("top_k", int)):
            object.__setattr__(self, name, kind(getattr(self, name)))
        for name in ("suppress_tokens", "stop_strings"):
            object.__setattr__(self, name, tuple(getattr(self, name)))

    def _check_processors(self) -> None:
        if not 0 < self.repetition_penalty < inf:
            raise ValueError(
                f"repetition_penalty must be a finite number above 0, got {self.repetition_penalty}"
            )
        for name in ("presence_penalty", "frequency_penalty"):
            if not isfinite(value := getattr(self, name)):
                raise ValueError(f"{name} must be finite, got {value}")
        if self.min_new_tokens < 0:
            raise ValueError(f"min_new_tokens must be at least 0, got {self.min_new_tokens}")
        biases = self.logit_bias.values()
        if min((*self.logit_bias, *self.suppress_tokens), default=0) < 0 or not all(
            isfinite(bias) for bias in biases
        ):
            raise ValueError(
                f"logit_bias {dict(self.logit_bias)}, suppress_tokens {list(self.suppress_tokens)}:"
                " give ids of tokens, and finite biases"
            )
        if isinstance(self.stop_strings, str) or not all(self.stop_strings):
            raise ValueError(
                f"stop_strings {self.stop_strings!r} must be a list of texts, none of them empty"
            )

    def constraint_of(self, sequence: int) -> Constraint | None:
        """The constraint of one prompt of a batch."""
        constraint = self.constraint
        if constraint is None or not isinstance(constraint, Sequence):
            return constraint
        return constraint[sequence]

    def extra_options(self) -> dict[str, Any]:
        """The settings beside temperature, top-k and top-p that are not at their defaults."""
        values = {name: getattr(self, name) for name in EXTRA_OPTIONS}
        return {name: value for name, value in values.items() if value != EXTRA_OPTIONS[name]}


EXTRA_OPTIONS: dict[str, Any] = {
    "min_p": 0.0,
    "repetition_penalty": 1.0,
    "presence_penalty": 0.0,
    "frequency_penalty": 0.0,
    "logit_bias": {},
    "suppress_tokens": (),
    "min_new_tokens": 0,
    "stop_strings": (),
    "constraint": None,
}
"""Settings of `Sampling` that are off unless asked for, and their values then."""


@dataclass(frozen=True)
class Prefixes:
    """The texts that N distributions of one sequence follow: prompt, answer, then a path each.

    sequence: its number in the batch, which stays when others end. prompt: its tokens. answer:
    tokens of the answer that all paths share. paths: N lists of tokens, those of a tree's node from
    node 0 down; of rows that are no candidate they mean nothing.
    """

    sequence: int
    prompt: Sequence[int]
    answer: Sequence[int]
    paths: Sequence[Sequence[int]]


class PrefixProcessor(Protocol):
    """Changes the distribution of the next token by the text before it: penalties, constraints.

    The target's distribution after a prefix is the processed one. It must follow from the prefix
    alone, so that plain decoding, every tree and every acceptance rule mean the same distribution.
    A drafter's distribution need not be processed.
    """

    def __call__(self, logits_BNV: Tensor, prefixes: Sequence[Prefixes], /) -> Tensor:
        """Logits [B,N,V] of the next token after each of the N prefixes of B sequences."""
        ...


def warped_probs(logits: Tensor, sampling: Sampling, temperature: float | None = None) -> Tensor:
    """The distribution [..., V] in float64 that `generate` draws from: temperature, then top-k,
    then top-p, then min-p.

    Drafter and target are warped alike. Were only the target's, a drafter that agrees with it would
    still draft tokens that the warpers rule out: with top-p 0.8 up to a fifth of its draws.

    Args:
        logits: [..., V], of the whole vocabulary or of a draft vocabulary.
        sampling: of a temperature above 0.
        temperature: instead of the sampling's.
    """
    heat = sampling.temperature if temperature is None else temperature
    warpers = _warpers(heat, sampling.top_k, sampling.top_p, sampling.min_p)
    flat = logits.reshape(-1, logits.shape[-1]).double()
    warped = warpers(torch.empty(0, dtype=torch.long), flat)  # type: ignore[arg-type]
    return torch.as_tensor(warped).softmax(-1).reshape(logits.shape)


@lru_cache(maxsize=64)
def _warpers(temperature: float, top_k: int, top_p: float, min_p: float) -> LogitsProcessorList:
    warpers = LogitsProcessorList()
    if temperature != 1:
        warpers.append(TemperatureLogitsWarper(temperature))
    if top_k:
        warpers.append(TopKLogitsWarper(top_k))
    if top_p < 1:
        warpers.append(TopPLogitsWarper(top_p))
    if min_p:
        warpers.append(MinPLogitsWarper(min_p))
    return warpers


def likeliest(logits: Tensor) -> Tensor:
    """`argmax` over the last dimension: [..., V] -> int64 [...], the first of equals.

    On a CPU a row of a whole vocabulary is searched in blocks: maxima are vectorised, torch's
    search for their place is not (in bfloat16 least of all).
    """
    size = logits.shape[-1]
    if logits.device.type != "cpu" or size < _SEARCHED_WHOLE:
        return logits.argmax(-1)
    # 1. The first block that has the maximum.
    wide = logits.float() if logits.dtype.itemsize < 4 else logits
    if size % _BLOCK:
        wide = F.pad(wide, (0, -size % _BLOCK), value=-inf)
    blocks = wide.unflatten(-1, (-1, _BLOCK))
    block = blocks.amax(-1).argmax(-1, keepdim=True)
    # 2. Its place there.
    inside = blocks.gather(-2, block[..., None].expand(*block.shape, _BLOCK))
    return (block * _BLOCK + inside.argmax(-1))[..., 0]


def sample_probs(probs: Tensor, uniform: Tensor) -> Tensor:
    """Inverse-CDF draw: distribution [..., V] (need not sum to 1), uniform [...] -> int64 [...].
    Never a token of probability 0.
    """
    cumulative = probs.cumsum(-1)
    drawn = torch.searchsorted(cumulative, (uniform * cumulative[..., -1])[..., None], right=True)[
        ..., 0
    ]
    return drawn.clamp(max=probs.shape[-1] - 1)
