"""Batch merging: deterministic, within boundaries, the same text; merged tokens have vectors."""

from __future__ import annotations

import random
from collections import Counter
from typing import Any

import pytest
import torch

from modules.target.loading import load_target
from modules.tokenization.transfer.frozen_base import Base
from modules.tokenization.transfer.hypernetwork import Hypernetwork
from modules.tokenization.transfer.merging import (
    BOUNDARIES,
    DynamicEmbeddings,
    Piece,
    merge,
    pieces_of_ids,
    validity,
)
from tests.modules.tokenization.folders import model_folder

BATCH: list[list[Piece]] = [
    [b"a", b"b", b"a", b"b", b"a", b" c", b"d"],
    [b"a", b"b", b" c", b"d", b" c", b"d", 7, b"a", b"b"],
]
TEXT = b"un-believable facts. More  facts\n\nhere \xe6\x9d\xb1!"


def text_of(row: list[Any]) -> bytes:
    return b"".join(piece for piece in row if isinstance(piece, bytes))


def test_the_most_frequent_pair_of_the_batch_is_merged_left_to_right() -> None:
    word = validity("word")
    assert merge(BATCH, 0, word) == BATCH
    once = merge(BATCH, 1, word)
    assert once == [
        [b"ab", b"ab", b"a", b" c", b"d"],
        [b"ab", b" c", b"d", b" c", b"d", 7, b"ab"],
    ]
    assert merge(BATCH, 2, word)[1] == [b"ab", b" cd", b" cd", 7, b"ab"]
    # Left to right without overlap.
    assert merge([[b"a"] * 5], 1, word) == [[b"aa", b"aa", b"a"]]
    assert merge(BATCH, 99, word) == merge(BATCH, 50, word)


def counted_anew(batch: list[list[Any]], merges: int, least: int) -> list[list[Any]]:
    """The definition, with all pairs counted for every merge; pieces are tuples of ids."""
    rows = [list(row) for row in batch]
    for _ in range(merges):
        counts = Counter(pair for row in rows for pair in zip(row, row[1:], strict=False))
        pairs = [pair for pair in counts if not any(isinstance(each, int) for each in pair)]
        best = max((p for p in pairs if len(p[0] + p[1]) < 6), key=counts.__getitem__, default=None)
        if best is None or counts[best] < least:
            break
        for row in rows:
            place = 0
            while place < len(row) - 1:
                if (row[place], row[place + 1]) == best:
                    row[place : place + 2] = [best[0] + best[1]]
                place += 1
    return rows


@pytest.mark.parametrize("letters", [1, 2, 5])
def test_counts_that_are_kept_up_to_date_are_those_of_counting_anew(letters: int) -> None:
    draw = random.Random(letters)
    for _ in range(10):
        rows: list[list[Any]] = [
            [(draw.randrange(letters),) if draw.random() < 0.95 else 7 for _ in range(length)]
            for length in (0, 1, 12, 25)
        ]
        for merges, least in ((1, 1), (4, 1), (40, 1), (40, 2), (40, 3)):
            fast = merge(rows, merges, lambda left, right: len(left + right) < 6, least)
            assert fast == counted_anew(rows, merges, least)


@pytest.mark.parametrize("boundary", BOUNDARIES)
def test_merging_keeps_the_text_and_never_lengthens(boundary: str) -> None:
    def pretokens(text: str) -> list[str]:
        return text.replace(" ", "| ").strip("|").split("|")

    row: list[Piece] = [TEXT[i : i + 1] for i in range(len(TEXT))]
    lengths = []
    for merges in (0, 1, 4, 16, 64):
        (merged,) = merge([row], merges, validity(boundary, pretokens))
        assert text_of(merged) == TEXT
        lengths.append(len(merged))
    assert lengths == sorted(lengths, reverse=True) and lengths[-1] < lengths[0]


def test_boundaries() -> None:
    word, hyphen, sentence = map(validity, ("word", "word_hyphen", "sentence"))
    assert word(b" be", b"lieve") and not word(b"be", b" lieve") and not word(b" a", b" b")
    assert word(b"un-", b"real") and not hyphen(b"un-", b"real")
    assert word(b"  ", b" ") and not word(b"\n", b"\n") and not sentence(b"a\n", b"\nb")
    assert sentence(b"two", b" words") and not sentence(b"end.", b" New")
    assert word(b"\xe6\x9d", b"\xb1") and word(b"\xe6", b"\x9d")
    # Parts of a character carry nothing over a boundary.
    assert not word(b"\xa9", b" b") and not sentence(b"\xa9.", b" B") and sentence(b"\xa9", b" b")
    assert not hyphen(b"\xa9-", b"b") and word(b"\xa9-", b"b") and not word(b"\xa9", b"\n")
    pretoken = validity("pretoken", str.split)
    assert pretoken(b"\xe6", b"\x9d") and not pretoken(b"\xa9", b" b")
    with pytest.raises(ValueError, match="boundary 'line' is unknown"):
        validity("line")
    with pytest.raises(ValueError, match="needs the tokenizer's pre-tokenizer"):
        validity("pretoken")


def test_special_tokens_are_never_merged() -> None:
    merged = merge([[7, b"a", 7, b"a", 7, b"a"]], 9, validity("sentence"))
    assert merged == [[7, b"a", 7, b"a", 7, b"a"]]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Base:
    folder = model_folder(tmp_path_factory.mktemp("base"), 0)
    return Base(load_target(str(folder), "float32", "cpu"))


def test_without_merges_the_base_models_own_logits(base: Base) -> None:
    ids = base.target.tokenizer("The cat sat on the mat.").input_ids
    network = Hypernetwork(base.embedding.float(), None, 16, 1, 2, length=4).eval()
    dynamic = DynamicEmbeddings(network, base)
    pieces = pieces_of_ids(base, ids)
    assert b"".join(pieces) == b"The cat sat on the mat."  # type: ignore[arg-type]
    vectors = dynamic.vectors(pieces)
    assert torch.equal(vectors, base.embedding[ids]) and dynamic.predicted == 0
    predicted = DynamicEmbeddings(network, base, originals=False).vectors(pieces)
    assert not torch.allclose(predicted, vectors)


def test_vectors_of_merged_tokens_are_kept(base: Base) -> None:
    network = Hypernetwork(base.embedding.float(), None, 16, 1, 2, length=4).eval()
    dynamic = DynamicEmbeddings(network, base, remembered=2)
    first = dynamic.vectors([b"The cat", b" sat on", b"The cat"])
    assert dynamic.predicted == 2 and torch.equal(first[0], first[2])
    assert torch.equal(dynamic.vectors([b"The cat"])[0], first[0]) and dynamic.predicted == 2
    dynamic.vectors([b"another one"])
    assert len(dynamic.cache) == 2 and b" sat on" not in dynamic.cache
    assert all(len(kept.untyped_storage()) == kept.nbytes for kept in dynamic.cache.values())
