"""A lower bound of a target call's time on this device, from the memory that it reads and its
arithmetic.

Shape legend: N rows of a call.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from modules.contracts.target import Target
from modules.runtime.phase_timer import now

_READ_BYTES = 1 << 28
_SQUARE = 1536


@dataclass(frozen=True)
class Roofline:
    """Measured limits of a device, and memory and arithmetic of a target.

    bytes_per_second: of a large read. flops_per_second: of a large matrix product. weight_bytes:
    read by every call.
    flops_per_row: of the linear layers, two per weight.
    """

    bytes_per_second: float
    flops_per_second: float
    weight_bytes: int
    flops_per_row: int

    def seconds(self, rows: int) -> float:
        """The least that a call of this many rows can take (roofline model, Williams et al.
        2009).
        """
        return max(
            self.weight_bytes / self.bytes_per_second,
            rows * self.flops_per_row / self.flops_per_second,
        )


@torch.no_grad()
def measure_roofline(target: Target, repeats: int = 7) -> Roofline:
    """Measure the device of `target` (best of `repeats`), and count bytes and operations of its
    linear layers and head.
    """
    # 1. Weights that a call reads: an embedding only if it is also the head.
    weights = [parameter for parameter in target.model.parameters() if parameter.dim() == 2]
    embedding = target.architecture.embedding.get_parameter("weight")
    head = target.architecture.head.weight
    read = [weight for weight in weights if weight is not embedding or embedding is head]
    elements = sum(weight.numel() for weight in read)
    # 2. Time a large read and a large product.
    large = torch.ones(_READ_BYTES // 4, device=target.device)
    square = torch.randn(_SQUARE, _SQUARE, device=target.device)
    return Roofline(
        bytes_per_second=_READ_BYTES / _best(lambda: large.sum(), target, repeats),
        flops_per_second=2 * _SQUARE**3 / _best(lambda: square @ square, target, repeats),
        weight_bytes=sum(weight.numel() * weight.element_size() for weight in read),
        flops_per_row=2 * elements,
    )


def _best(call: Callable[[], object], target: Target, repeats: int) -> float:
    taken = []
    for _ in range(repeats):
        began = now(target.device)
        call()
        taken.append(now(target.device) - began)
    return min(taken)
