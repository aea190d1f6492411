"""How good the gates of an accelerated stream are, on held-out text.

Shape legend: B sequences, T tokens of a packed row, M rows that predict an assistant token, H
hidden size.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional as F

from modules.contracts.trainable import TrainingResult
from modules.drafters.self_speculative.accelerated import GateLabels, Streams

if TYPE_CHECKING:
    from modules.contracts.target import Target

BINS = 10
"""Of equal width, of an expected calibration error."""
PAGE = "gates.md"


def calibration_error(probability_M: Tensor, right_M: Tensor, bins: int = BINS) -> float:
    """Expected calibration error: the mean over all rows of |share right − mean probability| of
    the bin that a row's probability is in (Guo et al. 2017, arXiv 1706.04599).
    """
    if not len(probability_M):
        return 0.0
    bin_M = (probability_M * bins).long().clamp(max=bins - 1)
    gaps = torch.zeros(bins, dtype=torch.float64)
    gaps.index_add_(0, bin_M.cpu(), (right_M.double() - probability_M.double()).cpu())
    return float(gaps.abs().sum()) / len(probability_M)


@dataclass
class GateReport:
    """Sums over batches.

    gates: layers of the gates, the target's last one included.
    """

    gates: Sequence[int]
    _probabilities: dict[int, list[Tensor]] = field(default_factory=dict)
    _right: dict[int, list[Tensor]] = field(default_factory=dict)
    _layers: dict[tuple[str, int], list[float]] = field(default_factory=dict)
    """(stream, layer) -> cosine to the last layer, agreement, rows."""

    def add_routed(self, gate: int, probability_M: Tensor, right_M: Tensor) -> None:
        """Add a router's probabilities, and whether the gate's token was the target's."""
        self._probabilities.setdefault(gate, []).append(probability_M)
        self._right.setdefault(gate, []).append(right_M)

    def add_layers(self, streams: Streams, labels: GateLabels, target: Target) -> None:
        """Add both streams of a batch, layer by layer."""
        for (start, stop), states in zip(
            pairwise([0, *self.gates[:-1]]), streams.accelerated, strict=True
        ):
            for layer in range(start + 1, stop + 1):
                self._add("accelerated", layer, states[layer - start], labels, target)
                self._add("slow", layer, streams.slow[layer], labels, target)

    def _add(
        self, stream: str, layer: int, states_BTH: Tensor, labels: GateLabels, target: Target
    ) -> None:
        states_MH = states_BTH.flatten(0, 1)[labels.flat_M]
        cosines = F.cosine_similarity(states_MH.float(), labels.last_MH.float(), dim=-1)
        sums = self._layers.setdefault((stream, layer), [0.0, 0.0, 0.0])
        added = (cosines.sum(), labels.agrees(states_MH, target).sum(), len(cosines))
        self._layers[stream, layer] = [
            total + float(more) for total, more in zip(sums, added, strict=True)
        ]

    def result(self) -> TrainingResult:
        """Figures of every gate below the last layer, and a page of all layers."""
        figures = {}
        for gate, layer in enumerate(self.gates[:-1]):
            if gate not in self._right:
                continue
            probability_M = torch.cat(self._probabilities[gate])
            right_M = torch.cat(self._right[gate])
            figures[f"held_out/agreement_{layer}"] = float(right_M.double().mean())
            figures[f"held_out/lens_agreement_{layer}"] = self._mean("slow", layer, 1)
            figures[f"held_out/calibration_error_{layer}"] = calibration_error(
                probability_M, right_M
            )
        return TrainingResult(figures, {PAGE: self._page()})

    def _mean(self, stream: str, layer: int, place: int) -> float:
        sums = self._layers[stream, layer]
        return sums[place] / max(1.0, sums[2])

    def _page(self) -> str:
        """A table of cosines and agreement by layer."""
        rows = [
            f"| {layer}{' (gate)' if layer in self.gates else ''} | "
            + " | ".join(
                f"{self._mean(stream, layer, place):.3f}"
                for place in (0, 1)
                for stream in ("slow", "accelerated")
            )
            + " |"
            for stream, layer in self._layers
            if stream == "slow"
        ]
        return "\n".join(
            [
                "# Both streams, layer by layer, on held-out text",
                "",
                "Cosine to the last layer's state, and how often the best token behind the frozen",
                "norm and LM head is the target's.",
                "",
                "| layer | cosine, slow | cosine, accelerated | agreement, slow | agreement, "
                "accelerated |",
                "|---|---:|---:|---:|---:|",
                *rows,
                "",
            ]
        )
