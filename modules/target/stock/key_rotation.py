"""How a stock model turns queries and keys to their positions, and how to turn them to others.

Rotary positions turn pairs of numbers by angles that grow with the position, half a head apart.
Other layouts, and angles that depend on the length of the text, are refused: single tokens at the
first and the last position show what a model does.

Shape legend: B sequences, Q query heads, K key/value heads, D head size, F frequencies.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from modules.contracts.rows import Rows
from modules.target.kernels.attention_hook import LayerAttention

STEADY = ("default", "linear", "llama3", "yarn")
"""Kinds of rotary positions whose angles depend on nothing but the position."""
TOKENS = 4
"""Single tokens whose queries and keys are compared."""
TOLERANCES = {torch.float64: 1e-4, torch.float32: 1e-4}
"""Relative distance of keys that are turned as here; cosines have 32 bits."""
COARSE = 2e-2
"""The same at 16 bits."""

_PROVEN: WeakKeyDictionary[Any, KeyRotation] = WeakKeyDictionary()
"""Target -> how it turns them."""


@dataclass(frozen=True)
class KeyRotation:
    """Turns queries and keys of a model from one position to another.

    frequencies_F: float32, angle per position of each pair. layers: those that have positions.
    """

    frequencies_F: Tensor
    layers: frozenset[int]

    def turned(self, layer: int, vectors: Tensor, before: Tensor, after: Tensor) -> Tensor:
        """Queries or keys [..., D] of a layer, turned from positions to others.

        before, after: int64, of the vectors' leading dimensions or broadcast to them.
        """
        if layer not in self.layers:
            return vectors
        # 1. Cosine and sine of the difference of two angles, each as the model rounds it.
        (cos_before, sin_before), (cos_after, sin_after) = map(self._angles, (before, after))
        cosine = cos_after * cos_before + sin_after * sin_before
        sine = sin_after * cos_before - cos_after * sin_before
        # 2. Turn the pairs; other numbers have no position.
        size = 2 * len(self.frequencies_F)
        wide = vectors.float() if vectors.dtype.itemsize < 4 else vectors
        first, second = wide[..., :size].chunk(2, -1)
        parts = [first * cosine - second * sine, second * cosine + first * sine, wide[..., size:]]
        return torch.cat(parts, -1).to(vectors.dtype)

    def _angles(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Cosine and sine [..., F] at positions."""
        angles = positions[..., None].float() * self.frequencies_F.to(positions.device)
        return angles.cos(), angles.sin()


def key_rotation(target: Any) -> KeyRotation:
    """How a target turns queries and keys, shown once; its attention takes hooks.

    Raises:
        ValueError: it does so in another way, or has no rotary positions.
    """
    if target not in _PROVEN:
        _PROVEN[target] = _proven(target)
    return _PROVEN[target]


@torch.no_grad()
def _proven(target: Any) -> KeyRotation:
    rotation = KeyRotation(_frequencies(target), frozenset(range(target.shape.num_layers)))
    # 1. Single tokens, whose states are the same wherever they stand.
    place = target.max_positions - 1
    near, far = (torch.tensor(p, device=target.device) for p in (0, place))
    turned = set()
    # 2. Some layers may have no positions; others must turn as here.
    for layer, vectors in _vectors(target, place).items():
        first, second = vectors.chunk(2)
        if _close(first, second):
            continue
        if not _close(rotation.turned(layer, first, near, far), second):
            raise _refusal(target, f"layer {layer} turns them in another way")
        turned.add(layer)
    if not turned:
        raise _refusal(target, "no layer turns them")
    return KeyRotation(rotation.frequencies_F, frozenset(turned))


def _frequencies(target: Any) -> Tensor:
    """The frequencies of all layers, float32 [F]."""
    kind = target.shape.rope.get("rope_type", "default")
    if kind not in STEADY:
        raise _refusal(target, f"angles of kind {kind!r} may change with the length")
    parts = (getattr(module, "inv_freq", None) for module in target.model.modules())
    tables = [part.float() for part in parts if isinstance(part, Tensor)]
    if not tables or not all(torch.equal(tables[0], table) for table in tables[1:]):
        raise _refusal(target, "its layers do not share one table of frequencies")
    return tables[0]


def _vectors(target: Any, place: int) -> dict[int, Tensor]:
    """Queries and keys [B,Q+K,D] of every layer, of tokens alone at position 0, then of the same
    at `place`.
    """
    vectors: dict[int, Tensor] = {}

    def watched(attention: LayerAttention) -> Tensor:
        both = torch.cat([attention.query_BQND[:, :, 0], attention.key_BKSD[:, :, 0]], 1)
        vectors[attention.layer] = both.to(target.device)
        return attention.stock()

    # 1. Each token twice.
    ids = torch.arange(TOKENS, device=target.device) * (target.shape.vocab_size // TOKENS)
    positions = torch.tensor([0, place], device=target.device).repeat_interleave(TOKENS)[:, None]
    visible = torch.ones_like(positions, dtype=torch.bool)[..., None]
    # 2. As sequences of their own.
    session = target.open(2 * TOKENS, 1)
    session.attend_by(watched)
    session.read(ids.repeat(2)[:, None], Rows(positions, visible))
    return vectors


def _close(ours: Tensor, theirs: Tensor) -> bool:
    limit = TOLERANCES.get(ours.dtype, COARSE)
    return bool((ours - theirs).double().norm() <= limit * theirs.double().norm())


def _refusal(target: Any, reason: str) -> ValueError:
    return ValueError(
        f"positions: queries and keys of {target.name!r} cannot be turned to other positions, "
        f"{reason}: use original, or another target"
    )
