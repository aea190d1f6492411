"""Rows keep every document once, apart, and in an order that (seed, epoch) decides."""

from __future__ import annotations

import torch

from data.conversations import Tokens
from data.packing import collate, pack
from modules.contracts.shapes import StateName
from tests.fakes import tiny_target


def document(length: int, seed: int = 0) -> Tokens:
    """Random tokens, the second half the assistant's."""
    ids = torch.randint(5, 100, (length,), generator=torch.Generator().manual_seed(seed))
    return Tokens(ids, torch.arange(length) >= length // 2)


def test_rows_hold_every_document_once_and_fit() -> None:
    lengths = [3, 9, 4, 10, 1, 6, 5, 2, 7]
    rows = pack(lengths, 10, seed=1)
    assert sorted(index for row in rows for index in row) == list(range(9))
    assert all(sum(lengths[index] for index in row) <= 10 for row in rows)
    assert len(rows) <= 6


def test_packing_is_deterministic_and_changes_with_seed_and_epoch() -> None:
    lengths = [1 + i % 7 for i in range(40)]
    assert pack(lengths, 12, 3, 1) == pack(lengths, 12, 3, 1)
    assert pack(lengths, 12, 3, 1) != pack(lengths, 12, 3, 2)
    assert pack(lengths, 12, 3, 1) != pack(lengths, 12, 4, 1)


def test_a_batch_restarts_positions_and_tells_documents_apart() -> None:
    batch = collate([[document(3), document(2)], [document(4)]])
    assert batch.position_ids.tolist() == [[0, 1, 2, 0, 1], [0, 1, 2, 3, 0]]
    assert batch.document_ids.tolist() == [[0, 0, 0, 1, 1], [0, 0, 0, 0, -1]]
    assert batch.loss_mask.tolist() == [
        [False, True, True, False, True],
        [False, False, True, True, False],
    ]


def test_packed_states_equal_those_of_each_document_alone() -> None:
    target = tiny_target()
    documents = [document(7, 1), document(5, 2), document(6, 3)]
    packed = target.features(collate([documents[:2], documents[2:]]), ["final"])["final"]
    for (row, start), alone in zip([(0, 0), (0, 7), (1, 0)], documents, strict=True):
        expected = target.features(collate([[alone]]), ["final"])["final"][0]
        torch.testing.assert_close(packed[row, start : start + len(alone)], expected)


def test_states_are_laid_out_like_their_rows() -> None:
    rows = [[document(3), document(2)], [document(4)]]
    states: list[list[dict[StateName, torch.Tensor]]] = [
        [{"final": torch.full((len(d), 2), float(len(d)))} for d in row] for row in rows
    ]
    batch = collate(rows, states)
    assert batch.states["final"][..., 0].tolist() == [[3, 3, 3, 2, 2], [4, 4, 4, 4, 0]]
