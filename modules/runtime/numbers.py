"""Numbers in natural-language texts."""

from __future__ import annotations

import re

NUMBER = re.compile(r"(?:(?<![\w)\]])-)?\d[\d,]*(?:\.\d+)?")
"""A number with optional sign, thousands separators and fraction; in `10-5` the hyphen is none."""


def plain_number(number: str) -> str:
    """A number without thousands separators and without a fraction of zero."""
    number = number.strip().replace(",", "")
    return number.rstrip("0").rstrip(".") if "." in number else number


def final_number(text: str) -> str | None:
    """The last number of a text, as `plain_number` writes it; None if it has none."""
    numbers = NUMBER.findall(text)
    return plain_number(numbers[-1]) if numbers else None
