"""Static trees: fixed paths of ranks, filled with the drafter's most likely tokens.

Shape legend: B sequences, W frontier nodes, N nodes, D draft vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from modules.contracts.drafter import Drafter, DraftState, Frontier
from modules.contracts.token_tree import SiblingDraw, TokenTree, Topology

Path = tuple[int, ...]
MOST_PATHS = 4096


@dataclass(frozen=True)
class Level:
    """Nodes of one depth that have children, and where those children's tokens come from."""

    nodes: Tensor
    """Node index of each expanded node [W]."""
    parent_rows: Tensor
    """Row number of its parent [W]."""
    sources: Tensor
    """For each child, in node order: index into this level's expanded nodes."""
    ranks: Tensor
    """For each child: its rank among its parent's tokens."""
    widest: int
    """Ranks needed."""


@dataclass(frozen=True)
class Template:
    """Fixed paths as index tensors."""

    topology: Topology
    levels: tuple[Level, ...]


class StaticTree:
    """Fills fixed paths: (i, j) is the rank-j token under the rank-i token (Cai et al. 2024,
    section 2.3).

    Args:
        paths: prefix-closed, the most valuable first: a smaller budget takes the first ones.

    Raises:
        ValueError: a path whose prefix is not listed before it, a rank that no draft has, or more
            paths than a target can verify at once.
    """

    sibling_draw = SiblingDraw.BY_VALUE

    def __init__(self, paths: Sequence[Sequence[int]]) -> None:
        # 1. A bounded number of bounded paths.
        if len(paths) > MOST_PATHS or any(len(path) > MOST_PATHS for path in paths):
            raise ValueError(
                f"tree has {len(paths)} paths: at most {MOST_PATHS} are drafted, and none is longer"
            )
        self.paths = tuple(tuple(path) for path in paths)
        # 2. Every path follows its prefix.
        listed: set[Path] = {()}
        for path in self.paths:
            if path[:-1] not in listed:
                raise ValueError(
                    f"tree path {list(path)} stands before {list(path[:-1])}: list prefixes first"
                )
            if not path or not 0 <= path[-1] < MOST_PATHS:
                raise ValueError(
                    f"tree path {list(path)} must end in a rank from 0 to {MOST_PATHS - 1}"
                )
            listed.add(path)

    @staticmethod
    def chain(depth: int) -> StaticTree:
        """The most likely token at each of `depth` steps."""
        return StaticTree([(0,) * (i + 1) for i in range(depth)])

    @property
    def depth(self) -> int:
        """Length of the longest path."""
        return max((len(path) for path in self.paths), default=0)

    def build(self, drafter: Drafter, state: DraftState, budget: int) -> TokenTree:
        """A tree of the first `budget` paths."""
        fixed = template(self.paths[:budget], state.newest_B.device)
        columns = [state.newest_B[:, None]]
        tokens_BN = columns[0]
        for depth, level in enumerate(fixed.levels):
            # 1. Expand the nodes of this level that have children.
            frontier = Frontier(
                tokens_BN[:, level.nodes], level.parent_rows.expand(len(tokens_BN), -1), depth
            )
            logits_BWD = drafter.expand(state, frontier)
            # 2. Their children are the tokens at the given ranks.
            best_BWR = logits_BWD.topk(level.widest, dim=-1).indices
            drafted = best_BWR[:, level.sources, level.ranks]
            columns.append(
                drafted if drafter.vocabulary_D is None else drafter.vocabulary_D[drafted]
            )
            tokens_BN = torch.cat(columns, dim=1)
        return TokenTree(
            tokens_BN, fixed.topology.expand(len(tokens_BN)), vocabulary_D=drafter.vocabulary_D
        )


@lru_cache(maxsize=64)
def template(paths: tuple[Path, ...], device: torch.device) -> Template:
    """Node order, parents and index tensors: nodes sorted by (depth, path), node 0 the root."""
    # 1. Nodes and their parents.
    nodes: list[Path] = [(), *sorted(paths, key=lambda path: (len(path), path))]
    index = {path: i for i, path in enumerate(nodes)}
    parents = [-1] + [index[path[:-1]] for path in nodes[1:]]
    # 2. Nodes with children, by the row in which they are expanded.
    expanded = [path for path in nodes if any(child[:-1] == path for child in nodes[1:])]
    row = {path: i for i, path in enumerate(expanded)}
    # 3. Index tensors of each level.
    levels = []
    for depth in range(max((len(path) for path in expanded), default=-1) + 1):
        at = [path for path in expanded if len(path) == depth]
        children = [path for path in nodes if len(path) == depth + 1]
        levels.append(
            Level(
                nodes=torch.tensor([index[path] for path in at], device=device),
                parent_rows=torch.tensor(
                    [row[path[:-1]] if path else -1 for path in at], device=device
                ),
                sources=torch.tensor([at.index(path[:-1]) for path in children], device=device),
                ranks=torch.tensor([path[-1] for path in children], device=device),
                widest=max(path[-1] for path in children) + 1,
            )
        )
    return Template(Topology(torch.tensor([parents], device=device)), tuple(levels))
