"""Small constraints over token ids, with dead ends kept out by construction."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Walk:
    """A state of `Remainders`: the ids so far."""

    vocabulary: int
    ids: tuple[int, ...] = ()

    def allows(self, token: int) -> bool:
        """Every third place allows one token alone, others about half of them, by the whole
        prefix."""
        seen = sum((place + 2) * (each + 1) for place, each in enumerate(self.ids))
        if len(self.ids) % 3 == 2:
            return token == seen % self.vocabulary
        return (seen + token * (token + 3)) % 5 < 3 or token == seen % self.vocabulary

    def allowed(self) -> Tensor:
        """Its mask [V]."""
        return torch.tensor([self.allows(token) for token in range(self.vocabulary)])

    def advance(self, token: int) -> Walk | None:
        """The longer walk."""
        return Walk(self.vocabulary, (*self.ids, token)) if self.allows(token) else None

    def forced(self) -> list[int]:
        """The only token that may follow, if there is one."""
        tokens = self.allowed().nonzero()[:, 0].tolist()
        return tokens if len(tokens) == 1 else []


@dataclass(frozen=True)
class Remainders:
    """A constraint whose allowed tokens depend on all tokens before."""

    vocabulary: int

    def start(self) -> Walk:
        """The empty walk."""
        return Walk(self.vocabulary)

    def valid(self, ids: list[int]) -> bool:
        """Whether it allows an answer."""
        state: Walk | None = self.start()
        for token in ids:
            state = None if state is None else state.advance(token)
        return state is not None
