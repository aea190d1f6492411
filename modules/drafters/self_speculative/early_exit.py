"""Decoding with M2R2's gates alone: a token leaves at the first gate whose router is sure enough
(Bhendawade et al. 2025, arXiv 2502.02040, `dynamic computing`). Lossy.

The slow stream of a token that has left is missing in the layers above. It is completed lazily: a
later token that goes further takes all tokens that wait there with it, in one call. Keys and values
are then those of the whole model on the same text.

Shape legend: N rows since the last commit, M rows that wait at an interval, H hidden size, V
vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from modules.contracts.drafter import Drafter
from modules.contracts.rows import Rows
from modules.contracts.shapes import StateName
from modules.contracts.token_tree import TokenTree
from modules.contracts.verification import Accepted, Verified
from modules.decoding.loop import Trace
from modules.drafters.heads.base import refuse_unknown
from modules.drafters.self_speculative.lossy import PartialDecoder
from modules.drafters.self_speculative.m2r2 import M2R2
from modules.target.kv_cache import SlotCache
from modules.target.session import Session
from modules.target.target import Target

RouterName = Literal["arla", "max_probability", "cosine"]


class EarlyExitSession(Session):
    """One sequence whose tokens may leave at a gate.

    Args:
        target: whose layers run.
        cache: keys and values of the sequence.
        decoder: which says where tokens leave.

    waiting: of every interval, states [1,M,H] of the last rows, which it has not run.
    exits: the layer at which each token left.
    """

    def __init__(self, target: Any, cache: SlotCache, decoder: EarlyExitDecoder) -> None:
        super().__init__(target, cache)
        self.decoder, self.exits = decoder, list[int]()
        self.intervals = list(pairwise([0, *decoder.gates]))
        self._forget()

    def _forget(self) -> None:
        """No row is left that is not committed."""
        self.count, self.complete = 0, False
        self.waiting: list[Tensor | None] = [None] * len(self.intervals)

    def prefill(
        self, ids_BT: Tensor, lengths_B: Tensor, states: Sequence[StateName] = ()
    ) -> tuple[Tensor, dict[StateName, Tensor]]:
        """Read the prompt through all layers."""
        self.exits.append(self.target.shape.num_layers)
        return super().prefill(ids_BT, lengths_B, states)

    @torch.no_grad()
    def verify(self, tree: TokenTree, states: Sequence[StateName] = ()) -> Verified:
        """Logits [1,1,V] after the newest token, from the gate where it leaves."""
        assert tree.tokens_BN.shape == (1, 1) and not states, "one token of one sequence at a time"
        self.count += 1
        hidden = self.target.embed(tree.tokens_BN)
        for gate, (start, stop) in enumerate(self.intervals):
            # 1. All rows that wait for this interval run it.
            before = self.waiting[gate]
            hidden = hidden if before is None else torch.cat([before, hidden], dim=1)
            self.waiting[gate] = None
            rows = self._last_rows(hidden.shape[1])
            if stop == self.target.shape.num_layers:
                final = self.run_layers(rows, hidden, start, stop, ("final",))["final"]
                logits, self.complete = self.target.logits(final[:, -1:]), True
                break
            hidden, reached = self.decoder.interval(self, rows, hidden, gate)
            logits = self.target.logits(self.target.final_norm(reached[-1]))
            # 2. Leave here, or go on.
            if self.decoder.confidence(gate, reached, logits) > self.decoder.threshold:
                later = self.waiting[gate + 1]
                self.waiting[gate + 1] = (
                    hidden if later is None else torch.cat([later, hidden], dim=1)
                )
                break
        self.exits.append(stop)
        return Verified(tree, logits)

    def _last_rows(self, count: int) -> Rows:
        """The last `count` rows since the last commit; each sees all rows before it."""
        order = torch.arange(self.count, device=self.target.device)
        last = order[self.count - count :]
        positions = self.lengths_B[:, None] + last
        return self._inside(Rows(positions, (last[:, None] >= order)[None]))

    def commit(self, accepted: Accepted) -> None:
        """Commit all rows once they have run all layers; until then they wait."""
        if self.complete:
            order = torch.arange(self.count, device=accepted.next_B.device)[None]
            counts_B = torch.full_like(accepted.lengths_B, self.count)
            self.cache.commit(Accepted(order, counts_B, accepted.next_B))
            self._forget()


class EarlyExitDecoder(PartialDecoder):
    """Decodes one prompt at a time; a token leaves at the first gate whose confidence is above the
    threshold, and at the last layer at the latest.

    Args:
        target: the model that M2R2 was trained on.
        drafter: the trained M2R2.
        threshold: in [0, 1]; at 1 no token leaves early.
        router: `arla`, the trained routers; `max_probability`, the largest probability at the gate
            (as CALM, Schuster et al. 2022, arXiv 2207.07061); `cosine`, that of the last two states
            before the gate.
        accelerated: whether gates read the accelerated stream; False is the plain logit lens, at
            the same gates, for comparison.

    Raises:
        ValueError: another kind of drafter, a threshold out of range, or the trained routers
            without the stream that they were trained on.
    """

    name = "early_exit"
    batched: ClassVar[bool] = False

    def __init__(
        self,
        target: Target,
        drafter: Drafter,
        threshold: float = 0.8,
        router: RouterName = "arla",
        accelerated: bool = True,
    ) -> None:
        super().__init__(target, drafter)
        # 1. Check the settings.
        refuse_unknown("router", router, ("arla", "max_probability", "cosine"))
        if not isinstance(drafter, M2R2):
            raise ValueError(
                f"drafter is a {type(drafter).__name__}, which has no gates: give a run of "
                "m2r2.yaml"
            )
        if not 0 <= threshold <= 1:
            raise ValueError(f"threshold must lie in [0, 1], got {threshold}")
        if router == "arla" and not accelerated:
            raise ValueError(
                "router arla reads the accelerated stream: use max_probability or cosine with "
                "accelerated: false"
            )
        # 2. What the gates read.
        self.gated, self.threshold, self.router = drafter, threshold, router
        self.accelerated = accelerated
        self._session: EarlyExitSession | None = None

    @property
    def gates(self) -> list[int]:
        """Layers of the gates, the last one included."""
        return self.gated.stream.gates

    def model(self) -> Any:
        """The target, whose layers all run in the end."""
        return self.target

    def opened(self, batch_size: int, capacity: int) -> EarlyExitSession:
        """A new sequence. ValueError: several."""
        if batch_size != 1:
            raise ValueError(
                f"{self.name} decodes one prompt at a time: set batch_size to 1 or leave it out"
            )
        layers = self.target.shape.num_layers
        self._session = EarlyExitSession(self.target, SlotCache(layers, 1, capacity), self)
        return self._session

    def layers_of(self, traces: Sequence[Trace]) -> list[list[int]]:
        """The layer that each token of the last answer left at. Layers that were completed later
        are not counted.
        """
        assert self._session is not None and len(traces) == 1
        return [self._session.exits[: len(traces[0].ids)]]

    def interval(
        self, session: Session, rows: Rows, hidden_1MH: Tensor, gate: int
    ) -> tuple[Tensor, list[Tensor]]:
        """The slow stream of all rows behind an interval, and the states of the newest one that
        lead to its gate.
        """
        start, stop = self.gated.stream.intervals[gate]
        if self.accelerated:
            return self.gated.stream.decoded(session, rows, hidden_1MH, 1, start, stop)
        names = (*range(start + 1, stop), "pre_norm")
        states = session.run_layers(rows, hidden_1MH, start, stop, names)
        inside = [hidden_1MH, *(states[name] for name in names)]
        return states["pre_norm"], [state[:, -1:] for state in inside]

    def confidence(self, gate: int, reached: Sequence[Tensor], logits_11V: Tensor) -> float:
        """How sure a gate is of its token, from the states [1,1,H] that lead to it."""
        if self.router == "max_probability":
            return float(logits_11V.softmax(-1).max())
        if self.router == "cosine":
            return float(F.cosine_similarity(reached[-2], reached[-1], dim=-1))
        states_J = torch.cat(list(reached), dim=1)
        return float(self.gated.routers[gate](states_J).sigmoid())
