"""Passes of rows together with auxiliary ones, which may enter at later layers.

Shape legend: B sequences, N rows of one call, P auxiliary rows, X both, H hidden size.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from modules.contracts.rows import AuxiliaryRows, Entry, Rows
from modules.contracts.shapes import StateName
from modules.contracts.target import Target
from modules.runtime.phase_timer import phase
from modules.target.kv_cache import AppendedCache, SlotCache

Change = Callable[[Tensor, Rows], tuple[Tensor, Rows]]
"""The states of some rows and these rows -> those of the next part of a pass."""


def rows_beside(
    target: Target,
    hidden_BNH: Tensor,
    rows: Rows,
    names: Sequence[StateName],
    auxiliary: AuxiliaryRows,
    cache: SlotCache | None = None,
) -> dict[StateName, Tensor]:
    """States `{name: [B,N+P,H]}` of one pass over rows followed by auxiliary rows; of the N rows
    alone below the layer where the others enter.
    """
    count = hidden_BNH.shape[1]

    def append(hidden: Tensor, rows: Rows) -> tuple[Tensor, Rows]:
        return torch.cat([hidden, auxiliary.entering(hidden)], dim=1), rows.beside(auxiliary)

    def enter(entry: Entry) -> Change:
        def change(hidden: Tensor, rows: Rows) -> tuple[Tensor, Rows]:
            after = entry.replaced(hidden[:, count:], hidden[:, :count])
            return torch.cat([hidden[:, :count], after], dim=1), rows

        return change

    parts = [(0, _unchanged), (auxiliary.layer, append)]
    parts += [(entry.layer, enter(entry)) for entry in auxiliary.later]
    return _in_parts(target, hidden_BNH, rows, names, parts, cache)


def gradient_beside(
    target: Target,
    hidden_BNH: Tensor,
    rows: Rows,
    names: Sequence[StateName],
    auxiliary: AuxiliaryRows,
) -> dict[StateName, Tensor]:
    """The states of `rows_beside`, with a gradient through the auxiliary rows alone: the pass of
    the others stores nothing for the backward pass.
    """
    # 1. The other rows, without a gradient.
    batch_size, count = hidden_BNH.shape[:2]
    depth = target.shape.num_layers
    cache = AppendedCache(depth, batch_size, count + auxiliary.position_ids_BP.shape[1])
    layers = {auxiliary.layer, *(entry.layer for entry in auxiliary.later)} - {0}
    inputs: dict[int, StateName] = {k: "pre_norm" if k == depth else k for k in layers}
    wanted = tuple(dict.fromkeys((*names, *inputs.values())))
    with torch.no_grad(), phase("target states"):
        states = target.forward_rows(hidden_BNH, rows, wanted, cache)

    # 2. The auxiliary rows attend to the cached keys and values of the others.
    def others(layer: int) -> Tensor:
        return states[inputs[layer]] if layer else hidden_BNH

    def enter(entry: Entry) -> Change:
        return lambda hidden, rows: (entry.replaced(hidden, others(entry.layer)), rows)

    parts = [(auxiliary.layer, _unchanged)]
    parts += [(entry.layer, enter(entry)) for entry in auxiliary.later]
    hidden_BPH = auxiliary.entering(others(auxiliary.layer))
    rows_after = Rows(auxiliary.position_ids_BP, auxiliary.visible_BPX)
    more = _in_parts(target, hidden_BPH, rows_after, names, parts, cache)
    return {
        name: torch.cat([states[name], more[name]], dim=1) if name in more else states[name]
        for name in names
    }


def _in_parts(
    target: Target,
    hidden_BXH: Tensor,
    rows: Rows,
    names: Sequence[StateName],
    parts: Sequence[tuple[int, Change]],
    cache: SlotCache | None,
) -> dict[StateName, Tensor]:
    """States of a pass whose rows change before some layers.

    Args:
        target, names, cache: as in `Target.forward_rows`.
        hidden_BXH, rows: of the first part.
        parts: the first layer of each part, ascending, and what changes there.
    """
    depth, states = target.shape.num_layers, {}
    ends = [*(layer for layer, _ in parts[1:]), depth]
    for index, ((start, change), stop) in enumerate(zip(parts, ends, strict=True)):
        hidden_BXH, rows = change(hidden_BXH, rows)
        last = index == len(parts) - 1
        outer = [name for name in names if not isinstance(name, int)] if last else []
        # 1. Behind the last layer only the norm remains.
        if start == depth and last:
            after = {"pre_norm": hidden_BXH, "final": target.final_norm(hidden_BXH)}
            states |= {name: after[name] for name in outer}
        # 2. The layers of this part.
        elif start < stop:
            inner = [name for name in names if isinstance(name, int) and start <= name < stop]
            whole = (start, stop) == (0, depth)
            wanted = [*inner, *(outer if last else ["pre_norm"])]
            layers = None if whole else (start, stop)
            seen = target.forward_rows(hidden_BXH, rows, wanted, cache, layers)
            hidden_BXH = hidden_BXH if last else seen.pop("pre_norm")
            states |= seen
    return states


def _unchanged(hidden: Tensor, rows: Rows) -> tuple[Tensor, Rows]:
    return hidden, rows
