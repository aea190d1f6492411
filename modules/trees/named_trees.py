"""Static trees as lists of paths: (i_0, …, i_{d-1}) is the rank-i_0 first draft, then the rank-i_1
second one, ….

Paths are listed by value, so that a smaller budget takes the first ones.
"""

from __future__ import annotations

import re

from modules.trees.released import EAGLE_25, FALCON_8, MC_SIM_7B_63, Path
from modules.trees.static import MOST_PATHS

NARROW: list[Path] = [
    [0],
    [0, 0],
    [1],
    [0, 0, 0],
    [0, 1],
    [1, 0],
    [2],
    [0, 0, 0, 0],
    [3],
    [0, 0, 1],
    [2, 0],
    [0, 2],
    [1, 0, 0],
    [0, 0, 0, 0, 0],
    [0, 1, 0],
]
"""The root and the first seven nodes: a CPU verifies eight rows for little more than one."""

NAMED: dict[str, list[Path]] = {
    "narrow": NARROW,
    "mc_sim_7b_63": MC_SIM_7B_63,
    "eagle_25": EAGLE_25,
    "falcon_8": FALCON_8,
    "falcon_8_cut_6": [path for path in FALCON_8 if len(path) <= 6],
}
"""`narrow` is this project's own, and so is the choice of Falcon's first six levels, for blocks of
three: no tree was released for those. The others are the released ones."""
RENAMED = {"falcon_6": "falcon_8_cut_6"}
"""Names that saved drafters may carry."""

OPTIMISED = re.compile(r"optimised(?:_([1-9][0-9]*))?")
"""`optimised_N`: the best tree of N nodes by measured accuracies; `optimised` alone has as many as
`narrow`.
"""


def optimised_size(tree: list[Path] | str) -> int | None:
    """Nodes of the optimised tree that `tree` names; None when it names another.

    Raises ValueError when they are more than can be drafted.
    """
    match = OPTIMISED.fullmatch(tree) if isinstance(tree, str) else None
    nodes = None if match is None else int(match[1] or len(NARROW))
    if nodes is not None and not 1 <= nodes <= MOST_PATHS:
        raise ValueError(f"tree {tree!r} must have 1 to {MOST_PATHS} nodes")
    return nodes


def tree_paths(tree: list[Path] | str, depth: int | None, unit: str = "draft steps") -> list[Path]:
    """The paths of a tree given by name (cut at `depth`, if there is one) or in full.

    Raises ValueError when there is no tree of that name, or when a path is deeper than `depth`,
    counted in `unit`.
    """
    # 1. A name: cut at the depth.
    if isinstance(tree, str):
        tree = RENAMED.get(tree, tree)
        if tree not in NAMED:
            raise ValueError(
                f"tree {tree!r} is not known: use one of {', '.join(NAMED)}, optimised_N or a list "
                "of paths"
            )
        return [path for path in NAMED[tree] if depth is None or len(path) <= depth]
    # 2. A list of paths: checked, never cut.
    for path in tree:
        if depth is not None and len(path) > depth:
            raise ValueError(
                f"tree path {path} is deeper than the drafter's {depth} {unit}: shorten it or "
                "train more"
            )
    return tree
