"""The less repetitive half of the prompts, where a lookup has the least to copy.

Small targets repeat themselves at temperature 0, which favours drafters that look tokens up.
Repetition is measured in plain decoding's answers, so every method has the same half.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

SPAN = 4
"""Length in tokens of the counted runs."""
KEY = "less_repetitive_half"
"""Key of a method in the report."""


def repetition(ids: Sequence[int], span: int = SPAN) -> float:
    """Share of an answer's runs of `span` tokens that occurred in it before; 0 for an answer
    without such a run.
    """
    runs = [tuple(ids[i : i + span]) for i in range(len(ids) - span + 1)]
    return 1 - len(set(runs)) / len(runs) if runs else 0.0


def less_repetitive(answers: Mapping[str, Sequence[int]]) -> set[str]:
    """The half of the prompts (rounded down) whose answers repeat themselves least; ties go to the
    first prompts.
    """
    ranked = sorted(answers, key=lambda prompt: repetition(answers[prompt]))
    return set(ranked[: len(ranked) // 2])
