"""Problems with right and wrong solutions: data for judges and token-level preferences."""

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
from data.reading.files import Skipped
from modules.runtime.numbers import plain_number

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

    text: without calculator annotations. right: whether its final answer is right. error:
    characters of the first mistake in `text`, if known. inferred: whether the mistake may be
    anywhere in the step that `error` spans, see `first_error`.
    """

    text: str
    right: bool
    error: Span | None = None
    inferred: bool = False

    @property
    def answer(self) -> str | None:
        """Its final number as written; None without one."""
        numbers = _ANSWER.findall(self.text)
        return plain_number(numbers[-1]) if numbers else None


@dataclass(frozen=True)
class Problem:
    """A question and its solutions."""

    question: str
    solutions: tuple[Solution, ...]

    @property
    def right(self) -> list[Solution]:
        """The right solutions, in order."""
        return [solution for solution in self.solutions if solution.right]

    @property
    def positive(self) -> Solution:
        """The right solution to pair with wrong ones: of the sampled solutions, or else of all, the
        first with the most frequent answer. (The first solution was written by a person.)"""
        candidates = self.right[1:] or self.right
        return next(iter(by_answer(candidates)), candidates)[0]

    @property
    def wrong(self) -> list[Solution]:
        """The wrong solutions, in order."""
        return [solution for solution in self.solutions if not solution.right]


def is_problem(row: Mapping[str, Any]) -> bool:
    """Whether a row holds right and wrong solutions: ours (`solution`, `wrong`) or OpenAI's
    (`ground_truth`, and `{is_correct, solution}` under any other key)."""
    return isinstance(row.get("question"), str) and (
        isinstance(row.get("solution"), str)
        and isinstance(row.get("wrong"), str)
        or isinstance(row.get("ground_truth"), str)
    )


def read_problem(row: Mapping[str, Any]) -> Problem:
    """The problem of a row that `is_problem`. The error of a wrong solution is `error`, or else the
    result of `first_error` (None without calculator annotations). Raises Skipped if `error` is no
    span of characters."""
    # 1. Our own rows: one right and one wrong solution.
    if "ground_truth" not in row:
        wrong, error = row["wrong"], row.get("error") or None
        if error and not (
            isinstance(error, list)
            and len(error) == 2
            and all(type(bound) is int for bound in error)
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
    # 2. OpenAI's rows: sampled solutions, whose errors are inferred from right ones.
    tried = [
        value
        for value in row.values()
        if isinstance(value, Mapping) and isinstance(value.get("solution"), str)
    ]
    right = [
        row["ground_truth"],
        *(sample["solution"] for sample in tried if sample.get("is_correct")),
    ]
    results = {plain_number(result) for text in right for _, result in CALCULATION.findall(text)}
    wrong = [sample["solution"] for sample in tried if not sample.get("is_correct")]
    return Problem(
        row["question"],
        (
            *(Solution(_clean(text), True) for text in right),
            *(Solution(_clean(text), False, *first_error(text, results)) for text in wrong),
        ),
    )


def first_error(text: str, right_results: set[str]) -> tuple[Span | None, bool]:
    """The first step of a wrong solution that no right one has, in characters of the text without
    annotations, and whether it is inferred; None if all calculated results are among
    `right_results`.

    If the calculation is false, its result is the mistake. Mostly it is true, because a calculator
    computed it: then its operands are wrong, or the step is, and the span covers the whole step,
    from its first operand to its result. That is an inference: the mistake may be a single operand,
    be in the words before, or be none (a detour that no right solution of the row takes).
    """
    for calculation in CALCULATION.finditer(text):
        if plain_number(calculation[2]) not in right_results:
            # The result in the text without annotations.
            before = _clean(text[: calculation.start()])
            result = _WRITTEN.match(_clean(text), len(before))
            if result is None:
                return None, False
            if calculated(calculation[1]) is not None and not _holds(
                calculation[1], calculation[2]
            ):
                return result.span(1), False
            return (_step_start(before, calculation[1]), result.end()), True
    return None, False


def _step_start(before: str, expression: str) -> int:
    """The start of a calculation in the text before its result: its first operand, searched
    backwards from the last one within the line (operands in words are skipped); the end of the text
    if no operand is written."""
    line = before.rfind("\n") + 1
    written, start = list(_OPERAND.finditer(before, line)), len(before)
    # From the last operand backwards.
    for operand in reversed(_OPERAND.findall(expression)):
        earlier = [
            match
            for match in written
            if match.end() <= start and plain_number(match[0]) == plain_number(operand)
        ]
        start = earlier[-1].start() if earlier else start
    # Include signs, brackets and currencies.
    while start > line and start < len(before) and before[start - 1] in "($€£.-":
        start -= 1
    return start


def calculated(expression: str) -> float | None:
    """The value of a calculation with + - * / and brackets; None for any other expression."""
    try:
        return _value(ast.parse(expression.replace(",", "").strip(), mode="eval").body)
    except (SyntaxError, KeyError, ZeroDivisionError):
        return None


def _value(node: ast.AST) -> float:
    """The value of a syntax tree of numbers and the four operations; others raise KeyError."""
    if isinstance(node, ast.Constant) and isinstance(node.value, int | float):
        return node.value
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
        return -_value(node.operand)
    if isinstance(node, ast.BinOp):
        return _OPERATIONS[type(node.op)](_value(node.left), _value(node.right))
    raise KeyError(type(node))


def _holds(expression: str, result: str) -> bool:
    """Whether a calculation gives the result up to rounding; False if it cannot be computed."""
    value, said = calculated(expression), calculated(result)
    return (
        value is not None and said is not None and isclose(value, said, rel_tol=1e-2, abs_tol=1e-2)
    )


@dataclass(frozen=True)
class Injected:
    """A right solution with one changed result: the text up to the changed number, the unchanged
    rest, and the characters of the digits that differ."""

    text: str
    rest: str
    error: Span


def inject(text: str, chance: random.Random) -> Injected | None:
    """Change one result of a right solution; None without a result, or if the change only removes
    trailing digits.
    """
    results = list(_RESULT.finditer(text))
    if not results:
        return None
    # Draw a result, and replace it by a plausible slip.
    result = chance.choice(results)
    right, (begins, ends) = result[1], result.span(1)
    wrong = str(mistaken(int(right), chance))
    # The error begins at the first digit that differs.
    same = next(
        (i for i, (old, new) in enumerate(zip(right, wrong)) if old != new),
        min(len(right), len(wrong)),
    )
    start, end = begins + same, begins + len(wrong)
    return Injected(text[:begins] + wrong, text[ends:], (start, end)) if start < end else None


def by_answer(solutions: Iterable[Solution]) -> list[list[Solution]]:
    """Solutions grouped by final number, the most frequent number first (ties in order of
    appearance); solutions without a number are left out."""
    groups: dict[str, list[Solution]] = {}
    for solution in solutions:
        if solution.answer is not None:
            groups.setdefault(solution.answer, []).append(solution)
    return sorted(groups.values(), key=len, reverse=True)


def frequent_wrong(problem: Problem, mass: float = 0.5) -> list[Solution]:
    """One wrong solution for each of the most frequent wrong answers, until these cover `mass` of
    all wrong solutions.

    Frequent mistakes are systematic and not accidents (Lin et al. 2024, section 4.1): after the
    most frequent answer, only answers that occur at least twice count, as in the released code.
    """
    groups = by_answer(problem.wrong)
    chosen, needed = list[Solution](), mass * sum(map(len, groups))
    for group in groups:
        if needed <= 0 or (chosen and len(group) < 2):
            break
        chosen.append(group[0])
        needed -= len(group)
    return chosen


def _clean(text: str) -> str:
    return CALCULATION.sub("", text)
