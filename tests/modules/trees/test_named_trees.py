"""The named trees: the released ones by digests of the releases' own node lists, and cuts of
them.
"""

from __future__ import annotations

import hashlib
import json

import pytest

from modules.trees.named_trees import NAMED, tree_paths
from modules.trees.static import StaticTree


def digest(paths: list[list[int]]) -> str:
    return hashlib.sha256(json.dumps(paths).encode()).hexdigest()[:16]


@pytest.mark.parametrize(
    ("name", "released", "by_depth"),
    [
        ("mc_sim_7b_63", "35c38d3c9cde7957", [10, 28, 23, 2]),
        ("eagle_25", "523717d6431e7672", [4, 8, 8, 3, 2]),
    ],
)
def test_medusas_and_eagles_trees_are_the_released_lists_in_their_order(name, released, by_depth):
    paths = tree_paths(name, None)
    assert digest(paths) == released
    assert [
        sum(len(path) == depth for path in paths) for depth in range(1, len(by_depth) + 1)
    ] == by_depth


def test_falcons_tree_has_the_released_nodes():
    """The release lists 166, of which [0, 1, 0, 0] stands there twice, level by level; ours are in
    another order.
    """
    paths = tree_paths("falcon_8", None)
    assert digest(sorted(paths)) == "ad000aca830099cb" and len(paths) == 165
    assert [sum(len(path) == depth for path in paths) for depth in range(1, 9)] == [
        20,
        15,
        19,
        23,
        21,
        23,
        21,
        23,
    ]


def test_falcons_tree_for_blocks_of_three_is_its_first_six_levels():
    assert tree_paths("falcon_8_cut_6", None) == [
        path for path in NAMED["falcon_8"] if len(path) < 7
    ]
    assert tree_paths("falcon_6", None) == tree_paths("falcon_8_cut_6", None), (
        "a name that saved drafters carry"
    )


@pytest.mark.parametrize("name", NAMED)
def test_a_named_tree_lists_prefixes_first_and_is_cut_by_depth(name):
    paths = tree_paths(name, None)
    StaticTree(paths)
    assert len({tuple(path) for path in paths}) == len(paths)
    for depth in (1, 2, 5):
        assert tree_paths(name, depth) == [path for path in paths if len(path) <= depth]
