"""TokenSelect: one set of tokens for all heads of a layer, by soft votes of the heads (Wu et al.
2024, arXiv 2411.02886).

A row reads the first tokens, the newest ones, and from between those with most votes. A head votes
by its softmax over the tokens between, so that no head has more than one vote. The set is chosen
again when the query has turned away from the one that it was chosen for. Scores are scaled as in
attention.

For texts longer than the trained context, `positions: reassigned` lets every row read what it has
chosen at consecutive positions, itself at the last, so that no distance is greater than the set.
Votes are then cast without positions, as in the authors' release, which rotates keys after the
choice: distances in the text would be beyond the trained ones.

Shape legend: B sequences, Q query heads, K key/value heads, G query heads per key/value head, N
rows of one call, J rows since the last commit, S slots, X chosen slots, E = Q times head size, R
rows that vote.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from modules.contracts.target import Target
from modules.sparse_kv.policy import LayerCall, Policy, Selection, Step, checked, top_slots
from modules.target.stock.key_rotation import KeyRotation, key_rotation


def soft_vote(logits_BQRS: Tensor, candidates_BRS: Tensor, pool: int = 1) -> Tensor:
    """Votes [B,1,R,S]: the heads' softmax over the candidates, summed; 0 for all others.

    pool: width of a maximum over neighbouring slots, odd.
    """
    masked = logits_BQRS.masked_fill(~candidates_BRS[:, None], -torch.inf)
    # A row without candidates has no softmax.
    votes = masked.softmax(-1).nan_to_num(0.0).sum(1)
    if pool > 1:
        votes = F.max_pool1d(votes, pool, stride=1, padding=pool // 2)
    return votes.masked_fill(~candidates_BRS, 0.0)[:, None]


@dataclass
class Entries:
    """What a layer last chose for, and what: after the last commit, and after each row since.

    query_BJE: queries. slots_BJX: slots that they chose. valid_BJ: whether there was a choice.
    """

    query_BJE: Tensor
    slots_BJX: Tensor
    valid_BJ: Tensor

    def select(self, sequences_S: Tensor) -> Entries:
        """The entries of these sequences alone (int64 [S])."""
        return Entries(
            self.query_BJE[sequences_S], self.slots_BJX[sequences_S], self.valid_BJ[sequences_S]
        )

    def at(self, index_B1: Tensor) -> Entries:
        """One entry of each sequence."""
        return Entries(
            *(
                part.gather(1, index_B1.view(-1, 1, *[1] * (part.dim() - 2)).expand_as(part[:, :1]))
                for part in (self.query_BJE, self.slots_BJX, self.valid_BJ)
            )
        )

    def first(self, count: int) -> Entries:
        """The first so many."""
        return Entries(
            self.query_BJE[:, :count], self.slots_BJX[:, :count], self.valid_BJ[:, :count]
        )

    def add(self, other: Entries) -> Entries:
        """These followed by others."""
        mine, more = (
            (entries.query_BJE, entries.slots_BJX, entries.valid_BJ) for entries in (self, other)
        )
        return Entries(*(torch.cat(pair, 1) for pair in zip(mine, more)))


@dataclass
class TokenSelection(Selection):
    """The votes' choice, and the newest one of every layer.

    turns: how the target turns its keys, if positions are re-assigned.
    """

    policy: TokenSelect
    turns: KeyRotation | None = None
    entries: dict[int, Entries] = field(default_factory=dict)

    @property
    def rotation(self) -> KeyRotation | None:
        """What turns chosen slots to consecutive positions, if they are re-assigned."""
        return self.turns

    def choose(self, call: LayerCall) -> Tensor | None:
        """First, newest and elected slots of each row."""
        policy = self.policy
        most = policy.initial + policy.budget + policy.local
        if most >= call.slots:
            self.entries.pop(call.layer, None)
            return None
        # 1. Entries that rows before these ones left.
        voters = self._voters(call)
        query_BNE = voters.query_BQND.transpose(1, 2).flatten(2)
        entries = self._entries(call, query_BNE)
        # 2. Each row takes its parent's choice, or makes one.
        elected: Tensor | None = None
        # Rows of a short context choose all, which is no choice to go on with.
        long_BN = call.positions_BN >= most
        for row in range(query_BNE.shape[1]):
            before = entries.at(_parents(call, row))
            near = F.cosine_similarity(query_BNE[:, row], before.query_BJE[:, 0], dim=-1)
            reused_B = (near >= policy.threshold) & before.valid_BJ[:, 0] & long_BN[:, row]
            after = before
            if not bool(reused_B.all()):
                elected = self._elected(voters) if elected is None else elected
                made = Entries(
                    query_BNE[:, row : row + 1],
                    elected[:, 0, row : row + 1],
                    long_BN[:, row : row + 1],
                )
                after = _where(reused_B, before, made)
            entries = entries.add(after)
        self.entries[call.layer] = entries
        middle_B1NX = entries.slots_BJX[:, -query_BNE.shape[1] :][:, None]
        # 3. Beside the first and the newest ones.
        newest = call.newest_slots(policy.local)
        newest = torch.where(newest < policy.initial, -1, newest)
        return torch.cat([call.first_slots(policy.initial), middle_B1NX, newest], 3)

    def _entries(self, call: LayerCall, query_BNE: Tensor) -> Entries:
        earlier = call.pending - query_BNE.shape[1]
        entries = self.entries.get(call.layer)
        if entries is None:
            batch, device = len(query_BNE), query_BNE.device
            slots = torch.full((batch, 1, self.policy.budget), -1, device=device)
            valid = torch.zeros(batch, 1, dtype=torch.bool, device=device)
            entries = Entries(torch.zeros_like(query_BNE[:, :1]), slots, valid)
        missing = 1 + earlier - entries.valid_BJ.shape[1]
        # Rows that ran while the context was short left no entry.
        for _ in range(missing):
            entries = entries.add(entries.first(1))
        return entries.first(1 + earlier)

    def _elected(self, call: LayerCall) -> Tensor:
        """int64 [B,1,N,X]: the slots with most votes between the first and the newest."""
        policy = self.policy
        age_BNS = call.positions_BN[..., None] - call.positions_BS[:, None]
        middle = call.visible_BNS & (age_BNS >= policy.local)
        middle = middle & (call.positions_BS >= policy.initial)[:, None]
        return self._most_votes(call, call.grouped_BKGND, middle)

    def _voters(self, call: LayerCall) -> LayerCall:
        """The call with the queries that vote: without positions, if these are re-assigned."""
        if self.turns is None:
            return call
        places = call.positions_BN[:, None]
        query = self.turns.turned(call.layer, call.query_BQND, places, torch.zeros_like(places))
        return replace(call, query_BQND=query)

    def _most_votes(self, call: LayerCall, query_BKGRD: Tensor, candidates_BRS: Tensor) -> Tensor:
        """int64 [B,1,R,X]: the candidates with most votes of these queries."""
        policy = self.policy
        if self.turns is not None:
            places = call.positions_BS[:, None]
            keys = self.turns.turned(call.layer, call.keys_BKSD, places, torch.zeros_like(places))
            call = replace(call, keys_BKSD=keys)
        votes = soft_vote(call.products(query_BKGRD).flatten(1, 2), candidates_BRS, policy.pool)
        slots = top_slots(votes, candidates_BRS, policy.budget, policy.pool > 1)
        assert slots is not None
        return slots

    def choose_prompt(self, call: LayerCall) -> Tensor | None:
        """One choice for all rows of the call, by the mean of their queries."""
        policy, before_B = self.policy, call.lengths_B
        if policy.initial + policy.budget + policy.local >= call.slots - call.query_BQND.shape[2]:
            return None
        # 1. The mean over rows that are no padding.
        order = torch.arange(call.query_BQND.shape[2], device=before_B.device)
        real_BN = (order < call.counts_B[:, None]).to(call.query_BQND.dtype)
        shares = real_BN / real_BN.sum(1, keepdim=True).clamp(min=1)
        voters = self._voters(call)
        mean = torch.einsum("bkgnd,bn->bkgd", voters.grouped_BKGND, shares)[:, :, :, None]
        # 2. Votes for the slots between the first and the newest before these rows.
        slots_S = torch.arange(call.slots, device=before_B.device)
        middle = (slots_S >= policy.initial) & (slots_S < before_B[:, None] - policy.local)
        elected = self._most_votes(voters, mean, middle[:, None])
        # 3. Beside those.
        newest = before_B[:, None] - 1 - torch.arange(policy.local, device=before_B.device)
        newest = torch.where(newest < policy.initial, -1, newest)[:, None, None]
        first = call.first_slots(policy.initial)[:, :, :1]
        first = torch.where(first < before_B[:, None, None, None], first, -1)
        return torch.cat([first, elected, newest], 3)

    def commit(self, step: Step) -> None:
        """The newest accepted row's entry serves the rows after it."""
        for layer, entries in self.entries.items():
            if entries.valid_BJ.shape[1] == 1:
                continue
            last = entries.at(step.last_B1 + 1)
            moved = step.moved(last.slots_BJX[:, 0])[:, None]
            self.entries[layer] = Entries(last.query_BJE, moved, last.valid_BJ)


def _parents(call: LayerCall, row: int) -> Tensor:
    """int64 [B,1]: the entry before a row of the call: 0 is that of the last commit, 1 + j that of
    row j since then.
    """
    before = call.pending - call.query_BQND.shape[2] + row
    above_BJ = call.path_BNJ[:, row, :before]
    order = torch.arange(1, before + 1, device=above_BJ.device)
    return F.pad(above_BJ * order, (1, 0)).amax(1, keepdim=True)


def _where(chosen_B: Tensor, first: Entries, other: Entries) -> Entries:
    """Entries of `first` where chosen, else of `other`."""
    pairs = (
        (first.query_BJE, other.query_BJE),
        (first.slots_BJX, other.slots_BJX),
        (first.valid_BJ, other.valid_BJ),
    )
    return Entries(*(torch.where(chosen_B.view(-1, *[1] * (a.dim() - 1)), a, b) for a, b in pairs))


class TokenSelect(Policy):
    """Dynamic token-level selection.

    Args:
        budget: k, elected slots between the first and the newest.
        initial: first slots.
        local: newest positions, the row's own included.
        threshold: cosine of queries from which the last choice is used again; above 1 none is,
            -1 uses the first one always.
        pool: width of the maximum over the votes of neighbouring slots, odd; 1 is none.
        chunk: tokens of a prompt that choose together.
        positions: at which a row reads its set: those of the text (`original`), or consecutive ones
            (`reassigned`) for texts longer than the trained context. Texts that the set holds
            whole are read alike.

    Raises:
        ValueError: a setting below its least value, an even `pool`, or unknown `positions`.
    """

    def __init__(
        self,
        budget: int = 2048,
        initial: int = 128,
        local: int = 512,
        threshold: float = 0.9,
        pool: int = 1,
        chunk: int = 8192,
        positions: Literal["original", "reassigned"] = "original",
    ) -> None:
        checked(
            budget=(budget, 1),
            initial=(initial, 0),
            local=(local, 1),
            pool=(pool, 1),
            chunk=(chunk, 1),
        )
        if pool % 2 == 0:
            raise ValueError(f"pool must be odd, so that it is centred, got {pool}")
        if positions not in ("original", "reassigned"):
            raise ValueError(f"positions {positions!r} is unknown: use original or reassigned")
        self.budget, self.initial, self.local = budget, initial, local
        self.threshold, self.pool, self.prompt_rows = threshold, pool, chunk
        self.any_length = positions == "reassigned"

    def start(self, target: Target, batch: int) -> TokenSelection:
        """A selection that has chosen nothing yet.

        Raises:
            ValueError: positions are re-assigned and go beyond the target's context, or the target
                does not turn its keys as rotary positions do.
        """
        if not self.any_length:
            return TokenSelection(self)
        most = self.initial + self.budget + self.local + self.prompt_rows
        if most > target.max_positions:
            raise ValueError(
                f"positions: reassigned ones reach {most} (initial, budget, local and chunk), the "
                f"context of {target.max_positions}: lower chunk or budget"
            )
        return TokenSelection(self, key_rotation(target))
