"""The target drafts for itself, with the first and the newest slots of its KV cache alone. The
drafter takes no line outside of this file.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor

from modules.contracts.drafter import Context, Drafter, DraftState, Frontier, ProposalRows
from modules.contracts.losses import Losses
from modules.contracts.sampling import Sampling
from modules.contracts.shapes import TargetShape
from modules.decoding.decoder import SpeculativeDecoder
from modules.trees.sampled.branching import DrawnTree
from modules.trees.static import StaticTree
from tests.fakes import tiny_target
from tests.modules.conformance import check_decoding
from tests.modules.sampling import goodness, small_target


@dataclass
class SparseState(DraftState):
    """With the rows of this proposal."""

    rows: ProposalRows


class SparseTarget(Drafter):
    """Reads `sinks` first and `window` newest committed slots."""

    builder = StaticTree.chain(3)

    def __init__(self, shape: TargetShape, sinks: int = 1, window: int = 2) -> None:
        super().__init__()
        self.sinks, self.window = sinks, window

    def compatibility(self, target: Any) -> str | None:
        return None

    def loss(self, batch: Any, target: Any, progress: float) -> Losses:
        raise ValueError("there is nothing to train")

    def start(self, context: Context) -> SparseState:
        none = ProposalRows.none(context.newest_B)
        return SparseState(context, context.newest_B, context.lengths_B, none)

    def slots(self, lengths_B: Tensor) -> Tensor:
        first = torch.arange(self.sinks).expand(len(lengths_B), -1)
        newest = lengths_B[:, None] - 1 - torch.arange(self.window)
        newest = torch.where(newest < self.sinks, -1, newest)
        return torch.cat([torch.where(first < lengths_B[:, None], first, -1), newest], 1)

    def expand(self, state: DraftState, frontier: Frontier) -> Tensor:
        assert isinstance(state, SparseState)
        session, tokens = state.context.session, frontier.tokens_BW
        assert session is not None
        state.rows = state.rows.add(frontier)
        rows = state.rows.newest(frontier, session.lengths_B)
        rows = replace(rows, committed_BS=self.slots(session.lengths_B))
        return state.context.target.logits(session.read(tokens, rows))


def sparse(target: Any) -> SparseTarget:
    return SparseTarget(target.shape).eval()


def test_it_passes_what_conformance_checks() -> None:
    check_decoding(sparse)


@pytest.mark.parametrize("sampling", [Sampling(1.0), Sampling(0.7, top_p=0.9)], ids=["1", "warped"])
def test_drawn_trees_keep_the_targets_distribution(sampling: Sampling) -> None:
    target = small_target()
    builder = DrawnTree([(0,), (1,), (0, 0)])
    decoder = SpeculativeDecoder(target, sparse(target), builder=builder, stop_ids=frozenset())
    assert goodness(decoder, [3, 1], sampling, runs=1500) > 1e-4


def test_a_window_over_all_slots_drafts_what_the_target_says() -> None:
    """And a window of one slot does not."""
    target = tiny_target()
    found = []
    for window in (64, 1):
        drafter = SparseTarget(target.shape, sinks=1, window=window)
        traces = SpeculativeDecoder(target, drafter).decode([[7, 8, 9, 10, 11]], Sampling(), 24)
        found.append(traces[0].accepted)
    assert found[0] == [4, 4, 4, 4, 4, 3] and sum(found[1]) == 23 and max(found[1]) < 4
