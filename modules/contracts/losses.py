"""What a loss gives: a scalar to minimise, and metrics that average over processes."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

from torch import Tensor


class Mean(NamedTuple):
    """A metric that averages correctly over batches and ranks: sum and count, both scalars."""

    total: Tensor
    count: Tensor


@dataclass(frozen=True)
class Losses:
    """What one batch gives: the scalar to minimise and the metrics to log (detached)."""

    total: Tensor
    metrics: dict[str, Mean] = field(default_factory=dict)
