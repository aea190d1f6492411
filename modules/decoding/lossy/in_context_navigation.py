"""In-context navigation: answers that were found go into the prompt, and another one is asked for
(Peng et al. 2024, arXiv 2410.02284); and self-consistency over answers that begin differently.

Tokens whose keys (rows of the LM head) lie near that of the likeliest one rank high whether they
are right or not. A list of found answers moves the query away from their keys.

Shape legend: B answers, V vocabulary, H hidden size.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from modules.decoding.loop import Trace
from modules.decoding.lossy.several_answers import SeveralAnswers
from modules.decoding.timing import Clock
from modules.runtime.numbers import final_number
from modules.target.session import Session
from modules.target.target import Target

LINES = re.compile(r"\s*\n\s*")


class KeptText:
    """A text in a KV cache. Reading another one keeps their common beginning.

    Args:
        target: the model that reads.
        capacity: tokens of the longest text.
    """

    def __init__(self, target: Target, capacity: int) -> None:
        self.target, self.session = target, target.open(1, capacity)
        self._ids: list[int] = []

    def read(self, ids: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Logits [V] after the text, and the query [H] that they come from."""
        # At least the last token is read, so that there are logits.
        common = 0
        while common < min(len(self._ids), len(ids) - 1) and self._ids[common] == ids[common]:
            common += 1
        if self._ids:
            self.session.rewind(torch.tensor([common]))
        ids_BT = torch.tensor([list(ids[common:])], device=self.target.device)
        count_B = torch.tensor([ids_BT.shape[1]], device=self.target.device)
        logits_BV, states = self.session.prefill(ids_BT, count_B, ("final",))
        self._ids = list(ids)
        return logits_BV[0], states["final"][0, -1]


class Exploring(SeveralAnswers):
    """Base of decoders whose answers begin with different tokens.

    Args:
        target: the model that answers.
        answers: how many.
        opening: text that begins the model's answer.
        item: text before each answer, with its `{number}`.
        candidates: likeliest first tokens that are looked at.

    Raises:
        ValueError: no answer, more answers than candidates, or another field in `item`.
    """

    def __init__(
        self, target: Target, answers: int, opening: str, item: str, candidates: int
    ) -> None:
        super().__init__(target)
        if not 1 <= answers <= candidates:
            raise ValueError(
                f"answers must lie between 1 and candidates, got {answers} and {candidates}"
            )
        try:
            item.format(number=1)
        except (AttributeError, LookupError, ValueError) as error:
            raise ValueError(
                f"item {item!r} cannot be filled in ({error}): write {{number}} for the number of "
                "an answer, and other braces twice"
            ) from None
        self.count, self.opening, self.item, self.candidates = answers, opening, item, candidates

    def listed(self, prompt: list[int], answers: Sequence[str]) -> list[int]:
        """The prompt, then the answers in a list that asks for another one. An answer of several
        lines is listed on one.
        """
        lines = [
            self.item.format(number=n) + LINES.sub(" ", text.rstrip()) + "\n"
            for n, text in enumerate(answers, 1)
        ]
        text = self.opening + "".join(lines) + self.item.format(number=len(answers) + 1)
        return [*prompt, *self.target.tokenizer.encode(text, add_special_tokens=False)]

    def unused(self, logits_V: Tensor, used: Iterable[str]) -> list[int]:
        """The likeliest tokens, of those with the same string the first, none with a used one."""
        seen, tokens = set(used), []
        for token in logits_V.topk(min(self.candidates, len(logits_V))).indices.tolist():
            text = self.spelled(token)
            if text not in seen:
                seen.add(text)
                tokens.append(token)
        return tokens

    def spelled(self, token: int) -> str:
        """The string of a token, by which first tokens are compared; spaces around do not count."""
        text = self.target.tokenizer.decode([token])
        return text.strip() or text

    def check_room(self, length: int, limit: int) -> None:
        """ValueError for a list that leaves no room for an answer."""
        if length + limit > self.target.max_positions:
            raise ValueError(
                f"a prompt with {length} tokens of found answers and {limit} new ones exceed the "
                f"target's context of {self.target.max_positions}: ask for fewer or shorter answers"
            )


def greedy(
    session: Session, first: list[int], limit: int, stops: frozenset[int]
) -> list[list[int]]:
    """Continue the session's sequences greedily after their first tokens, as one batch."""
    answers, alive = [[token] for token in first], list(range(len(first)))
    while True:
        # 1. Answers that have ended leave the batch.
        running = [
            row
            for row, number in enumerate(alive)
            if len(answers[number]) < limit and answers[number][-1] not in stops
        ]
        if len(running) < len(alive):
            alive = [alive[row] for row in running]
            if not alive:
                return answers
            session.keep(running)
        # 2. One token each.
        newest_B1 = torch.tensor([answers[number][-1:] for number in alive])
        newest_B1 = newest_B1.to(session.target.device)
        logits_BV, _ = session.prefill(newest_B1, torch.ones_like(newest_B1[:, 0]))
        for number, token in zip(alive, logits_BV.argmax(-1).tolist(), strict=True):
            answers[number].append(token)


class InContextNavigation(Exploring):
    """Each answer begins with the likeliest token after the list of those before it whose string
    began none of them, and goes on greedily after the prompt without the list (the released
    setting). One answer is greedy decoding.

    Reports state how near the query is to the mean key of the first tokens found before, as
    cosines, without the list and with it (`explored_cosine_plain`, `explored_cosine_listed`).

    Args:
        target: the model that answers.
        answers: how many are looked for (R).
        opening, item, candidates: as in `Exploring`.
    """

    name = "in_context_navigation"

    def __init__(
        self,
        target: Target,
        answers: int = 4,
        opening: str = "Here are different answers:\n",
        item: str = "{number}.",
        candidates: int = 100,
    ) -> None:
        super().__init__(target, answers, opening, item, candidates)

    def answer(self, prompt: list[int], limit: int, trace: Trace, clock: Clock) -> None:
        """Explore one answer after another; the prompt is read once."""
        plain = self.listed(prompt, [])
        self.check_room(len(plain), limit)
        text, texts, first = KeptText(self.target, len(plain) + limit + 1), [], []
        query_H = None
        for _ in range(self.count):
            # 1. The list, and a first token that no answer has.
            context = self.listed(prompt, texts)
            self.check_room(len(context), limit)
            text.session.reserve(len(context) + limit + 1)
            with clock.phase("draft" if first else "prefill"):
                logits_V, listed_H = text.read(context)
            query_H = listed_H if query_H is None else query_H
            self._report(first, query_H, listed_H, trace)
            tokens = self.unused(logits_V, map(self.spelled, first))
            if not tokens:
                break
            first.append(tokens[0])
            # 2. Its continuation after the prompt alone.
            with clock.phase("verify"):
                text.read(plain)
                trace.answers += greedy(text.session, first[-1:], limit, self.target.eos_ids)
                text.session.rewind(torch.tensor([len(plain)]))
            texts.append(self.target.tokenizer.decode(trace.answers[-1], skip_special_tokens=True))

    def _report(self, first: list[int], plain_H: Tensor, listed_H: Tensor, trace: Trace) -> None:
        """Note the cosines of both queries with the mean key of the first tokens."""
        if first:
            ids = torch.tensor(first, device=plain_H.device)
            key_H = self.target.lm_head_rows(ids).float().mean(0)
            for name, query_H in (("plain", plain_H), ("listed", listed_H)):
                cosine = torch.cosine_similarity(query_H.float(), key_H, dim=0)
                trace.figures.setdefault(f"explored_cosine_{name}", []).append(float(cosine))


class SelfConsistency(Exploring):
    """Answers that begin with the n likeliest tokens of different strings, continued greedily as
    one batch that shares the prompt's KV. The answer is one whose last number most of them have,
    the earliest of those. Reports state the share that agrees with it (`agreement`).

    Args:
        target: the model that answers.
        answers: n.
        opening, item, candidates: as in `Exploring`.
    """

    name = "self_consistency"

    def __init__(
        self,
        target: Target,
        answers: int = 4,
        opening: str = "",
        item: str = "",
        candidates: int = 100,
    ) -> None:
        super().__init__(target, answers, opening, item, candidates)

    def answer(self, prompt: list[int], limit: int, trace: Trace, clock: Clock) -> None:
        """Begin differently, continue together, and vote."""
        plain = self.listed(prompt, [])
        self.check_room(len(plain), limit)
        text = KeptText(self.target, len(plain) + limit)
        with clock.phase("prefill"):
            logits_V, _ = text.read(plain)
        first = self.unused(logits_V, ())[: self.count]
        with clock.phase("verify"):
            text.session.keep([0] * len(first))
            answers = greedy(text.session, first, limit, self.target.eos_ids)
        numbers = [
            last_value(self.target.tokenizer.decode(ids, skip_special_tokens=True))
            for ids in answers
        ]
        votes = Counter(number for number in numbers if number is not None)
        best = max(votes, key=lambda number: votes[number]) if votes else None
        # The answers of the majority come first, otherwise they keep their order.
        order = sorted(range(len(answers)), key=lambda n: numbers[n] != best)
        trace.answers = [answers[n] for n in order]
        trace.figures["agreement"] = [votes[best] / len(answers) if best is not None else 0.0]


def last_value(text: str) -> float | None:
    """The last number of a text; None without one."""
    number = final_number(text)
    return None if number is None else float(number)
