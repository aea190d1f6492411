"""Prompt lookup: draft the tokens that followed an earlier occurrence of the last n (Saxena 2023).

Shape legend: B sequences, L tokens of a text, K drafted tokens.
"""

from __future__ import annotations

import torch
from torch import Tensor

from modules.contracts.drafter import DraftState
from modules.contracts.shapes import TargetShape
from modules.contracts.token_tree import TokenTree
from modules.drafters.retrieval.base import TextDrafter, TextState, chains


class PromptLookup(TextDrafter):
    """Looks up the longest n-gram at the end of the text that also occurs earlier. Of several
    occurrences it takes the latest that a whole draft follows, otherwise the one that most tokens
    follow. It drafts nothing where there is none. (Saxena's code takes the first occurrence that a
    whole draft follows.)

    Args:
        shape: the target's dimensions.
        longest, shortest: largest and smallest n.
        tokens: at most so many are drafted, unless a method's budget says otherwise.
    """

    def __init__(
        self, shape: TargetShape, longest: int = 3, shortest: int = 1, tokens: int = 7
    ) -> None:
        super().__init__(shape)
        if not 1 <= shortest <= longest:
            raise ValueError(f"shortest must lie between 1 and longest ({longest}), got {shortest}")
        if tokens < 1:
            raise ValueError(f"tokens must be at least 1, got {tokens}")
        self.longest, self.shortest, self.tokens = longest, shortest, tokens

    @property
    def default_budget(self) -> int:
        """The constructor's argument `tokens`."""
        return self.tokens

    def propose(self, state: DraftState, budget: int) -> TokenTree:
        """A chain of at most `budget` tokens."""
        assert isinstance(state, TextState)
        texts = [
            text[:count] for text, count in zip(state.text_BL, state.counts_B.tolist(), strict=True)
        ]
        return chains(state.newest_B, [self.lookup(text, budget) for text in texts])

    def lookup(self, text_L: Tensor, count: int) -> Tensor:
        """Up to `count` tokens that followed an earlier occurrence of the text's last n-gram; empty
        if there is none.
        """
        for size in range(min(self.longest, len(text_L) - 1), self.shortest - 1, -1):
            windows = text_L[:-1].unfold(0, size, 1)
            occurrences = (windows == text_L[-size:]).all(1).nonzero()
            if len(occurrences):
                begins = occurrences[:, 0] + size
                whole = begins[begins + count <= len(text_L)]
                begin = int(whole[-1]) if len(whole) else int(begins[0])
                return text_L[begin : begin + count]
        return torch.empty(0, dtype=torch.long, device=text_L.device)
