"""Adaptive weighted rejection sampling: a token of the constrained distribution and an unbiased
estimate of the mass that the constraint allows, without asking it about the whole vocabulary
(Lipkin et al. 2025, arXiv 2504.05410).

With p the next token's distribution and ok the constraint, E[weight · 1(token = y)] = p(y) ok(y)
for every y: such draws are properly weighted, which sequential Monte Carlo needs.

Shape legend: V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

SHARP = 2 / 3
"""Largest probability from which on the geometric estimate is used: it varies less there."""
NOTHING_LEFT = 1e-5
"""Mass of tokens not yet tried below which a text is given up as a dead end."""
_CHUNK = 64


class WeightedToken(NamedTuple):
    """A token and the logarithm of its weight; None and -inf where nothing is allowed."""

    token: int | None
    log_weight: float


DEAD = WeightedToken(None, -math.inf)


class Randomness(Protocol):
    """What a draw needs of chance."""

    def order(self, probs_V: Tensor) -> Iterator[int]:
        """Tokens of positive probability, drawn one after another without replacement."""
        ...

    def repeats(self, rejected: float) -> int:
        """How often a draw with replacement falls on tokens of this mass before it does not."""
        ...


class Generated:
    """Randomness of a torch generator.

    Args:
        generator: on the device of the probabilities.
    """

    def __init__(self, generator: torch.Generator) -> None:
        self.generator = generator

    def order(self, probs_V: Tensor) -> Iterator[int]:
        """By decreasing log p + Gumbel noise, the first ones without sorting all."""
        noise_V = torch.empty_like(probs_V).exponential_(generator=self.generator)
        keys_V, count = probs_V.log() - noise_V.log(), int((probs_V > 0).sum())
        first = keys_V.topk(min(_CHUNK, count)).indices.tolist()
        yield from first
        if count > _CHUNK:
            yield from keys_V.topk(count).indices[_CHUNK:].tolist()

    def repeats(self, rejected: float) -> int:
        """A number of geometric distribution."""
        uniform = torch.rand(
            (), generator=self.generator, dtype=torch.float64, device=self.generator.device
        )
        return int(math.log1p(-float(uniform)) / math.log(rejected)) if rejected > 0 else 0


def weighted_token(
    probs_V: Tensor, allows: Callable[[int], bool], randomness: Randomness
) -> WeightedToken:
    """A token of p · ok / Z with a weight of mean Z.

    Args:
        probs_V: p, float64.
        allows: ok.
        randomness: what is drawn.
    """
    if float(probs_V.max()) < SHARP:
        return recursive(probs_V, allows, randomness)
    return geometric(probs_V, allows, randomness)


def recursive(
    probs_V: Tensor, allows: Callable[[int], bool], randomness: Randomness
) -> WeightedToken:
    """The first allowed token of the order. Its weight: the factors 1 - q of those rejected before
    it, and q unless the token after it is allowed too; q is a token's probability among those not
    tried before. One call more than tokens up to the accepted one."""
    log_weight, rejected = 0.0, 0.0
    order = randomness.order(probs_V)
    for token in order:
        prob = float(probs_V[token])
        share = min(1.0, prob / (1 - rejected))
        if allows(token):
            following = next(order, None)
            if following is not None and not allows(following):
                log_weight += math.log(share)
            return WeightedToken(token, log_weight)
        rejected += prob
        if rejected >= 1 - NOTHING_LEFT or share >= 1:
            return DEAD
        log_weight += math.log1p(-share)
    return DEAD


def geometric(
    probs_V: Tensor, allows: Callable[[int], bool], randomness: Randomness
) -> WeightedToken:
    """Draws with replacement until two are allowed; the first is the token. The weight is
    1 / (1 + rejections), the unbiased estimate of Z. Tokens that were rejected are not tried again:
    how often they would be is drawn."""
    left_V, rejected, rejections = probs_V.clone(), 0.0, 0
    token: int | None = None
    for _ in range(2):
        for drawn in randomness.order(left_V):
            rejections += randomness.repeats(rejected)
            if allows(drawn):
                break
            rejections += 1
            rejected += float(left_V[drawn])
            left_V[drawn] = 0
            if rejected >= 1 - NOTHING_LEFT:
                return DEAD
        else:
            return DEAD
        token = drawn if token is None else token
    return WeightedToken(token, -math.log1p(rejections))


def best_token(logits_V: Tensor, allows: Callable[[int], bool]) -> WeightedToken:
    """The allowed token of the highest logit, of equal ones the first: greedy decoding under a
    mask, with as few calls as tokens rank above it."""
    token = next((token for token in _by_logit(logits_V) if allows(token)), None)
    return DEAD if token is None else WeightedToken(token, 0.0)


def _by_logit(logits_V: Tensor) -> Iterator[int]:
    """Tokens of finite logit by falling logit, of equal ones the first; the best ones without
    sorting all."""
    finite = int((logits_V > -torch.inf).sum())
    if not finite:
        return
    least = logits_V.topk(min(_CHUNK, finite)).values[-1]
    for chosen_V in (logits_V >= least, (logits_V < least) & (logits_V > -torch.inf)):
        ids = chosen_V.nonzero()[:, 0]
        yield from ids[logits_V[ids].argsort(descending=True, stable=True)].tolist()
