"""RASD: retrieved continuations, pruned by a drafter's distributions and fused with its tree (Quan
et al. 2025, arXiv 2503.03434).

Shape legend: B sequences, W frontier rows, V target vocabulary, D draft vocabulary, T tokens of a
text, C continuations, L tokens of one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from modules.contracts.drafter import Drafter, DraftState, Frontier, TreeBuilder
from modules.contracts.shapes import TargetShape
from modules.contracts.token_tree import TokenTree
from modules.drafters.retrieval.partner import Partnered, PartneredState, as_trie
from modules.drafters.retrieval.rest import Rest
from modules.trees.candidates import log_probs
from modules.trees.trie import END, Trie, batch_of_trees, frequent_prefixes

EXAMINED = 8
"""Retrieved prefixes examined per node of the budget: a drafter rules some out, and others are
already in its tree."""
Ranked = list[tuple[list[int], int]]
"""Continuations and their numbers of occurrences."""
Columns = NDArray[np.int64]


class RecordingDrafter:
    """A drafter, as tree builders see it, that records the distributions it returns.

    Args:
        drafter: the drafter that is wrapped.
    """

    def __init__(self, drafter: Drafter) -> None:
        self._drafter = drafter
        self.tokens: list[Tensor] = []
        self.parents: list[Tensor] = []
        self.distributions: list[Tensor] = []

    @property
    def vocabulary_D(self) -> Tensor | None:
        """Target ids that the drafter can draft [D]; None: all."""
        return self._drafter.vocabulary_D

    def expand(self, state: DraftState, frontier: Frontier) -> Tensor:
        """The drafter's logits [B,W,D]; their distribution is recorded."""
        logits_BWD = self._drafter.expand(state, frontier)
        self.tokens.append(frontier.tokens_BW)
        self.parents.append(frontier.parents_BW.expand_as(frontier.tokens_BW))
        self.distributions.append(log_probs(logits_BWD.detach()).exp())
        return logits_BWD

    def opinions(self, texts: list[list[int]], vocab_size: int) -> list[DraftDistributions]:
        """The recorded distributions of each sequence, given the texts so far."""
        columns_V = columns_of(self.vocabulary_D, vocab_size)
        shares = [share_outside(text, columns_V) for text in texts]
        if not self.distributions:
            return [DraftDistributions([], [], None, columns_V, share) for share in shares]
        tokens, parents = torch.cat(self.tokens, 1).tolist(), torch.cat(self.parents, 1).tolist()
        probs_BWD = torch.cat(self.distributions, 1).cpu()
        return [
            DraftDistributions(words, above, probs_WD, columns_V, share)
            for words, above, probs_WD, share in zip(
                tokens, parents, probs_BWD, shares, strict=True
            )
        ]


def columns_of(vocabulary_D: Tensor | None, vocab_size: int) -> Columns | None:
    """Int64 [V]: the column of every token in a draft vocabulary, -1 outside; None without one."""
    if vocabulary_D is None:
        return None
    columns_V = np.full(vocab_size, -1, dtype=np.int64)
    columns_V[vocabulary_D.cpu().numpy()] = np.arange(len(vocabulary_D))
    return columns_V


def share_outside(text: list[int], columns_V: Columns | None) -> float:
    """Probability that the next token is outside the draft vocabulary: the share of such tokens in
    the text, by the rule of succession (one of each kind added).
    """
    if columns_V is None:
        return 0.0
    return (int((columns_V[text] < 0).sum()) + 1) / (len(text) + 2)


@dataclass
class DraftDistributions:
    """A drafter's distributions [W,D] at the W nodes that it expanded, with the tokens of these
    nodes and the row numbers of their parents.

    columns_V: the column of every token in the distributions, -1 outside; None: all tokens, in
    order.
    outside: the total probability of tokens outside. A drafter with a trimmed vocabulary has no
    estimate of them: its distributions cover the tokens inside, and are scaled by 1 - `outside`.
    """

    tokens: list[int]
    parents: list[int]
    probs_WD: Tensor | None
    columns_V: Columns | None = None
    outside: float = 0.0

    def __post_init__(self) -> None:
        """Index the rows by parent row and token."""
        self._rows = {
            (parent, token): row
            for row, (parent, token) in reversed(list(enumerate(zip(self.parents, self.tokens))))
        }

    def path_probability(self, path: Sequence[int], top: int, least: float) -> float | None:
        """The probability of the part of a path that the drafter has a distribution for; None when
        a token on it is neither among the `top` likeliest nor as likely as `least`.

        A token outside the draft vocabulary ends that part with the probability `outside`: the
        drafter cannot distinguish such tokens (inferred; the paper does not cover them).
        """
        row: int | None = 0
        product = 1.0
        # Follow the path through the expanded rows, as far as they reach.
        for token in path:
            if row is None or self.probs_WD is None:
                break
            column = token if self.columns_V is None else int(self.columns_V[token])
            if column < 0:
                return product * self.outside if self.outside >= least else None
            probs_D = self.probs_WD[row]
            probability = float(probs_D[column]) * (1 - self.outside)
            if probability < least and int((probs_D > probs_D[column]).sum()) >= top:
                return None
            product, row = product * probability, self._rows.get((row, token))
        return product


class Rasd(Partnered):
    """Continuations of the end of the text, retrieved from the text and optionally a corpus, fused
    with a drafter's tree. Without a partner only retrieval drafts. All nodes are point masses.

    Args:
        shape: the target's dimensions.
        partner: the drafter whose tree is fused; an evaluation names it as its methods name
            drafters. A partner that builds its own trees without a builder prunes nothing.
        datastore: folder that `python -m data.datastore` wrote; None retrieves from the text only.
        longest: tokens of the suffix looked up in the text.
        length: tokens of a continuation.
        top, least: a retrieved token stays when it is among the partner's `top` most likely tokens
            or has at least probability `least` (inferred, as is the treatment of tokens outside its
            vocabulary).
        retrieved: nodes of the budget that are reserved for retrieval.
        tokens: nodes drafted in all, unless a method's budget says otherwise (on GPUs about 90, of
            which 30 retrieved; inferred).
        builder: builds the partner's tree in place of its own builder; an evaluation names it as
            its methods do.
        text_match: tokens of the text's end that must occur earlier in the text for it to be used
            before the corpus; at `longest` + 1 the corpus always comes first. Where the first
            source has nothing, the other is used. The paper uses one of them only. Replaying 146
            held-out answers of the embedded target, with its answers to other prompts as the
            corpus, gave 1.92, 1.91 and 1.86 tokens per call at 1, 2 and 3, and 1.70 with the corpus
            first.

    Raises:
        ValueError: a partner or a builder whose trees cannot be fused.
    """

    def __init__(
        self,
        shape: TargetShape,
        partner: Drafter | None = None,
        datastore: str | None = None,
        longest: int = 3,
        length: int = 16,
        top: int = 10,
        least: float = 0.01,
        retrieved: int = 3,
        tokens: int = 7,
        builder: TreeBuilder | None = None,
        text_match: int = 1,
    ) -> None:
        if min(longest, length, top, retrieved) < 1 or tokens <= retrieved:
            raise ValueError(
                "longest, length, top and retrieved must be at least 1 and tokens above "
                f"retrieved, got {longest}, {length}, {top}, {retrieved} and {tokens}"
            )
        if not 1 <= text_match <= longest + 1:
            raise ValueError(
                f"text_match must lie between 1 and longest + 1 ({longest + 1}), got {text_match}"
            )
        super().__init__(shape, partner, builder)
        self.longest, self.length, self.text_match = longest, length, text_match
        self.top, self.least, self.retrieved, self.tokens = top, least, retrieved, tokens
        self.rest = None if datastore is None else Rest(shape, datastore, length=length)

    @property
    def default_budget(self) -> int:
        """The constructor's argument `tokens`."""
        return self.tokens

    def propose(self, state: DraftState, budget: int) -> TokenTree:
        """The partner's tree, then the retrieved paths that it does not rule out, the best
        first.
        """
        # The partner drafts first and leaves `retrieved` nodes; its distributions then prune paths.
        assert isinstance(state, PartneredState)
        drafted, recorder = self._partners_tree(state, max(1, budget - self.retrieved))
        tries, texts = [], state.texts()
        opinions = None if recorder is None else recorder.opinions(texts, self.shape.vocab_size)
        for sequence, text in enumerate(texts):
            trie = Trie(text[-1]) if drafted is None else as_trie(drafted, sequence)
            opinion = None if opinions is None else opinions[sequence]
            ranked = self.retrieve(text, budget if opinion is None else EXAMINED * budget)
            for path in prune(ranked, opinion, self.top, self.least):
                trie.fuse(path, budget + 1)
            tries.append(trie)
        return batch_of_trees(tries, state.newest_B.device)

    def _partners_tree(
        self, state: PartneredState, budget: int
    ) -> tuple[TokenTree | None, RecordingDrafter | None]:
        if self.partner is None or state.partner is None:
            return None, None
        if self.builds is None and type(self.partner).propose is not Drafter.propose:
            return self.partner.propose(state.partner, budget), None
        recorder, builder = RecordingDrafter(self.partner), self.builds or self.partner.builder
        return builder.build(recorder, state.partner, budget), recorder  # type: ignore[arg-type]

    def retrieve(self, text: list[int], most: int) -> Ranked:
        """The most frequent continuations in the text, otherwise in the corpus, otherwise in the
        text after a suffix shorter than `text_match`.
        """
        in_text = partial(matches, np.array(text), length=self.length)
        return (
            frequent_prefixes(in_text(self.longest, self.text_match), most)
            or (self.rest.retrieve(text, most) if self.rest is not None else [])
            or frequent_prefixes(in_text(self.text_match - 1), most)
        )


def matches(text_T: np.ndarray, longest: int, shortest: int = 1, *, length: int) -> np.ndarray:
    """Tokens after every earlier occurrence of the longest suffix that has one, of `longest` to
    `shortest` tokens: int64 [C,L], filled with `END` after the text.
    """
    for size in range(min(longest, len(text_T) - 1), shortest - 1, -1):
        windows = np.lib.stride_tricks.sliding_window_view(text_T[:-1], size)
        begins = np.flatnonzero((windows == text_T[-size:]).all(1)) + size
        if len(begins):
            padded = np.append(text_T, np.full(length, END))
            return padded[begins[:, None] + np.arange(length)]
    return np.empty((0, length), dtype=np.int64)


def prune(
    ranked: Ranked, opinion: DraftDistributions | None, top: int, least: float
) -> list[list[int]]:
    """The retrieved paths that the drafter does not rule out, ordered by its probability times
    their share of occurrences.
    """
    total = sum(count for path, count in ranked if len(path) == 1)
    judged = [
        (1.0 if opinion is None else opinion.path_probability(path, top, least), count, path)
        for path, count in ranked
    ]
    scored = [
        (-trust * count / total, len(path), path)
        for trust, count, path in judged
        if trust is not None
    ]
    return [path for _, _, path in sorted(scored, key=lambda entry: entry[:2])]
