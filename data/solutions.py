"""Problems with solutions that are known to be right or wrong: what judges and token-level preferences learn from."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

CALCULATION = re.compile(r"<<([^<>=]*)=([^<>]*)>>")
"""A calculator annotation, as in GSM8K: `9 * 20 = <<9*20=180>>180`."""
_NUMBER = re.compile(r"-?\d[\d,]*(?:\.\d+)?")
_ANSWER = re.compile(r"(?:A:|answer is|####)\s*\$?(-?\d[\d,]*(?:\.\d+)?)")
Span = tuple[int, int]


@dataclass(frozen=True)
class Solution:
    """A worked answer.

    text: without calculator annotations. right: whether its final answer is. error: characters of the first wrong
    result in `text`, where it is known.
    """

    text: str
    right: bool
    error: Span | None = None

    @property
    def answer(self) -> str | None:
        """Its final number as written; None if it states none."""
        found = _ANSWER.findall(self.text)
        return _plain(found[-1]) if found else None


@dataclass(frozen=True)
class Problem:
    """A question and solutions to it."""

    question: str
    solutions: tuple[Solution, ...]

    @property
    def right(self) -> list[Solution]:
        """The right ones, in order."""
        return [solution for solution in self.solutions if solution.right]

    @property
    def wrong(self) -> list[Solution]:
        """The wrong ones, in order."""
        return [solution for solution in self.solutions if not solution.right]


def is_problem(row: Mapping[str, Any]) -> bool:
    """Whether a row holds solutions known to be right or wrong: ours (`solution`, `wrong`) or OpenAI's
    (`ground_truth`, and `{is_correct, solution}` under any other key)."""
    return isinstance(row.get("question"), str) and (
        isinstance(row.get("solution"), str) and isinstance(row.get("wrong"), str)
        or isinstance(row.get("ground_truth"), str))


def read_problem(row: Mapping[str, Any]) -> Problem:
    """A problem from a row that `is_problem`. The error of a wrong solution is what `error` says, or else the first
    calculated result that no right solution has (unknown without calculator annotations)."""
    if "ground_truth" not in row:
        error = tuple(row["error"]) if row.get("error") else None
        return Problem(row["question"], (Solution(row["solution"], True), Solution(row["wrong"], False, error)))
    tried = [value for value in row.values() if isinstance(value, Mapping) and isinstance(value.get("solution"), str)]
    right = [row["ground_truth"], *(one["solution"] for one in tried if one.get("is_correct"))]
    known = {_plain(result) for text in right for _, result in CALCULATION.findall(text)}
    wrong = [one["solution"] for one in tried if not one.get("is_correct")]
    return Problem(row["question"], (*(Solution(_clean(text), True) for text in right),
                                     *(Solution(_clean(text), False, first_error(text, known)) for text in wrong)))


def first_error(text: str, known: set[str]) -> Span | None:
    """Characters, in the text without annotations, of the first calculated result that is not among `known`."""
    for found in CALCULATION.finditer(text):
        if _plain(found[2]) not in known:
            start = len(_clean(text[:found.start()]))
            number = _NUMBER.match(_clean(text), start)
            return number.span() if number else None
    return None


def frequent_wrong(problem: Problem, mass: float = 0.5) -> list[Solution]:
    """The wrong solutions with the most frequent answers, until these cover `mass` of all wrong ones.

    Frequent mistakes are the model's own and not accidents (Lin et al. 2024, section 4.1). Solutions without a final
    number are left out.
    """
    wrong = [solution for solution in problem.wrong if solution.answer is not None]
    kept: set[str | None] = set()
    covered = 0
    for answer, count in Counter(solution.answer for solution in wrong).most_common():
        if covered >= mass * len(wrong):
            break
        kept.add(answer)
        covered += count
    return [solution for solution in wrong if solution.answer in kept]


def _clean(text: str) -> str:
    return CALCULATION.sub("", text)


def _plain(number: str) -> str:
    """A number without thousands separators and without a fraction of zero."""
    number = number.strip().replace(",", "")
    return number.rstrip("0").rstrip(".") if "." in number else number
