"""Token tries: continuations merged by their common prefixes, and batches of them as trees.

Shape legend: C continuations, L tokens of one, B sequences, N nodes.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from modules.contracts.token_tree import TokenTree, Topology

END = -1
"""Marks the places after the last token of a continuation."""
Tokens = NDArray[np.int64]


class Trie:
    """A tree of tokens under a newest token (node 0), no two siblings equal, parents before
    children.
    """

    def __init__(self, newest: int) -> None:
        self.tokens, self.parents = [newest], [-1]
        self._children: dict[tuple[int, int], int] = {}

    def __len__(self) -> int:
        """Nodes, the newest token's included."""
        return len(self.tokens)

    def child(self, node: int, token: int) -> int | None:
        """The child of a node that holds this token."""
        return self._children.get((node, token))

    def fuse(self, path: Iterable[int], size: int) -> int:
        """Walk down a path, sharing its longest existing prefix and adding the rest while there are
        fewer than `size` nodes. Returns the node where it ends."""
        node = 0
        for token in path:
            child = self._children.get((node, token))
            if child is None:
                if len(self) >= size:
                    return node
                child = self._children[node, token] = len(self)
                self.tokens.append(token)
                self.parents.append(node)
            node = child
        return node

    def path(self, node: int) -> list[int]:
        """Tokens from below the root down to a node."""
        tokens: list[int] = []
        while node > 0:
            tokens.append(self.tokens[node])
            node = self.parents[node]
        return tokens[::-1]


def batch_of_trees(tries: Sequence[Trie], device: torch.device) -> TokenTree:
    """One tree per sequence, padded to the largest."""
    size = max(map(len, tries))
    tokens = [trie.tokens + [0] * (size - len(trie)) for trie in tries]
    parents = [trie.parents + list(range(len(trie), size)) for trie in tries]
    return TokenTree(
        torch.tensor(tokens, device=device), Topology(torch.tensor(parents, device=device))
    )


def likeliest(continuations_CL: Tokens) -> list[int]:
    """The commonest first token of continuations, the commonest after it, and so on; the lowest id
    of equally common ones. It ends where no continuation goes on.

    continuations_CL: int64, `END` after the last token of each, in any order.
    """
    chain: list[int] = []
    for column in range(continuations_CL.shape[1]):
        rows = continuations_CL[continuations_CL[:, column] != END]
        if not len(rows):
            break
        tokens, counts = np.unique(rows[:, column], return_counts=True)
        chain.append(int(tokens[counts.argmax()]))
        continuations_CL = rows[rows[:, column] == chain[-1]]
    return chain


def frequent_prefixes(continuations_CL: Tokens, most: int) -> list[tuple[list[int], int]]:
    """The `most` commonest prefixes of continuations and how many have each; a prefix comes before
    its extensions.

    continuations_CL: int64, `END` after the last token of each, in any order.
    """
    if not continuations_CL.size:
        return []
    # 1. Sort, so that continuations with a common prefix are neighbours.
    rows = continuations_CL[np.lexsort(continuations_CL.T[::-1])]
    # 2. Where a new prefix of each depth starts and ends.
    new = np.ones(rows.shape, dtype=bool)
    new[1:] = np.logical_or.accumulate(rows[1:] != rows[:-1], axis=1)
    depths, starts = np.nonzero(new.T)
    ends = np.append(starts[1:], len(rows))
    ends[ends <= starts] = len(rows)
    counts = ends - starts
    # 3. Without the prefixes that end in padding, the commonest and shortest first.
    real = rows[starts, depths] != END
    depths, starts, counts = depths[real], starts[real], counts[real]
    order = np.lexsort((depths, -counts))[:most]
    return [(rows[starts[i], : depths[i] + 1].tolist(), int(counts[i])) for i in order]
