"""Constraints of any Python predicate.

Shape legend: V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from functools import cached_property

import torch
from torch import Tensor


class Predicate:
    """Answers whose every prefix a function of token ids accepts.

    Masking asks it of the whole vocabulary at every token; `modules.constraints.awrs` asks a few
    times.

    Args:
        accepts: whether ids, which may end with an end token, may begin an answer.
        vocabulary: size of the target's.
        eos_ids: end tokens, after which nothing is asked.
    """

    def __init__(
        self,
        accepts: Callable[[tuple[int, ...]], bool],
        vocabulary: int,
        eos_ids: Collection[int] = (),
    ) -> None:
        self.accepts, self.vocabulary, self.eos_ids = accepts, vocabulary, frozenset(eos_ids)
        self.calls = 0

    def start(self) -> PredicateState:
        """The state before the answer."""
        return PredicateState(self, ())

    def ask(self, ids: tuple[int, ...]) -> bool:
        """The predicate's answer, counted in `calls`."""
        self.calls += 1
        return self.accepts(ids)


class PredicateState:
    """The ids so far; what was asked once is remembered.

    Args:
        predicate: that is asked. ids: of the answer so far.
    """

    def __init__(self, predicate: Predicate, ids: tuple[int, ...]) -> None:
        self.predicate, self.ids = predicate, ids
        self._answers: dict[int, bool] = {}

    def allows(self, token: int) -> bool:
        """Whether the token may follow: one call of the predicate; nothing follows an end token."""
        if self.ids and self.ids[-1] in self.predicate.eos_ids:
            return False
        if token not in self._answers:
            self._answers[token] = self.predicate.ask((*self.ids, token))
        return self._answers[token]

    @cached_property
    def _mask_V(self) -> Tensor:
        return torch.tensor([self.allows(token) for token in range(self.predicate.vocabulary)])

    def allowed(self) -> Tensor:
        """bool [V]: one call of the predicate per token."""
        return self._mask_V

    def advance(self, token: int) -> PredicateState | None:
        """The state after one more token; None if it may not follow."""
        if not self.allows(token):
            return None
        return PredicateState(self.predicate, (*self.ids, token))

    def forced(self) -> list[int]:
        """None: a predicate does not say."""
        return []
