"""The embedded prompts: enough of them, varied, clean, and apart from the held-out ones."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

PROMPTS = Path(__file__).resolve().parents[2] / "data" / "prompts"
CATEGORIES = {
    "question",
    "maths",
    "code",
    "summarise",
    "rewrite",
    "roleplay",
    "extraction",
    "reasoning",
    "writing",
}


def rows(name: str) -> list[dict]:
    return [json.loads(line) for line in (PROMPTS / name).read_text().splitlines()]


def opening(prompt: str) -> str:
    return " ".join(prompt.lower().split()[:5])


def test_training_prompts_are_many_and_distinct() -> None:
    prompts = [row["prompt"] for row in rows("prompts.jsonl")]
    assert len(prompts) >= 330
    assert len({" ".join(prompt.lower().split()) for prompt in prompts}) == len(prompts)
    assert max(Counter(map(opening, prompts)).values()) <= 8  # not one sentence with slots


def test_training_prompts_are_clean() -> None:
    for row in rows("prompts.jsonl"):
        assert set(row) == {"category", "prompt"}
        assert row["prompt"] == row["prompt"].strip()
        assert 9 <= len(row["prompt"].split()) <= 120


def test_every_category_is_well_filled() -> None:
    counts = Counter(row["category"] for row in rows("prompts.jsonl"))
    assert set(counts) == CATEGORIES
    assert min(counts.values()) >= 25


def test_held_out_prompts_are_apart() -> None:
    held_out = rows("heldout.jsonl")
    assert len(held_out) >= 20
    assert len({row["question_id"] for row in held_out}) == len(held_out)
    assert {row["category"] for row in held_out} == CATEGORIES
    turns = {turn for row in held_out for turn in row["turns"]}
    assert turns.isdisjoint(row["prompt"] for row in rows("prompts.jsonl"))
