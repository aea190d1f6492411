"""Exact probabilities of the next byte from a model of tokens (Phan et al. 2024, arXiv 2410.09303).

The text is a string of bytes x that may end anywhere, inside of a token too. P(x) is the sum over
its cover encodings: tokens t_1 … t_m that the tokenizer would write, whose bytes start with x while
those of t_1 … t_{m-1} are shorter than x. All but the last token of a cover are the encoding of a
prefix of x, here a *context*; so one row of the model per context gives the probabilities of all
covers.

Shape legend: V vocabulary, C covers.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from copy import copy
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from modules.byte_level.vocabulary import ByteVocabulary, going_on, unfinished, word_begins

END = 256
"""The outcome beside the 256 bytes: the text ends."""
Tokens = tuple[int, ...]


class TokenModel(Protocol):
    """Distributions of the next token after a text and further tokens."""

    def log_probs(self, contexts: Sequence[Tokens]) -> list[Tensor]:
        """Natural log probabilities [V] of the token after each context, in float64."""
        ...

    def commit(self, tokens: Tokens) -> None:
        """Begin all later contexts with these tokens, which are then left out of them."""
        ...


@dataclass
class Context:
    """Tokens after the committed ones that spell the text up to byte `end`.

    log_prob: of the tokens, those committed since the beginning included.
    next_V: log probabilities of the token after them.
    written: tokens that were checked, and whether the tokenizer writes them here.
    """

    tokens: Tokens
    end: int
    log_prob: float
    next_V: Tensor
    written: dict[int, bool] = field(default_factory=dict)


@dataclass(frozen=True)
class Covers:
    """Covers that are longer than the text.

    contexts_C: which context each one has. tokens_C: its last token. log_probs_C: of all of its
    tokens. bytes_C: its first byte after the text.
    """

    contexts_C: Tensor
    tokens_C: Tensor
    log_probs_C: Tensor
    bytes_C: Tensor

    def select(self, places: Tensor) -> Covers:
        """The covers at these places alone."""
        parts = (self.contexts_C, self.tokens_C, self.log_probs_C, self.bytes_C)
        return Covers(*(part[places] for part in parts))


class ByteText:
    """A text of bytes, and the model's probabilities of what comes next.

    Where the model gives probability to tokens that its tokenizer would not write, the outcomes are
    normalised without these.

    Args:
        model: read after what stands before the text.
        vocabulary: of the model's tokenizer.
        end_ids: tokens that end a text.
        text: to begin with.
        unchecked: share of probability whose covers are taken without asking the tokenizer, the
            least likely ones; 1 checks none ("fast mode"), 0 all.
        begins: whether a text begins here, before which SentencePiece puts a space.
    """

    def __init__(
        self,
        model: TokenModel,
        vocabulary: ByteVocabulary,
        end_ids: frozenset[int],
        text: bytes = b"",
        unchecked: float = 1e-4,
        begins: bool = True,
    ) -> None:
        if not 0 <= unchecked <= 1:
            raise ValueError(f"unchecked must lie between 0 and 1, got {unchecked}")
        self.model, self.vocabulary, self.unchecked = model, vocabulary, unchecked
        self.end_ids = sorted(i for i in end_ids if i not in vocabulary.data)
        self._begun = vocabulary.begin(b"") if begins else b""
        self._text = self._begun + text
        # The committed part of the text: bytes, tokens and their log probability.
        self._anchor, self._log_prob = 0, 0.0
        self._before: Tokens = ()
        self._tokens: dict[int, list[Tokens]] = {0: [()]}
        self._contexts: list[Context] = []
        self._stale, self._branch = True, False

    @property
    def text(self) -> bytes:
        """The bytes so far."""
        return self._text[len(self._begun) :]

    @property
    def tokens(self) -> Tokens:
        """The tokens of the text as far as it has whole characters."""
        open_bytes, _ = unfinished(self._text)
        whole = self._text[self._anchor : len(self._text) - open_bytes]
        return self._before + (self.vocabulary.encode(whole) or ())

    def extend(self, data: bytes) -> None:
        """Append bytes to the text."""
        self._text += data
        self._stale = True

    def next_byte(self) -> Tensor:
        """Probabilities [257] of the next byte, in float64; the last one is that the text ends.

        Raises:
            ValueError: no token of the vocabulary goes on with the text.
        """
        contexts = self._read()
        covers = self._longer(contexts)
        probs = torch.zeros(END + 1, dtype=torch.double)
        probs.index_add_(0, covers.bytes_C, covers.log_probs_C.exp())
        for context in contexts:
            if context.end == len(self._text) and self.end_ids:
                ended = context.next_V[self.end_ids].logsumexp(0) + context.log_prob
                probs[END] += float(ended.exp())
        # Covers that were not checked may be no UTF-8, with which no text goes on.
        opened = self._text[len(self._text) - unfinished(self._text)[0] :]
        readable = torch.zeros_like(probs)
        readable[[*going_on(opened), END]] = 1.0
        probs *= readable
        if not float(probs.sum()) > 0:
            raise ValueError(
                f"no token goes on with {self.text[-16:]!r}: the text is no UTF-8, or the "
                "tokenizer cannot write it"
            )
        return probs / probs.sum()

    def log_prob(self) -> float:
        """log P(x), the probability that the text after what was read begins with these bytes."""
        contexts = self._read()
        longer = self._longer([c for c in contexts if c.end < len(self._text)]).log_probs_C
        exact = [context.log_prob for context in contexts if context.end == len(self._text)]
        every = torch.cat([longer, torch.tensor(exact, dtype=torch.double)])
        return float(every.logsumexp(0)) + self._log_prob if len(every) else -math.inf

    def ahead(self) -> list[tuple[bytes, Tensor]]:
        """Of every context its bytes of the text that its last token has to spell, and the joint
        log probabilities [V] of the text and that token (for tokens that spell them)."""
        return [(self._text[c.end :], c.next_V + c.log_prob) for c in self._read()]

    def branch(self) -> ByteText:
        """A copy whose text may go on otherwise. It shares the model's rows, and commits none."""
        other = copy(self)
        other._tokens, other._branch = dict(self._tokens), True
        return other

    # -- contexts ----------------------------------------------------------------------------------

    def _read(self) -> list[Context]:
        """The contexts of all covers, with the model's distributions after them."""
        if not self._stale:
            return self._contexts
        # 1. Ends of contexts from which some token reaches the end of the text.
        size, data = len(self._text), self.vocabulary
        first = max(self._anchor, size - data.longest)
        ends = [i for i in range(first, size) if not _empty(data.starting(self._text[i:]))]
        self._advance(min([*ends, size]))
        # 2. Run those that are new in one call.
        seen = {context.tokens: context for context in self._contexts}
        wanted = [(tokens, i) for i in [*ends, size] for tokens in self._tokens_at(i)]
        paths = [
            tokens[:n] for tokens, _ in wanted if tokens not in seen for n in range(len(tokens) + 1)
        ]
        paths = list(dict.fromkeys(paths))
        after = dict(zip(paths, self.model.log_probs(paths), strict=True))
        # 3. The probability of each is that of its path.
        self._contexts = [
            seen[tokens]
            if tokens in seen
            else Context(
                tokens,
                i,
                sum(float(after[tokens[:n]][token]) for n, token in enumerate(tokens)),
                after[tokens],
            )
            for tokens, i in wanted
        ]
        self._stale = False
        return self._contexts

    def _tokens_at(self, end: int) -> list[Tokens]:
        """Tokens after the committed ones that spell the text up to `end`: what the tokenizer
        writes, and inside of a character every way to write its bytes."""
        if end not in self._tokens:
            part = self._text[self._anchor : end]
            whole = None if unfinished(part)[0] else self.vocabulary.encode(part)
            self._tokens[end] = [whole] if whole is not None else self._pieced(end)
        return self._tokens[end]

    def _pieced(self, end: int) -> list[Tokens]:
        """Tokens that end inside of a character, one more than those of an earlier place."""
        sequences = []
        for start in range(max(self._anchor, end - self.vocabulary.longest), end):
            piece, exact = self._text[start:end], []
            for k in range(self.vocabulary.starting(piece).start, len(self.vocabulary.sorted)):
                if self.vocabulary.sorted[k] != piece:
                    break
                exact.append(int(self.vocabulary.ids_S[k]))
            if exact:
                sequences += [(*tokens, i) for tokens in self._tokens_at(start) for i in exact]
        return [
            ids
            for ids, good in zip(sequences, self.vocabulary.written(sequences), strict=True)
            if good
        ]

    def _advance(self, earliest: int) -> None:
        """Commit the text before the last word that begins at or before the first context's end, so
        that no cover reaches over the border."""
        border = earliest
        while border > self._anchor and not word_begins(self._text, border):
            border -= 1
        tokens = self.vocabulary.encode(self._text[self._anchor : border])
        if border <= self._anchor or tokens is None or self._branch:
            return
        # 1. The probability of what is committed.
        after = self.model.log_probs([tokens[:n] for n in range(len(tokens))])
        gained = sum(float(after[n][token]) for n, token in enumerate(tokens))
        # 2. Contexts go on without these tokens.
        self.model.commit(tokens)
        self._contexts = [
            Context(c.tokens[len(tokens) :], c.end, c.log_prob - gained, c.next_V, c.written)
            for c in self._contexts
            if c.tokens[: len(tokens)] == tokens
        ]
        self._log_prob += gained
        self._before += tokens
        self._anchor, self._tokens = border, {border: [()]}

    # -- covers ------------------------------------------------------------------------------------

    def _longer(self, contexts: Sequence[Context]) -> Covers:
        """Covers whose last token goes beyond the text, without those that the tokenizer does not
        write."""
        data, rows = self.vocabulary, []
        for number, context in enumerate(contexts):
            # Tokens that begin with the rest of the text and are longer.
            longer = data.longer(self._text[context.end :])
            ids = longer.ids_S.to(context.next_V.device)
            log_probs_C = context.next_V[ids].cpu() + context.log_prob
            number_C = torch.full_like(longer.ids_S, number)
            rows.append(Covers(number_C, longer.ids_S, log_probs_C, longer.bytes_S))
        if not rows:
            none = torch.zeros(0, dtype=torch.long)
            return Covers(none, none, none.double(), none)
        names = ("contexts_C", "tokens_C", "log_probs_C", "bytes_C")
        covers = Covers(*(torch.cat([getattr(row, name) for row in rows]) for name in names))
        return self._written(contexts, covers)

    def _written(self, contexts: Sequence[Context], covers: Covers) -> Covers:
        """The covers that the tokenizer writes, likeliest first; the last `unchecked` of their
        probability are not checked."""
        covers = covers.select(covers.log_probs_C.argsort(descending=True))
        if not len(covers.tokens_C):
            return covers
        share_C = (covers.log_probs_C - covers.log_probs_C[0]).exp()
        rest_C = share_C.flip(0).cumsum(0).flip(0)
        count = int((rest_C > self.unchecked * rest_C[0]).sum()) if self.unchecked < 1 else 0
        pairs = list(
            zip(covers.contexts_C[:count].tolist(), covers.tokens_C[:count].tolist(), strict=True)
        )
        # Ask the tokenizer about those that were not asked about before.
        new = [(n, token) for n, token in pairs if token not in contexts[n].written]
        verdicts = self.vocabulary.written([(*contexts[n].tokens, token) for n, token in new])
        for (n, token), good in zip(new, verdicts, strict=True):
            contexts[n].written[token] = good
        good_C = torch.ones(len(covers.tokens_C), dtype=torch.bool)
        good_C[:count] = torch.tensor(
            [contexts[n].written[token] for n, token in pairs], dtype=torch.bool
        )
        return covers.select(good_C)


def _empty(places: slice) -> bool:
    return places.start >= places.stop
