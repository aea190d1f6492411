"""Numbers in texts, as people write them."""

from __future__ import annotations

import re

NUMBER = re.compile(r"-?\d[\d,]*(?:\.\d+)?")
"""With thousands separators, perhaps negative or with a fraction."""


def plain_number(number: str) -> str:
    """A number without thousands separators and without a fraction of zero."""
    number = number.strip().replace(",", "")
    return number.rstrip("0").rstrip(".") if "." in number else number


def final_number(text: str) -> str | None:
    """The last number of a text, as `plain_number` writes it; None if it has none."""
    found = NUMBER.findall(text)
    return plain_number(found[-1]) if found else None
