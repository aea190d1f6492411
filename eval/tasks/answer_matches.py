"""Whether an answer matches its reference: mathematical expressions, tool calls, translations.

Pure functions of texts.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from fractions import Fraction
from typing import Any

from data.reading.rows import json_of

_BOX = re.compile(r"\\(?:boxed|fbox)\s*")
_SPACING = re.compile(r"\\[!,;: ]|\\(?:left|right|displaystyle|quad|qquad)(?![a-zA-Z])|\\?\$|\s")
_UNIT = re.compile(r"\\(?:text|mbox|mathrm)\{[^{}]*\}$|\^\{?\\circ\}?$|\\?%$|\\circ$")
_TEXT = re.compile(r"\\(?:text|mbox|mathrm|textbf|mathbf)\{([^{}]*)\}")
_SHORT = re.compile(r"\\(frac|sqrt)(\d)")
_SECOND = re.compile(r"(\\frac\{[^{}]*\})(\d)")
_DIVIDED = re.compile(r"(-?\d+)/(\d+)")
_FRACTION = re.compile(r"(-?)\\frac\{(-?\d+)\}\{(-?\d+)\}")
_NUMBER = re.compile(r"-?\d*\.?\d+")
_THOUSANDS = re.compile(r"(?<=\d),(?=\d{3}(?:\D|$))")
_NAMED = re.compile(r"[a-zA-Z]{1,2}=")
_ARGUMENTS = ("arguments", "parameters")
_ORDERS = 6
_RECALL_WEIGHT = 2.0

# -- mathematics -----------------------------------------------------------------------------------


def boxed(text: str) -> str | None:
    """The content of the last `\\boxed{…}`; None without one that is closed."""
    for box in reversed([*_BOX.finditer(text)]):
        rest = text[box.end() :]
        if not rest.startswith("{"):
            return rest.split("$")[0].strip() or None
        depth = 0
        for i, letter in enumerate(rest):
            depth += (letter == "{") - (letter == "}")
            if not depth:
                return rest[1:i]
    return None


def same_expression(answer: str, solution: str) -> bool:
    """Whether an answer's boxed expression is the solution's, by their normal forms, or as numbers
    (Hendrycks et al. 2021, MATH; a solution without a box is the expression itself).
    """
    final, expected = boxed(answer), boxed(solution)
    if final is None:
        return False
    left, right = normal_form(final), normal_form(solution if expected is None else expected)
    if left == right:
        return True
    numbers = _value(left), _value(right)
    return numbers[0] is not None and numbers[0] == numbers[1]


def normal_form(expression: str) -> str:
    """An expression without spacing, units and marks of style."""
    text = re.sub(r"\\[dt]frac", r"\\frac", expression.strip()).rstrip(". ")
    # Units and words after a value go first, while spaces still separate them.
    while (shorter := _UNIT.sub("", text).strip()) != text and shorter:
        text = shorter
    text = _TEXT.sub(r"\1", text)
    text = _SPACING.sub("", text)
    text = _SHORT.sub(r"\\\1{\2}", text)
    text = _SECOND.sub(r"\1{\2}", text)
    text = _THOUSANDS.sub("", text)
    if _NAMED.match(text):
        text = text.partition("=")[2]
    divided = _DIVIDED.fullmatch(text)
    return f"\\frac{{{divided[1]}}}{{{divided[2]}}}" if divided else text


def _value(text: str) -> Fraction | None:
    """The number that a normal form is; None for anything else."""
    parts = _FRACTION.fullmatch(text)
    if parts and int(parts[3]):
        return Fraction(int(parts[2]), int(parts[3])) * (-1 if parts[1] else 1)
    return Fraction(text) if _NUMBER.fullmatch(text) else None


# -- tool calls ------------------------------------------------------------------------------------


def calls_in(text: str) -> list[tuple[str, str]]:
    """The tool calls in a text: names, and arguments in a canonical form.

    A call is a JSON object with `name` and `arguments` (or `parameters`), which may be JSON text,
    alone, in a list, under `function` or among other text.
    """
    decoder, calls, place = json.JSONDecoder(), list[tuple[str, str]](), 0
    while (bracket := re.search(r"[\[{]", text[place:])) is not None:
        start = place + bracket.start()
        try:
            value, place = decoder.raw_decode(text, start)
        except (ValueError, RecursionError):
            place = start + 1
            continue
        inside = [*_calls(value)]
        calls += inside
        # A list or object that is no call may still be the text around one.
        place = place if inside else start + 1
    return calls


def _calls(value: Any) -> Iterator[tuple[str, str]]:
    if isinstance(value, list):
        for item in value:
            yield from _calls(item)
    if not isinstance(value, Mapping):
        return
    if isinstance(value.get("function"), Mapping):
        yield from _calls(value["function"])
    elif isinstance(value.get("name"), str):
        arguments = next((value[key] for key in _ARGUMENTS if key in value), None)
        if arguments is None:
            return
        parsed = json_of(arguments) if isinstance(arguments, str) else arguments
        yield value["name"], json.dumps(parsed, sort_keys=True)


def same_calls(answer: str, reference: str) -> bool:
    """Whether an answer calls the reference's functions with its arguments, in any order."""
    expected = calls_in(reference)
    return bool(expected) and Counter(calls_in(answer)) == Counter(expected)


# -- translations ----------------------------------------------------------------------------------


def chrf(answer: str, reference: str) -> float:
    """chrF: F score, β = 2, of the mean precision and recall of character n-grams, n = 1 … 6,
    without white space (Popović 2015). In [0, 1]; works for every script.
    """
    left, right = "".join(answer.split()), "".join(reference.split())
    precisions, recalls = list[float](), list[float]()
    for order in range(1, _ORDERS + 1):
        grams, expected = (
            Counter(text[i : i + order] for i in range(len(text) - order + 1))
            for text in (left, right)
        )
        if grams and expected:
            common = (grams & expected).total()
            precisions.append(common / grams.total())
            recalls.append(common / expected.total())
    if not precisions or not sum(precisions):
        return 0.0
    precision, recall = sum(precisions) / len(precisions), sum(recalls) / len(recalls)
    weight = _RECALL_WEIGHT**2
    return (1 + weight) * precision * recall / (weight * precision + recall)
