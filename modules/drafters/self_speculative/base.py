"""What drafters made of the target's own layers share: the target's first layers draft, all layers
verify, and both use one KV cache.

The first layers of a drafted row run once. Their outputs are handed over with the tree, and
verification runs the other layers (`TokenTree.with_run_rows`). What a drafter writes at later
layers is overwritten there.

Shape legend: B sequences, W frontier nodes, M rows of a proposal, H hidden size, D draft
vocabulary.
"""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

from modules.contracts.drafter import Context, DraftState, Frontier, ProposalRows
from modules.contracts.rows import Rows
from modules.contracts.target import Session
from modules.contracts.token_tree import TokenTree
from modules.contracts.verification import Accepted, Verified
from modules.drafters.trained import TrainedDrafter


@dataclass
class SelfState(DraftState):
    """State of a proposal that the target's own layers draft.

    rows: those that have run. hidden_BMH: their states behind the shared layers.
    """

    rows: ProposalRows
    hidden_BMH: Tensor

    @property
    def session(self) -> Session:
        """The target's open sequences."""
        assert self.context.session is not None, "the target's session is needed to draft"
        return self.context.session

    def cleared(self) -> None:
        """Drop the rows of the last proposal."""
        self.rows = ProposalRows.none(self.newest_B)
        self.hidden_BMH = self.hidden_BMH[:, :0]


class SelfSpeculative(TrainedDrafter):
    """Base of drafters that run layers of their target over drafted rows, in its KV cache.

    Subclasses define `shared_layers` and `run`.
    """

    @property
    @abstractmethod
    def shared_layers(self) -> int:
        """How many of the first layers drafting runs just as verification does."""

    @abstractmethod
    def run(self, state: SelfState, rows: Rows, embeddings_BWH: Tensor) -> tuple[Tensor, Tensor]:
        """States [B,W,H] of the newest rows behind the shared layers, and the LM head's inputs
        [B,W,H] after them.

        Args:
            state: with these rows in its proposal.
            rows: the newest ones.
            embeddings_BWH: their inputs of the first layer.
        """

    def start(self, context: Context) -> DraftState:
        """State without a proposal."""
        target, newest_B = context.target, context.newest_B
        nothing = torch.zeros(
            len(newest_B), 0, target.shape.hidden_size, dtype=target.dtype, device=newest_B.device
        )
        rows = ProposalRows.none(newest_B)
        return SelfState(context, newest_B, context.lengths_B, rows, nothing)

    @torch.no_grad()
    def expand(self, state: DraftState, frontier: Frontier) -> Tensor:
        """Logits [B,W,D] of the token after each frontier node."""
        assert isinstance(state, SelfState)
        if frontier.depth == 0:
            state.cleared()
        target, session = state.context.target, state.session
        # 1. The newest rows see those that they descend from.
        state.rows = state.rows.add(frontier)
        rows = state.rows.newest(frontier, session.lengths_B)
        session.reserve(rows.visible_BNJ.shape[2])
        # 2. The shared layers' states are kept for verification.
        reached, final = self.run(state, rows, target.embed(frontier.tokens_BW))
        state.hidden_BMH = torch.cat([state.hidden_BMH, reached], dim=1)
        return self.head(frontier.depth, target)(final)

    def prepare(self, state: DraftState, tree: TokenTree) -> TokenTree:
        """The tree with the rows whose shared layers have run."""
        assert isinstance(state, SelfState)
        rows = state.rows
        return tree.with_run_rows(
            rows.tokens_BM, rows.parents_BM, state.hidden_BMH, self.shared_layers
        )

    def absorb(self, state: DraftState, verified: Verified, accepted: Accepted) -> DraftState:
        """State after a verification, without a proposal."""
        after = super().absorb(state, verified, accepted)
        assert isinstance(after, SelfState)
        after.cleared()
        return after
