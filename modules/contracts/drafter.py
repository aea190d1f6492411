"""The contract of everything that drafts, and what passes between a drafter, the target and the
acceptance rule.

Shape legend: B sequences, T prompt tokens, N tree nodes, A accepted rows (padded), W frontier rows,
V target vocabulary, D draft vocabulary, H hidden size.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

import torch
from torch import Tensor
from typing_extensions import Self

from modules.contracts.rows import Rows, with_children
from modules.contracts.sampling import Sampling
from modules.contracts.shapes import StateName
from modules.contracts.token_tree import SiblingDraw, TokenTree
from modules.contracts.trainable import Trainable
from modules.contracts.verification import Accepted, Verified

if TYPE_CHECKING:
    from modules.contracts.target import Session, Target


@dataclass(frozen=True)
class Context:
    """What a drafter starts from: the prompts as the target has just read them.

    input_ids_BT: right-padded prompt tokens; lengths_B: their lengths (all committed to the
    target's cache).
    newest_B: the first emitted token of each sequence, not yet in the cache.
    states: the prompt's target states `{name: [B,T,H]}` of the drafter's `decoding_states`.
    """

    target: Target
    input_ids_BT: Tensor
    lengths_B: Tensor
    newest_B: Tensor
    states: dict[StateName, Tensor] = field(default_factory=dict)
    sampling: Sampling = Sampling()
    generators: tuple[torch.Generator, ...] = ()
    """One per sequence."""
    session: Session | None = None
    """The target's open sequences, for drafters that run layers of the target themselves. Sequences
    that have ended leave it, so it always holds those of the state."""

    @property
    def following_BT(self) -> Tensor:
        """int64 [B,T], the token after each position of the prompts, at the last one the newest."""
        last_B1 = self.lengths_B[:, None] - 1
        return self.input_ids_BT.roll(-1, 1).scatter(1, last_B1, self.newest_B[:, None])

    def select(self, sequences_S: Tensor) -> Context:
        """The context of these sequences alone (int64 [S])."""
        return replace(
            self,
            input_ids_BT=self.input_ids_BT[sequences_S],
            lengths_B=self.lengths_B[sequences_S],
            newest_B=self.newest_B[sequences_S],
            states={name: state[sequences_S] for name, state in self.states.items()},
            generators=tuple(self.generators[i] for i in sequences_S.tolist()),
        )


@dataclass(frozen=True)
class Frontier:
    """Nodes to expand next. Rows of a proposal are numbered in the order they were handed to
    `expand`, row 0 the root.

    tokens_BW: int64 [B,W]; parents_BW: int64 [B,W], the parent's row number (-1 for the root).
    """

    tokens_BW: Tensor
    parents_BW: Tensor
    depth: int


@dataclass(frozen=True)
class ProposalRows:
    """The rows of a proposal so far, in the order in which the drafter expanded them.

    tokens_BM, parents_BM: int64 [B,M], as in the frontiers. above_BMM: bool [B,M,M], which
    rows each one sees: itself and those that it descends from.
    """

    tokens_BM: Tensor
    parents_BM: Tensor
    above_BMM: Tensor

    @staticmethod
    def none(newest_B: Tensor) -> ProposalRows:
        """An empty proposal for as many sequences."""
        empty_B0 = newest_B[:, None][:, :0]
        return ProposalRows(empty_B0, empty_B0, empty_B0[:, :, None][:, :, :0].bool())

    def add(self, frontier: Frontier) -> ProposalRows:
        """These rows followed by those of one more frontier. Depth 0 begins a proposal."""
        if frontier.depth == 0:
            return ProposalRows.none(frontier.tokens_BW[:, 0])._with(frontier)
        return self._with(frontier)

    def _with(self, frontier: Frontier) -> ProposalRows:
        return ProposalRows(
            torch.cat([self.tokens_BM, frontier.tokens_BW], 1),
            torch.cat([self.parents_BM, frontier.parents_BW], 1),
            with_children(self.above_BMM, frontier.parents_BW),
        )

    def newest(self, frontier: Frontier, lengths_B: Tensor) -> Rows:
        """The rows of the frontier that was added last, to be run after the earlier ones.

        Args:
            frontier: the one that was added last.
            lengths_B: int64 [B], committed tokens before the root.
        """
        positions = (lengths_B[:, None] + frontier.depth).expand_as(frontier.tokens_BW)
        return Rows(positions, self.above_BMM[:, -frontier.tokens_BW.shape[1] :])

    def select(self, sequences_S: Tensor) -> ProposalRows:
        """The rows of these sequences alone (int64 [S])."""
        parts = (self.tokens_BM, self.parents_BM, self.above_BMM)
        return ProposalRows(*(part[sequences_S] for part in parts))


@dataclass
class DraftState:
    """Everything a drafter knows about the sequences it is drafting for; subclasses add their own
    tensors.

    newest_B: int64 [B], node 0 of the next tree. lengths_B: int64 [B], tokens in the target's
    cache.
    """

    context: Context
    newest_B: Tensor
    lengths_B: Tensor

    def select(self, sequences_S: Tensor) -> Self:
        """The state of these sequences alone (int64 [S]). Tensors lead with B; other parts have
        their own `select`.
        """
        return replace(
            self,
            **{
                f.name: _selected(getattr(self, f.name), sequences_S)
                for f in fields(self)
                if f.init
            },
        )


def _selected(part: Any, sequences_S: Tensor) -> Any:
    if isinstance(part, Tensor):
        return part[sequences_S]
    if hasattr(part, "select"):
        return part.select(sequences_S)
    return [_selected(item, sequences_S) for item in part] if isinstance(part, list) else part


class TreeBuilder(Protocol):
    """Grows a tree by asking a drafter for distributions, level by level."""

    sibling_draw: SiblingDraw
    """How its siblings are drawn."""

    @property
    def depth(self) -> int:
        """Levels of its trees at most."""
        ...

    def build(self, drafter: Drafter, state: DraftState, budget: int) -> TokenTree:
        """A tree of at most `budget` drafted nodes."""
        ...


class Drafter(Trainable):
    """Proposes tokens for the target to verify. No per-sequence state lives on the module.

    Subclasses implement `start`, `expand` and `absorb`, and give a default `builder`; one that
    builds its own trees overrides `propose` instead of `expand`.
    """

    # What kind of drafter it is.
    draft_tokenizer: Any = None
    """Its tokenizer, where that may differ from the target's: then the decoder translates
    (`modules.decoding.translation`), and all ids that it reads and drafts are this tokenizer's. A
    Hugging Face tokenizer; only `get_vocab` and `unk_token_id` are read.
    """

    depth_unit: ClassVar[str] = "draft steps"
    """What `max_depth` counts, as messages name it."""

    absorbs_any_tree: ClassVar[bool] = True
    """Whether `absorb` takes trees that another one proposed, such as tokens that a constraint
    forces."""

    own_model: ClassVar[bool] = False
    """Whether it is an independent language model, which needs only tokens and distributions of its
    target.
    """

    @property
    def decoding_states(self) -> tuple[StateName, ...]:
        """Target states that `start` and `absorb` read."""
        return ()

    @property
    def builder(self) -> TreeBuilder:
        """The tree builder it uses unless a method names another."""
        raise ValueError(
            f"{type(self).__name__} has no default tree builder: name one under `builder:`"
        )

    @property
    def default_budget(self) -> int:
        """Drafted nodes per step unless a method says otherwise."""
        return 8

    @property
    def least_budget(self) -> int:
        """The smallest budget that it can make a tree of; above 1 where its calls have rows that
        only compute.
        """
        return 1

    @property
    def learns(self) -> bool:
        """Whether what it decodes stays with the module and is drafted in later prompts."""
        return False

    @property
    def max_depth(self) -> int | None:
        """Tokens that it can draft in a row; None: any number."""
        return None

    @property
    def sibling_draw(self) -> SiblingDraw:
        """How the siblings of its own trees are drawn, which decides the rules it may be verified
        with.
        """
        return self.builder.sibling_draw

    @property
    def vocabulary_D(self) -> Tensor | None:
        """Target ids of the draft vocabulary [D]; None: the whole vocabulary."""
        return None

    def parts(self) -> Mapping[str, Part]:
        """Drafters beside it and folders of data that it retrieves from, by the names of its
        arguments.
        """
        return {}

    @property
    def stock(self) -> Any:
        """The drafter as a Hugging Face model on the same weights; None if it is not one."""
        return None

    @property
    def tokens_D(self) -> Tensor | None:
        """Ids of its own vocabulary that it can draft [D]; None: all of them."""
        return self.vocabulary_D

    def adapt(self, target: Target) -> Target:
        """The target this drafter decodes with: `target` itself unless training changed it
        (Medusa-2).
        """
        return target

    def adapt_sharing(self, target: Target) -> Target:
        """The same for measurements during training: on the target's own weights instead of a
        copy."""
        return self.adapt(target)

    @abstractmethod
    def start(self, context: Context) -> DraftState:
        """State after the target has read the prompts."""

    def propose(self, state: DraftState, budget: int) -> TokenTree:
        """A tree of at most `budget` drafted nodes under the newest token."""
        return self.builder.build(self, state, budget)

    def prepare(self, state: DraftState, tree: TokenTree) -> TokenTree:
        """The tree as it goes to the target: what a drafter adds to one that a builder made, such
        as rows that it has run already.
        """
        return tree

    def expand(self, state: DraftState, frontier: Frontier) -> Tensor:
        """Logits [B,W,D] of the token after each frontier node. Called with depth 0 first, which
        begins a proposal.
        """
        raise ValueError(
            f"{type(self).__name__} proposes its own trees: it cannot be given a tree builder"
        )

    def absorb(self, state: DraftState, verified: Verified, accepted: Accepted) -> DraftState:
        """State after a verification, of this drafter's tree or of any other."""
        return replace(
            state, newest_B=accepted.next_B, lengths_B=state.lengths_B + accepted.lengths_B
        )


def proposal(
    drafter: Drafter, state: DraftState, budget: int, builder: TreeBuilder | None = None
) -> TokenTree:
    """A tree of at most `budget` drafted nodes, ready to be verified: the builder's, or without one
    the drafter's own.
    """
    if builder is None:
        return drafter.prepare(state, drafter.propose(state, budget))
    return drafter.prepare(state, builder.build(drafter, state, budget))


Part = Drafter | Path
"""A component of another drafter: a drafter, or a folder of data."""


def check_depth(builder: TreeBuilder, drafter: Drafter) -> None:
    """ValueError for a builder of trees that are deeper than the drafter can draft."""
    longest = drafter.max_depth
    if longest is not None and builder.depth > longest:
        raise ValueError(
            f"builder draws trees of depth {builder.depth}, but the drafter has {longest} "
            f"{drafter.depth_unit}: lower the depth or train more"
        )
