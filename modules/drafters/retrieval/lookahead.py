"""Lookahead decoding: n-grams from parallel Jacobi iterations, drafted when their first token
occurs (Fu et al. 2024, arXiv 2402.02057).

Shape legend: B sequences, N nodes, W columns of the window, L its levels (n-gram size less one).
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from modules.contracts.drafter import Context, DraftState
from modules.contracts.sampling import likeliest
from modules.contracts.shapes import TargetShape
from modules.contracts.token_tree import TokenTree, Topology
from modules.contracts.verification import Accepted, Verified
from modules.drafters.retrieval.base import PerSequence, TextDrafter, TextState
from modules.trees.trie import Trie, batch_of_trees


class Pool:
    """N-grams by their first token, the latest last, at most `most` of each."""

    def __init__(self, most: int) -> None:
        self.most = most
        self._ngrams: dict[int, OrderedDict[tuple[int, ...], None]] = {}

    def add(self, ngram: Sequence[int]) -> None:
        """Add an n-gram, or move a present one to the end as the latest."""
        endings = self._ngrams.setdefault(ngram[0], OrderedDict())
        endings[tuple(ngram[1:])] = None
        endings.move_to_end(tuple(ngram[1:]))
        if len(endings) > self.most:
            endings.popitem(last=False)

    def continuations(self, token: int) -> list[tuple[int, ...]]:
        """Endings of the n-grams that begin with a token, the latest first."""
        return list(reversed(self._ngrams.get(token, {})))


@dataclass
class LookaheadState(TextState):
    """The Jacobi window int64 [B,L,W] and the n-gram pools."""

    window_BLW: Tensor
    pools: PerSequence[Pool]


class Lookahead(TextDrafter):
    """Every call also runs a window of guesses, whose rows are never accepted: column i of level l
    guesses the token l + i + 1 positions ahead. It sees level 0 up to its column, and its own
    column. The predictions of the last level complete one n-gram per column; n-grams that begin
    with the newest token are drafted.

    By default the release moves the window by one position per call, however many tokens were
    accepted. Here it moves by the accepted number, and repeats its last column at new positions.
    N-grams of the text also enter the pool, which is an option in the release.

    Args:
        shape: the target's dimensions.
        ngram: tokens of an n-gram.
        window: columns of the window.
        guesses: n-grams stored per first token.
    """

    absorbs_any_tree: ClassVar[bool] = False
    """It reads the window's rows."""

    def __init__(
        self, shape: TargetShape, ngram: int = 4, window: int = 4, guesses: int = 4
    ) -> None:
        super().__init__(shape)
        if ngram < 2 or min(window, guesses) < 1:
            raise ValueError(
                f"ngram must be at least 2, window and guesses at least 1, got {ngram}, {window} "
                f"and {guesses}"
            )
        self.ngram, self.window, self.guesses = ngram, window, guesses

    @property
    def default_budget(self) -> int:
        """The window's rows and all guesses of a token."""
        return (self.ngram - 1) * (self.window + self.guesses)

    @property
    def least_budget(self) -> int:
        """The window's rows and one token of a guess."""
        return (self.ngram - 1) * self.window + 1

    def start(self, context: Context) -> LookaheadState:
        """A window of the prompt's tokens; the pool holds the prompt's n-grams."""
        state = super().start(context)
        pools = PerSequence(Pool(self.guesses) for _ in state.newest_B)
        cells = torch.arange((self.ngram - 1) * self.window, device=state.newest_B.device)
        window = state.text_BL.gather(1, cells % state.counts_B[:, None])
        for pool, text in zip(pools, state.texts(), strict=True):
            self._remember(pool, text)
        return LookaheadState(
            **vars(state), window_BLW=window.view(-1, self.ngram - 1, self.window), pools=pools
        )

    def _remember(self, pool: Pool, text: list[int]) -> None:
        for begin in range(len(text) - self.ngram + 1):
            pool.add(text[begin : begin + self.ngram])

    def propose(self, state: DraftState, budget: int) -> TokenTree:
        """The window's rows after the newest token, then the n-grams that begin with it."""
        assert isinstance(state, LookaheadState)
        cells = (self.ngram - 1) * self.window
        if budget <= cells:
            raise ValueError(
                f"budget {budget} leaves nothing beside a window of {cells} rows: give more, or a "
                "smaller window"
            )
        tries = []
        for pool, newest in zip(state.pools, state.newest_B.tolist(), strict=True):
            trie = Trie(newest)
            for guess in pool.continuations(newest):
                trie.fuse(guess, budget - cells + 1)
            tries.append(trie)
        return self._with_window(state.window_BLW, batch_of_trees(tries, state.newest_B.device))

    def _with_window(self, window_BLW: Tensor, guesses: TokenTree) -> TokenTree:
        """Insert the window's rows between the root and the guesses."""
        batch, device = len(window_BLW), window_BLW.device
        cells = window_BLW[0].numel()
        row = torch.arange(1, cells + 1, device=device)
        # Level 0 is a chain; each row of a later level hangs below the row above it.
        above = torch.where(row > self.window, row - self.window, row - 1)
        # Guesses come after the window, so their parents move by its size.
        drafted = guesses.parents_BN[:, 1:]
        drafted = torch.where(drafted > 0, drafted + cells, 0)
        parents = torch.cat([guesses.parents_BN[:, :1], above.expand(batch, -1), drafted], dim=1)
        tokens = torch.cat(
            [guesses.tokens_BN[:, :1], window_BLW.flatten(1), guesses.tokens_BN[:, 1:]], dim=1
        )
        # Rows of the window are verified, but can never be accepted.
        candidate = torch.ones_like(tokens, dtype=torch.bool)
        candidate[:, 1 : cells + 1] = False
        return TokenTree(tokens, Topology(parents), candidate)

    def absorb(self, state: DraftState, verified: Verified, accepted: Accepted) -> LookaheadState:
        """Complete the window's n-grams, drop its oldest level and shift it by the accepted
        tokens.
        """
        assert isinstance(state, LookaheadState)
        # 1. Predictions of the last level are a new level.
        began = (state.counts_B - self.ngram + 1).clamp(min=0).tolist()
        cells = state.window_BLW[0].numel()
        newest_BW = likeliest(verified.logits_BNV[:, cells - self.window + 1 : cells + 1])
        grown = torch.cat([state.window_BLW, newest_BW[:, None]], dim=1)
        went_on = super().absorb(state, verified, accepted)
        assert isinstance(went_on, LookaheadState)
        # 2. Every column is an n-gram now; so are the last tokens of the text.
        for pool, ngrams, text, begin in zip(
            state.pools, grown.mT.tolist(), went_on.texts(), began, strict=True
        ):
            for ngram in ngrams:
                pool.add(ngram)
            self._remember(pool, text[begin:])
        # 3. Shift the columns; the last one is repeated.
        columns = torch.arange(self.window, device=grown.device) + accepted.lengths_B[:, None] - 1
        columns = columns.clamp(max=self.window - 1)[:, None].expand(-1, self.ngram - 1, -1)
        went_on.window_BLW = grown[:, 1:].gather(2, columns)
        return went_on
