"""Documents of a packed row go through a recurrence in groups of similar length."""

from __future__ import annotations

import pytest
import torch

from modules.contracts.batches import TextBatch
from modules.drafters.blocks.documents import Documents
from modules.drafters.blocks.falcon import Falcon
from tests.fakes import tiny_target

TARGET = tiny_target()


def packed_row(lengths: list[int], padding: int) -> TextBatch:
    """Documents of these lengths in one row, and padding behind them."""
    ids = [number for number, length in enumerate(lengths) for _ in range(length)] + [-1] * padding
    positions = torch.cat([torch.arange(length) for length in (*lengths, padding)])
    tokens = torch.randint(5, 128, (1, len(ids)), generator=torch.Generator().manual_seed(0))
    return TextBatch(tokens, torch.tensor([ids]) >= 0, positions[None], torch.tensor([ids]))


def test_documents_go_through_the_recurrence_side_by_side_within_twice_their_tokens() -> None:
    """A long document among many short ones, and padding longer than any."""
    lengths = [5, 64, *range(1, 16), 7, 3]
    found = Documents.of(packed_row(lengths, 300).document_ids)
    assert found.lengths_S.tolist() == [*lengths, 300]
    index, inside = zip(*found.groups(), strict=True)
    assert 1 < len(inside) < 5 and sum(own.numel() for own in inside) <= 2 * sum(lengths)
    usual = Documents.of(packed_row([250, 400, 150, 200], 24).document_ids)
    assert [tuple(own.shape) for _, own in usual.groups()] == [(4, 400)]
    places = torch.cat([part[own] for part, own in zip(index, inside, strict=True)])
    assert places.sort().values.tolist() == list(range(sum(lengths)))
    assert len(list(Documents.of(torch.full((1, 4), -1)).groups())) == 1, (
        "padding where there is nothing else"
    )


@pytest.mark.parametrize("padding", [0, 90])
def test_the_recurrence_over_groups_is_that_over_packed_documents(padding: int) -> None:
    drafter, lengths = Falcon(TARGET.shape).eval(), [5, 40, *range(1, 12), 7]
    batch, total = packed_row(lengths, padding), sum(lengths)
    features = torch.randn(batch.input_ids.numel(), TARGET.shape.hidden_size, requires_grad=True)
    following, alone = batch.input_ids.roll(-1, 1).flatten(), []
    for rows, tokens in zip(
        features[:total].split(lengths), following[:total].split(lengths), strict=True
    ):
        memory = drafter.blank_memory(features, 1)
        alone.append(
            drafter.fuse(tokens[None], rows[None], memory, TARGET, torch.tensor([len(tokens)]))[0][
                0
            ]
        )
    expected = torch.cat(alone)
    found = drafter.fused(Documents.of(batch.document_ids), features, following, TARGET)
    torch.testing.assert_close(found[:total], expected, atol=1e-5, rtol=0)
    assert not bool(found[total:].any())
    slopes = [
        torch.autograd.grad(
            rows[:total].square().sum(), (features, *drafter.recurrence.parameters())
        )
        for rows in (found, expected)
    ]
    for one, other in zip(*slopes, strict=True):
        torch.testing.assert_close(one, other, atol=1e-4, rtol=1e-4)
