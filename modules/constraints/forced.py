"""Tokens that a constraint forces, drafted without a drafter.

Shape legend: B sequences, N nodes.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from modules.constraints.masking import MaskedDrafter, States, allowed_tree
from modules.contracts.drafter import Context, Drafter, DraftState, TreeBuilder
from modules.contracts.losses import Losses
from modules.contracts.shapes import TargetShape
from modules.contracts.target import Target
from modules.contracts.token_tree import SiblingDraw, TokenTree, Topology

MOST_FORCED = 32
"""Forced tokens in one call."""


class ForcedTokens(Drafter):
    """Drafts nothing itself: under a constraint the loop drafts what is forced.

    Args:
        shape: the target's dimensions, of which nothing is read.
    """

    def __init__(self, shape: TargetShape) -> None:
        super().__init__()

    def compatibility(self, target: Target) -> str | None:
        """None: it serves every target."""
        return None

    @property
    def sibling_draw(self) -> SiblingDraw:
        """Forced tokens are chosen by value."""
        return SiblingDraw.BY_VALUE

    def loss(self, batch: object, target: Target, progress: float) -> Losses:
        """Raises ValueError: there is nothing to train."""
        raise ValueError("ForcedTokens has no parameters to train: name it in an evaluation")

    def start(self, context: Context) -> DraftState:
        """State with the newest tokens."""
        return DraftState(context, context.newest_B, context.lengths_B)

    def propose(self, state: DraftState, budget: int) -> TokenTree:
        """The newest token alone."""
        return TokenTree.root(state.newest_B)


def forced_tokens(states: States, sequence: int, most: int) -> list[int]:
    """Tokens that follow the answer of a sequence by its constraint, at most so many."""
    if states.follow(sequence, ()) is None:
        return []
    state = states.after(sequence, ())
    tokens = [] if state is None else state.forced()[: max(0, most)]
    # Only as far as the constraint itself takes them.
    for count in range(1, len(tokens) + 1):
        if states.after(sequence, tuple(tokens[:count])) is None:
            return tokens[: count - 1]
    return tokens


def constrained_proposal(
    drafter: Drafter,
    state: DraftState,
    budget: int,
    builder: TreeBuilder | None,
    states: States,
    sequences: Sequence[int],
    room: Sequence[int],
) -> tuple[TokenTree, list[int]]:
    """A tree of tokens that constraints allow, and how many forced ones each sequence has in it.

    Where every sequence has forced tokens, these alone are verified and the drafter is not called.
    In other batches they replace the trees of their sequences, if trees are chosen by value.

    Args:
        drafter, state, budget, builder: as in `modules.contracts.drafter.proposal`.
        states: followed to the newest tokens. sequences: numbers of the rows.
        room: tokens that each sequence may still have.
    """
    # 1. What is forced.
    most = MOST_FORCED if drafter.absorbs_any_tree else 0
    forced = [
        forced_tokens(states, sequence, min(most, left - 1))
        for sequence, left in zip(sequences, room, strict=True)
    ]
    counts = [len(tokens) for tokens in forced]
    if all(counts):
        chain = with_chains(TokenTree.root(state.newest_B), forced)
        return drafter.prepare(state, chain), counts
    # 2. The drafter's tree, masked while it grows and cut afterwards.
    if builder is None and type(drafter).propose is Drafter.propose:
        builder = drafter.builder
    if builder is None:
        tree = drafter.propose(state, budget)
    else:
        masked: Drafter = MaskedDrafter(drafter, states, sequences)  # type: ignore[assignment]
        tree = builder.build(masked, state, budget)
    tree = allowed_tree(tree, states, sequences)
    # 3. Forced tokens of some sequences.
    plain = tree.candidate_BN is None and tree.auxiliary is None
    if any(counts) and plain and tree.draws_used == {SiblingDraw.BY_VALUE}:
        return drafter.prepare(state, with_chains(tree, forced)), counts
    return drafter.prepare(state, tree), [0] * len(counts)


def with_chains(tree: TokenTree, chains: Sequence[Sequence[int]]) -> TokenTree:
    """The tree, with a chain in place of the trees of sequences that have one."""
    width = max(tree.size, *(len(chain) + 1 for chain in chains))
    tokens, parents = tree.tokens_BN.tolist(), tree.parents_BN.expand_as(tree.tokens_BN).tolist()
    for b, chain in enumerate(chains):
        if chain:
            tokens[b], parents[b] = [tokens[b][0], *chain], list(range(-1, len(chain)))
        # Padding is its own parent.
        missing = range(len(tokens[b]), width)
        tokens[b] += [0] * len(missing)
        parents[b] += missing
    device = tree.tokens_BN.device
    return TokenTree(
        torch.tensor(tokens, device=device), Topology(torch.tensor(parents, device=device))
    )
