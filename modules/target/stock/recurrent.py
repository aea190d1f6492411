"""Layers that keep a state in place of keys and values: gated delta rules (Qwen3-Next, Qwen3.5),
Mamba, short convolutions (LFM2).

A state cannot be taken back, and a row of a tree must not see its siblings. So such a module reads
every path of a call's rows by itself, from the state at the committed tokens; documents of a packed
batch are paths too. That state stays until `commit`, which goes on from it over the accepted rows.

Shape legend: B sequences, N rows of one call, T tokens of a packed row, J rows since the last
commit, P paths, D rows of a path, X all tokens, H hidden size.
"""

from __future__ import annotations

import copy
import functools
import inspect
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache, LinearAttentionLayer

from modules.contracts.rows import DocumentRows, Rows
from modules.contracts.verification import Accepted

WASTE = 256
"""Rows of padding that are computed rather than split paths by length into two calls."""


@dataclass(frozen=True)
class Paths:
    """Where the rows of a call are, as paths from the committed tokens.

    groups: of paths that are read together, the sequence of each [P] and its rows [P,D] since the
        last commit, padded on the right. outputs_BN: where each row's output is, in the outputs of
        all groups one after another, flattened. whole: each sequence has one path of all its rows.
    """

    groups: list[tuple[Tensor, Tensor]]
    outputs_BN: Tensor
    whole: bool


def paths_of(visible_BNJ: Tensor) -> Paths:
    """The fewest paths that end in rows no other row sees. A row that sees something else than the
    rows before it on such a path has a path of its own.
    """
    batch, count, width = visible_BNJ.shape
    depth_BN = visible_BNJ.sum(2)
    # 1. On which path each row is read: the first one that holds what it sees, in the same order.
    seen_BNN = visible_BNJ[:, :, width - count :]
    ends_BN = seen_BNN.sum(1) == 1
    place_BNN = visible_BNJ.cumsum(2, dtype=torch.int32)[:, :, width - count :]
    holds_BNN = seen_BNN & ends_BN[:, :, None] & (place_BNN == depth_BN[:, None, :])
    own_N = torch.arange(count, device=visible_BNJ.device)
    end_BN = torch.where(holds_BNN.any(1), holds_BNN.int().argmax(1), own_N)
    used_BN = torch.zeros_like(ends_BN).scatter(1, end_BN, True)
    # 2. The rows of each path, in order, and how many there are.
    sequence_P, last_P = used_BN.nonzero(as_tuple=True)
    on_PJ = visible_BNJ[sequence_P, last_P]
    rows_PJ = torch.argsort(~on_PJ, dim=1, stable=True)
    number_BN = (used_BN.flatten().cumsum(0).view_as(end_BN) - 1).gather(1, end_BN)
    lengths = on_PJ.sum(1).tolist()
    # There is at least one path for each sequence.
    whole = len(lengths) == batch and set(lengths) == {width}
    return _in_groups(sequence_P, rows_PJ, lengths, number_BN, depth_BN, whole)


def document_paths(rows: DocumentRows) -> Paths:
    """The documents of packed texts, without a mask of all pairs; every token of padding alone."""
    documents_BT, device = rows.document_ids_BT, rows.document_ids_BT.device
    batch, width = documents_BT.shape
    order_T = torch.arange(width, device=device)
    # 1. A number for every document and every token of padding, by sequences.
    least = documents_BT.min()
    most = documents_BT.max() - least + 1
    key_BT = torch.where(rows.real_BT, documents_BT - least, most + order_T)
    sequences_B1 = torch.arange(batch, device=device)[:, None]
    key_BT = key_BT + sequences_B1 * (most + width)
    _, number_BT, length_P = key_BT.unique(return_inverse=True, return_counts=True)
    # 2. Each document's tokens, in order.
    sorted_X = torch.argsort(number_BT.flatten(), stable=True)
    first_P = length_P.cumsum(0) - length_P
    path_X = number_BT.flatten()[sorted_X]
    place_X = torch.arange(len(sorted_X), device=device) - first_P[path_X]
    rows_PD = sorted_X.new_zeros(len(length_P), int(length_P.max()))
    rows_PD[path_X, place_X] = sorted_X % width
    depth_BT = torch.empty_like(number_BT).flatten()
    depth_BT[sorted_X] = place_X + 1
    sequence_P = sorted_X[first_P] // width
    lengths = length_P.tolist()
    return _in_groups(sequence_P, rows_PD, lengths, number_BT, depth_BT.view(batch, -1), False)


def _in_groups(
    sequence_P: Tensor,
    rows_PD: Tensor,
    lengths: list[int],
    number_BN: Tensor,
    depth_BN: Tensor,
    whole: bool,
) -> Paths:
    """Paths in groups of similar lengths, where one group would be mostly padding.

    Args:
        sequence_P, rows_PD, lengths: the sequence, the rows and how many, of each path.
        number_BN, depth_BN: the path of each row, and which of its rows it is, from 1.
        whole: as in `Paths`.
    """
    kinds = [0] * len(lengths)
    if len(lengths) * max(lengths) > 2 * sum(lengths) + WASTE:
        kinds = [length.bit_length() for length in lengths]
    groups, first_P, start = [], torch.zeros_like(sequence_P), 0
    for kind in sorted(set(kinds)):
        members = [path for path, other in enumerate(kinds) if other == kind]
        longest = max(lengths[path] for path in members)
        chosen = torch.tensor(members, device=sequence_P.device)
        groups.append((sequence_P[chosen], rows_PD[chosen, :longest]))
        places = torch.arange(len(members), device=sequence_P.device)
        first_P[chosen] = start + longest * places
        start += longest * len(members)
    return Paths(groups, first_P[number_BN] + depth_BN - 1, whole)


@dataclass
class RecurrentStates:
    """What the recurrent modules of one model keep of the sequences of one session.

    committed: the state at the committed tokens, of each module that has read some. inputs: its
        inputs [B,J,H] since the last commit. after: its state behind all of them, where they are
        one path.
    """

    committed: dict[nn.Module, LinearAttentionLayer] = field(default_factory=dict)
    inputs: dict[nn.Module, Tensor] = field(default_factory=dict)
    after: dict[nn.Module, tuple[LinearAttentionLayer, int]] = field(default_factory=dict)

    def commit(self, accepted: Accepted) -> None:
        """Go on over the accepted rows of each sequence."""
        paths = [list(path) for path in accepted.paths]
        for module, inputs_BJH in self.inputs.items():
            after, length = self.after.get(module, (None, 0))
            if after is not None and all(path == list(range(length)) for path in paths):
                self.committed[module] = after
            else:
                self._replay(module, inputs_BJH, paths)
        self.inputs, self.after = {}, {}

    def _replay(self, module: nn.Module, inputs_BJH: Tensor, paths: list[list[int]]) -> None:
        """Read the accepted rows from the committed state, sequences of equal numbers together."""
        merged: list[LinearAttentionLayer | None] = [None] * len(paths)
        for count in {len(path) for path in paths}:
            members = [b for b, path in enumerate(paths) if len(path) == count]
            chosen = torch.tensor(members, device=inputs_BJH.device)
            rows = torch.tensor([paths[b] for b in members], device=inputs_BJH.device)
            earlier = self.committed.get(module)
            state = _new() if earlier is None else _chosen(earlier, chosen)
            if count:
                _read(module, inputs_BJH[chosen[:, None], rows], state, {})
            for place, b in enumerate(members):
                merged[b] = _chosen(state, torch.tensor([place]))
        self.committed[module] = _joined([state for state in merged if state is not None])

    def chosen(self, sequences_S: Tensor) -> RecurrentStates:
        """The committed states of these sequences alone (int64 [S]), which may repeat."""
        return RecurrentStates(
            {module: _chosen(state, sequences_S) for module, state in self.committed.items()}
        )


class Recurrence:
    """The recurrent modules of one model, and the rows of the call that runs through them."""

    def __init__(self, layers: nn.ModuleList) -> None:
        self.modules: list[Any] = [
            module for layer in layers for module in layer.modules() if _keeps_state(module)
        ]
        self._rows: Rows | None = None
        self._paths: Paths | None = None
        for module in self.modules:
            # In place, since the layers hold references to these modules.
            module.forward = functools.partial(_along_paths, self, module)

    @contextmanager
    def reading(self, rows: Rows) -> Iterator[None]:
        """While the block lasts, modules read these rows."""
        before = self._rows, self._paths
        self._rows, self._paths = rows, None
        try:
            yield
        finally:
            self._rows, self._paths = before

    @property
    def active(self) -> bool:
        """Whether a call says which rows see which; the library's own calls do not."""
        return self._rows is not None

    def paths(self, batch: int) -> Paths:
        """The paths of this call's rows, found once."""
        rows = self._rows
        assert rows is not None
        if self._paths is None and isinstance(rows, DocumentRows):
            self._paths = document_paths(rows)
        elif self._paths is None:
            self._paths = paths_of(rows.visible_BNJ.expand(batch, -1, -1))
        return self._paths


def _keeps_state(module: nn.Module) -> bool:
    """Whether a module's own code reads a convolution's state from the cache."""
    code = getattr(inspect.unwrap(type(module).forward), "__code__", None)
    return code is not None and "get_conv_state" in code.co_names


def _along_paths(recurrence: Recurrence, module: nn.Module, *args: Any, **options: Any) -> Tensor:
    """The module's outputs [B,N,H], each row read at the end of its own path."""
    forward = type(module).forward
    if not recurrence.active:
        return forward(module, *args, **options)
    arguments = inspect.signature(forward).bind(module, *args, **options).arguments
    hidden_BNH: Tensor = arguments["hidden_states"]
    cache: Any = next(
        (arguments[name] for name in _CACHES if arguments.get(name) is not None), None
    )
    states = RecurrentStates() if cache is None else cache.recurrent
    # 1. Rows of earlier calls that these see, and these.
    paths, batch = recurrence.paths(len(hidden_BNH)), len(hidden_BNH)
    inputs_BJH = hidden_BNH
    if cache is not None:
        earlier = states.inputs.get(module, hidden_BNH[:, :0])[:, : cache.ahead]
        assert earlier.shape[1] == cache.ahead, "this module has not read the rows before these"
        inputs_BJH = states.inputs[module] = torch.cat([earlier, hidden_BNH], dim=1)
    # 2. Every path from the committed state.
    outputs: list[Tensor] = []
    states.after.pop(module, None)
    for sequence_P, rows_PD in paths.groups:
        committed = states.committed.get(module)
        state = _new() if committed is None else _chosen(committed, sequence_P)
        read = _read(
            module, inputs_BJH[sequence_P[:, None], rows_PD], state, arguments.get("kwargs")
        )
        outputs.append(read.flatten(0, 1))
        if paths.whole:
            states.after[module] = state, rows_PD.shape[1]
    # 3. Every row's output.
    return torch.cat(outputs)[paths.outputs_BN.flatten()].unflatten(0, (batch, -1))


_CACHES = ("cache_params", "past_key_values")


_GOES_ON: dict[type, bool] = {}
"""Whether the modules of a class go on from a state over several rows at once."""


def _read(
    module: nn.Module,
    hidden_PDH: Tensor,
    state: LinearAttentionLayer,
    options: Mapping[str, Any] | None,
) -> Tensor:
    """The module's outputs [P,D,H] of paths; `state` becomes that behind their last rows."""
    kind, fresh = type(module), not any(state.has_previous_state.values())
    if fresh or hidden_PDH.shape[1] == 1 or _GOES_ON.get(kind):
        return _call(module, hidden_PDH, state, options)
    if kind not in _GOES_ON:
        _GOES_ON[kind] = _depends_on_state(module, hidden_PDH, state, options)
        return _read(module, hidden_PDH, state, options)
    # Mamba's scan begins without a state in the library, so its rows are read one by one.
    steps = [_call(module, row_PH[:, None], state, options) for row_PH in hidden_PDH.unbind(1)]
    return torch.cat(steps, dim=1)


def _depends_on_state(
    module: nn.Module,
    hidden_PDH: Tensor,
    state: LinearAttentionLayer,
    options: Mapping[str, Any] | None,
) -> bool:
    """Whether one call over several rows reads the recurrent state: twice the state gives other
    outputs. A convolution's state alone is always read.
    """
    if not any(state.is_recurrent_states_initialized.values()):
        return True
    once, twice = (
        _like(state, lambda part, _, value, by=by: value * (by if part == _PARTS[1] else 1))
        for by in (1, 2)
    )
    outputs = [_call(module, hidden_PDH, each, options) for each in (once, twice)]
    return not torch.equal(*outputs)


def _call(
    module: nn.Module,
    hidden_PDH: Tensor,
    state: LinearAttentionLayer,
    options: Mapping[str, Any] | None,
) -> Tensor:
    """One call of the library's code from a state, which it changes."""
    forward, index = type(module).forward, getattr(module, "layer_idx", 0)
    name = next(name for name in _CACHES if name in inspect.signature(forward).parameters)
    layers: Any = [*[None] * index, state]
    return forward(module, hidden_PDH, **{name: Cache(layers=layers)}, **(options or {}))


def _new() -> LinearAttentionLayer:
    return LinearAttentionLayer()


_PARTS = (
    "conv_states",
    "recurrent_states",
    "is_conv_states_initialized",
    "is_recurrent_states_initialized",
    "has_previous_state",
    "conv_kernel_size",
)


def _like(state: LinearAttentionLayer, change: Any) -> LinearAttentionLayer:
    """A state whose tensors are `change(part, number, tensor)`."""
    new = copy.copy(state)
    for part in _PARTS:
        values = getattr(state, part)
        changed = {
            number: change(part, number, value) if isinstance(value, Tensor) else value
            for number, value in values.items()
        }
        setattr(new, part, changed)
    return new


def _chosen(state: LinearAttentionLayer, sequences_S: Tensor) -> LinearAttentionLayer:
    """Copies of the states of these sequences."""
    return _like(
        state, lambda _part, _number, value: value.index_select(0, sequences_S.to(value.device))
    )


def _joined(states: list[LinearAttentionLayer]) -> LinearAttentionLayer:
    """The states of all sequences."""
    return _like(
        states[0],
        lambda part, number, _: torch.cat([getattr(state, part)[number] for state in states]),
    )
