"""Decoding with a part of the layers: what the lossy decoders of this folder share.

They decode as plain decoding does, through sessions that run fewer layers for a token.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, cast

from modules.contracts.drafter import Drafter, Part
from modules.contracts.sampling import Sampling
from modules.contracts.target import Session
from modules.decoding.decoder import SpeculativeDecoder
from modules.decoding.loop import Trace
from modules.target.target import Target


class OpensAs:
    """A target whose sequences are opened by another function; all else is the target's.

    max_positions: tokens that such sequences may have; None: as many as the target's.
    """

    def __init__(self, target: Any, opened: Any, max_positions: int | None = None) -> None:
        self._target, self.open = target, opened
        self.max_positions = target.max_positions if max_positions is None else max_positions

    def __getattr__(self, name: str) -> Any:
        """What the target has under this name."""
        return getattr(self._target, name)


class PartialDecoder(ABC):
    """Base of decoders that leave out layers and verify nothing. Subclasses define `opened` and
    `layers_of`.

    Args:
        target: the model that the drafter was trained for.
        drafter: the trained component.
    """

    name: str
    claims_lossless: ClassVar[bool] = False

    def __init__(self, target: Target, drafter: Drafter) -> None:
        self.target, self.drafter = target, drafter

    @abstractmethod
    def model(self) -> Any:
        """The model whose layers run."""

    @abstractmethod
    def opened(self, batch_size: int, capacity: int) -> Session:
        """New sequences that run fewer layers."""

    @abstractmethod
    def layers_of(self, traces: Sequence[Trace]) -> list[list[int]]:
        """Layers that ran before each token of these answers, which were decoded last."""

    def parts(self) -> Mapping[str, Part]:
        """The trained component, for reports."""
        return {"drafter": self.drafter}

    def decode(self, prompts: list[list[int]], sampling: Sampling, limit: int) -> list[Trace]:
        """Continue every prompt by at most `limit` tokens, as one batch."""
        target = cast(Any, OpensAs(self.model(), self.opened))
        decoder = SpeculativeDecoder(target, name=self.name, stop_ids=self.target.eos_ids)
        traces = decoder.decode(prompts, sampling, limit)
        for trace, layers in zip(traces, self.layers_of(traces), strict=True):
            trace.layers = layers
        return traces

    def quality_of(self, traces: Sequence[Trace]) -> dict[str, float]:
        """Figures of these answers for a report: `layers_per_token`, and `nominal_speedup`, all
        layers of the target over that. Layers are not seconds: LM head, drafting and small calls
        are left out. The first token of an answer comes from the prompt and is not counted.
        """
        layers = [count for trace in traces for count in trace.layers[1:]]
        if not layers:
            return {}
        mean = sum(layers) / len(layers)
        nominal = self.target.shape.num_layers / mean
        return {"layers_per_token": mean, "nominal_speedup": nominal}
