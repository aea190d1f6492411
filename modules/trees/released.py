"""The trees that the papers' authors released, node for node.

A path (i_0, …, i_{d-1}) is the rank-i_0 first draft, then the rank-i_1 second one, ….
"""

from __future__ import annotations

Path = list[int]

MC_SIM_7B_63: list[Path] = [
    [0], [0, 0], [1], [0, 1], [2], [0, 0, 0], [1, 0], [0, 2], [3], [0, 3], [4], [0, 4], [2, 0],
    [0, 5], [0, 0, 1], [5], [0, 6], [6], [0, 7], [0, 1, 0], [1, 1], [7], [0, 8], [0, 0, 2],
    [3, 0], [0, 9], [8], [9], [1, 0, 0], [0, 2, 0], [1, 2], [0, 0, 3], [4, 0], [2, 1], [0, 0, 4],
    [0, 0, 5], [0, 0, 0, 0], [0, 1, 1], [0, 0, 6], [0, 3, 0], [5, 0], [1, 3], [0, 0, 7],
    [0, 0, 8], [0, 0, 9], [6, 0], [0, 4, 0], [1, 4], [7, 0], [0, 1, 2], [2, 0, 0], [3, 1], [2, 2],
    [8, 0], [0, 5, 0], [1, 5], [1, 0, 1], [0, 2, 1], [9, 0], [0, 6, 0], [0, 0, 0, 1], [1, 6],
    [0, 7, 0],
]
"""Medusa's (github.com/FasterDecoding/Medusa, medusa/model/medusa_choices.py), in the order in which its
search added the nodes; Hydra's too."""

EAGLE_25: list[Path] = [
    [0], [1], [2], [3], [0, 0], [0, 1], [0, 2], [1, 0], [1, 1], [2, 0], [2, 1], [3, 0], [0, 0, 0],
    [0, 0, 1], [0, 0, 2], [0, 1, 0], [0, 1, 1], [0, 2, 0], [0, 2, 1], [1, 0, 0], [0, 0, 0, 0],
    [0, 0, 0, 1], [0, 0, 0, 2], [0, 0, 0, 0, 0], [0, 0, 0, 0, 1],
]
"""EAGLE-1's (github.com/SafeAILab/EAGLE, eagle/model/choices.py, where it is called mc_sim_7b_63 too);
Clover-2's too."""

_FALCON_8_CHILDREN: dict[tuple[int, ...], int] = {
    (): 20,
    (0,): 10, (1,): 2, (2,): 2, (3,): 1,
    (0, 0): 10, (0, 1): 2, (0, 2): 2, (0, 3): 1, (1, 0): 2, (2, 0): 1, (3, 0): 1,
    (0, 0, 0): 10, (0, 0, 1): 2, (0, 0, 2): 1, (0, 1, 0): 2, (0, 1, 1): 1, (0, 2, 0): 1,
    (0, 2, 1): 1, (0, 3, 0): 1, (1, 0, 0): 2, (2, 0, 0): 1, (3, 0, 0): 1,
    (0, 0, 0, 0): 10, (0, 0, 0, 1): 2, (0, 0, 0, 2): 1, (0, 0, 1, 0): 1, (0, 0, 2, 0): 1,
    (0, 1, 0, 0): 1, (0, 2, 0, 0): 1, (0, 3, 0, 0): 1, (1, 0, 0, 0): 1, (2, 0, 0, 0): 1,
    (3, 0, 0, 0): 1,
    (0, 0, 0, 0, 0): 9, (0, 0, 0, 0, 1): 2, (0, 0, 0, 0, 2): 1, (0, 0, 0, 1, 0): 1,
    (0, 0, 0, 1, 1): 1, (0, 0, 0, 2, 0): 1, (0, 0, 1, 0, 0): 1, (0, 0, 2, 0, 0): 1,
    (0, 1, 0, 0, 0): 1, (0, 2, 0, 0, 0): 1, (0, 3, 0, 0, 0): 1, (1, 0, 0, 0, 0): 1,
    (2, 0, 0, 0, 0): 1, (3, 0, 0, 0, 0): 1,
    (0, 0, 0, 0, 0, 0): 9, (0, 0, 0, 0, 0, 1): 2, (0, 0, 0, 0, 0, 2): 1, (0, 0, 0, 0, 1, 0): 1,
    (0, 0, 0, 1, 0, 0): 1, (0, 0, 1, 0, 0, 0): 1, (0, 0, 2, 0, 0, 0): 1, (0, 1, 0, 0, 0, 0): 1,
    (0, 2, 0, 0, 0, 0): 1, (0, 3, 0, 0, 0, 0): 1, (1, 0, 0, 0, 0, 0): 1, (2, 0, 0, 0, 0, 0): 1,
    (0, 0, 0, 0, 0, 0, 0): 8, (0, 0, 0, 0, 0, 0, 1): 2, (0, 0, 0, 0, 0, 0, 2): 1,
    (0, 0, 0, 0, 0, 1, 0): 1, (0, 0, 0, 0, 0, 1, 1): 1, (0, 0, 0, 0, 0, 2, 0): 1,
    (0, 0, 0, 0, 1, 0, 0): 1, (0, 0, 0, 1, 0, 0, 0): 1, (0, 0, 1, 0, 0, 0, 0): 1,
    (0, 0, 2, 0, 0, 0, 0): 1, (0, 1, 0, 0, 0, 0, 0): 1, (0, 2, 0, 0, 0, 0, 0): 1,
    (0, 3, 0, 0, 0, 0, 0): 1, (1, 0, 0, 0, 0, 0, 0): 1, (2, 0, 0, 0, 0, 0, 0): 1,
}


def _fanned(children: dict[tuple[int, ...], int]) -> list[Path]:
    """Under every parent its likeliest `children[parent]` drafts; paths of small length and ranks first."""
    paths = [[*parent, rank] for parent, count in children.items() for rank in range(count)]
    return sorted(paths, key=lambda path: (len(path) + sum(path), path))


FALCON_8: list[Path] = _fanned(_FALCON_8_CHILDREN)
"""Falcon's for blocks of two (github.com/Bestpay-inc/Falcon, models/choices.py, kmask2_8layer_tree): 165
nodes, of which the release lists [0, 1, 0, 0] twice. It lists them level by level; the order here, for smaller
budgets, is this project's."""
