"""The editing task: sentences of its sources, damaged by known edits, the same for one seed."""

from __future__ import annotations

import json
import random
from collections import Counter
from pathlib import Path

import pytest

from data.corpora.editing import KINDS, build, damaged, pairs, sentences
from data.reading.rows import load_conversations


def test_sentences_end_with_their_mark_and_cross_no_empty_line() -> None:
    text = (
        "# Title\n\nOne two\nthree four five. Too short. A b c d e\n\nF g h i j k. Has (a b) c d e."
    )
    assert sentences([text, "One two three four five."], 5, 9) == [
        "One two three four five.",
        "F g h i j k.",
    ]


def test_an_edit_inserts_deletes_swaps_or_misspells_one_word() -> None:
    words, seen = ["aa", "bb", "cc", "dd"], Counter()
    for seed in range(400):
        text = damaged(words, 1, ["zz"], random.Random(seed)).split()
        if len(text) == 5:
            seen["insert"] += [word for word in text if word != "zz"] == words
        elif len(text) == 3:
            seen["delete"] += all(word in words for word in text)
        elif sorted(text) == words:
            seen["swap"] += sum(one != other for one, other in zip(text, words)) == 2
        else:
            differing = [(one, other) for one, other in zip(text, words) if one != other]
            letters = sum(a != b for a, b in zip(*differing[0]))
            seen["misspell"] += len(differing) == 1 and letters == 1
    assert set(seen) == set(KINDS) and min(seen.values()) > 60
    assert damaged(words, 0, ["zz"], random.Random(0)) == "aa bb cc dd"
    # Two words are left.
    for seed in range(20):
        assert len(damaged(["aa", "bb"], 5, ["zz"], random.Random(seed)).split()) >= 2


def test_the_same_seed_writes_the_same_bytes_and_sentences_are_apart(tmp_path: Path) -> None:
    text = " ".join(f"Word{chr(97 + i)} one two three four." for i in range(20))
    (tmp_path / "page.md").write_text(text)
    source = tmp_path / "rows.jsonl"
    source.write_text(json.dumps({"prompt": "p", "response": "The first row has five words."}))
    files = [str(tmp_path / "*.md")]
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        build(str(tmp_path / name), str(source), files, 50, 6, random_words=0.0, seed=seed)
    first, same, other = ((tmp_path / name / "train.jsonl").read_bytes() for name in "abc")
    assert first == same != other
    rows = {
        name: [json.loads(line) for line in (tmp_path / "a" / f"{name}.jsonl").open()]
        for name in ("train", "heldout")
    }
    assert len(rows["train"]) == 50 and len(rows["heldout"]) == 6
    clean = {name: {row["response"] for row in some} for name, some in rows.items()}
    assert not clean["train"] & clean["heldout"] and len(clean["train"]) == 15
    read = list(load_conversations(str(tmp_path / "a" / "train.jsonl"), None, "train"))
    assert [turn["content"] for turn in read[0].messages] == [
        rows["train"][0]["prompt"],
        rows["train"][0]["response"],
    ]


def test_a_share_of_the_answers_has_random_words() -> None:
    clean = [" ".join(f"w{chr(97 + i)}{chr(97 + j)}" for j in range(6)) for i in range(10)]
    rows = pairs(clean, 400, 2, 0.5, random.Random(0))
    assert 160 < sum(row["response"] in clean for row in rows) < 240
    assert {len(row["response"].split()) for row in rows} == {6}


def test_what_cannot_be_made_is_refused_by_name(tmp_path: Path) -> None:
    source = tmp_path / "rows.jsonl"
    source.write_text(json.dumps({"prompt": "p", "response": "The first row has five words."}))
    for arguments, message in (
        ({"heldout": 5}, "1 sentences of 5 to 16 words, heldout is 5: lower it"),
        ({"shortest": 1}, "shortest must be at least 2 words, got 1"),
        ({"random_words": 1.5}, "random_words must lie in"),
        ({"files": [str(tmp_path / "none*")]}, "matches none"),
    ):
        with pytest.raises(ValueError, match=message):
            build(str(tmp_path / "out"), str(source), **{"files": [], **arguments})
    assert not (tmp_path / "out").exists()
