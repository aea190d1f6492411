"""Distributions of a target after many continuations of one text, with one KV cache for all.

Shape legend: N new rows, J rows since the last commit, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from copy import copy

import torch
from torch import Tensor

from modules.contracts.rows import Rows
from modules.contracts.target import Target
from modules.contracts.verification import Accepted

Tokens = tuple[int, ...]


class TokenRows:
    """Continuations of a text as a tree of rows. Rows stay in the cache until others are committed,
    so that each is run once; all that are new run in one call.

    Args:
        target: the model.
        before: tokens that stand before the text, at least one.
    """

    def __init__(self, target: Target, before: Sequence[int]) -> None:
        if not before:
            raise ValueError("nothing stands before the text: give a token that begins texts")
        self.target, self.calls = target, 1
        self._session = target.open(1, len(before) + 64)
        ids_BT = torch.tensor([list(before)], device=target.device)
        logits_BV, _ = self._session.prefill(ids_BT, torch.tensor([len(before)]).to(ids_BT))
        self._after: dict[Tokens, Tensor] = {(): logits_BV[0].double().log_softmax(-1)}
        self._numbers: dict[Tokens, int] = {}
        """Numbers of the rows since the last commit, by their tokens."""

    def __deepcopy__(self, memo: dict) -> TokenRows:
        """The committed rows, for a text that goes on otherwise; the target is shared."""
        other = copy(self)
        first_B = torch.zeros(1, dtype=torch.long, device=self.target.device)
        other._session = self._session.select(first_B)
        other._after, other._numbers = {(): self._after[()]}, {}
        return other

    @torch.no_grad()
    def log_probs(self, contexts: Sequence[Tokens]) -> list[Tensor]:
        """Log probabilities [V] of the token after each context, in float64."""
        paths = dict.fromkeys(tokens[: n + 1] for tokens in contexts for n in range(len(tokens)))
        new = sorted((path for path in paths if path not in self._after), key=len)
        if new:
            self._run(new)
        return [self._after[tokens] for tokens in contexts]

    def _run(self, paths: list[Tokens]) -> None:
        """One call over the last tokens of paths, parents before children."""
        # 1. Each row sees those of its own path.
        first = len(self._numbers)
        self._numbers |= {path: first + n for n, path in enumerate(paths)}
        visible_NJ = torch.zeros(len(paths), len(self._numbers), dtype=torch.bool)
        for row, path in enumerate(paths):
            visible_NJ[row, [self._numbers[path[: n + 1]] for n in range(len(path))]] = True
        depth_N = torch.tensor([len(path) - 1 for path in paths])
        # 2. Run them after the rows that have run.
        device, session = self.target.device, self._session
        session.reserve(len(self._numbers))
        ids_BN = torch.tensor([[path[-1] for path in paths]], device=device)
        positions_BN = session.lengths_B[:, None] + depth_N.to(device)
        final_BNH = session.read(ids_BN, Rows(positions_BN, visible_NJ[None].to(device)))
        log_probs_NV = self.target.logits(final_BNH)[0].double().log_softmax(-1)
        self._after |= dict(zip(paths, log_probs_NV, strict=True))
        self.calls += 1

    def commit(self, tokens: Tokens) -> None:
        """Keep the rows of these tokens and forget the others."""
        (after,) = self.log_probs([tokens])
        path = [self._numbers[tokens[: n + 1]] for n in range(len(tokens))]
        device = self.target.device
        lengths_B = torch.tensor([len(path)], device=device)
        path_BA = torch.tensor([path], dtype=torch.long, device=device)
        if path:
            self._session.commit(Accepted(path_BA, lengths_B, lengths_B))
        self._after, self._numbers = {(): after}, {}
