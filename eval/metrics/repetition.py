"""The less repetitive half of the prompts: where a lookup has the least to copy.

A small target repeats itself at temperature 0, and drafters that look tokens up live on that. How
repetitive a prompt is, plain decoding's answer to it tells, so every method is measured on the same
half.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

SPAN = 4
"""Tokens of the runs that are counted."""
KEY = "less_repetitive_half"
"""Of a method in the report."""


def repetition(ids: Sequence[int], span: int = SPAN) -> float:
    """Share of an answer's runs of `span` tokens that stood in it before; 0 for an answer without
    such a run.
    """
    runs = [tuple(ids[i : i + span]) for i in range(len(ids) - span + 1)]
    return 1 - len(set(runs)) / len(runs) if runs else 0.0


def less_repetitive(answers: Mapping[str, Sequence[int]]) -> set[str]:
    """The half of the prompts (rounded down) whose answers repeat themselves least; of equals the
    first ones.
    """
    ranked = sorted(answers, key=lambda prompt: repetition(answers[prompt]))
    return set(ranked[: len(ranked) // 2])
