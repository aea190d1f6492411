"""Problems with solutions that are known to be right or wrong: what judges and token-level
preferences learn from.
"""

from __future__ import annotations

import ast
import operator
import random
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from math import isclose
from typing import Any

from data.corpora.word_problems import mistaken
from data.labelled.numbers import plain_number
from data.reading.files import Skipped

CALCULATION = re.compile(r"<<([^<>=]*)=([^<>]*)>>")
"""A calculator annotation, as in GSM8K: `9 * 20 = <<9*20=180>>180`."""
_OPERAND = re.compile(r"\d[\d,]*(?:\.\d+)?")
_WRITTEN = re.compile(r"\s*[$€£]?\s*(-?\d(?:[\d,]*\d)?(?:\.\d+)?)")
_RESULT = re.compile(r"= ?[$€£]?(\d+)")
_OPERATIONS = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
}
_ANSWER = re.compile(r"(?:A:|answer is|####)\s*\$?(-?\d[\d,]*(?:\.\d+)?)")
Span = tuple[int, int]


@dataclass(frozen=True)
class Solution:
    """A worked answer.

    text: without calculator annotations. right: whether its final answer is. error: characters of
    the first mistake in `text`, where it is known. inferred: the mistake is only known to lie in
    the step that `error` spans, see `first_error`.
    """

    text: str
    right: bool
    error: Span | None = None
    inferred: bool = False

    @property
    def answer(self) -> str | None:
        """Its final number as written; None if it states none."""
        found = _ANSWER.findall(self.text)
        return plain_number(found[-1]) if found else None


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
    def positive(self) -> Solution:
        """The right solution that a wrong one is paired with: of those that were sampled as it was,
        or else of all, the first with their most frequent answer. (The one that came with the
        question a person wrote.)"""
        candidates = self.right[1:] or self.right
        return next(iter(by_answer(candidates)), candidates)[0]

    @property
    def wrong(self) -> list[Solution]:
        """The wrong ones, in order."""
        return [solution for solution in self.solutions if not solution.right]


def is_problem(row: Mapping[str, Any]) -> bool:
    """Whether a row holds solutions known to be right or wrong: ours (`solution`, `wrong`) or
    OpenAI's (`ground_truth`, and `{is_correct, solution}` under any other key)."""
    return isinstance(row.get("question"), str) and (
        isinstance(row.get("solution"), str)
        and isinstance(row.get("wrong"), str)
        or isinstance(row.get("ground_truth"), str)
    )


def read_problem(row: Mapping[str, Any]) -> Problem:
    """A problem from a row that `is_problem`. The error of a wrong solution is what `error` says,
    or else what `first_error` finds (nothing without calculator annotations). Skipped: it says no
    characters."""
    if "ground_truth" not in row:
        wrong, error = row["wrong"], row.get("error") or None
        if error and not (
            isinstance(error, list)
            and len(error) == 2
            and all(type(one) is int for one in error)
            and 0 <= error[0] < error[1] <= len(wrong)
        ):
            raise Skipped("`error` is no [start, end] of characters of `wrong`")
        return Problem(
            row["question"],
            (
                Solution(row["solution"], True),
                Solution(wrong, False, tuple(error) if error else None),
            ),
        )
    tried = [
        value
        for value in row.values()
        if isinstance(value, Mapping) and isinstance(value.get("solution"), str)
    ]
    right = [row["ground_truth"], *(one["solution"] for one in tried if one.get("is_correct"))]
    known = {plain_number(result) for text in right for _, result in CALCULATION.findall(text)}
    wrong = [one["solution"] for one in tried if not one.get("is_correct")]
    return Problem(
        row["question"],
        (
            *(Solution(_clean(text), True) for text in right),
            *(Solution(_clean(text), False, *first_error(text, known)) for text in wrong),
        ),
    )


def first_error(text: str, known: set[str]) -> tuple[Span | None, bool]:
    """Where a wrong solution first does what no right one does, in characters of the text without
    annotations, and whether that is inferred; None without a calculated result that is not among
    `known`.

    Where the calculation itself is false its result is the mistake. Mostly it is true, because a
    calculator made it: then its operands are wrong, or the step should not have been taken, and all
    of the step is spanned, from its first operand to its result. That is an inference: the mistake
    may be one operand alone, lie in the words before, or not be one (a detour that no right
    solution of the row takes).
    """
    for found in CALCULATION.finditer(text):
        if plain_number(found[2]) not in known:
            before = _clean(text[: found.start()])
            result = _WRITTEN.match(_clean(text), len(before))
            if result is None:
                return None, False
            if calculated(found[1]) is not None and not _holds(found[1], found[2]):
                return result.span(1), False
            return (_step_start(before, found[1]), result.end()), True
    return None, False


def _step_start(before: str, expression: str) -> int:
    """Where a calculation begins in the text before its result: at the first of its operands, found
    from the last one back within the line (those in words are passed over); the end of the text if
    none is written."""
    line = before.rfind("\n") + 1
    written, start = list(_OPERAND.finditer(before, line)), len(before)
    for operand in reversed(_OPERAND.findall(expression)):
        earlier = [
            one
            for one in written
            if one.end() <= start and plain_number(one[0]) == plain_number(operand)
        ]
        start = earlier[-1].start() if earlier else start
    while start > line and start < len(before) and before[start - 1] in "($€£.-":
        start -= 1
    return start


def calculated(expression: str) -> float | None:
    """The value of a calculation of numbers by + - * / and brackets; None where it is written
    otherwise.
    """
    try:
        return _value(ast.parse(expression.replace(",", "").strip(), mode="eval").body)
    except (SyntaxError, KeyError, ZeroDivisionError):
        return None


def _value(node: ast.AST) -> float:
    """KeyError: anything but numbers and the four operations."""
    if isinstance(node, ast.Constant) and isinstance(node.value, int | float):
        return node.value
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
        return -_value(node.operand)
    if isinstance(node, ast.BinOp):
        return _OPERATIONS[type(node.op)](_value(node.left), _value(node.right))
    raise KeyError(type(node))


def _holds(expression: str, result: str) -> bool:
    """Whether a calculation that can be checked gives the result, but for rounding."""
    value, said = calculated(expression), calculated(result)
    return (
        value is not None and said is not None and isclose(value, said, rel_tol=1e-2, abs_tol=1e-2)
    )


@dataclass(frozen=True)
class Injected:
    """A right solution with one of its results changed: the text up to the changed number, the rest
    as it was, and the characters of the digits that differ."""

    text: str
    rest: str
    error: Span


def inject(text: str, chance: random.Random) -> Injected | None:
    """Change one result of a right solution; None without a result, or when the change only leaves
    out last digits.
    """
    results = list(_RESULT.finditer(text))
    if not results:
        return None
    found = chance.choice(results)
    right, (begins, ends) = found[1], found.span(1)
    wrong = str(mistaken(int(right), chance))
    same = next(
        (i for i, (old, new) in enumerate(zip(right, wrong)) if old != new),
        min(len(right), len(wrong)),
    )
    start, end = begins + same, begins + len(wrong)
    return Injected(text[:begins] + wrong, text[ends:], (start, end)) if start < end else None


def by_answer(solutions: Iterable[Solution]) -> list[list[Solution]]:
    """Solutions with the same final number together, the most frequent number first (ties as they
    come); those without a number are left out."""
    groups: dict[str, list[Solution]] = {}
    for solution in solutions:
        if solution.answer is not None:
            groups.setdefault(solution.answer, []).append(solution)
    return sorted(groups.values(), key=len, reverse=True)


def frequent_wrong(problem: Problem, mass: float = 0.5) -> list[Solution]:
    """One wrong solution for each of the most frequent wrong answers, until these cover `mass` of
    all wrong solutions.

    Frequent mistakes are the model's own and not accidents (Lin et al. 2024, section 4.1): behind
    the most frequent answer only those that were given twice count, as in the released code.
    """
    groups = by_answer(problem.wrong)
    found, needed = list[Solution](), mass * sum(map(len, groups))
    for group in groups:
        if needed <= 0 or (found and len(group) < 2):
            break
        found.append(group[0])
        needed -= len(group)
    return found


def _clean(text: str) -> str:
    return CALCULATION.sub("", text)
