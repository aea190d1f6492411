"""Momentum decoding: greedy decoding with a resistance against repeated n-grams (Lan et al. 2022,
arXiv 2212.02175). Lossy; its choices are deterministic, so that drafts of it can be verified.

Shape legend: B sequences, N tree nodes, V vocabulary, K candidates.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from modules.acceptance.rejection import children_of, families
from modules.acceptance.rules import EVERY_DRAW, AcceptanceRule, Draws, accepted_paths
from modules.contracts.sampling import Sampling
from modules.contracts.shapes import StateName
from modules.contracts.token_tree import SiblingDraw, TokenTree
from modules.contracts.verification import Accepted, Verified
from modules.decoding.decoder import SpeculativeDecoder
from modules.decoding.loop import Observer, Run


class NGrams:
    """The n-grams of a text that grows, 1 ≤ n ≤ `longest`.

    Args:
        longest: tokens of the longest n-gram.
        text: tokens to begin with.
    """

    def __init__(self, longest: int, text: Iterable[int] = ()) -> None:
        self.longest = longest
        self._last: tuple[int, ...] = ()
        self._seen: set[tuple[int, ...]] = set()
        for token in text:
            self.append(token)

    def append(self, token: int) -> None:
        """Add the n-grams that end with this token."""
        ending = (*self._last, token)
        self._seen.update(ending[first:] for first in range(len(ending)))
        self._last = ending[max(0, len(ending) - self.longest + 1) :]

    def repeated(self, token: int) -> int:
        """Length of the longest n-gram of the text that the token, appended, would repeat; 0 if the
        text has no such token. The time does not depend on the text's length.
        """
        ending = (*self._last, token)
        return next(
            (len(ending) - first for first in range(len(ending)) if ending[first:] in self._seen), 0
        )


class MomentumDraws(Draws):
    """Choices of momentum decoding, one text per sequence.

    The next token maximises p(v) - α f(r(v)) over the K likeliest tokens (section 3 of the paper);
    r is the length of the n-gram that v would repeat, f(0) = 0. Ties go to the first id.

    Args:
        sampling: of temperature 0.
        texts: n-grams of each sequence.
        alpha, candidates, resistances: as in `MomentumDecoder`.
    """

    def __init__(
        self,
        sampling: Sampling,
        texts: list[NGrams],
        alpha: float,
        candidates: int,
        resistances: Sequence[float],
    ) -> None:
        super().__init__(sampling, [])
        self.texts, self.alpha, self.candidates = texts, alpha, candidates
        self.resistances = (0.0, *resistances)

    def select(self, sequences: list[int]) -> MomentumDraws:
        """The choices of these sequences alone."""
        texts = [self.texts[i] for i in sequences]
        return MomentumDraws(
            self.sampling, texts, self.alpha, self.candidates, self.resistances[1:]
        )

    def ranked(self, logits: Tensor) -> tuple[list, list]:
        """Probabilities and ids [..., K] of the likeliest tokens, on the host."""
        logits, count = logits.double(), min(self.candidates, logits.shape[-1])
        best, ids = logits.topk(count, dim=-1)
        return (best - logits.logsumexp(-1, keepdim=True)).exp().tolist(), ids.tolist()

    def next_token(self, sequence: int, probs_K: list[float], ids_K: list[int]) -> int:
        """The choice among the candidates, appended to the text."""
        text = self.texts[sequence]
        scores_K = [
            prob - self.alpha * self.resistances[text.repeated(token)]
            for prob, token in zip(probs_K, ids_K, strict=True)
        ]
        # Of equal scores the first id's, as `argmax` takes; never a token of probability 0.
        ranked = zip(probs_K, scores_K, ids_K, strict=True)
        *_, token = max(ranked, key=lambda each: (each[0] > 0, each[1], -each[2]))
        text.append(token)
        return token

    def choose(self, logits_BNV: Tensor) -> Tensor:
        """The next token of each sequence, int64 [B,1], from its only row."""
        probs, ids = self.ranked(logits_BNV[:, 0])
        tokens = [self.next_token(b, probs[b], ids[b]) for b in range(len(probs))]
        return torch.tensor(tokens, device=logits_BNV.device)[:, None]


class MomentumRule:
    """Accepts the nodes that momentum decoding chooses, whatever tree they are in."""

    name, lossless = "momentum", False
    sibling_draws: frozenset[SiblingDraw] = EVERY_DRAW
    states: tuple[StateName, ...] = ()

    def __call__(self, tree: TokenTree, verified: Verified, draws: Draws) -> Accepted:
        """Walk down from node 0 by the choices of `MomentumDraws`."""
        assert isinstance(draws, MomentumDraws)
        probs_BNK, ids_BNK = draws.ranked(verified.logits_BNV)
        tokens_BN, walks = tree.tokens_BN.tolist(), []
        for b, (probs_NK, ids_NK) in enumerate(zip(probs_BNK, ids_BNK, strict=True)):
            # Nodes with the same prefix go on together.
            family, nodes = families(tree, b), [0]
            while True:
                token = draws.next_token(b, probs_NK[nodes[0]], ids_NK[nodes[0]])
                chosen = [
                    node for node in children_of(family, nodes) if tokens_BN[b][node] == token
                ]
                if not chosen:
                    break
                nodes = chosen
            path_N = tree.topology.ancestors[b, nodes[0]]
            walks.append((path_N.nonzero()[:, 0].tolist(), token))
        return accepted_paths(walks, tree.tokens_BN.device)


@dataclass
class MomentumDecoder(SpeculativeDecoder):
    """Momentum decoding of one batch; with a drafter speculatively, with the same answers.

    Args:
        target, drafter, builder, budget, name, stop_ids: as in `SpeculativeDecoder`, which chooses
            no rule here.
        alpha: α, how much a resistance costs in probability. 0 is greedy decoding.
        candidates: k likeliest tokens of each step.
        resistances: f(1), f(2), …; as many as the longest n-gram that is looked for. The default is
            the paper's for English, `[1, 1, 2, 3, 4]` its Chinese one. Its infinite resistance of
            longer n-grams never occurs, as none longer is looked for.

    Raises:
        ValueError: a rule; a setting out of range; a temperature above 0.
    """

    claims_lossless: ClassVar[bool] = False
    name: str = "momentum"
    alpha: float = 0.2
    candidates: int = 5
    resistances: Sequence[float] = (1.0, 2.0, 3.0, 4.0, 5.0)

    def __post_init__(self) -> None:
        """Check the settings of the method and of its parts."""
        if self.rule is not None:
            raise ValueError("momentum decoding has a rule of its own: leave `rule` out")
        least = min(self.resistances, default=-1.0)
        if self.candidates < 1 or not self.alpha >= 0 or not least >= 0:
            raise ValueError(
                "momentum decoding needs candidates of at least 1, alpha and resistances of at "
                f"least 0, and one resistance, got {self.candidates}, {self.alpha} and "
                f"{list(self.resistances)}"
            )
        super().__post_init__()

    def rule_for(self, sampling: Sampling) -> AcceptanceRule:
        """The rule that verifies its choices."""
        return MomentumRule()

    def begin(
        self,
        prompts: Sequence[list[int]],
        sampling: Sampling,
        limit: int,
        observer: Observer | None = None,
        images: Sequence[Mapping[str, Any] | None] = (),
    ) -> Run:
        """One batch before its first step."""
        if sampling.temperature > 0:
            raise ValueError(
                f"{self.name} draws nothing: give the row temperature 0, got "
                f"{sampling.temperature:g}"
            )
        run = super().begin(prompts, sampling, limit, observer, images)
        texts = [NGrams(len(self.resistances), prompt) for prompt in prompts]
        run.draws = MomentumDraws(sampling, texts, self.alpha, self.candidates, self.resistances)
        return run
