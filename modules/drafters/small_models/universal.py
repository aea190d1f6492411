"""Small language models whose tokenizer is not the target's (Timor et al. 2025, arXiv 2502.05202).

The drafter reads the text in its own tokens, written anew as the text grows. What it drafts comes
to the target in one of two ways: `TokenIntersection` drafts tokens that both vocabularies spell
alike, from its distribution over these; `StringMatching` drafts a string, which the target's
tokenizer writes.

Shape legend: B sequences, T prompt tokens, N rows of one call, W frontier nodes, K drafted tokens,
H hidden size of the drafter, D tokens that both models have.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from modules.byte_level.retokenised import Retokenised, continued
from modules.byte_level.vocabulary import ByteVocabulary, unfinished
from modules.contracts.drafter import Context, Drafter, DraftState, Frontier
from modules.contracts.losses import Losses
from modules.contracts.rows import Rows
from modules.contracts.shapes import TargetShape
from modules.contracts.target import Target
from modules.contracts.token_tree import SiblingDraw, TokenTree
from modules.contracts.verification import Accepted, Verified
from modules.drafters.retrieval.base import PerSequence, chains
from modules.drafters.small_models.own_cache import OwnCacheState
from modules.target.loading import load_target
from modules.target.target import Target as LoadedTarget
from modules.trees.sampled.chain import SampledChain


@dataclass
class ForeignText:
    """One sequence's text in the drafter's tokens.

    read: tokens that the drafter's cache holds, or will after the next draft.
    """

    text: Retokenised
    read: list[int] = field(default_factory=list)

    def unread(self, committed: int) -> tuple[int, list[int]]:
        """How many of the cache's `committed` tokens stay, and those to be read; at least one."""
        ids, common = self.text.ids, 0
        while common < min(len(ids) - 1, committed) and ids[common] == self.read[common]:
            common += 1
        self.read = ids
        return common, ids[common:]


@dataclass
class UniversalState(OwnCacheState):
    """State of the drafter's sequences; unread tokens are the drafter's.

    texts: of every sequence.
    """

    texts: PerSequence[ForeignText] = field(default_factory=PerSequence)


class Universal(Drafter):
    """Base of the drafters with a tokenizer of their own. Nothing is trained.

    Args:
        shape: the target's dimensions (nothing of them is read).
        model: Hub id, folder or .gguf file of a causal LM with byte-level BPE or SentencePiece, or
            the loaded model.
        draft_length: tokens that it drafts in a row.
    """

    own_model = True
    names_places = ("model",)

    def __init__(
        self, shape: TargetShape, model: str | LoadedTarget, draft_length: int = 4
    ) -> None:
        super().__init__()
        if draft_length < 1:
            raise ValueError(f"draft_length must be at least 1, got {draft_length}")
        self.source, self.draft_length = model, draft_length
        # A list hides the model's wrapper, whose weights are those of `self.model`.
        self._runner: list[LoadedTarget] = []

    @torch.no_grad()
    def initialise(self, target: Target) -> None:
        """Load the model as the target was loaded, and compare the vocabularies.

        Raises:
            ValueError: a model that cannot be loaded, or a tokenizer of another kind.
        """
        precision, device = str(target.dtype).removeprefix("torch."), str(target.device)
        loaded = (
            self.source
            if isinstance(self.source, LoadedTarget)
            else load_target(self.source, precision, device, chats=False)
        )
        self._runner, self.model = [loaded], loaded.model
        self.own = ByteVocabulary(loaded.tokenizer, loaded.shape.vocab_size)
        self.adapt(target)

    @property
    def language_model(self) -> LoadedTarget:
        """The drafter's model behind the interface of targets."""
        if not self._runner:
            raise ValueError(f"{type(self).__name__} has no model yet: call `initialise(target)`")
        return self._runner[0]

    def adapt(self, target: Target) -> Target:
        """The target itself; the drafter writes its tokens from now on."""
        self.theirs = ByteVocabulary(target.tokenizer, target.shape.vocab_size)
        return target

    def compatibility(self, target: Target) -> str | None:
        """None: it serves targets of any tokenizer."""
        return None

    def loss(self, batch: Any, target: Target, progress: float) -> Losses:
        """Raises ValueError: it drafts with a model as it is."""
        raise ValueError(
            f"{type(self).__name__} is not trained: name it in an evaluation's methods, or train "
            "an Independent drafter"
        )

    def ends(self, target: Target) -> dict[int, int]:
        """The drafter's end tokens and the target's of the same spelling, by the former."""
        names, theirs = self.language_model.tokenizer, target.tokenizer.get_vocab()
        pieces = {i: names.convert_ids_to_tokens(i) for i in self.language_model.eos_ids}
        return {i: theirs[p] for i, p in pieces.items() if theirs.get(p) in target.eos_ids}

    # -- reading -----------------------------------------------------------------------------------

    def rewritten(self, ids: list[int], target: Target) -> Retokenised:
        """A text of the target's tokens in the drafter's, behind the token that its tokenizer puts
        before every text, if it does.
        """
        decoded = target.tokenizer.decode(ids, clean_up_tokenization_spaces=False)
        text, names = Retokenised(self.own, decoded), self.own.tokenizer
        if names.bos_token_id in names.encode("")[:1] and text.fixed[:1] != [names.bos_token_id]:
            text.fixed = [names.bos_token_id, *text.fixed]
        return text

    def start(self, context: Context) -> UniversalState:
        """State with the whole text unread, in the drafter's tokens."""
        texts = PerSequence[ForeignText]()
        rows = zip(context.input_ids_BT.tolist(), context.lengths_B.tolist(), strict=True)
        for (ids, length), newest in zip(rows, context.newest_B.tolist(), strict=True):
            text = self.rewritten(ids[:length], context.target)
            text.extend(self.theirs.spelled([newest]))
            texts.append(ForeignText(text))
        room = max(len(text.text.ids) for text in texts) + 64
        session = self.language_model.open(len(texts), room)
        return self._unread(
            UniversalState(
                context,
                context.newest_B,
                context.lengths_B,
                session,
                context.input_ids_BT,
                context.lengths_B,
                texts=texts,
            )
        )

    def _unread(self, state: UniversalState) -> UniversalState:
        """The state with the tokens that its cache does not hold; what it holds too much is
        forgotten."""
        device = state.newest_B.device
        lengths = state.session.lengths_B.tolist()
        rows = [text.unread(count) for text, count in zip(state.texts, lengths, strict=True)]
        state.session.rewind(torch.tensor([common for common, _ in rows]))
        counts = [len(ids) for _, ids in rows]
        padded = [ids + [0] * (max(counts) - len(ids)) for _, ids in rows]
        return replace(
            state,
            unread_BP=torch.tensor(padded, device=device),
            unread_counts_B=torch.tensor(counts, device=device),
            root_BH=None,
            above_BRA=None,
        )

    def absorb(self, state: DraftState, verified: Verified, accepted: Accepted) -> UniversalState:
        """State with the emitted tokens written anew in the drafter's."""
        assert isinstance(state, UniversalState)
        emitted = accepted.emitted(verified.tree).tolist()
        for text, ids, count in zip(state.texts, emitted, accepted.lengths_B.tolist(), strict=True):
            text.text.extend(self.theirs.spelled(ids[:count]))
        lengths_B = state.lengths_B + accepted.lengths_B
        return self._unread(replace(state, newest_B=accepted.next_B, lengths_B=lengths_B))

    def hidden(self, state: UniversalState, frontier: Frontier) -> Tensor:
        """The LM head's inputs [B,W,H] after each frontier node, whose tokens are the drafter's."""

        def read(tokens_BN: Tensor, rows: Rows) -> Tensor:
            return state.session.read(tokens_BN, rows)

        return state.states(frontier, read)


class TokenIntersection(Universal):
    """Drafts from its distribution restricted to the tokens that both vocabularies spell alike, and
    renormalised (TLI in the paper). Lossless by the ratio rule: the tree carries that distribution.

    Args:
        shape, model, draft_length: as in `Universal`.
    """

    def __init__(
        self, shape: TargetShape, model: str | LoadedTarget, draft_length: int = 4
    ) -> None:
        super().__init__(shape, model, draft_length)
        self._builder = SampledChain(draft_length)
        for name in ("columns_D", "targets_D", "drafted_V"):
            self.register_buffer(name, None, persistent=False)

    @property
    def builder(self) -> SampledChain:
        """A chain drawn from the restricted distribution."""
        return self._builder

    @property
    def default_budget(self) -> int:
        """As many tokens as it drafts in a row."""
        return self.draft_length

    @property
    def vocabulary_D(self) -> Tensor | None:
        """Target ids [D] that it can draft, ascending."""
        return self.targets_D

    def adapt(self, target: Target) -> Target:
        """The target itself; pairs tokens of the same bytes, and end tokens of the same name.

        Raises:
            ValueError: no token has the same bytes in both.
        """
        super().adapt(target)
        drafted, written = self.own.by_bytes, self.theirs.by_bytes
        pairs = {i: drafted[data] for data, i in written.items() if data in drafted}
        if not pairs:
            raise ValueError(f"the drafter has no token of the target {target.name}: give another")
        pairs |= {end: ending for ending, end in self.ends(target).items()}
        device, ordered = target.device, sorted(pairs.items())
        self.targets_D = torch.tensor([i for i, _ in ordered], device=device)
        self.columns_D = torch.tensor([drafted for _, drafted in ordered], device=device)
        self.drafted_V = torch.zeros(target.shape.vocab_size, dtype=torch.long, device=device)
        self.drafted_V[self.targets_D] = self.columns_D
        return target

    def expand(self, state: DraftState, frontier: Frontier) -> Tensor:
        """Logits [B,W,D] of the shared tokens after each frontier node."""
        assert isinstance(state, UniversalState) and self.drafted_V is not None
        drafted = replace(frontier, tokens_BW=self.drafted_V[frontier.tokens_BW])
        return self.language_model.logits(self.hidden(state, drafted), self.columns_D)


class StringMatching(Universal):
    """Drafts its likeliest string, which the target's tokenizer writes after the text (SLEM in the
    paper). Lossless at any temperature as a point mass.

    Args:
        shape, model, draft_length: as in `Universal`; the length is in the drafter's tokens.
    """

    @property
    def sibling_draw(self) -> SiblingDraw:
        """A string is a point mass."""
        return SiblingDraw.BY_VALUE

    @property
    def default_budget(self) -> int:
        """Twice the tokens that it drafts, as the target's tokenizer may need more."""
        return 2 * self.draft_length

    def propose(self, state: DraftState, budget: int) -> TokenTree:
        """A chain of the string's tokens in the target's vocabulary."""
        assert isinstance(state, UniversalState)
        # 1. The drafter's likeliest tokens.
        tokens_B1, drafted = state.newest_B[:, None], []
        for depth in range(self.draft_length):
            parents_B1 = torch.full_like(tokens_B1, depth - 1)
            hidden_B1H = self.hidden(state, Frontier(tokens_B1, parents_B1, depth))
            tokens_B1 = self.language_model.logits(hidden_B1H).argmax(-1)
            drafted.append(tokens_B1)
        # 2. As a string, in the target's tokens.
        ends = self.ends(state.context.target)
        rows = torch.cat(drafted, 1).tolist()
        drafts = [
            torch.tensor(self.written(text, ids, ends)[:budget], dtype=torch.long)
            for text, ids in zip(state.texts, rows, strict=True)
        ]
        return chains(state.newest_B, [draft.to(state.newest_B.device) for draft in drafts])

    def written(self, text: ForeignText, ids: list[int], ends: dict[int, int]) -> list[int]:
        """The target's tokens of what the drafter wrote after a text, up to its end token."""
        special = next((n for n, i in enumerate(ids) if i not in self.own.data), len(ids))
        data, ending = (
            self.own.spelled(ids[:special]),
            [ends[i] for i in ids[special:][:1] if i in ends],
        )
        # The drafter has not read a character that is not whole yet: it writes all of it.
        tail = text.text.tail
        begun = tail[len(tail) - unfinished(tail)[0] :]
        if not data.startswith(begun):
            return []
        data = data[len(begun) :]
        return continued(self.theirs, text.text.tail, data) + ending
