"""Static trees as lists of paths: (i_0, …, i_{d-1}) is the rank-i_0 first draft, then the rank-i_1 second one, ….

Paths are listed in the order they are worth having, so that a smaller budget keeps the first ones.
"""

from __future__ import annotations

import re

Path = list[int]

NARROW: list[Path] = [[0], [0, 0], [1], [0, 0, 0], [0, 1], [1, 0], [2], [0, 0, 0, 0], [3], [0, 0, 1], [2, 0], [0, 2],
                      [1, 0, 0], [0, 0, 0, 0, 0], [0, 1, 0]]
"""The first seven and the root are as many rows as a CPU verifies for little more than one."""

# The released trees, of Medusa (63 nodes) and of EAGLE-1 and Clover-2 (25 nodes), a node as a string of ranks.
_MC_SIM_7B_63 = """0 00 1 01 2 000 10 02 3 03 4 04 20 05 001 5 06 6 07 010 11 7 08 002 30 09 8 9 100 020 12 003 40 21
004 005 0000 011 006 030 50 13 007 008 009 60 040 14 70 012 200 31 22 80 050 15 101 021 90 060 0001 16 070"""
_EAGLE_25 = "0 1 2 3 00 01 02 10 11 20 21 30 000 001 002 010 011 020 021 100 0000 0001 0002 00000 00001"


# Falcon's pattern for blocks of two, a node as `path:children`: ten on the likeliest path, one or two elsewhere. Levels
# 6 to 8 go on as the first five do.
_FALCON = """:20 0:10 1:2 2:2 3:1 00:10 01:2 02:2 03:1 10:2 20:1 30:1 000:10 001:2 002:1 010:2 011:1 020:1 021:1 030:1
100:2 200:1 300:1 0000:10 0001:2 0002:1 0010:1 0020:1 0100:1 0200:1 0300:1 00000:10 00001:2 000000:10 000001:2
0000000:10 0000001:2"""


def _unpacked(text: str) -> list[Path]:
    return [[int(rank) for rank in node] for node in text.split()]


def _fanned(text: str, depth: int) -> list[Path]:
    """The children of every node listed, the likeliest first; no deeper than `depth`."""
    fans = [([int(rank) for rank in node], int(count)) for node, count in (fan.split(":") for fan in text.split())]
    paths = [[*node, rank] for node, count in fans if len(node) < depth for rank in range(count)]
    return sorted(paths, key=lambda path: (sum(path) + len(path), path))


NAMED: dict[str, list[Path]] = {
    "narrow": NARROW, "mc_sim_7b_63": _unpacked(_MC_SIM_7B_63), "eagle_25": _unpacked(_EAGLE_25),
    "falcon_8": _fanned(_FALCON, 8), "falcon_6": _fanned(_FALCON, 6)}


OPTIMISED = re.compile(r"optimised(?:_([1-9][0-9]*))?")
"""`optimised_N`: the best tree of N nodes by measured accuracies; `optimised` alone has as many as `narrow`."""


def optimised_size(tree: list[Path] | str) -> int | None:
    """Nodes of the optimised tree that `tree` asks for; None when it asks for none."""
    found = OPTIMISED.fullmatch(tree) if isinstance(tree, str) else None
    return None if found is None else int(found[1] or len(NARROW))


def tree_paths(tree: list[Path] | str, depth: int | None) -> list[Path]:
    """The paths of a tree given by name (cut at `depth`, if there is one) or in full.

    Raises ValueError when there is no tree of that name, or when a path is deeper than `depth`.
    """
    if isinstance(tree, str):
        if tree not in NAMED:
            raise ValueError(f"tree {tree!r} is not known: use one of {', '.join(NAMED)}, optimised_N or a list of "
                             "paths")
        return [path for path in NAMED[tree] if depth is None or len(path) <= depth]
    for path in tree:
        if depth is not None and len(path) > depth:
            raise ValueError(f"tree path {path} is deeper than the {depth} draft heads: shorten it or add heads")
    return tree
