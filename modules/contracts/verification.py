"""What a target call computes, and what a rule accepts.

Shape legend: B sequences, N tree nodes, A accepted rows (padded), V target vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from functools import cached_property

import torch
from torch import Tensor

from modules.contracts.shapes import StateName
from modules.contracts.token_tree import TokenTree


@dataclass(frozen=True)
class Verified:
    """One target call over a tree: logits and states of all its nodes.

    auxiliary_states: `{name: [B,P,H]}` of the tree's auxiliary rows, for the requested states.
    """

    tree: TokenTree
    logits_BNV: Tensor
    states: dict[StateName, Tensor] = field(default_factory=dict)
    auxiliary_states: dict[StateName, Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class Accepted:
    """The path that a rule accepted.

    path_BA: int64 [B,A], accepted rows of the tree from node 0 down, padded with 0 after
    `lengths_B`.
    lengths_B: int64 [B], accepted rows, node 0 included (so at least 1); as many tokens are emitted
    by the call:
        the accepted drafts and `next_B`.
    next_B: int64 [B], the token that follows the last accepted row; node 0 of the next tree.
    host_paths: `paths`, where they have already been read.
    """

    path_BA: Tensor
    lengths_B: Tensor
    next_B: Tensor
    host_paths: list[list[int]] | None = field(default=None, repr=False, compare=False)

    @cached_property
    def lengths(self) -> list[int]:
        """`lengths_B` on the host."""
        if self.host_paths is not None:
            return [len(path) for path in self.host_paths]
        return self.lengths_B.tolist()

    @cached_property
    def paths(self) -> list[list[int]]:
        """The accepted rows of each sequence on the host, without padding."""
        if self.host_paths is not None:
            return self.host_paths
        return [
            path[:count] for path, count in zip(self.path_BA.tolist(), self.lengths, strict=True)
        ]

    def trimmed(self) -> Accepted:
        """The same without columns that are padding in every sequence; nothing is read again."""
        narrow_BA = self.path_BA[:, : max(self.lengths)]
        return replace(self, path_BA=narrow_BA, host_paths=self.paths)

    @property
    def last_B(self) -> Tensor:
        """int64 [B]: the deepest accepted row."""
        return self.path_BA.gather(1, self.lengths_B[:, None] - 1)[:, 0]

    def along_path(self, rows_BNX: Tensor) -> Tensor:
        """Rows [B,N,...] gathered along the accepted path [B,A,...] (padding columns repeat row
        0).
        """
        index = self.path_BA.reshape(*self.path_BA.shape, *([1] * (rows_BNX.dim() - 2)))
        return rows_BNX.gather(1, index.expand(*self.path_BA.shape, *rows_BNX.shape[2:]))

    def emitted(self, tree: TokenTree) -> Tensor:
        """int64 [B,A]: the tokens this call emits, accepted drafts then `next_B`; undefined
        past `lengths_B`.
        """
        drafts = torch.cat([self.along_path(tree.tokens_BN)[:, 1:], self.next_B[:, None]], dim=1)
        return drafts.scatter(1, self.lengths_B[:, None] - 1, self.next_B[:, None])
