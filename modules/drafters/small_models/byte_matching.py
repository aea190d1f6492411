"""A drafter of another tokenizer whose distribution is that of the next bytes.

Exact byte-level probabilities (Phan et al. 2024, arXiv 2410.09303) as draft distribution of
string-level speculation (Timor et al. 2025, arXiv 2502.05202).

Shape legend: B sequences, W frontier nodes, S tokens of the drafter, V target vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from modules.byte_level.covers import ByteText
from modules.byte_level.token_rows import TokenRows
from modules.contracts.drafter import Context, DraftState, Frontier
from modules.contracts.shapes import TargetShape
from modules.contracts.target import Target
from modules.contracts.verification import Accepted, Verified
from modules.drafters.retrieval.base import PerSequence
from modules.drafters.small_models.universal import Universal
from modules.target.target import Target as LoadedTarget
from modules.trees.sampled.chain import SampledChain


@dataclass
class ByteState(DraftState):
    """texts: of every sequence. drafts: in a proposal, the same with the tokens drafted so far."""

    texts: PerSequence[ByteText] = field(default_factory=PerSequence)
    drafts: PerSequence[ByteText] = field(default_factory=PerSequence)


class ByteMatching(Universal):
    """Draws a string that the drafter's next token would spell after the text, and drafts the first
    token with which the target's vocabulary spells it.

    The text may end inside of one of the drafter's tokens: all tokens that cover its end count,
    each with what it has beyond the end. So q(v) sums their probabilities over all whose rest
    begins with the target's token v, the longest that fits. No string is left out, as in an
    intersection of the vocabularies, and q is known, so that the ratio rule is lossless. The
    tokenizer is not asked whether it would write a cover.

    Sequences of a batch are drafted for one after another.

    Args:
        shape, model, draft_length: as in `Universal`; the length is in the target's tokens.
    """

    def __init__(
        self, shape: TargetShape, model: str | LoadedTarget, draft_length: int = 4
    ) -> None:
        super().__init__(shape, model, draft_length)
        self._builder = SampledChain(draft_length)
        self._first: dict[bytes, Tensor] = {}

    @property
    def builder(self) -> SampledChain:
        """A chain drawn from the distribution."""
        return self._builder

    @property
    def default_budget(self) -> int:
        """As many tokens as it drafts in a row."""
        return self.draft_length

    def adapt(self, target: Target) -> Target:
        """The target itself; what was found for another one is forgotten."""
        self._first = {}
        return super().adapt(target)

    def first(self, begun: bytes) -> Tensor:
        """The target's first token [S] of what the drafter's tokens spell beyond these bytes, the
        longest that fits; -1 where there is none."""
        if begun not in self._first:
            ids = []
            for i in self.own.longer(begun).ids_S.tolist():
                rest = self.own.data[i][len(begun) :]
                ends = range(min(len(rest), self.theirs.longest), 0, -1)
                match = (self.theirs.by_bytes.get(rest[:end]) for end in ends)
                ids.append(next((token for token in match if token is not None), -1))
            self._first[begun] = torch.tensor(ids, dtype=torch.long)
        return self._first[begun]

    def start(self, context: Context) -> ByteState:
        """State with every text's beginning read and its last word open."""
        texts = PerSequence[ByteText]()
        model = self.language_model
        rows = zip(context.input_ids_BT.tolist(), context.lengths_B.tolist(), strict=True)
        for (ids, length), newest in zip(rows, context.newest_B.tolist(), strict=True):
            text = self.rewritten(ids[:length], context.target)
            before = text.fixed or [min(model.eos_ids)]
            spelled = text.tail + self.theirs.spelled([newest])
            begins = not text.tail and before[-1] not in self.own.data
            rows_of = TokenRows(model, before)
            texts.append(ByteText(rows_of, self.own, model.eos_ids, spelled, 1.0, begins))
        return ByteState(context, context.newest_B, context.lengths_B, texts, texts)

    def expand(self, state: DraftState, frontier: Frontier) -> Tensor:
        """Log probabilities [B,1,V] of the next token after the newest one of a chain."""
        assert isinstance(state, ByteState)
        if frontier.depth == 0:
            state.drafts = PerSequence(text.branch() for text in state.texts)
        else:
            for text, token in zip(state.drafts, frontier.tokens_BW[:, 0].tolist(), strict=True):
                text.extend(self.theirs.spelled([token]))
        rows = [self.distribution(text, state.context.target) for text in state.drafts]
        return torch.stack(rows)[:, None].to(frontier.tokens_BW.device)

    def distribution(self, text: ByteText, target: Target) -> Tensor:
        """Log probabilities [V] of the target's next token; uniform where nothing goes on."""
        probs_V = torch.zeros(target.shape.vocab_size, dtype=torch.double)
        for begun, log_probs_V in text.ahead():
            first_S = self.first(begun)
            probs_S = log_probs_V.cpu()[self.own.longer(begun).ids_S].exp()
            probs_V.index_add_(0, first_S.clamp(min=0), probs_S * (first_S >= 0))
            if not begun:
                for drafted, end in self.ends(target).items():
                    probs_V[end] += float(log_probs_V[drafted].exp())
        return probs_V.log() if float(probs_V.sum()) > 0 else torch.zeros_like(probs_V)

    def absorb(self, state: DraftState, verified: Verified, accepted: Accepted) -> ByteState:
        """State with the emitted tokens' bytes appended."""
        assert isinstance(state, ByteState)
        emitted = accepted.emitted(verified.tree).tolist()
        for text, ids, count in zip(state.texts, emitted, accepted.lengths_B.tolist(), strict=True):
            text.extend(self.theirs.spelled(ids[:count]))
        lengths_B = state.lengths_B + accepted.lengths_B
        return replace(state, newest_B=accepted.next_B, lengths_B=lengths_B, drafts=state.texts)
