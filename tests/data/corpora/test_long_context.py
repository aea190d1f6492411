"""Generated long prompts: their length, and answers that are in them."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from data.corpora.long_context import (
    KINDS,
    MARGIN,
    estimated_tokens,
    generated,
    repository,
    room,
)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("tokens", [1024, 4096])
def test_prompts_have_their_length_and_name_their_answers(kind: str, tokens: int) -> None:
    prompts = list(generated(kind, tokens, 3, seed=1))
    assert len({prompt.text for prompt in prompts}) == 3
    for prompt in prompts:
        assert room(tokens) - MARGIN < estimated_tokens(prompt.text) <= room(tokens) + 60
        assert all(answer in prompt.text for answer in prompt.answers)
    again = list(generated(kind, tokens, 3, seed=1))
    assert again == prompts != list(generated(kind, tokens, 3, seed=2))


def test_names_of_a_value_are_those_that_come_to_it() -> None:
    """Read as a program, in order."""
    for prompt in generated("variables", 1024, 5, seed=0):
        values: dict[str, str] = {}
        for words in prompt.text.split("Set ")[1:]:
            name, _, source = words.partition(".")[0].split()
            values[name] = values.get(source, source)
        asked = prompt.text.rpartition("value ")[2].split()[0]
        assert {name for name, value in values.items() if value == asked} == {*prompt.answers}
        assert len(values) == 8


def test_facts_are_not_repeated_in_a_table() -> None:
    (prompt,) = generated("key_value", 2048, 1, seed=0)
    assert prompt.text.count(prompt.answers[0]) == 1
    key = prompt.text.rpartition("key ")[2].split("?")[0]
    assert f"{key}: {prompt.answers[0]}\n" in prompt.text


def test_code_is_continued_at_a_line_that_is_not_shown(tmp_path: Path) -> None:
    coin = random.Random(0)
    for name in ("a.py", "b/c.py", "notes.txt"):
        file = tmp_path / name
        file.parent.mkdir(exist_ok=True)
        file.write_text("".join(f"{name[0]}{i} = {coin.random()}\n" for i in range(30)))
    prompts = list(repository(tmp_path, 600, 4, seed=0))
    for prompt in prompts:
        assert prompt.answers[0] not in prompt.text and "notes" not in prompt.text
        assert estimated_tokens(prompt.text) <= 600
        name = prompt.text.rpartition("Continue ")[2].split(". ")[0]
        lines = (tmp_path / name).read_text().splitlines()
        shown = prompt.text.rpartition("```")[0].splitlines()[-1]
        assert lines[lines.index(shown) + 1] == prompt.answers[0]
    with pytest.raises(ValueError, match="no file of code"):
        next(repository(tmp_path / "none", 600, 1, seed=0))
    with pytest.raises(ValueError, match="kind 'pin' is unknown"):
        next(generated("pin", 600, 1, seed=0))
