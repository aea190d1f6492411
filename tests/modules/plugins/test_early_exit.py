"""A drafter made of the target's own first layers, which hands its rows over to the verification.
The drafter takes no line outside of this file.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from modules.contracts.batches import TextBatch
from modules.contracts.drafter import Context, Drafter, DraftState, Frontier, ProposalRows
from modules.contracts.losses import Losses
from modules.contracts.rows import Rows
from modules.contracts.sampling import Sampling
from modules.contracts.shapes import TargetShape
from modules.contracts.token_tree import TokenTree
from modules.decoding.decoder import SpeculativeDecoder
from modules.losses.chunked import masked_mean
from modules.target.session import Session
from modules.trees.sampled.branching import DrawnTree
from modules.trees.static import StaticTree
from tests.fakes import tiny_target
from tests.modules.conformance import check_decoding, check_gradients, check_loss, check_no_labels
from tests.modules.sampling import goodness, small_target

LAYER = 1


@dataclass
class ExitState(DraftState):
    """With the rows of this proposal that have run, and their states."""

    rows: ProposalRows
    hidden_BMH: Tensor


class EarlyExit(Drafter):
    """Logits of a linear map of the hidden states behind the target's first layers."""

    builder = StaticTree.chain(3)
    training_states = (LAYER,)

    def __init__(self, shape: TargetShape) -> None:
        super().__init__()
        size = shape.hidden_size
        self.map = nn.Parameter(torch.eye(size) + 0.1 * torch.randn(size, size))

    def compatibility(self, target: Any) -> str | None:
        return None

    def loss(self, batch: TextBatch, target: Any, progress: float) -> Losses:
        hidden = target.final_norm(batch.states[LAYER][:, :-1] @ self.map)
        losses = F.cross_entropy(target.logits(hidden).mT, batch.input_ids[:, 1:], reduction="none")
        return Losses(masked_mean(losses.flatten(), batch.loss_mask[:, 1:].flatten()))

    def start(self, context: Context) -> ExitState:
        nothing = torch.zeros(len(context.newest_B), 0, len(self.map), dtype=context.target.dtype)
        rows = ProposalRows.none(context.newest_B)
        return ExitState(context, context.newest_B, context.lengths_B, rows, nothing)

    def expand(self, state: DraftState, frontier: Frontier) -> Tensor:
        assert isinstance(state, ExitState)
        session, target = state.context.session, state.context.target
        assert session is not None
        state.rows = state.rows.add(frontier)
        rows = state.rows.newest(frontier, session.lengths_B)
        embeddings = target.embed(frontier.tokens_BW)
        hidden = session.run_layers(rows, embeddings, 0, LAYER)["pre_norm"]
        earlier = state.hidden_BMH if frontier.depth else state.hidden_BMH[:, :0]
        state.hidden_BMH = torch.cat([earlier, hidden], 1)
        return target.logits(target.final_norm(hidden.to(self.map.dtype) @ self.map))

    def prepare(self, state: DraftState, tree: TokenTree) -> TokenTree:
        assert isinstance(state, ExitState)
        return tree.with_run_rows(
            state.rows.tokens_BM, state.rows.parents_BM, state.hidden_BMH, LAYER
        )


def early_exit(target: Any) -> EarlyExit:
    torch.manual_seed(3)
    return EarlyExit(target.shape).double().eval()


def test_it_passes_what_conformance_checks() -> None:
    target = tiny_target()
    check_decoding(early_exit)
    for check in (check_loss, check_gradients, check_no_labels):
        check(early_exit(target), target)


@pytest.mark.parametrize("sampling", [Sampling(1.0), Sampling(0.7, top_p=0.9)], ids=["1", "warped"])
def test_drawn_trees_keep_the_targets_distribution(sampling: Sampling) -> None:
    target = small_target()
    builder = DrawnTree([(0,), (1,), (0, 0)])
    drafter = early_exit(target)
    decoder = SpeculativeDecoder(target, drafter, builder=builder, stop_ids=frozenset())
    assert goodness(decoder, [3, 1], sampling, runs=1500) > 1e-4


def test_no_row_runs_a_layer_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a chain of four nodes the last alone is new to the first layer when it is verified."""
    target, calls = tiny_target(), []
    run_layers = Session.run_layers

    def record(self: Session, rows: Rows, hidden: Tensor, start: int, stop: int, *more: Any) -> Any:
        calls.append((hidden.shape[1], start, stop))
        return run_layers(self, rows, hidden, start, stop, *more)

    monkeypatch.setattr(Session, "run_layers", record)
    SpeculativeDecoder(target, early_exit(target)).decode([[7, 8, 9]], Sampling(), 2)
    assert calls[:5] == [(1, 0, 1), (1, 0, 1), (1, 0, 1), (1, 0, 1), (4, 1, 2)]
