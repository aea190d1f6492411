"""Calls over trees through `torch.compile`: fixed shapes, so that one graph serves every step with
a tree of its width and a context of its size.

On a GPU the graphs are CUDA graphs (`reduce-overhead`), on a CPU inductor's kernels with the
weights packed into them (`freezing`; a packed copy per graph). Keys and values stay at fixed
addresses in buffers of a few sizes; a call writes its rows at slots that it is given and attends to
the whole buffer under a mask. Widths are rounded up to `WIDTHS` with rows that see only themselves.
Prompts, calls that rewrite states on the way, wider trees and batches run as before. Nothing here
has run on a GPU; single calls on a CPU: docs/benchmarks/verification_cost_xeon2_202611.

Shape legend: B sequences, N rows of a call, K key/value heads, S slots, D head size, H hidden size.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from types import FunctionType
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.cache_utils import Cache

from modules.contracts.rows import Rows
from modules.contracts.shapes import StateName, TargetShape
from modules.target.kv_cache import Buffers, SlotCache

WIDTHS = (*range(1, 9), 12, 16, 24, 32, 48, 64)
"""Rows that have a graph; others are rounded up to the next."""
LEAST_CAPACITY = 256
"""The smallest buffer, in slots. Others have twice, four times, … as many, so that prompts of all
lengths share a few buffers and their graphs."""
BACKEND: str | Callable[..., Any] = "inductor"
"""The compiler backend; tests use others."""


def compile_blocks(component: nn.Module) -> None:
    """Compile the blocks of a trained component (those with `compiles`: feed-forward networks,
    residual blocks, Clover's fusion) with `torch.compile`, one graph for any number of rows. Values
    and gradients stay the same.

    Raises:
        ValueError: it has none.
    """
    blocks = [module for module in component.modules() if getattr(module, "compiles", False)]
    for block in blocks:
        block.compile(dynamic=True, backend=BACKEND)
    if not blocks:
        raise ValueError(
            f"trainer.compile is true, but {type(component).__name__} has no blocks of its own to "
            "compile: set it to false"
        )


class Layers(Protocol):
    """The part of a target that a compiled call needs: its layers, and how their states are
    recorded."""

    architecture: Any

    @property
    def shape(self) -> TargetShape:
        """The dimensions of the target."""
        ...

    @property
    def device(self) -> torch.device:
        """Where its layers compute."""
        ...

    def watching(self, names: Sequence[StateName]) -> AbstractContextManager[None]:
        """Record the states of these names while the block lasts."""
        ...

    def layer_states(
        self,
        embeddings_BNH: Tensor,
        position_ids_BN: Tensor,
        mask: Any,
        cache: Any,
        names: Sequence[StateName],
    ) -> list[Tensor]:
        """States of one pass through the layers, in the order of `names`."""
        ...


class FixedSlots(Cache):
    """The KV cache as one compiled call sees it.

    Args:
        keys, values: of every layer [B,K,S,D], written in place.
        slots_BN: where the rows of the call are written.
    """

    def __init__(self, keys: list[Tensor], values: list[Tensor], slots_BN: Tensor) -> None:
        super().__init__(layers=[])
        self.keys, self.values, self.slots_BN = keys, values, slots_BN

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *_: Any, **__: Any
    ) -> tuple[Tensor, Tensor]:
        """Write [B,K,N,D] keys and values of one layer; all slots of that layer."""
        index = self.slots_BN[:, None, :, None].expand_as(key_states)
        keys, values = self.keys[layer_idx], self.values[layer_idx]
        keys.scatter_(2, index, key_states)
        values.scatter_(2, index, value_states)
        return keys, values


def tree_call(
    target: Layers,
    embeddings_BNH: Tensor,
    position_ids_BN: Tensor,
    mask: Any,
    slots_BN: Tensor,
    keys: list[Tensor],
    values: list[Tensor],
    names: tuple[StateName, ...],
) -> list[Tensor]:
    """States of a call's rows, in the order of `names`; the function that is compiled."""
    cache = FixedSlots(keys, values, slots_BN)
    return target.layer_states(embeddings_BNH, position_ids_BN, mask, cache, names)


class CompiledCalls:
    """The compiled calls of one target, one graph per width, requested states and slots of the
    cache's buffers.

    Args:
        target: whose layers are called.
        autotune: let the compiler try kernels for every matrix product (minutes per graph).
    """

    def __init__(self, target: Layers, autotune: bool = False) -> None:
        self._target, self._autotune = weakref.ref(target), autotune
        self.graphs: dict[tuple[int, tuple[StateName, ...], int], Callable[..., list[Tensor]]] = {}
        """By width, states and slots of the buffers."""
        self._free: dict[int, list[Buffers]] = {}
        """Buffers whose cache was deleted, by their slots."""

    @property
    def target(self) -> Layers:
        """Whose calls these are."""
        target = self._target()
        assert target is not None, "the target is gone"
        return target

    def open(self, capacity: int) -> SlotCache:
        """An empty cache of one sequence in buffers at fixed addresses; buffers of a deleted cache
        are reused.
        """
        room = LEAST_CAPACITY
        # Few sizes, so that buffers and graphs are shared.
        while room < capacity + WIDTHS[-1]:
            room *= 2
        free = self._free.setdefault(room, [])
        buffers = free.pop() if free else Buffers()
        cache = SlotCache(self.target.shape.num_layers, 1, room, fixed=buffers)
        weakref.finalize(cache, free.append, buffers)
        return cache

    def takes(self, rows: int, cache: SlotCache) -> bool:
        """Whether a call of so many rows has a graph (the first call of new buffers makes them, and
        has none).
        """
        return cache.fixed is not None and cache.fixed.store is not None and rows <= WIDTHS[-1]

    def __call__(
        self, embeddings_BNH: Tensor, rows: Rows, cache: SlotCache, names: Sequence[StateName]
    ) -> dict[StateName, Tensor]:
        """States `{name: [B,N,H]}` of the rows; their keys and values are written after the
        committed ones.
        """
        target, count = self.target, embeddings_BNH.shape[1]
        assert cache.fixed is not None
        # 1. Pad the call to the width of a graph.
        width = next(width for width in WIDTHS if width >= count)
        wide = widened(rows, width)
        cache.begin(wide)
        embeddings_BNH = F.pad(embeddings_BNH, (0, 0, 0, width - count))
        mask, wanted = (
            target.architecture.mask(wide, cache, embeddings_BNH),
            tuple(dict.fromkeys(names)),
        )
        # 2. Replay it, or compile it first.
        with target.watching(wanted):
            graph = self._graph(width, wanted, cache.capacity)
            states = graph(
                target,
                embeddings_BNH,
                wide.position_ids_BN,
                mask,
                cache.slots_BN,
                cache.fixed.keys,
                cache.fixed.values,
                wanted,
            )
        # 3. Copy: the next replay of a CUDA graph overwrites these results.
        return {name: state[:, :count].clone() for name, state in zip(wanted, states, strict=True)}

    def _graph(
        self, width: int, names: tuple[StateName, ...], capacity: int
    ) -> Callable[..., list[Tensor]]:
        key = width, names, capacity
        if key not in self.graphs:
            # A new code object: torch.compile gives up on one after eight shapes.
            code = tree_call.__code__.replace(
                co_name=f"tree_call_of_{width}_rows_and_{capacity}_slots"
            )
            function = FunctionType(code, tree_call.__globals__)
            self.graphs[key] = torch.compile(function, fullgraph=True, dynamic=False, **self._how())
        return self.graphs[key]

    def _how(self) -> dict[str, Any]:
        if BACKEND != "inductor":
            return {"backend": BACKEND}
        if self.target.device.type == "cuda":
            return {"mode": "max-autotune" if self._autotune else "reduce-overhead"}
        return {"options": {"freezing": True, "max_autotune": self._autotune}}


def widened(rows: Rows, width: int) -> Rows:
    """The rows and, up to `width`, others that see only themselves."""
    more = width - rows.position_ids_BN.shape[1]
    if not more:
        return rows
    visible = F.pad(rows.visible_BNJ, (0, more, 0, more))
    itself = torch.eye(width, dtype=torch.bool, device=visible.device)
    itself[: width - more] = False
    return Rows(F.pad(rows.position_ids_BN, (0, more)), visible | itself)
