"""Trees of a fixed shape whose tokens are drawn from the drafter's distribution: SpecInfer's,
SpecTr's, RSD-C's and Sequoia's.

Shape legend: B sequences, W frontier nodes, R siblings, N nodes, D draft vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from modules.contracts.drafter import Context, Drafter, DraftState, Frontier
from modules.contracts.token_tree import SiblingDraw, TokenTree, Topology
from modules.trees.named_trees import Path
from modules.trees.sampled.draws import check_temperature, draft_probs, independent, race
from modules.trees.static import StaticTree, template

Draw = Literal["without_replacement", "independent"]
DRAWS: dict[str, SiblingDraw] = {
    "without_replacement": SiblingDraw.WITHOUT_REPLACEMENT,
    "independent": SiblingDraw.INDEPENDENT,
}


class DrawnTree:
    """Fills fixed paths with draws: (i, j) is the j-th draw under the i-th draw from the root.

    The number of siblings never depends on a drawn value, so that the tree may be verified with its
    distribution.

    Args:
        paths: prefix-closed, a draw only after the draws before it; the most valuable first: a
            smaller budget takes the first ones.
        draw: how siblings are drawn. Independent duplicates are kept, each with its own children.
        temperature: of the draft; None: the target's.
        exhausted: when all tokens of a distribution are drawn, `"stop"`, or go on with the
            `"uniform"` distribution over the others (Sequoia; without replacement only).

    Raises:
        ValueError: a path before its prefix or its earlier siblings, an unknown setting.
    """

    def __init__(
        self,
        paths: Sequence[Sequence[int]],
        draw: Draw = "without_replacement",
        temperature: float | None = None,
        exhausted: Literal["stop", "uniform"] = "stop",
    ) -> None:
        self.paths = StaticTree(paths).paths
        for i, path in enumerate(self.paths):
            if path[-1] > 0 and (*path[:-1], path[-1] - 1) not in self.paths[:i]:
                raise ValueError(
                    f"tree path {list(path)} stands before its earlier sibling: a draw follows the "
                    "draws before it"
                )
        if draw not in DRAWS or exhausted not in ("stop", "uniform"):
            raise ValueError(
                f"draw {draw!r} and exhausted {exhausted!r}: use one of {', '.join(DRAWS)}, and "
                "stop or uniform"
            )
        check_temperature(temperature)
        self.sibling_draw, self.temperature, self.exhausted = DRAWS[draw], temperature, exhausted

    @property
    def depth(self) -> int:
        """Length of the longest path."""
        return max((len(path) for path in self.paths), default=0)

    def build(self, drafter: Drafter, state: DraftState, budget: int) -> TokenTree:
        """A tree of the first `budget` paths, with the distributions that its nodes were drawn
        from.
        """
        fixed = template(self.paths[:budget], state.newest_B.device)
        tokens_BN, vocabulary_D = state.newest_B[:, None], drafter.vocabulary_D
        probs, rows = [], [-1]
        real = [torch.ones_like(tokens_BN, dtype=torch.bool)]
        for depth, level in enumerate(fixed.levels):
            # 1. The distributions of the expanded nodes.
            frontier = Frontier(
                tokens_BN[:, level.nodes], level.parent_rows.expand(len(tokens_BN), -1), depth
            )
            probs_BWD = draft_probs(
                drafter.expand(state, frontier), state.context, self.temperature
            )
            if self.sibling_draw is SiblingDraw.INDEPENDENT:
                probs_BWD = of_one_row(probs_BWD, tokens_BN, fixed.topology, level.nodes)
            # 2. Draw their children, and note from which row.
            drawn_BWR, real_BWR = self._siblings(probs_BWD, state.context, level.widest)
            rows += (sum(part.shape[1] for part in probs) + level.sources).tolist()
            probs.append(probs_BWD)
            # 3. Tokens in node order.
            drawn = drawn_BWR[:, level.sources, level.ranks]
            real.append(real_BWR[:, level.sources, level.ranks])
            tokens_BN = torch.cat(
                [tokens_BN, drawn if vocabulary_D is None else vocabulary_D[drawn]], dim=1
            )
        if not probs:
            return TokenTree.root(state.newest_B)
        # 4. Nothing below a draw that was not there is a candidate.
        topology = fixed.topology.expand(len(tokens_BN))
        missing_BN = (topology.ancestors & ~torch.cat(real, dim=1)[:, None]).any(-1)
        rows_BN = torch.tensor(rows, device=tokens_BN.device).expand_as(tokens_BN)
        return TokenTree(
            tokens_BN,
            topology,
            candidate_BN=~missing_BN,
            draw_BN=torch.full_like(tokens_BN, self.sibling_draw),
            probs_BRD=torch.cat(probs, dim=1),
            prob_rows_BN=rows_BN,
            vocabulary_D=vocabulary_D,
        )

    def _siblings(self, probs_BWD: Tensor, context: Context, count: int) -> tuple[Tensor, Tensor]:
        """Draws [B,W,R] and whether the distribution had a token left for each."""
        if self.sibling_draw is SiblingDraw.INDEPENDENT:
            drawn_BWR = independent(probs_BWD, context, count)
            return drawn_BWR, torch.ones_like(drawn_BWR, dtype=torch.bool)
        if count > probs_BWD.shape[-1]:
            raise ValueError(
                f"tree with {count} siblings, but the draft vocabulary has {probs_BWD.shape[-1]} "
                "tokens: ask for fewer"
            )
        keys_BWR, drawn_BWR = race(probs_BWD, context, self.exhausted).topk(count, dim=-1)
        return drawn_BWR, keys_BWR.isfinite()


def of_one_row(probs_BWD: Tensor, tokens_BN: Tensor, topology: Topology, nodes_W: Tensor) -> Tensor:
    """The distributions [B,W,D] of expanded nodes; nodes with the same prefix all get that of the
    first.

    Children of twins are siblings of one distribution. A drafter's rows for one prefix differ by
    rounding (in bfloat16 by 0.4 % of the largest probability), and K-SEQ has one threshold for one
    distribution.

    Args:
        probs_BWD: of the expanded nodes. tokens_BN: of the tree so far.
        topology: of the whole tree. nodes_W: the expanded nodes.
    """
    whole = TokenTree(F.pad(tokens_BN, (0, topology.size - tokens_BN.shape[1])), topology)
    first_BW = whole.first_BN[:, nodes_W]
    row_BW = (first_BW[:, :, None] == first_BW[:, None]).int().argmax(-1)
    return probs_BWD.gather(1, row_BW[..., None].expand_as(probs_BWD))


def branching_tree(
    branching: Sequence[int], draw: Draw = "without_replacement", temperature: float | None = None
) -> DrawnTree:
    """Every node of level l has `branching[l]` children: RSD-C (Jeon et al. 2024, section 3.2.1),
    or SpecInfer's expansion (Miao et al. 2023) with independent draws."""
    if not branching or min(branching) < 1:
        raise ValueError(
            f"branching must be numbers of children of at least 1, got {list(branching)}"
        )
    levels: list[list[Path]] = [[[]]]
    for count in branching:
        levels.append([[*path, draw_index] for path in levels[-1] for draw_index in range(count)])
    return DrawnTree([path for level in levels[1:] for path in level], draw, temperature)


def chains(count: int, depth: int, temperature: float | None = None) -> DrawnTree:
    """`count` independent chains of `depth` tokens: SpecTr's drafts (Sun et al. 2023)."""
    return branching_tree([count] + [1] * (depth - 1), "independent", temperature)
