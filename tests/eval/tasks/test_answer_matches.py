"""Matching answers: expressions, calls, translations, and programs with cases."""

from __future__ import annotations

import json

import pytest

from eval.tasks.answer_checks import Check, score
from eval.tasks.answer_matches import boxed, calls_in, chrf, same_calls, same_expression

SAME = [
    (r"\boxed{42}", "42"),
    (r"so \boxed{1} or \boxed{\frac{1}{2}}.", r"\frac12"),
    (r"\boxed{\dfrac{3}{4}}", "3/4"),
    (r"\boxed{0.75}", r"\frac{3}{4}"),
    (r"\boxed{-\tfrac{1}{2}}", "-0.5"),
    (r"\boxed{x = 5}", "5"),
    (r"\boxed{1,000}", "1000"),
    (r"\boxed{\left( 3, \frac{\pi}{2} \right)}", r"(3,\frac{\pi}{2})"),
    (r"\boxed{90^\circ}", "90"),
    (r"\boxed{12\%}", "12"),
    (r"\boxed{\text{Evelyn}}", r"\text{Evelyn}"),
    (r"\boxed{Evelyn}", r"\text{Evelyn}"),
    (r"\boxed{7 \text{ inches}}", "7"),
    (r"\boxed{2\sqrt3}", r"2\sqrt{3}"),
    (r"\boxed{.5}", "0.50"),
    (r"\boxed 8$", "8"),
    (r"\boxed{\$18.90}", "18.90"),
    (r"\boxed{3}", r"a proof, \boxed{3}"),
]
OTHER = [
    (r"\boxed{42}", "24"),
    ("the answer is 42", "42"),
    (r"\boxed{42", "42"),
    (r"\boxed{\frac{1}{2}}", r"\frac{2}{1}"),
    (r"\boxed{(1,2)}", "(2,1)"),
    (r"\boxed{1,2}", "12"),
    (r"\boxed{\frac{1}{0}}", "0"),
]


@pytest.mark.parametrize(("answer", "solution"), SAME)
def test_expressions_that_are_the_same(answer: str, solution: str) -> None:
    assert same_expression(answer, solution)
    assert score(answer, Check("math_answer", solution)) == 1.0


@pytest.mark.parametrize(("answer", "solution"), OTHER)
def test_expressions_that_are_not(answer: str, solution: str) -> None:
    assert not same_expression(answer, solution)


def test_nested_boxes_are_closed_where_they_end() -> None:
    assert boxed(r"\boxed{\sqrt{a^{2}}+1} and {more}") == r"\sqrt{a^{2}}+1"
    assert boxed(r"\boxed{1} then \boxed{2") == "1" and boxed("none") is None


def test_calls_are_found_in_every_form() -> None:
    rome = {"city": "Rome", "days": 2}
    expected = [("weather", json.dumps(rome, sort_keys=True))]
    for text in (
        json.dumps({"name": "weather", "arguments": rome}),
        f"so <tool_call>\n{json.dumps({'name': 'weather', 'parameters': rome})}\n</tool_call>",
        json.dumps([{"type": "function", "function": {"name": "weather", "arguments": rome}}]),
        json.dumps({"name": "weather", "arguments": json.dumps(rome)}),
        '{x} [1] {"calls": [1]} ' + json.dumps([{"name": "weather", "arguments": rome}]),
    ):
        assert calls_in(text) == expected, text
    assert calls_in("no { call [") == [] and calls_in('{"name": "weather"}') == []


def test_calls_are_compared_whole_and_in_any_order() -> None:
    one, two = ({"name": "f", "arguments": {"a": a, "b": 0}} for a in (1, 2))
    reference = json.dumps([one, two])
    swapped = {"name": "f", "arguments": {"b": 0, "a": 1}}
    assert same_calls(json.dumps(two) + json.dumps(swapped), reference)
    for answer in ([one], [one, one], [one, two, two], [one, {**two, "name": "g"}], []):
        assert not same_calls(json.dumps(answer), reference)
    assert not same_calls("[]", "[]")


def test_chrf_by_hand() -> None:
    assert chrf("der Hund", "der Hund") == 1.0 and chrf("", "x") == chrf("x", "") == 0.0
    assert chrf("abc", "xyz") == 0.0
    # Orders 1 and 2: precisions 2/2 and 1/1, recalls 2/3 and 1/2; no third order in the answer.
    precision, recall = 1.0, (2 / 3 + 1 / 2) / 2
    assert chrf("a b", "abc") == pytest.approx(5 * precision * recall / (4 * precision + recall))
    assert chrf("犬が走る", "犬が走った") > chrf("猫が", "犬が走った") > 0


STREAM = [{"input": "1 2\n", "output": "3\n", "testtype": "stdin"}, {"input": "4 5", "output": "9"}]
CALL = [{"input": "[1, 2]\n3", "output": "[3, 6]", "testtype": "functional"}]


@pytest.mark.parametrize(
    ("program", "passes"),
    [
        ("print(sum(map(int, input().split())))", 1.0),
        ("import sys\nprint(sum(map(int, sys.stdin.buffer.read().split())), '')", 1.0),
        ("def main():\n    print(3)\nif __name__ == '__main__':\n    main()", 0.0),
        ("a, b = map(int, input().split())\nprint(a + b)\nexit()", 1.0),
        ("print(3)\nexit(1)", 0.0),
        ("import os\nos._exit(0)", 0.0),
    ],
)
def test_programs_that_read_and_print(program: str, passes: float) -> None:
    check = Check("pass_at_1", json.dumps(STREAM))
    assert score(f"```python\n{program}\n```", check) == passes


@pytest.mark.parametrize(
    ("program", "passes"),
    [
        ("class Solution:\n    def scale(self, a, k):\n        return [x * k for x in a]", 1.0),
        ("def scale(a, k):\n    return tuple(x * k for x in a)", 1.0),
        ("def scale(a, k):\n    return a", 0.0),
    ],
)
def test_functions_of_cases(program: str, passes: float) -> None:
    check = Check("pass_at_1", json.dumps(CALL), entry="scale")
    assert score(f"```python\n{program}\n```", check) == passes
