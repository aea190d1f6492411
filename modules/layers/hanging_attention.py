"""Attention of training rows to a prefix that they share, and to rows of their own.

Shape legend: B sequences, T positions of a packed row, S slots of the prefix, M training rows, J
own rows of each, Q query heads, G key/value heads, E head size.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from modules.layers.activation_checkpointing import recomputed

MAX_SCORES = 2**24
"""Attention scores [M,Q,S] of training rows above this many are computed in parts, on a CPU."""
SCORES_ON_A_DEVICE = 16
"""How many times as many an accelerator computes at once: 1 GiB in float32."""


def most_scores(device: torch.device) -> int:
    """Scores that are computed at once on a device."""
    return MAX_SCORES * (1 if device.type == "cpu" else SCORES_ON_A_DEVICE)


Visible = Callable[[int, Tensor], Tensor]
"""A sequence and places [M] of rows in it -> bool [M,S], the slots that they see."""


class Prefix:
    """Keys and values that training rows share and see parts of.

    Args:
        keys_BSGE, values_BSGE: [B,S,G,E].
        visible: which of the S slots rows of a sequence see: a function, or all of it, bool
            [B,T,S].
        flat_M: int64, the training rows as positions of the flattened [B*T], ascending.
        length: T; not needed beside a tensor.
    """

    def __init__(
        self,
        keys_BSGE: Tensor,
        values_BSGE: Tensor,
        visible: Visible | Tensor,
        flat_M: Tensor,
        length: int | None = None,
    ) -> None:
        self.keys, self.values = keys_BSGE, values_BSGE
        self.visible, length = _looked_up(visible, length)
        self.counts = torch.bincount(flat_M // length, minlength=len(keys_BSGE)).tolist()
        self.places = (flat_M % length).split(self.counts)

    def mix(self, queries_MQE: Tensor, hanging: Sequence[Sequence[Tensor]]) -> Tensor:
        """Attention [M,Q,E] to the prefix and to the hanging rows, whose keys and values are
        [M,G,E] each.
        """
        # Training rows are sorted by sequence, so each sequence's attention is one call.
        own_keys, own_values = ([pair[i].split(self.counts) for pair in hanging] for i in (0, 1))
        parts = [
            attention_in_parts(
                queries,
                self.keys[b],
                self.values[b],
                partial(self.visible, b),
                self.places[b],
                [keys[b] for keys in own_keys],
                [values[b] for values in own_values],
            )
            for b, queries in enumerate(queries_MQE.split(self.counts))
        ]
        return torch.cat(parts)


def _looked_up(visible: Visible | Tensor, length: int | None) -> tuple[Visible, int]:
    """A mask as a function of sequence and places, and its length."""
    if isinstance(visible, Tensor):
        return lambda sequence, places_M: visible[sequence, places_M], visible.shape[1]
    assert length is not None, "a function does not say how long the text is"
    return visible, length


def attention_in_parts(
    queries_MQE: Tensor,
    keys_SGE: Tensor,
    values_SGE: Tensor,
    visible: Callable[[Tensor], Tensor],
    places_M: Tensor,
    own_keys_JMGE: list[Tensor],
    own_values_JMGE: list[Tensor],
) -> Tensor:
    """`hanging_attention` with at most `most_scores` in memory: longer inputs are cut into
    parts, whose scores are recomputed in the backward pass. `visible` gives the slots that rows at
    some places see.
    """
    count = max(1, most_scores(queries_MQE.device) // (queries_MQE.shape[1] * len(keys_SGE)))
    if len(queries_MQE) <= count:
        seen = visible(places_M)
        return hanging_attention(
            queries_MQE, keys_SGE, values_SGE, seen, own_keys_JMGE, own_values_JMGE
        )

    def of_part(
        queries: Tensor, keys: Tensor, values: Tensor, places: Tensor, *private: Any
    ) -> Tensor:
        return hanging_attention(queries, keys, values, visible(places), *private)

    parts = [slice(start, start + count) for start in range(0, len(queries_MQE), count)]
    return torch.cat(
        [
            recomputed(
                True,
                of_part,
                queries_MQE[part],
                keys_SGE,
                values_SGE,
                places_M[part],
                [keys[part] for keys in own_keys_JMGE],
                [values[part] for values in own_values_JMGE],
            )
            for part in parts
        ]
    )


def hanging_attention(
    queries_MQE: Tensor,
    keys_SGE: Tensor,
    values_SGE: Tensor,
    visible_MS: Tensor,
    own_keys_JMGE: list[Tensor],
    own_values_JMGE: list[Tensor],
) -> Tensor:
    """Attention of rows to the visible part of a common prefix and to J private rows each.

    queries [M,Q,E], keys and values [S,G,E], visible bool [M,S], own keys and values J times
    [M,G,E] -> [M,Q,E]. Queries and keys may be wider than values, whose size scales the scores.
    """
    rows, heads, wide = queries_MQE.shape
    size = values_SGE.shape[-1]
    length, groups = len(keys_SGE), keys_SGE.shape[1]
    # 1. Scores to the prefix; query heads share the keys of their group.
    queries = queries_MQE.view(rows, groups, heads // groups, wide) * size**-0.5
    scores = torch.einsum("mgre,sge->mgrs", queries, keys_SGE).masked_fill(
        ~visible_MS[:, None, None], -torch.inf
    )
    # 2. Scores to the J private rows, which are always visible.
    if own_keys_JMGE:
        own_scores = torch.stack(
            [(queries * keys[:, :, None]).sum(-1) for keys in own_keys_JMGE], dim=-1
        )
        scores = torch.cat([scores, own_scores], dim=-1)
    # 3. One softmax over both, and the values of both.
    weights = scores.softmax(-1)
    mixed = torch.einsum("mgrs,sge->mgre", weights[..., :length], values_SGE)
    for step, values in enumerate(own_values_JMGE):
        mixed = mixed + weights[..., length + step, None] * values[:, :, None]
    return mixed.reshape(rows, heads, size)
