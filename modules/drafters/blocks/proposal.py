"""A tree that is drafted in blocks of k levels.

Shape legend: B sequences, W frontier nodes, R rows of the proposal, C blocks of its last pass, K
tokens of a block, D draft vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from modules.contracts.drafter import Frontier
from modules.contracts.rows import rows_at


@dataclass
class Proposal:
    """Rows and block logits of a proposal so far.

    Blocks are numbered in the order they were computed. Block 0 follows the prefix, every other
    block follows a node.

    tokens_BR, parents_BR: the rows handed to `expand`.
    blocks_BR: for each row, the block that drafts its children.
    logits_BCKD: logits of the blocks of the last pass.
    first: number of the first of these.
    """

    tokens_BR: Tensor
    parents_BR: Tensor
    blocks_BR: Tensor
    logits_BCKD: Tensor
    first: int = 0

    @staticmethod
    def begin(frontier: Frontier, logits_BKD: Tensor) -> Proposal:
        """A proposal with the root and the block that follows it."""
        blocks_BR = torch.zeros_like(frontier.tokens_BW)
        return Proposal(frontier.tokens_BW, frontier.parents_BW, blocks_BR, logits_BKD[:, None])

    def next_pass(self, logits_BWKD: Tensor) -> Tensor:
        """Store the blocks of another pass, one per frontier node; returns their numbers [B,W]."""
        self.first += self.logits_BCKD.shape[1]
        self.logits_BCKD = logits_BWKD
        batch, width = logits_BWKD.shape[:2]
        numbers = torch.arange(width, device=logits_BWKD.device) + self.first
        return numbers.expand(batch, -1)

    def add(self, frontier: Frontier, blocks_BW: Tensor) -> None:
        """Append the rows of a frontier; `blocks_BW` are the blocks that draft their children."""
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

    def slot_logits(self, slot: int, width: int) -> Tensor:
        """Logits [B,W,D] in one slot of the blocks of the last `width` rows."""
        return rows_at(self.logits_BCKD[:, :, slot], self.blocks_BR[:, -width:] - self.first)
