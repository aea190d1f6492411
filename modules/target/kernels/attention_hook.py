"""Another attention in place of the model's, for the calls of one session.

The attention that Hugging Face's interface finds for a model
(`modules.target.kernels.cpu_kernels.grouped_attention`) hands its inputs to the hook, if one is
set. No module and no config of the model changes, and other threads keep the model's attention.

Shape legend: B sequences, Q query heads, K key/value heads, N rows of one call, S attended slots, D
head size.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class LayerAttention:
    """The inputs of one layer's attention.

    layer: its index. query_BQND: after the rotation. key_BKSD, value_BKSD: of all slots that the
    call may read. mask_BNS: additive, [B,1,N,S]. scaling: of the scores. window:
    positions that the layer reaches back, if it has a sliding window. stock: computes the model's
    own attention [B,N,Q,D].
    """

    layer: int
    query_BQND: Tensor
    key_BKSD: Tensor
    value_BKSD: Tensor
    mask_BNS: Tensor
    scaling: float
    window: int | None
    stock: Callable[[], Tensor]


AttentionHook = Callable[[LayerAttention], Tensor]
"""A layer's inputs -> its output [B,N,Q,D]."""

_HOOK: ContextVar[AttentionHook | None] = ContextVar("attention_hook", default=None)


@contextmanager
def attending(hook: AttentionHook | None) -> Iterator[None]:
    """While the block lasts, layers that this thread runs attend by `hook`; None: as the model
    does.
    """
    token = _HOOK.set(hook)
    try:
        yield
    finally:
        _HOOK.reset(token)


def current_hook() -> AttentionHook | None:
    """The hook that is set; None inside of compiled calls, which have none."""
    return None if torch.compiler.is_compiling() else _HOOK.get()
