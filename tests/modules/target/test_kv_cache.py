"""The cache moves accepted rows of all layers at once, and holds the same rows wherever its buffers
are.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from modules.contracts.rows import causal_rows
from modules.contracts.verification import Accepted
from modules.target.kv_cache import Buffers, SlotCache

ACCEPTED = Accepted(torch.tensor([[0, 2, 4]]), torch.tensor([3]), torch.tensor([5]))
"""Rows 2 and 4 have to move, to where 1 and 2 stand."""


class Launches(TorchDispatchMode):
    """Counts the operators that run."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += 1
        return func(*args, **(kwargs or {}))


def written(layers: int, buffers: Buffers | None) -> tuple[SlotCache, list[Tensor]]:
    """A cache with one call of five rows, and the keys [1,2,5,3] of every layer."""
    cache, keys = SlotCache(layers, 1, 16, fixed=buffers), []
    cache.begin(causal_rows(torch.tensor([0]), 5))
    for layer in range(layers):
        keys.append(torch.arange(30.0).reshape(1, 2, 5, 3) + 100 * layer)
        cache.update(keys[-1], -keys[-1], layer)
    return cache, keys


def seen(cache: SlotCache, layer: int) -> tuple[Tensor, Tensor]:
    """What the next call's row attends to in a layer."""
    cache.begin(causal_rows(torch.tensor([3]), 1))
    return cache.update(torch.zeros(1, 2, 1, 3), torch.zeros(1, 2, 1, 3), layer)


@pytest.mark.parametrize("fixed", [False, True])
def test_a_commit_costs_the_same_however_many_layers_there_are(fixed: bool) -> None:
    counts = []
    for layers in (2, 7):
        cache, keys = written(layers, Buffers() if fixed else None)
        with Launches() as launches:
            cache.commit(ACCEPTED)
        counts.append(launches.count)
        for layer, rows in enumerate(keys):
            for found, expected in zip(seen(cache, layer), (rows, -rows), strict=True):
                assert torch.equal(found[:, :, :3], expected[:, :, [0, 2, 4]])
    assert counts[0] == counts[1]


def test_fixed_buffers_are_used_again_and_left_by_a_cache_that_grows() -> None:
    buffers = Buffers()
    first, keys = written(2, buffers)
    first.commit(ACCEPTED)
    second, _ = written(2, buffers)
    assert second.fixed is buffers and buffers.store is not None
    place = buffers.keys[1].data_ptr()
    second.commit(ACCEPTED)
    assert place == buffers.store[1, 0].data_ptr() == seen(second, 1)[0].data_ptr()
    second.reserve(100)
    assert second.fixed is None and buffers.keys[1].data_ptr() == place
    found, _ = seen(second, 1)
    assert found.data_ptr() != place and torch.equal(found[:, :, :3], keys[1][:, :, [0, 2, 4]])
