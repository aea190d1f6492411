"""Pairs of a tree builder and a rule, and the orders of them that papers claim."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from modules.acceptance.rules import (
    KSequentialRule,
    MultiRoundRule,
    PointRule,
    RatioRule,
    check_pairing,
)
from modules.contracts.drafter import TreeBuilder
from modules.trees.reranked import RerankedTree
from modules.trees.sampled.branching import branching_tree, chains
from modules.trees.sampled.chain import SampledChain
from modules.trees.sampled.dyspec import DySpecTree
from modules.trees.sampled.sequoia import best_paths, sequoia_tree
from modules.trees.sampled.stochastic_beam import StochasticBeamTree
from modules.trees.static import StaticTree

SIBLINGS = 4
"""Siblings of the largest one-level tree."""
NODES, DEEPEST = 15, 6
"""Drafted nodes and levels of whole trees."""
Rule = RatioRule | PointRule


@dataclass(frozen=True)
class Trial:
    """A builder and the rule that verifies its trees; `nodes` are drafted."""

    builder: TreeBuilder
    rule: Rule
    nodes: int

    def __post_init__(self) -> None:
        """Refuse a rule that does not fit the builder's draws."""
        check_pairing(self.rule, self.builder.sibling_draw)


def level_trials() -> dict[str, Trial]:
    """One level of K siblings: every rule against the optimum of one draft, which is `ratio 1`."""
    # Each rule on trees drawn the way it requires.
    trials = {"ratio 1": Trial(SampledChain(1), RatioRule(), 1)}
    for count in range(2, SIBLINGS + 1):
        trials[f"multi_round {count}"] = Trial(chains(count, 1), MultiRoundRule(), count)
        trials[f"k_seq {count}"] = Trial(chains(count, 1), KSequentialRule(), count)
        trials[f"recursive {count}"] = Trial(branching_tree([count]), RatioRule(), count)
        trials[f"point {count}"] = Trial(
            StaticTree([(i,) for i in range(count)]), PointRule(), count
        )
    return trials


def tree_trials(acceptance: Sequence[float], heat: float | None = None) -> dict[str, Trial]:
    """Whole trees of 15 nodes, and one chain as deep as the five chains; `heat` is the drawn trees'
    temperature.
    """
    independent = branching_tree([3, 2, 1], "independent", heat)
    static = best_paths([acceptance], NODES, DEEPEST)
    # Chains, independent branches, draws without replacement, optimised shapes, trees by value.
    return {
        "chain of 3, ratio": Trial(SampledChain(3), RatioRule(), 3),
        "5 chains of 3, multi_round": Trial(chains(5, 3, heat), MultiRoundRule(), NODES),
        "5 chains of 3, k_seq": Trial(chains(5, 3, heat), KSequentialRule(), NODES),
        "3-2-1 independent, multi_round": Trial(independent, MultiRoundRule(), NODES),
        "3-2-1 independent, k_seq": Trial(independent, KSequentialRule(), NODES),
        "RSD-C 3-2-1": Trial(branching_tree([3, 2, 1], temperature=heat), RatioRule(), NODES),
        "RSD-S 5 wide, 3 deep": Trial(StochasticBeamTree(5, 3, heat), RatioRule(), NODES),
        "Sequoia": Trial(
            sequoia_tree([acceptance], NODES, DEEPEST, temperature=heat), RatioRule(), NODES
        ),
        "Sequoia's shape, top-k by value": Trial(StaticTree(static), PointRule(), NODES),
        "DySpec": Trial(DySpecTree(DEEPEST, temperature=heat), RatioRule(), NODES),
        "EAGLE-2's rerank, top-k by value": Trial(RerankedTree(DEEPEST, 5), PointRule(), NODES),
    }


ORDERS = [
    *((f"recursive {k}", f"multi_round {k}") for k in range(2, SIBLINGS + 1)),
    ("RSD-C 3-2-1", "3-2-1 independent, multi_round"),
    ("RSD-S 5 wide, 3 deep", "3-2-1 independent, multi_round"),
    ("RSD-S 5 wide, 3 deep", "5 chains of 3, multi_round"),
    *((f"k_seq {k}", "ratio 1") for k in range(2, SIBLINGS + 1)),
    ("5 chains of 3, k_seq", "chain of 3, ratio"),
    *((f"k_seq {k}", f"multi_round {k}") for k in range(2, SIBLINGS + 1)),
    ("5 chains of 3, k_seq", "5 chains of 3, multi_round"),
    ("DySpec", "RSD-C 3-2-1"),
    ("DySpec", "Sequoia"),
    ("DySpec", "Sequoia's shape, top-k by value"),
    ("DySpec", "EAGLE-2's rerank, top-k by value"),
]
"""Pairs in the order that their papers claim: the first accepts at least as much."""
