"""Input-guided Aggressive Decoding (IAD): the input itself is the draft (Ge et al. 2022, arXiv
2205.10350; Sun et al. 2021, arXiv 2106.04970).

Shape legend: B sequences, K drafted tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from modules.contracts.drafter import Context, DraftState
from modules.contracts.shapes import TargetShape
from modules.contracts.token_tree import TokenTree
from modules.contracts.verification import Accepted, Verified
from modules.drafters.retrieval.base import PerSequence, TextDrafter, TextState, chains


class Source:
    """The input of one sequence, and where each of its n-grams ends if it occurs only once.

    Args:
        tokens: of the input.
        longest: largest n.
    """

    def __init__(self, tokens: Sequence[int], longest: int) -> None:
        self.tokens, self.longest = list(tokens), longest
        self._ends: dict[tuple[int, ...], int | None] = {}
        for size in range(1, longest + 1):
            for end in range(size, len(tokens) + 1):
                ngram = tuple(tokens[end - size : end])
                self._ends[ngram] = None if ngram in self._ends else end

    def match(self, output: Sequence[int]) -> int | None:
        """Where copying goes on after this output: the end of its shortest suffix that occurs once
        in the input. None: the shorter ones occur several times, and the next does not occur or
        would be longer than `longest`.
        """
        for size in range(1, min(self.longest, len(output)) + 1):
            suffix = tuple(output[-size:])
            if suffix not in self._ends:
                return None
            if (end := self._ends[suffix]) is not None:
                return end
        return None

    def follow(self, place: int | None, new: Sequence[int], output: Sequence[int]) -> int | None:
        """The place after `new` tokens, with which the output now ends: one further for each while
        they are the input's, otherwise by `match`.
        """
        if place is not None and self.tokens[place : place + len(new)] == list(new):
            return place + len(new)
        return self.match(output)


@dataclass
class InputState(TextState):
    """State of the input-guided drafter.

    sources: the input of each sequence. places: where copying goes on in it; None: unknown.
    """

    sources: PerSequence[Source]
    places: PerSequence[int | None]


class InputGuided(TextDrafter):
    """Drafts the rest of the input as one chain, for answers that nearly copy it (correction,
    editing, simplification).

    It begins with the first token of the input. Where the answer departs from the input, copying
    goes on after the shortest suffix of the answer that occurs once in the input; until there is
    one, nothing is drafted. (The paper's code does so after every call. Here a chain that the
    budget has cut goes on without a match, as the whole input would.)

    The input is the prompt: of an encoder-decoder model what its encoder reads, of a decoder-only
    one all of the prompt. Drafts end before an end-of-sequence token, which costs nothing: the
    target gives the token after the draft itself.

    Args:
        shape: the target's dimensions.
        longest: tokens of the longest suffix that is looked up (3 in the paper).
        tokens: at most so many are drafted, unless a method's budget says otherwise (inferred; in
            the paper all of the rest).
    """

    def __init__(self, shape: TargetShape, longest: int = 3, tokens: int = 64) -> None:
        super().__init__(shape)
        for name, value in (("longest", longest), ("tokens", tokens)):
            if value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        self.longest, self.tokens = longest, tokens

    @property
    def default_budget(self) -> int:
        """The constructor's argument `tokens`."""
        return self.tokens

    def start(self, context: Context) -> InputState:
        """State with the inputs, read up to the first token."""
        begun = super().start(context)
        lengths, newest = context.lengths_B.tolist(), context.newest_B.tolist()
        sources = PerSequence(
            Source(text[:count], self.longest)
            for text, count in zip(context.input_ids_BT.tolist(), lengths, strict=True)
        )
        places = PerSequence(
            source.follow(0, [token], [token])
            for source, token in zip(sources, newest, strict=True)
        )
        return InputState(context, begun.newest_B, begun.lengths_B, begun.text_BL, sources, places)

    def propose(self, state: DraftState, budget: int) -> TokenTree:
        """A chain of at most `budget` tokens."""
        assert isinstance(state, InputState)
        drafts = []
        for source, place in zip(state.sources, state.places, strict=True):
            rest = [] if place is None else source.tokens[place : place + budget]
            ends = state.context.target.eos_ids
            stop = next((i for i, token in enumerate(rest) if token in ends), len(rest))
            drafts.append(torch.tensor(rest[:stop], dtype=torch.long, device=state.newest_B.device))
        return chains(state.newest_B, drafts)

    def absorb(self, state: DraftState, verified: Verified, accepted: Accepted) -> InputState:
        """State with the emitted tokens, and copying going on after them."""
        assert isinstance(state, InputState)
        went_on = super().absorb(state, verified, accepted)
        assert isinstance(went_on, InputState)
        prompts = state.context.lengths_B.tolist()
        places = PerSequence(
            source.follow(place, text[-count:], text[prompt:])
            for source, place, text, prompt, count in zip(
                state.sources, state.places, went_on.texts(), prompts, accepted.lengths, strict=True
            )
        )
        return replace(went_on, places=places)
