"""The token tree: what a drafter proposes and the target verifies in one forward.

Shape legend: B sequences, N nodes, R rows of draft distributions, D draft vocabulary, H hidden
size.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from enum import IntEnum
from functools import cached_property, lru_cache
from typing import Any

import torch
from torch import Tensor

from modules.contracts.rows import AuxiliaryRows, Rows


class SiblingDraw(IntEnum):
    """How a node was drawn among its siblings, which decides the rules it may be verified with."""

    BY_VALUE = 0
    """Chosen by value (top-k, retrieval, rerank): a point mass given the context."""
    WITHOUT_REPLACEMENT = 1
    """Drawn in order from its distribution with the earlier siblings removed (Plackett-Luce)."""
    INDEPENDENT = 2
    """Drawn from its distribution independently of its siblings; duplicates are kept."""


@dataclass(frozen=True)
class Topology:
    """The structure of a tree: everything that follows from `parents` alone, computed once.

    parents_BN: int64 [B,N]; -1 for node 0, the node's own index for padding, else an earlier node's
    index.
        Siblings are in draw order. A static template shares one Topology over all steps (B = 1
        broadcasts).
    """

    parents_BN: Tensor
    _template: Topology | None = field(default=None, repr=False, compare=False)
    """The topology of one sequence that this one repeats, if it does."""

    @property
    def size(self) -> int:
        """Nodes N, padding included."""
        return self.parents_BN.shape[1]

    @cached_property
    def padding(self) -> Tensor:
        """bool [B,N]: rows that only fill up the width."""
        if self._template is not None:
            return self._repeated(self._template.padding)
        return self.parents_BN == torch.arange(self.size, device=self.parents_BN.device)

    @cached_property
    def real(self) -> Tensor:
        """bool [B,N]: nodes, not padding."""
        if self._template is not None:
            return self._repeated(self._template.real)
        return ~self.padding

    @cached_property
    def counts_B2(self) -> Tensor:
        """int64 [B,2]: the greatest depth, and the number of nodes below node 0."""
        if self._template is not None:
            return self._repeated(self._template.counts_B2)
        return _counts(self.real, self.depth)

    @cached_property
    def ancestors(self) -> Tensor:
        """bool [B,N,N]: `[b, i, j]` when node j is node i or above it. On the device, at fixed
        N.
        """
        if self._template is not None:
            return self._repeated(self._template.ancestors)
        parents = self.parents_BN
        # 1. Paths of at most one edge.
        itself = torch.eye(self.size, dtype=torch.bool, device=parents.device).expand(
            parents.shape[0], -1, -1
        )
        reach = itself | (parents[:, :, None] == torch.arange(self.size, device=parents.device))
        # 2. Each product doubles the length of the paths.
        paths = reach.float()
        for _ in range((self.size - 1).bit_length()):
            paths = torch.bmm(paths, paths).clamp_(max=1)
        return paths > 0

    @cached_property
    def depth(self) -> Tensor:
        """int64 [B,N]: 0 for node 0 (and for padding)."""
        if self._template is not None:
            return self._repeated(self._template.depth)
        return self.ancestors.sum(-1) - 1

    def expand(self, batch: int) -> Topology:
        """The same topology for `batch` sequences; what this one has derived is shared."""
        if self.parents_BN.shape[0] == batch:
            return self
        return Topology(self.parents_BN.expand(batch, -1), _template=self)

    def _repeated(self, derived: Tensor) -> Tensor:
        return derived.expand(len(self.parents_BN), *derived.shape[1:])


@dataclass(frozen=True)
class PartialRows:
    """The first M rows of a tree, which have run through the target's layers below `layer`, in the
    order of the tree: their keys and values are in the cache after the committed ones
    (`Session.run_layers`).

    hidden_BMH: the input of that layer.
    """

    hidden_BMH: Tensor
    layer: int


@dataclass(frozen=True)
class TokenTree:
    """A batch of drafted trees, padded to one width.

    Node 0 is the newest emitted token, not yet in the KV cache. Rows with `candidate` False only
    compute (prompt embeddings, pseudo states, a lookahead window): they are never accepted and
    never committed. Plain decoding is the one-node tree; a chain is a tree with one branch.

    tokens_BN: int64 [B,N].
    topology: parents and what follows from them.
    candidate_BN: bool [B,N]; None means every row that is not padding.
    draw_BN: int64 [B,N] of `SiblingDraw`; None means every node is a point mass.
    probs_BRD: float [B,R,D] probabilities of the sampled nodes' distributions, over the draft
    vocabulary; only needed rows.
    prob_rows_BN: int64 [B,N]: the row of `probs_BRD` that the node was drawn from (-1: a point
    mass).
    vocabulary_D: int64 [D], target ids of the draft vocabulary; None means the whole vocabulary.
    already_run: states of the first rows that the drafter has computed on the target's layers.
    auxiliary: rows that run with the nodes and only compute.
    """

    tokens_BN: Tensor
    topology: Topology
    candidate_BN: Tensor | None = None
    draw_BN: Tensor | None = None
    probs_BRD: Tensor | None = None
    prob_rows_BN: Tensor | None = None
    vocabulary_D: Tensor | None = None
    already_run: PartialRows | None = None
    auxiliary: AuxiliaryRows | None = None

    @property
    def parents_BN(self) -> Tensor:
        """int64 [B,N], see `Topology`."""
        return self.topology.parents_BN

    @property
    def size(self) -> int:
        """N, the newest token's node included."""
        return self.tokens_BN.shape[1]

    @property
    def computed(self) -> int:
        """Rows that its verification runs for each sequence, auxiliary ones included."""
        more = 0 if self.auxiliary is None else self.auxiliary.position_ids_BP.shape[1]
        return self.size + more

    @cached_property
    def acceptable_BN(self) -> Tensor:
        """bool [B,N]: rows that may be accepted (node 0 always is)."""
        real = self.topology.real
        return real if self.candidate_BN is None else real & self.candidate_BN

    @property
    def counts_B2(self) -> Tensor:
        """int64 [B,2]: the greatest depth of a row that may be accepted, and how many there are
        below node 0.
        """
        if self.candidate_BN is None:
            return self.topology.counts_B2
        return _counts(self.acceptable_BN, self.topology.depth)

    @cached_property
    def draws_used(self) -> frozenset[SiblingDraw]:
        """The draft distributions that occur among the drafted candidates; a point mass where there
        are none.
        """
        return self.draws_carried or frozenset({SiblingDraw.BY_VALUE})

    @cached_property
    def draws_carried(self) -> frozenset[SiblingDraw]:
        """The same, empty where nothing is drafted. Reads the device."""
        if self.draw_BN is None:
            return frozenset({SiblingDraw.BY_VALUE} if self.size > 1 else ())
        drafted = self.acceptable_BN[:, 1:]
        return frozenset(
            SiblingDraw(value) for value in self.draw_BN[:, 1:][drafted].unique().tolist()
        )

    @cached_property
    def first_BN(self) -> Tensor:
        """int64 [B,N]: the first node with the same prefix, often the node itself.

        Trees chosen by value may hold siblings of one token. These, and the same paths below them,
        are one prefix, for which the target may be drawn from once only. Nodes that cannot be
        accepted have none. On the device, at fixed N.
        """
        nodes = torch.arange(self.size, device=self.tokens_BN.device)
        parents = self.parents_BN.clamp(min=0)
        # 1. Pairs of usable nodes at one depth with the same token.
        usable_BN = ~(self.topology.ancestors & ~self.acceptable_BN[:, None]).any(-1)
        depth_BN = self.topology.depth
        same = self.tokens_BN[:, :, None] == self.tokens_BN[:, None]
        same = same & (depth_BN[:, :, None] == depth_BN[:, None])
        same = same & usable_BN[:, :, None] & usable_BN[:, None]
        # 2. The last 1, 2, 4, … tokens of both paths are equal; the root is its own parent.
        above_BN = parents.expand(len(same), -1)
        for _ in range(max(1, (self.size - 1).bit_length())):
            rows = same.gather(1, above_BN[:, :, None].expand_as(same))
            same = same & rows.gather(2, above_BN[:, None].expand_as(same))
            above_BN = above_BN.gather(1, above_BN)
        # 3. The first node of each group.
        return torch.where(same.any(-1), same.int().argmax(-1), nodes)

    def with_run_rows(
        self, tokens_BM: Tensor, parents_BM: Tensor, hidden_BMH: Tensor, layer: int
    ) -> TokenTree:
        """The tree with the states that a drafter computed while it drafted the rows.

        Rows count from the first on, as long as they are the tree's first nodes. The target runs
        the others, such as those that a builder drafted and dropped. Reads the device.

        Args:
            tokens_BM, parents_BM: int64 [B,M], the rows that ran, in the order in which they were
                written (`Frontier`).
            hidden_BMH: the input of layer `layer`.
            layer: the first one that has not run.
        """
        # 1. Rows that are nodes of the tree, in its order.
        most = min(self.size, tokens_BM.shape[1])
        same_M = (tokens_BM[:, :most] == self.tokens_BN[:, :most]).all(0)
        same_M = same_M & (parents_BM[:, :most] == self.parents_BN[:, :most]).all(0)
        # 2. Only those before the first difference can be used.
        count = int(same_M.cumprod(0).sum())
        return replace(self, already_run=PartialRows(hidden_BMH[:, :count], layer))

    def only(self, real_BN: Tensor) -> TokenTree:
        """The tree without its other nodes; the order stays, shorter sequences end in padding.

        Reads the device. Rows that only compute, or have run already, must be added later.

        Args:
            real_BN: bool [B,N]; node 0 is real, and so is the parent of a real node.
        """
        assert self.auxiliary is None and self.already_run is None
        # 1. Real nodes first, in their order.
        fewest, width = map(int, torch.stack(real_BN.sum(1).aminmax()).tolist())
        if fewest == self.size:
            return self
        order = real_BN.int().argsort(dim=1, descending=True, stable=True)[:, :width]
        # 2. Renumber the parents; padding is its own parent.
        above_BN = self.parents_BN.expand(len(order), -1)
        moved = (real_BN.cumsum(1) - 1).gather(1, above_BN.clamp(min=0))
        parents = torch.where(above_BN < 0, above_BN, moved).gather(1, order)
        itself = torch.arange(width, device=order.device)
        parents = torch.where(real_BN.gather(1, order), parents, itself)

        def moved_BN(nodes_BN: Tensor | None) -> Tensor | None:
            return None if nodes_BN is None else nodes_BN.gather(1, order)

        return replace(
            self,
            tokens_BN=self.tokens_BN.gather(1, order),
            topology=Topology(parents),
            candidate_BN=moved_BN(self.candidate_BN),
            draw_BN=moved_BN(self.draw_BN),
            prob_rows_BN=moved_BN(self.prob_rows_BN),
        )

    def rows(self, lengths_B: Tensor) -> Rows:
        """The rows to verify after `lengths_B` committed tokens."""
        return Rows(lengths_B[:, None] + self.topology.depth, self.topology.ancestors)

    @staticmethod
    def root(tokens_B: Tensor) -> TokenTree:
        """The one-node tree of plain decoding."""
        return TokenTree(tokens_B[:, None], _lone(tokens_B.device).expand(len(tokens_B)))

    @staticmethod
    def chain(tokens_BN: Tensor, **fields: Any) -> TokenTree:
        """One branch: column i is the child of column i-1. `fields` are further ones of a tree."""
        parents = torch.arange(-1, tokens_BN.shape[1] - 1, device=tokens_BN.device)
        return TokenTree(tokens_BN, Topology(parents.expand_as(tokens_BN)), **fields)


@lru_cache(maxsize=16)
def _lone(device: torch.device) -> Topology:
    """The topology of one node, shared by all steps of plain decoding."""
    return Topology(torch.full((1, 1), -1, device=device))


def _counts(real_BN: Tensor, depth_BN: Tensor) -> Tensor:
    deepest_B = torch.where(real_BN, depth_BN, 0).amax(1)
    return torch.stack([deepest_B, real_BN.sum(1) - 1], 1)


def packed(
    tokens_BN: Tensor, parents_BN: Tensor, real_BN: Tensor, vocabulary_D: Tensor | None = None
) -> TokenTree:
    """The tree of the real nodes alone, see `TokenTree.only`.

    Args:
        tokens_BN, parents_BN: int64 [B,N]; the parent of a real node is real.
        real_BN: bool [B,N]; node 0 is.
        vocabulary_D: target ids of the draft vocabulary.
    """
    return TokenTree(tokens_BN, Topology(parents_BN), vocabulary_D=vocabulary_D).only(real_BN)
