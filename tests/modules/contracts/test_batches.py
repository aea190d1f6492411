"""The text batches that a batch of any kind is made of."""

from __future__ import annotations

from modules.contracts.batches import LabelledBatch, PreferenceBatch
from tests.fakes import tiny_batch, tiny_target


def test_a_batch_says_which_texts_it_is_made_of() -> None:
    target = tiny_target()
    first, second = tiny_batch(target), tiny_batch(target, seed=1)
    assert [text is first for text in first.texts()] == [True]
    assert [id(text) for text in PreferenceBatch(first, second).texts()] == [id(first), id(second)]
    assert LabelledBatch(second, second.input_ids % 2).texts() == (second,)
