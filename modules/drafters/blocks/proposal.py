"""A tree that is drafted in blocks of k levels (Falcon, Gao et al. 2025, arXiv 2412.12639).

Shape legend: B sequences, W frontier nodes, R rows of the proposal, C its blocks, K rows of a
block, A rows written ahead, X memories of the recurrence, flat, H hidden size, D draft vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from modules.contracts.drafter import Frontier
from modules.drafters.trained import rows_at


@dataclass
class Proposal:
    """What a proposal has computed so far; block 0 is the last of the prefix, every other one hangs
    off a node.

    tokens_BR, parents_BR, blocks_BR: the rows handed to `expand`, and the block whose outputs each
    one's drafts are. features_BCKH, memory_BCX: the blocks' outputs, and the recurrence's memory
    behind them (flat).
    above_BCA: which of the rows written ahead each block sees, its own included.
    logits_BCKD: of the blocks of the last pass, which begin at `first`.
    """

    tokens_BR: Tensor
    parents_BR: Tensor
    blocks_BR: Tensor
    features_BCKH: Tensor
    memory_BCX: Tensor
    above_BCA: Tensor
    logits_BCKD: Tensor
    first: int = 0

    def add(self, frontier: Frontier, blocks_BW: Tensor) -> None:
        """The rows of a frontier."""
        self.tokens_BR = torch.cat([self.tokens_BR, frontier.tokens_BW], dim=1)
        self.parents_BR = torch.cat([self.parents_BR, frontier.parents_BW], dim=1)
        self.blocks_BR = torch.cat([self.blocks_BR, blocks_BW], dim=1)

    def last_tokens(self, frontier: Frontier, count: int) -> Tensor:
        """int64 [B,W,K]: the last `count` tokens of the paths to a frontier."""
        tokens, above = [frontier.tokens_BW], frontier.parents_BW
        for _ in range(count - 1):
            tokens.insert(0, self.tokens_BR.gather(1, above))
            above = self.parents_BR.gather(1, above)
        return torch.stack(tokens, dim=2)

    def laws(self, output: int, width: int) -> Tensor:
        """Logits [B,W,D] of one output of the blocks of the last `width` rows."""
        return rows_at(self.logits_BCKD[:, :, output], self.blocks_BR[:, -width:] - self.first)
