"""Tests of programs as inputs and outputs, as in LiveCodeBench (Jain et al. 2024).

A case is an object with `input` and `output`. Without a function's name the program reads the input
from its standard input and must print the output. With one, the input's lines are the arguments
and the output is the value, all as JSON; the function may be a method of `Solution`.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from data.reading.rows import json_of

_STREAMS = """\
import io, sys
def _lines(text):
    return [line.rstrip() for line in text.strip().splitlines()]
_source, _real = compile({program!r}, "program", "exec"), sys.stdout
for _given, _expected in {cases!r}:
    sys.stdin = io.TextIOWrapper(io.BytesIO(_given.encode()))
    sys.stdout = _out = io.TextIOWrapper(io.BytesIO(), write_through=True)
    try:
        exec(_source, {{"__name__": "__main__"}})
    except SystemExit as _end:
        assert not _end.code
    finally:
        sys.stdout = _real
    assert _lines(_out.buffer.getvalue().decode()) == _lines(_expected)
"""
_CALLS = """\
import json
_names = globals()
_function = getattr(_names["Solution"](), {entry!r}) if "Solution" in _names else _names[{entry!r}]
for _given, _expected in {cases!r}:
    _arguments = [json.loads(line) for line in _given.splitlines() if line.strip()]
    assert json.loads(json.dumps(_function(*_arguments))) == json.loads(_expected)
"""


class Case(NamedTuple):
    """What a program reads and what it must give."""

    input: str
    output: str


def cases_of(reference: str) -> list[Case]:
    """The cases of a JSON text; none if it is anything else."""
    values: Any = json_of(reference) if reference.lstrip().startswith("[") else None
    if not isinstance(values, list):
        return []
    cases = [
        Case(value["input"], value["output"])
        for value in values
        if isinstance(value, dict)
        and isinstance(value.get("input"), str)
        and isinstance(value.get("output"), str)
    ]
    return cases if len(cases) == len(values) else []


def case_script(program: str, cases: list[Case], entry: str) -> tuple[str, str]:
    """A program and its test for `eval.tasks.programs.passes`."""
    pairs = [tuple(case) for case in cases]
    if entry:
        return program, _CALLS.format(entry=entry, cases=pairs)
    return "", _STREAMS.format(program=program, cases=pairs)
