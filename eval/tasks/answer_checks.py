"""Quality of answers, for methods that change them: pure functions of texts and scores.

Shape legend: P prompts.
"""

from __future__ import annotations

import importlib.util
import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np

from eval.metrics.bootstrap import mean_interval
from eval.tasks.answer_matches import chrf, same_calls, same_expression
from eval.tasks.program_cases import case_script, cases_of
from eval.tasks.programs import passes
from modules.runtime.numbers import NUMBER, final_number, plain_number

_WORD = re.compile(r"[a-z0-9]+")
_BLOCK = re.compile(r"```[a-zA-Z0-9]*[ \t]*\n(.*?)(?:```|\Z)", re.DOTALL)


def answer_number(text: str) -> float | None:
    """The number after `####` (GSM8K's mark of the answer), else the last number of the text; None
    without any.
    """
    marked = NUMBER.search(text.rpartition("####")[2]) if "####" in text else None
    number = final_number(text) if marked is None else plain_number(marked[0])
    return None if number is None else float(number)


def same_number(answer: str, solution: str) -> bool:
    """Whether an answer ends in the solution's number (Cobbe et al. 2021, GSM8K)."""
    number, expected = answer_number(answer), answer_number(solution)
    return number is not None and expected is not None and abs(number - expected) < 1e-6


def rouge_l(answer: str, reference: str) -> float:
    """F1 of the longest common subsequence of words, lower case (Lin 2004, ROUGE-L with β = 1)."""
    left, right = _WORD.findall(answer.lower()), _WORD.findall(reference.lower())
    if not left or not right:
        return 0.0
    common = _common_subsequence(left, right)
    return 2 * common / (len(left) + len(right))


def _common_subsequence(left: Sequence[str], right: Sequence[str]) -> int:
    row = [0] * (len(right) + 1)
    for word in left:
        diagonal = 0
        for index, other in enumerate(right, 1):
            diagonal, row[index] = (
                row[index],
                diagonal + 1 if word == other else max(row[index], row[index - 1]),
            )
    return row[-1]


def program_of(answer: str, context: str, entry: str) -> str:
    """The program of an answer: the first code block, or else the whole text.

    Code that defines `entry` follows the part of `context` before that function (imports,
    auxiliary functions); any other code continues `context`. Without `entry` it follows all of it.
    """
    block = _BLOCK.search(answer)
    code = block.group(1) if block else answer
    if not entry:
        return f"{context}\n{code}"
    start = f"def {entry}("
    return f"{context.partition(start)[0]}\n{code}" if start in code else context + code


# -- one answer, many answers ----------------------------------------------------------------------


@dataclass(frozen=True)
class Check:
    """How an answer is scored.

    metric: a key of `SCORES`. reference: solution, summary, calls, test or cases of a test
    (`eval.tasks.program_cases`). given: the code that a program continues. entry: name of the
    tested function.
    """

    metric: str
    reference: str
    given: str = ""
    entry: str = ""


def _passes_its_test(answer: str, check: Check) -> float:
    program = program_of(answer, check.given, check.entry)
    if cases := cases_of(check.reference):
        return float(passes(*case_script(program, cases, check.entry)))
    return float(
        passes(
            program, f"{check.reference}\ncheck({check.entry})" if check.entry else check.reference
        )
    )


def named_share(answer: str, reference: str) -> float:
    """Share of the reference's lines that the answer names (RULER's recall)."""
    wanted = [line.strip() for line in reference.splitlines() if line.strip()]
    return sum(line in answer for line in wanted) / len(wanted)


def same_line(answer: str, reference: str) -> bool:
    """Whether the answer's first line of code is the reference."""
    lines = (line.strip() for line in answer.splitlines())
    first = next((line for line in lines if line and not line.startswith("```")), "")
    return first == reference.strip()


def matches_schema(answer: str, schema: str) -> bool:
    """Whether an answer is JSON of a JSON schema, as the library jsonschema decides.

    Raises:
        ValueError: jsonschema is not installed.
    """
    if importlib.util.find_spec("jsonschema") is None:
        raise ValueError("metric 'json_schema': run `pip install jsonschema`")
    import jsonschema

    try:
        jsonschema.validate(json.loads(answer), json.loads(schema))
    except (json.JSONDecodeError, jsonschema.ValidationError):
        return False
    return True


SCORES: dict[str, Callable[[str, Check], float]] = {
    "exact_match": lambda answer, check: float(same_number(answer, check.reference)),
    "math_answer": lambda answer, check: float(same_expression(answer, check.reference)),
    "tool_calls": lambda answer, check: float(same_calls(answer, check.reference)),
    "rouge_l": lambda answer, check: rouge_l(answer, check.reference),
    "chrf": lambda answer, check: chrf(answer, check.reference),
    "pass_at_1": _passes_its_test,
    "named_share": lambda answer, check: named_share(answer, check.reference),
    "same_line": lambda answer, check: float(same_line(answer, check.reference)),
    "json_schema": lambda answer, check: float(matches_schema(answer, check.reference)),
}
"""Score in [0, 1] of an answer's text, by the metric's name."""
RUNS_CODE = frozenset({"pass_at_1"})
"""Metrics that execute generated programs."""


@cache
def score(answer: str, check: Check) -> float:
    # Counts by prompt, then the interval of the mean.
    """An answer's score. The same answer to the same question is scored once."""
    return SCORES[check.metric](answer, check)


def paired_outcome(
    method: Sequence[float],
    plain: Sequence[float],
    samples: int = 2000,
    seed: int = 0,
    level: float = 0.95,
) -> dict[str, Any]:
    """Wins, ties and losses of a method's scores against plain decoding's, prompt by prompt, and
    # An interval that excludes 0 decides.
    the mean difference with its paired percentile bootstrap interval (Efron 1979; Koehn 2004 for
    text).

    `verdict` is `win` or `loss` when the interval excludes 0, else `tie`; `ci95` is None below two
    prompts.
    """
    difference_P = np.asarray(method, dtype=np.float64) - np.asarray(plain, dtype=np.float64)
    counts = {
        "win": int((difference_P > 0).sum()),
        "tie": int((difference_P == 0).sum()),
        "loss": int((difference_P < 0).sum()),
        "difference": float(difference_P.mean()),
    }
    if len(difference_P) < 2:
        return {**counts, "ci95": None, "verdict": "tie"}
    low, high = mean_interval(difference_P, samples, seed, level)
    verdict = "win" if low > 0 else "loss" if high < 0 else "tie"
    return {**counts, "ci95": [low, high], "verdict": verdict}


def common_prefix(answer: Sequence[int], reference: Sequence[int]) -> float:
    """Share of the reference's tokens that the answer repeats before it first differs; 1 for two
    empty answers.
    """
    same = 0
    for token, expected in zip(answer, reference, strict=False):
        if token != expected:
            break
        same += 1
    return same / len(reference) if len(reference) else float(not len(answer))
