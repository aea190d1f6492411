"""A drafter of another tokenizer, in the target's ids.

All inputs of a drafter are translated into its own ids, token by token. Of its logits those columns
are used whose token the target has too. Builders take the softmax of these, so that drafted tokens
are target ids and draft probabilities those of the restricted, renormalised
distribution: what rules assume of a trimmed draft vocabulary, which is lossless.

Shape legend: D draft tokens that the target has too.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from modules.contracts.drafter import (
    Context,
    Drafter,
    DraftState,
    Frontier,
    Part,
    TreeBuilder,
)
from modules.contracts.losses import Losses
from modules.contracts.shapes import StateName
from modules.contracts.target import Target
from modules.contracts.token_tree import SiblingDraw, TokenTree
from modules.contracts.verification import Accepted, Verified
from modules.target.tokenizers.vocabulary import VocabularyMap


def in_target_ids(drafter: Drafter, target: Target) -> Drafter:
    """The drafter as builders and rules see it: itself, or translated if it has its own tokenizer.

    Raises:
        ValueError: it has no token of the target, or its trees are made without a builder.
    """
    if drafter.draft_tokenizer is None:
        return drafter
    return TranslatedDrafter(drafter, VocabularyMap.between(drafter.draft_tokenizer, target))


@dataclass
class TranslatedState(DraftState):
    """inner: the drafter's state, in its own ids; everything else is in target ids."""

    inner: DraftState


class TranslatedDrafter(Drafter):
    """Drafts the tokens of another drafter, in target ids.

    Args:
        drafter: of another tokenizer.
        vocabulary: its ids and the target's.
    """

    def __init__(self, drafter: Drafter, vocabulary: VocabularyMap) -> None:
        super().__init__()
        if type(drafter).propose is not Drafter.propose:
            raise ValueError(
                f"{type(drafter).__name__} has a tokenizer of its own and proposes its own trees: "
                "implement `expand`, so that its trees can be built from target ids"
            )
        self.drafter, self.vocabulary = drafter, vocabulary
        columns_D, targets_D = vocabulary.columns(drafter.vocabulary_D)
        self.register_buffer("columns_D", columns_D, persistent=False)
        self.register_buffer("targets_D", targets_D, persistent=False)

    def loss(self, batch: Any, target: Target, progress: float) -> Losses:
        """The drafter's own loss, which reads target ids."""
        return self.drafter.loss(batch, target, progress)

    @property
    def vocabulary_D(self) -> Tensor | None:
        """Target ids that it can draft."""
        return self.get_buffer("targets_D")

    def parts(self) -> Mapping[str, Part]:
        """The drafter that it translates."""
        return {"drafter": self.drafter}

    @property
    def builder(self) -> TreeBuilder:
        """The tree builder of the drafter."""
        return self.drafter.builder

    @property
    def sibling_draw(self) -> SiblingDraw:
        """How the drafter's siblings are drawn."""
        return self.drafter.sibling_draw

    @property
    def default_budget(self) -> int:
        """Drafted nodes per step of the drafter."""
        return self.drafter.default_budget

    @property
    def least_budget(self) -> int:
        """The smallest budget of the drafter."""
        return self.drafter.least_budget

    @property
    def learns(self) -> bool:
        """Whether the drafter learns while decoding."""
        return self.drafter.learns

    @property
    def max_depth(self) -> int | None:
        """The greatest depth of the drafter."""
        return self.drafter.max_depth

    @property
    def decoding_states(self) -> tuple[StateName, ...]:
        """Target states that the drafter reads."""
        return self.drafter.decoding_states

    def start(self, context: Context) -> TranslatedState:
        """The drafter's state after the translated prompts."""
        translated = replace(
            context,
            input_ids_BT=self.vocabulary.to_draft(context.input_ids_BT),
            newest_B=self.vocabulary.to_draft(context.newest_B),
        )
        inner = self.drafter.start(translated)
        return TranslatedState(context, context.newest_B, context.lengths_B, inner)

    def prepare(self, state: DraftState, tree: TokenTree) -> TokenTree:
        """The tree with what the drafter adds to it, in target ids."""
        assert isinstance(state, TranslatedState)
        seen = replace(tree, tokens_BN=self.vocabulary.to_draft(tree.tokens_BN))
        return replace(self.drafter.prepare(state.inner, seen), tokens_BN=tree.tokens_BN)

    def expand(self, state: DraftState, frontier: Frontier) -> Tensor:
        """Logits [B,W,D] of the tokens that the target has too."""
        assert isinstance(state, TranslatedState)
        tokens_BW = self.vocabulary.to_draft(frontier.tokens_BW)
        logits = self.drafter.expand(state.inner, replace(frontier, tokens_BW=tokens_BW))
        return logits[..., self.get_buffer("columns_D")]

    def absorb(self, state: DraftState, verified: Verified, accepted: Accepted) -> TranslatedState:
        """Advance both states. The drafter reads the tree and the next token in its own ids; logits
        and states of the verification stay the target's.
        """
        assert isinstance(state, TranslatedState)
        tree = replace(verified.tree, tokens_BN=self.vocabulary.to_draft(verified.tree.tokens_BN))
        inner = self.drafter.absorb(
            state.inner,
            replace(verified, tree=tree),
            replace(accepted, next_B=self.vocabulary.to_draft(accepted.next_B)),
        )
        return TranslatedState(
            state.context, accepted.next_B, state.lengths_B + accepted.lengths_B, inner
        )
