"""Comparison of an answer with the autoregressive row's: token identity, ties, and teacher forcing
at low precision.

Shape legend: T tokens, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple
from weakref import WeakKeyDictionary

import numpy as np
import torch
from torch import Tensor

from eval.metrics.acceptance import TIE_GAP, Identity, argmax_gaps, first_divergence, is_tie
from modules.contracts.batches import TextBatch
from modules.contracts.target import Target
from modules.target.session import PROMPT_ROWS

LOW_PRECISION_GAP = {torch.bfloat16: 0.5, torch.float16: 0.0625}
"""At these precisions every emitted token's logit must be within this gap of the teacher-forced
argmax's.
"""


@dataclass(frozen=True)
class Verdict:
    """The comparison of one answer with the expected one.

    position: index of the first differing token, None when identical. expected, actual: the two
    tokens there (None where an answer has ended). gap: distance of their teacher-forced logits.
    flips: share of tokens that are not the teacher-forced argmax (low precision only).
    """

    identity: Identity
    position: int | None = None
    expected: int | None = None
    actual: int | None = None
    gap: float | None = None
    flips: float | None = None


def judge(
    target: Target, prompt: Sequence[int], expected: Sequence[int], actual: Sequence[int]
) -> Verdict:
    """Compare an answer with the autoregressive row's on the same target.

    In float32 and float64 the first divergence must be a tie (`is_tie`). At lower precision, where
    rounding depends on the width of a call, every token must be the argmax or within
    `LOW_PRECISION_GAP` of it.
    """
    # Low precision compares every token instead of the first divergence.
    position = first_divergence(expected, actual)
    gap = LOW_PRECISION_GAP.get(target.dtype)
    if gap is not None:
        return _judge_loosely(target, prompt, actual, position, gap)
    # Equal answers, or an answer that ended early.
    if position is None:
        return Verdict(Identity.IDENTICAL)
    if position >= min(len(expected), len(actual)):
        return Verdict(Identity.DIFFERENT, position, _at(expected, position), _at(actual, position))
    # A tie of the two tokens after the common prefix.
    logits_V = teacher_forced_logits(target, prompt, actual[: position + 1])[-1].tolist()
    left, right = expected[position], actual[position]
    kind = Identity.TIE if is_tie(logits_V, left, right, TIE_GAP) else Identity.DIFFERENT
    return Verdict(kind, position, left, right, abs(logits_V[left] - logits_V[right]))


def _judge_loosely(
    target: Target, prompt: Sequence[int], actual: Sequence[int], position: int | None, gap: float
) -> Verdict:
    gaps_T = teacher_forced(target, prompt, actual).gaps_T
    flips = float(np.mean(gaps_T > 0)) if len(gaps_T) else 0.0
    if position is None:
        return Verdict(Identity.IDENTICAL, flips=flips)
    worst = float(gaps_T.max(initial=0.0))
    kind = Identity.TIE if worst <= gap else Identity.DIFFERENT
    return Verdict(kind, position, None, _at(actual, position), worst, flips)


def _at(ids: Sequence[int], position: int) -> int | None:
    return ids[position] if position < len(ids) else None


class Forced(NamedTuple):
    """The teacher-forced target about an answer's tokens: distances [T] of their logits from the
    likeliest's, log probabilities [T] at temperature 1, and whether each is the argmax [T].
    """

    gaps_T: np.ndarray
    log_probs_T: Tensor
    first_T: Tensor


_FORCED: WeakKeyDictionary[Target, dict[tuple[tuple[int, ...], tuple[int, ...]], Forced]] = (
    WeakKeyDictionary()
)


def teacher_forced(target: Target, prompt: Sequence[int], answer: Sequence[int]) -> Forced:
    """What the target says about an answer. Rows that give the same answer share one pass."""
    forced = _FORCED.setdefault(target, {})
    key = tuple(prompt), tuple(answer)
    if key not in forced:
        logits_TV = teacher_forced_logits(target, prompt, answer)
        ids_T = torch.tensor(answer, dtype=torch.int64)
        forced[key] = Forced(
            argmax_gaps(logits_TV.double().numpy(), answer),
            logits_TV.log_softmax(-1).gather(1, ids_T[:, None])[:, 0].double(),
            logits_TV.argmax(-1) == ids_T,
        )
    return forced[key]


def teacher_forced_logits(target: Target, prompt: Sequence[int], answer: Sequence[int]) -> Tensor:
    """Teacher-forced logits [T,V] of the answer's T tokens, by one pass without a KV cache; of a
    long text part by part, so that there is no mask of the whole, and its prompt is read once for
    all answers where a `PromptMemory` is in use.
    """
    # An encoder-decoder target reads from the loss mask where the answer begins.
    ids = torch.tensor([[*prompt, *answer]], device=target.device)
    positions = torch.arange(ids.shape[1], device=target.device)[None]
    batch = TextBatch(ids, positions >= len(prompt), positions, torch.zeros_like(ids))
    encodes = getattr(target.model.config, "is_encoder_decoder", False)
    if ids.shape[1] > PROMPT_ROWS and answer and not encodes:
        session = target.open(1, ids.shape[1])
        counts_B2 = torch.tensor([[len(prompt), len(answer)]], device=target.device)
        first_BV, _ = session.prefill(ids[:, : len(prompt)], counts_B2[:, 0])
        _, seen = session.prefill(ids[:, len(prompt) :], counts_B2[:, 1], ["final"])
        return torch.cat([first_BV, target.logits(seen["final"][0, :-1])]).float().cpu()
    with torch.no_grad():
        states_TH = target.features(batch, ["final"])["final"][0, len(prompt) - 1 : -1]
        return target.logits(states_TH).float().cpu()
