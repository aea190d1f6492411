"""Generated word problems with right solutions, and wrong ones whose first error is known.

`python -m data.corpora.word_problems` writes the embedded set (`data/prompts/solutions.jsonl`)
again, with identical bytes.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

EMBEDDED_SOLUTIONS = Path(__file__).parent.parent / "prompts" / "solutions.jsonl"
Values = dict[str, int]
NAMES = (
    "Ada",
    "Bilal",
    "Chen",
    "Dora",
    "Emil",
    "Fatou",
    "Goran",
    "Hana",
    "Ivo",
    "Jun",
    "Kirsi",
    "Luz",
)


@dataclass(frozen=True)
class Step:
    """One line of a solution: the name of its value, the computation, and the text (the value comes
    after the equals sign).
    """

    finds: str
    compute: Callable[[Values], int]
    says: str


@dataclass(frozen=True)
class Template:
    """A kind of problem: its text, the range of each number, and the solution's steps."""

    question: str
    numbers: dict[str, tuple[int, int]]
    steps: tuple[Step, ...]


TEMPLATES = (
    Template(
        "{name} packs {a} crates with {b} jars of honey each and then sells {c} jars at the gate. "
        "How many jars are left?",
        {"a": (4, 12), "b": (6, 15), "c": (5, 20)},
        (
            Step(
                "x", lambda v: v["a"] * v["b"], "{a} crates of {b} jars hold {a} * {b} = {x} jars."
            ),
            Step("y", lambda v: v["x"] - v["c"], "After the sale {x} - {c} = {y} jars are left."),
        ),
    ),
    Template(
        "A bus starts with {a} passengers. At the first stop {b} get on, at the second {c} get "
        "off, and at the third {d} get on. How many passengers are on the bus then?",
        {"a": (20, 35), "b": (5, 15), "c": (4, 12), "d": (3, 14)},
        (
            Step(
                "x",
                lambda v: v["a"] + v["b"],
                "After the first stop there are {a} + {b} = {x} passengers.",
            ),
            Step(
                "y",
                lambda v: v["x"] - v["c"],
                "After the second stop there are {x} - {c} = {y} passengers.",
            ),
            Step(
                "z",
                lambda v: v["y"] + v["d"],
                "After the third stop there are {y} + {d} = {z} passengers.",
            ),
        ),
    ),
    Template(
        "{name} buys {a} notebooks at {b} euros each and {c} pencils at {d} euros each. How many "
        "euros is that together?",
        {"a": (3, 9), "b": (3, 8), "c": (4, 12), "d": (1, 3)},
        (
            Step("x", lambda v: v["a"] * v["b"], "The notebooks cost {a} * {b} = {x} euros."),
            Step("y", lambda v: v["c"] * v["d"], "The pencils cost {c} * {d} = {y} euros."),
            Step("z", lambda v: v["x"] + v["y"], "Together that is {x} + {y} = {z} euros."),
        ),
    ),
    Template(
        "A hiker walks {a} kilometres an hour for {b} hours, rests, and then walks another {c} "
        "kilometres. The whole trail is {d} kilometres longer than that. How long is the trail?",
        {"a": (3, 6), "b": (3, 7), "c": (4, 9), "d": (5, 18)},
        (
            Step(
                "x",
                lambda v: v["a"] * v["b"],
                "Before the rest the hiker walks {a} * {b} = {x} kilometres.",
            ),
            Step(
                "y",
                lambda v: v["x"] + v["c"],
                "With the rest of the day that makes {x} + {c} = {y} kilometres.",
            ),
            Step("z", lambda v: v["y"] + v["d"], "The trail is {y} + {d} = {z} kilometres long."),
        ),
    ),
    Template(
        "{name} saves {a} coins every week for {b} weeks and spends {c} of them on a present. Then "
        "an aunt doubles what is left. How many coins does {name} have?",
        {"a": (6, 14), "b": (4, 9), "c": (8, 20)},
        (
            Step("x", lambda v: v["a"] * v["b"], "The savings are {a} * {b} = {x} coins."),
            Step("y", lambda v: v["x"] - v["c"], "The present leaves {x} - {c} = {y} coins."),
            Step("z", lambda v: 2 * v["y"], "Doubled, that is 2 * {y} = {z} coins."),
        ),
    ),
    Template(
        "A theatre has {a} rows of {b} seats. For tonight {c} tickets were sold in advance and {d} "
        "at the door. How many seats stay empty?",
        {"a": (10, 16), "b": (11, 18), "c": (40, 70), "d": (10, 30)},
        (
            Step("x", lambda v: v["a"] * v["b"], "The theatre has {a} * {b} = {x} seats."),
            Step("y", lambda v: v["c"] + v["d"], "Altogether {c} + {d} = {y} tickets were sold."),
            Step("z", lambda v: v["x"] - v["y"], "So {x} - {y} = {z} seats stay empty."),
        ),
    ),
    Template(
        "A baker makes {a} rolls in the morning and {b} at noon, and puts {c} of them into each "
        "bag for {d} bags. How many rolls are not in a bag?",
        {"a": (50, 80), "b": (30, 60), "c": (4, 8), "d": (5, 9)},
        (
            Step("x", lambda v: v["a"] + v["b"], "The baker makes {a} + {b} = {x} rolls."),
            Step("y", lambda v: v["c"] * v["d"], "The bags take {c} * {d} = {y} rolls."),
            Step("z", lambda v: v["x"] - v["y"], "Not in a bag are {x} - {y} = {z} rolls."),
        ),
    ),
    Template(
        "A tank holds {a} litres. A pump adds {b} litres a minute for {c} minutes while {d} litres "
        "leak away in all. How much water is in the tank afterwards?",
        {"a": (30, 90), "b": (6, 15), "c": (5, 12), "d": (8, 25)},
        (
            Step("x", lambda v: v["b"] * v["c"], "The pump adds {b} * {c} = {x} litres."),
            Step(
                "y",
                lambda v: v["a"] + v["x"],
                "Without the leak there would be {a} + {x} = {y} litres.",
            ),
            Step("z", lambda v: v["y"] - v["d"], "With the leak there are {y} - {d} = {z} litres."),
        ),
    ),
    Template(
        "{name} reads {a} pages a day from Monday to Friday and {b} pages on each day of the "
        "weekend. The book has {c} pages more than that. How many pages has the book?",
        {"a": (9, 18), "b": (20, 35), "c": (15, 60)},
        (
            Step("x", lambda v: 5 * v["a"], "From Monday to Friday that is 5 * {a} = {x} pages."),
            Step("y", lambda v: 2 * v["b"], "On the weekend it is 2 * {b} = {y} pages."),
            Step(
                "z",
                lambda v: v["x"] + v["y"],
                "In the whole week that makes {x} + {y} = {z} pages.",
            ),
            Step("w", lambda v: v["z"] + v["c"], "The book has {z} + {c} = {w} pages."),
        ),
    ),
    Template(
        "A farmer has {a} hens that lay {b} eggs each in a week. The family eats {c} of the eggs "
        "and the rest is sold for 2 euros apiece. How many euros does the farmer earn?",
        {"a": (6, 13), "b": (4, 6), "c": (7, 15)},
        (
            Step("x", lambda v: v["a"] * v["b"], "The hens lay {a} * {b} = {x} eggs."),
            Step("y", lambda v: v["x"] - v["c"], "For sale remain {x} - {c} = {y} eggs."),
            Step("z", lambda v: 2 * v["y"], "They bring in 2 * {y} = {z} euros."),
        ),
    ),
)


def embedded_problems(count: int = 100, seed: int = 0) -> list[dict[str, Any]]:
    """Rows of `{question, solution, wrong, error}`; `error` is the span of the first wrong number
    in `wrong`.
    """
    chance = random.Random(seed)
    rows: dict[str, dict[str, Any]] = {}
    while len(rows) < count:
        row = problem(TEMPLATES[len(rows) % len(TEMPLATES)], chance)
        rows[row["question"]] = row
    return list(rows.values())


def problem(template: Template, chance: random.Random) -> dict[str, Any]:
    """One problem with random numbers, its right solution, and a wrong one whose error propagates
    to the end.
    """
    # 1. Draw the numbers, and solve the problem.
    numbers = {key: chance.randint(*bounds) for key, bounds in template.numbers.items()}
    name = chance.choice(NAMES)
    right = _solve(template.steps, numbers)
    # 2. Draw a mistake until it is visible and no value becomes negative.
    wrong, error = right, (0, 0)
    while error == (0, 0) or min(wrong.values()) < 1:
        step = chance.choice(template.steps)
        wrong = _solve(template.steps, numbers, {step.finds: mistaken(right[step.finds], chance)})
        error = _place(template.steps, wrong, step)
    return {
        "question": template.question.format(name=name, **numbers),
        "solution": _write(template.steps, right),
        "wrong": _write(template.steps, wrong),
        "error": list(error),
    }


def mistaken(value: int, chance: random.Random) -> int:
    """A plausible wrong number: off by a little or by ten, or with its digits swapped."""
    swapped = int(str(value)[::-1])
    slips = [value + change for change in (-10, -2, -1, 1, 2, 10) if value + change > 0]
    return chance.choice([*slips, *([swapped] * 2 if swapped not in (value, 0) else [])])


def _solve(steps: Sequence[Step], numbers: Values, forced: Values | None = None) -> Values:
    """All values; those in `forced` replace computed ones, also in later steps."""
    values = dict(numbers)
    for step in steps:
        values[step.finds] = (forced or {}).get(step.finds, step.compute(values))
    return values


def _write(steps: Sequence[Step], values: Values) -> str:
    lines = [step.says.format(**values) for step in steps]
    return "\n".join([*lines, f"The answer is {values[steps[-1].finds]}."])


def _place(steps: Sequence[Step], values: Values, wrong: Step) -> tuple[int, int]:
    """The span of a step's value in the written solution."""
    before = "".join(step.says.format(**values) + "\n" for step in steps[: steps.index(wrong)])
    start = len(before) + len(wrong.says.split("{" + wrong.finds + "}")[0].format(**values))
    return start, start + len(str(values[wrong.finds]))


def main() -> None:
    """Write the embedded file, and print its size."""
    lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in embedded_problems()]
    EMBEDDED_SOLUTIONS.write_text("".join(lines), encoding="utf-8")
    print(f"{len(lines)} problems: {EMBEDDED_SOLUTIONS}")


if __name__ == "__main__":
    main()
