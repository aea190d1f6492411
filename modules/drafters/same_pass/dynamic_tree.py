"""Dynamic sparse trees as token trees: each sequence's is that of its state.

Shape legend: B sequences, S states, N nodes, K levels, R ranks.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from modules.contracts.token_tree import TokenTree, Topology
from modules.drafters.same_pass.sparse_tree import SparseTrees


@dataclass(frozen=True)
class Templates:
    """The trees of all states as index tensors, one row per state, padded to the widest.

    levels_SN, ranks_SN: where a node's token comes from; 0 for the root and for padding. counts_SN:
    prompt tokens after each node. topologies: of each state's tree without padding.
    """

    parents_SN: Tensor
    levels_SN: Tensor
    ranks_SN: Tensor
    counts_SN: Tensor
    topologies: tuple[Topology, ...]


@functools.lru_cache(maxsize=64)
def templates(trees: SparseTrees, device: torch.device) -> Templates:
    """The index tensors of these trees."""
    width = max(len(tree.paths) for tree in trees.trees)
    columns: list[list[list[int]]] = [[], [], [], []]
    for tree in trees.trees:
        index = {path: i for i, path in enumerate(tree.paths)}
        filled = [0] * (width - len(index))
        parents = [-1, *(index[path[:-1]] for path in tree.paths[1:])]
        levels = [0, *(len(path) - 1 for path in tree.paths[1:])]
        ranks = [0, *(path[-1] for path in tree.paths[1:])]
        # A padding node is its own parent.
        columns[0].append([*parents, *range(len(index), width)])
        for column, values in zip(columns[1:], (levels, ranks, tree.prompts), strict=True):
            column.append([*values, *filled])
    parents_SN, *others = (torch.tensor(column, device=device) for column in columns)
    topologies = (
        Topology(parents_SN[state : state + 1, : len(tree.paths)])
        for state, tree in enumerate(trees.trees)
    )
    return Templates(parents_SN, *others, topologies=tuple(topologies))


def drafted(
    trees: SparseTrees, states: Sequence[int], newest_B: Tensor, tokens_BKR: Tensor
) -> tuple[TokenTree, Tensor, tuple[tuple[int, ...], ...]]:
    """The token tree of the sequences, and the prompt tokens of each node, on the device [B,N] and
    on the host. Sequences with fewer nodes than others end in padding.

    Args:
        trees: of every state.
        states: of each sequence.
        newest_B: the roots.
        tokens_BKR: the likeliest tokens of every level, best first.
    """
    every = templates(trees, newest_B.device)
    width = max(len(trees.trees[state].paths) for state in states)
    # 1. Nodes and their places in the table of tokens.
    state_B = torch.tensor(list(states), device=newest_B.device)
    levels, ranks, counts, parents = (
        part[state_B, :width]
        for part in (every.levels_SN, every.ranks_SN, every.counts_SN, every.parents_SN)
    )
    same = len(set(states)) == 1
    topology = every.topologies[states[0]].expand(len(states)) if same else Topology(parents)
    # 2. Their tokens.
    sequence_B1 = torch.arange(len(states), device=newest_B.device)[:, None]
    drafts_BN = tokens_BKR[sequence_B1, levels, ranks]
    tokens_BN = torch.cat([newest_B[:, None], drafts_BN[:, 1:]], dim=1)
    on_host = (trees.trees[state].prompts for state in states)
    return TokenTree(tokens_BN, topology), counts, tuple(on_host)
