"""What text drafters with an optional partner share: another drafter whose drafts they combine.

Shape legend: B sequences.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from modules.contracts.drafter import (
    Context,
    Drafter,
    DraftState,
    Part,
    TreeBuilder,
    check_depth,
)
from modules.contracts.shapes import StateName, TargetShape
from modules.contracts.token_tree import SiblingDraw, TokenTree
from modules.contracts.verification import Accepted, Verified
from modules.drafters.retrieval.base import TextDrafter, TextState
from modules.trees.trie import Trie


@dataclass
class PartneredState(TextState):
    """State of a text drafter and of its partner; None without a partner."""

    partner: DraftState | None


class Partnered(TextDrafter):
    """Base of the text drafters with an optional partner, whose nodes are point masses too.

    Args:
        shape: the target's dimensions.
        partner: another drafter, or None.
        builder: builds the partner's trees in place of its own builder.

    Raises:
        ValueError: a partner or a builder whose trees cannot be combined with retrieved text.
    """

    def __init__(
        self, shape: TargetShape, partner: Drafter | None, builder: TreeBuilder | None = None
    ) -> None:
        super().__init__(shape)
        if partner is not None:
            _check_partner(type(self).__name__.lower(), partner, builder)
        self.partner, self.builds = partner, builder

    def parts(self) -> Mapping[str, Part]:
        """The partner, and its own datastore."""
        partners: dict[str, Part] = {} if self.partner is None else {"partner": self.partner}
        return {**partners, **super().parts()}

    @property
    def learns(self) -> bool:
        """Whether its partner changes while decoding."""
        return self.partner is not None and self.partner.learns

    @property
    def decoding_states(self) -> tuple[StateName, ...]:
        """The states that the partner reads; none without a partner."""
        return () if self.partner is None else self.partner.decoding_states

    def start(self, context: Context) -> PartneredState:
        """State with the text and the partner's start."""
        partner = None if self.partner is None else self.partner.start(context)
        return PartneredState(**vars(super().start(context)), partner=partner)

    def absorb(self, state: DraftState, verified: Verified, accepted: Accepted) -> PartneredState:
        """Append emitted tokens to the text and pass them to the partner, whoever drafted them."""
        assert isinstance(state, PartneredState)
        went_on = super().absorb(state, verified, accepted)
        assert isinstance(went_on, PartneredState)
        if self.partner is not None and state.partner is not None:
            went_on.partner = self.partner.absorb(state.partner, verified, accepted)
        return went_on


def _check_partner(name: str, partner: Drafter, builder: TreeBuilder | None) -> None:
    """Raise ValueError for trees that are drawn, deeper than the partner drafts, or with rows that
    are not candidates: combined with text, every node is a point mass.
    """
    draw = partner.sibling_draw if builder is None else builder.sibling_draw
    if draw is not SiblingDraw.BY_VALUE:
        kind = type(partner if builder is None else builder).__name__
        raise ValueError(
            f"{name}: {kind} draws its siblings ({draw.name.lower()}), but a fused tree is "
            "verified by value: give a `builder` that chooses, such as "
            "modules.trees.reranked.RerankedTree"
        )
    if partner.least_budget > 1:
        raise ValueError(
            f"{name}: partner {type(partner).__name__} needs rows that only compute, which a fused "
            "tree does not keep: name another partner"
        )
    if builder is not None:
        check_depth(builder, partner)


def as_trie(tree: TokenTree, sequence: int) -> Trie:
    """One sequence's drafted candidates; siblings with the same token become one node."""
    assert tree.candidate_BN is None, "a partner's tree consists of candidates: `_check_partner`"
    tokens, parents = tree.tokens_BN[sequence].tolist(), tree.parents_BN[sequence].tolist()
    trie, places = Trie(tokens[0]), {0: 0}
    for node in range(1, len(tokens)):
        if parents[node] != node:
            path = [*trie.path(places[parents[node]]), tokens[node]]
            places[node] = trie.fuse(path, len(tokens))
    return trie
