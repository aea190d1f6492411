"""The target drafts for itself with a part of its KV cache, and verifies with all of it: lossless
at any policy of `modules.sparse_kv`.

Drafted rows write keys and values after the committed ones; verification computes them anew, from
all slots. Its own scores choose the slots that the next drafts read (`refresh: verification`; the
order of TriForce, Sun et al. 2024, arXiv 2404.11912), or every drafted row chooses for itself, as a
lossy target would (`refresh: draft`).

Shape legend: B sequences, W frontier nodes, V vocabulary, T prompt tokens, O observed tokens.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from modules.contracts.drafter import Context, Drafter, DraftState, Frontier, ProposalRows
from modules.contracts.losses import Losses
from modules.contracts.shapes import TargetShape
from modules.contracts.target import Session, Target
from modules.contracts.token_tree import TokenTree
from modules.contracts.verification import Accepted, Verified
from modules.sparse_kv.policy import Policy
from modules.sparse_kv.reader import Phase, SparseReader
from modules.sparse_kv.session import check_hooked
from modules.trees.sampled.chain import SampledChain


@dataclass
class SparseState(DraftState):
    """With the rows of this proposal, and the reader of the target's KV cache."""

    rows: ProposalRows
    reader: SparseReader

    @property
    def session(self) -> Session:
        """The target's open sequences."""
        assert self.context.session is not None, "the target's session is needed to draft"
        return self.context.session


class SparseKVDrafter(Drafter):
    """Drafts a chain with the slots that a policy chooses.

    Args:
        shape: the target's dimensions.
        policy: which slots drafts read.
        steps: γ, drafted tokens.
        refresh: `verification`, whose newest accepted row chooses for all drafts after it, or
            `draft`, where every drafted row chooses.

    Raises:
        ValueError: no step, or an unknown `refresh`.
    """

    def __init__(
        self,
        shape: TargetShape,
        policy: Policy,
        steps: int = 4,
        refresh: Literal["verification", "draft"] = "verification",
    ) -> None:
        super().__init__()
        if refresh not in ("verification", "draft"):
            raise ValueError(f"refresh {refresh!r} is unknown: use verification or draft")
        self._builder = SampledChain(steps)
        self.policy, self.steps, self.refresh = policy, steps, refresh

    @property
    def builder(self) -> SampledChain:
        """A chain drawn from the sparse target's distribution."""
        return self._builder

    @property
    def default_budget(self) -> int:
        """γ drafted tokens a proposal."""
        return self.steps

    def compatibility(self, target: Target) -> str | None:
        """None: it serves every target whose attention can be replaced."""
        return None

    def loss(self, batch: object, target: Target, progress: float) -> Losses:
        """Raises ValueError: there is nothing to train."""
        raise ValueError(
            f"{type(self).__name__} has no parameters to train: name it in an evaluation's methods"
        )

    @torch.no_grad()
    def start(self, context: Context) -> SparseState:
        """State after the prompts.

        A policy that chooses by the newest queries of a prompt sees them in one more call over
        these tokens.

        Raises:
            ValueError: a target whose attention cannot be replaced.
        """
        session, target = context.session, context.target
        assert session is not None, "the target's session is needed to draft"
        check_hooked(target)
        selection = self.policy.start(target, len(context.lengths_B))
        reader = SparseReader(session.cache, selection)
        # 1. The prompt, as the policy remembers it.
        selection.read_prompt(context.input_ids_BT, context.lengths_B)
        if self.policy.observed:
            self._watch(context, session, reader)
        selection.end_prompt(session.cache.layer_keys(target.shape.num_layers), context.lengths_B)
        # 2. Verifications refresh the choice.
        session.attend_by(reader)
        none = ProposalRows.none(context.newest_B)
        return SparseState(context, context.newest_B, context.lengths_B, none, reader)

    def _watch(self, context: Context, session: Session, reader: SparseReader) -> None:
        """Read the newest tokens of the prompts again, with the selection looking on."""
        lengths, order = context.lengths_B, torch.arange(self.policy.observed)
        counts_B = lengths.clamp(max=self.policy.observed)
        index_BO = (lengths - counts_B)[:, None] + order.to(lengths.device)
        last = context.input_ids_BT.shape[1] - 1
        ids_BO = context.input_ids_BT.gather(1, index_BO.clamp(max=last))
        session.rewind(lengths - counts_B)
        reader.enter(Phase.WATCHED, ids_BO, counts_B)
        session.attend_by(reader)
        session.prefill(ids_BO, counts_B)

    @torch.no_grad()
    def expand(self, state: DraftState, frontier: Frontier) -> Tensor:
        """Logits [B,W,V] of the token after each frontier node, from the chosen slots."""
        assert isinstance(state, SparseState)
        session, reader = state.session, state.reader
        state.rows = state.rows.add(frontier)
        rows = state.rows.newest(frontier, session.lengths_B)
        session.reserve(rows.visible_BNJ.shape[2])
        held = self.refresh == "verification" and bool(reader.held)
        reader.enter(Phase.HELD if held else Phase.SPARSE, frontier.tokens_BW)
        session.attend_by(reader)
        return state.context.target.logits(session.read(frontier.tokens_BW, rows))

    def prepare(self, state: DraftState, tree: TokenTree) -> TokenTree:
        """The same tree; its verification reads all slots and refreshes the choice."""
        assert isinstance(state, SparseState)
        state.reader.enter(Phase.REFRESH, tree.tokens_BN)
        state.session.attend_by(state.reader)
        return tree

    def absorb(self, state: DraftState, verified: Verified, accepted: Accepted) -> DraftState:
        """State after a verification, with the choice of the newest accepted row."""
        assert isinstance(state, SparseState)
        state.reader.commit(accepted, verified.tree.tokens_BN, state.lengths_B)
        after = super().absorb(state, verified, accepted)
        assert isinstance(after, SparseState)
        after.rows = ProposalRows.none(after.newest_B)
        return after
