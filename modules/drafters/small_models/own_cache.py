"""Drafting with a language model whose KV cache is its own: it reads the text that was accepted
anew, and drafts behind it.

Shape legend: B sequences, N rows of one call, W frontier nodes, A rows of a proposal but its root,
R rows of a proposal, P unread tokens, H hidden size of the drafter.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from typing_extensions import Self

from modules.contracts.drafter import Context, DraftState, Frontier
from modules.contracts.rows import Rows, causal_rows, with_children
from modules.contracts.target import Session
from modules.contracts.verification import Accepted, Verified

Read = Callable[[Tensor, Rows], Tensor]
"""Tokens [B,N] at the positions of rows -> the LM head's inputs [B,N,H]; nothing is committed."""


@dataclass
class OwnCacheState(DraftState):
    """State of the drafter's sequences.

    session: the KV cache of its own model.
    unread_BP, unread_counts_B: tokens of the text that are not in the cache, the newest one last.
    root_BH: the LM head's input after the newest token, once that is read.
    above_BRA: which of the rows written ahead in this proposal (all but row 0) each row sees,
    itself included.
    """

    session: Session
    unread_BP: Tensor
    unread_counts_B: Tensor
    root_BH: Tensor | None = None
    above_BRA: Tensor | None = None

    @classmethod
    def begin(cls, context: Context, session: Session, **more: Any) -> Self:
        """State with the text unread that the session does not hold; `more`: a subclass's
        fields.
        """
        lengths_B, newest_B = context.lengths_B, context.newest_B
        read_B1 = session.lengths_B[:, None]
        order = read_B1 + torch.arange(context.input_ids_BT.shape[1], device=read_B1.device)
        last = context.input_ids_BT.shape[1] - 1
        unread_BP, counts_B = appended_tokens(
            context.input_ids_BT.gather(1, order.clamp(max=last)),
            lengths_B - session.lengths_B,
            newest_B[:, None],
            torch.ones_like(lengths_B),
        )
        return cls(context, newest_B, lengths_B, session, unread_BP, counts_B, **more)

    def states(self, frontier: Frontier, read: Read) -> Tensor:
        """The LM head's inputs [B,W,H] after each frontier node, all nodes of a level in one
        call.
        """
        if frontier.depth == 0 or self.above_BRA is None:
            return self._read_text(read)[:, None]
        # Each node sees its ancestors among the drafted rows, and the text before them.
        count, ahead = self.above_BRA.shape[1:]
        assert count == ahead + 1, "every row but the root comes after the text"
        self.above_BRA = with_children(self.above_BRA, frontier.parents_BW)
        positions_B1 = self.session.lengths_B[:, None] + frontier.depth - 1
        rows = Rows(positions_B1.expand_as(frontier.tokens_BW), self.above_BRA[:, count:])
        return self._read(read, frontier.tokens_BW, rows)

    def _read_text(self, read: Read) -> Tensor:
        """Read the unread tokens, newest included; the LM head's inputs [B,H] after the last."""
        count = self.unread_BP.shape[1]
        if count or self.root_BH is None:
            # Padding is read too, but only the unread tokens are committed.
            rows = causal_rows(self.session.lengths_B, count)
            final_BPH = self._read(read, self.unread_BP, rows)
            last_B = self.unread_counts_B - 1
            self.root_BH = final_BPH[torch.arange(len(last_B), device=last_B.device), last_B]
            order = torch.arange(count, device=last_B.device).expand(len(last_B), -1)
            self.session.commit(Accepted(order, self.unread_counts_B, self.newest_B))
            self.unread_BP, self.unread_counts_B = (
                self.unread_BP[:, :0],
                torch.zeros_like(last_B),
            )
        self.above_BRA = torch.zeros(
            len(self.newest_B), 1, 0, dtype=torch.bool, device=self.newest_B.device
        )
        return self.root_BH

    def _read(self, read: Read, tokens_BN: Tensor, rows: Rows) -> Tensor:
        self.session.reserve(rows.visible_BNJ.shape[2])
        return read(tokens_BN, rows)

    def after(self, verified: Verified, accepted: Accepted) -> Self:
        """State with the emitted tokens unread; the drafted rows are dropped."""
        unread, counts = appended_tokens(
            self.unread_BP,
            self.unread_counts_B,
            accepted.emitted(verified.tree),
            accepted.lengths_B,
        )
        return replace(
            self,
            newest_B=accepted.next_B,
            lengths_B=self.lengths_B + accepted.lengths_B,
            unread_BP=unread,
            unread_counts_B=counts,
            above_BRA=None,
        )


def appended_tokens(
    tokens_BP: Tensor, counts_B: Tensor, more_BN: Tensor, lengths_B: Tensor
) -> tuple[Tensor, Tensor]:
    """The first `counts_B` tokens of each sequence followed by the first `lengths_B` of `more_BN`,
    and the new counts.
    """
    places = counts_B[:, None] + torch.arange(more_BN.shape[1], device=counts_B.device)
    counts = counts_B + lengths_B
    return F.pad(tokens_BP, (0, more_BN.shape[1])).scatter(1, places, more_BN)[
        :, : int(counts.max())
    ], counts
