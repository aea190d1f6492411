"""Arguments of another type than the annotations give."""

from __future__ import annotations

from typing import Any

import pytest

from modules.runtime.argument_types import check_scalars


class Typed:
    def __init__(self, width: int, share: float = 0.5, name: str | None = None, of: Any = 0):
        pass


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"width": "x"}, "width must be a whole number, got 'x'"),
        ({"width": 1.5}, "width must be a whole number"),
        ({"width": True}, "width must be a whole number"),
        ({"share": "1"}, "share must be a number"),
        ({"name": 3}, "name must be text or null, got 3"),
        ({"width": 1, "share": 1, "name": None, "of": "x", "unknown": 3}, None),
    ],
)
def test_values_of_another_type_are_refused(arguments: dict[str, Any], words: str | None) -> None:
    if words is None:
        check_scalars(Typed, arguments, "methods: x")
        return
    with pytest.raises(ValueError, match=f"methods: x: {words}"):
        check_scalars(Typed, arguments, "methods: x")
