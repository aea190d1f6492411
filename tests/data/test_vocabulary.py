"""The draft vocabulary: frequent assistant tokens, ascending, the end of turn always among them."""

from __future__ import annotations

import pytest
import torch

from data.conversations import Tokens
from data.vocabulary import coverage, frequent_tokens


def test_the_most_frequent_assistant_tokens_and_the_end_of_turn() -> None:
    ids = torch.tensor([9, 9, 9, 9, 7, 7, 7, 5, 5, 3])
    documents = [Tokens(ids, torch.arange(10) >= 4)]
    assert frequent_tokens(documents, 2, 12).tolist() == [5, 7]
    assert frequent_tokens(documents, 2, 12, always=[0]).tolist() == [0, 7]
    assert frequent_tokens(documents, 5, 12).tolist() == [0, 1, 3, 5, 7]
    assert coverage(documents, torch.tensor([5, 7]), 12) == pytest.approx(5 / 6)


def test_sizes_that_make_no_sense_are_refused() -> None:
    documents = [Tokens(torch.tensor([1, 2]), torch.tensor([False, True]))]
    for size in (0, 13):
        with pytest.raises(
            ValueError, match=f"draft_vocabulary must .* the target's 12 tokens, got {size}"
        ):
            frequent_tokens(documents, size, 12)
