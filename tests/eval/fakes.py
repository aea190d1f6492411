"""Decoders with known behaviour: always right, never right in its drafts, and one that lies about
the tokens.
"""

from __future__ import annotations

import time
from dataclasses import replace

from modules.contracts.sampling import Sampling
from modules.decoding.decoder import SpeculativeDecoder, Trace
from modules.target.target import Target


class Replay:
    """The target's own tokens, told as if `per_call` of them came from each call that took 0.1
    s.
    """

    engine, name = "fake", "replay"

    def __init_subclass__(cls) -> None:
        cls.name = cls.__name__.lower()

    def __init__(self, target: Target, per_call: int = 1, depth: int | None = None) -> None:
        self.target, self.per_call = target, per_call
        self.depth = per_call - 1 if depth is None else depth

    def decode(self, prompts: list[list[int]], sampling: Sampling, limit: int) -> list[Trace]:
        return [
            self.tell(trace)
            for trace in SpeculativeDecoder(self.target).decode(prompts, sampling, limit)
        ]

    def tell(self, trace: Trace) -> Trace:
        calls = -(-(len(trace.ids) - 1) // self.per_call)
        drafted = [i % self.per_call != 0 for i in range(len(trace.ids))]
        seconds = {
            "prefill": 0.5,
            "draft": 0.02 * calls,
            "verify": 0.08 * calls,
            "accept": 0.0,
            "commit": 0.0,
        }
        return replace(
            trace,
            drafted=drafted,
            accepted=[self.per_call] * calls,
            offered=[self.depth] * calls,
            nodes=[self.depth] * calls,
            rows=[self.depth + 1] * calls,
            seconds={**seconds, "other": 0.0},
            time_to_first_token=0.5,
        )


class AlwaysRight(Replay):
    """Four tokens per call."""

    def __init__(self, target: Target) -> None:
        super().__init__(target, per_call=4)


class NeverRight(Replay):
    """Three drafts per call, none accepted."""

    def __init__(self, target: Target) -> None:
        super().__init__(target, per_call=1, depth=3)


class Slow(Replay):
    """Takes a second for an answer."""

    def tell(self, trace: Trace) -> Trace:
        time.sleep(1.0)
        return super().tell(trace)


class Liar(Replay):
    """Claims to be lossless, and changes one token of each answer."""

    def tell(self, trace: Trace) -> Trace:
        ids = list(trace.ids)
        ids[len(ids) // 2] = (ids[len(ids) // 2] + 7) % 60 + 5
        return super().tell(replace(trace, ids=ids))


class HonestlyLossy(Liar):
    """The same, but it says so."""

    claims_lossless = False


class Truncator(Replay):
    """Stops one token early: a prefix is not the same answer."""

    def tell(self, trace: Trace) -> Trace:
        return super().tell(replace(trace, ids=trace.ids[:-1], drafted=trace.drafted[:-1]))
