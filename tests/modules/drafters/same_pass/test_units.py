"""Lexical units: how they are marked in a text, which placeholders they give, and repetitions."""

from __future__ import annotations

import torch

from modules.contracts.token_tree import TokenTree, Topology
from modules.drafters.same_pass.lud import LUD
from modules.drafters.same_pass.units import confident_tokens, repeating_nodes, unit_lengths
from modules.losses.chunked import training_rows
from tests.fakes import tiny_batch, tiny_target

TARGET = tiny_target()


def lud(target=TARGET, shake: float = 0.05, **arguments) -> LUD:
    torch.manual_seed(3)
    drafter = LUD(target.shape, **{"dropout": 0.0, **arguments})
    drafter.initialise(target)
    with torch.no_grad():
        for parameter in drafter.parameters():
            parameter += shake * torch.randn_like(parameter)
    return drafter.to(target.dtype).eval()


def slow_units(labels: list[bool], confident: list[bool], longest: int) -> list[int]:
    """Units read from left to right, token by token."""
    lengths, begin = [0] * len(labels), None
    for j, label in enumerate(labels):
        if not label:
            begin = None
        elif begin is None or not confident[j] or lengths[begin] == longest:
            begin, lengths[j] = j, 1
        else:
            lengths[begin] += 1
    return lengths


def test_units_are_marked_as_by_reading() -> None:
    generator = torch.Generator().manual_seed(0)
    for longest in (2, 3, 5):
        labels = torch.rand(40, 30, generator=generator) < 0.85
        confident = torch.rand(40, 30, generator=generator) < 0.7
        found = unit_lengths(labels, confident, longest)
        rows = zip(labels.tolist(), confident.tolist(), strict=True)
        assert found.tolist() == [slow_units(*row, longest) for row in rows]


def test_confident_tokens_are_those_that_the_target_expects() -> None:
    batch = tiny_batch(TARGET)
    labels, confident = confident_tokens(batch, TARGET, 0.01)
    final = TARGET.features(batch, ("final",))["final"]
    probs = TARGET.logits(final).softmax(-1)
    for b, row in enumerate(batch.input_ids.tolist()):
        for j in range(1, len(row)):
            same = batch.document_ids[b, j] == batch.document_ids[b, j - 1]
            counts = bool(batch.loss_mask[b, j] and same)
            assert bool(labels[b, j]) == counts
            assert bool(confident[b, j]) == (counts and float(probs[b, j - 1, row[j]]) >= 0.01)
    assert confident.any() and not confident[labels].all()
    assert not confident_tokens(batch, TARGET, 1.1)[1].any()


def test_placeholders_follow_the_token_before_a_unit() -> None:
    """Of a unit of n tokens n-1 count; with `outside` all of them, after single tokens too."""
    batch = tiny_batch(TARGET)
    lengths = unit_lengths(*confident_tokens(batch, TARGET, 0.01), 4).flatten().tolist()
    rows = lud(unit_confidence=0.01, outside=0.0).rows(batch, TARGET)
    flat = rows.flat_MK1[:, 0].tolist()
    expected = [j - 1 for j, length in enumerate(lengths) if length > 1]
    assert flat == expected and expected
    for t, valid in zip(flat, rows.valid_MK.tolist(), strict=True):
        assert valid == [d < lengths[t + 1] - 1 for d in range(3)]
    rows = lud(unit_confidence=0.01, outside=1.0).rows(batch, TARGET)
    every = training_rows(batch, 3)
    expected = [t for t in every.flat_MK1[:, 0].tolist() if lengths[t + 1]]
    assert rows.flat_MK1[:, 0].tolist() == expected
    assert int(rows.valid_MK.sum()) > 2 * len(expected)
    # Without units and outside of them nothing is trained; a few are chosen of many.
    assert not len(lud(unit_confidence=1.1, outside=0.0).rows(batch, TARGET).flat_MK1)
    assert len(lud(unit_confidence=0.01, units=2).rows(batch, TARGET).flat_MK1) <= 4
    for share in (0.2, 0.5):
        assert int(lud(outside=share)._outside(100).sum()) == 100 * share
        assert 10 < int(lud(outside=share).train()._outside(100).sum()) < 65


def repeats(text: list[int], drafted: int, longest: int) -> bool:
    """Whether the same tokens stand twice in a row at one of the last tokens."""
    ends = range(len(text) - drafted + 1, len(text) + 1)
    return any(
        text[end - size : end] == text[end - 2 * size : end - size]
        for end in ends
        for size in range(1, longest + 1)
        if end >= 2 * size
    )


def test_repetitions_are_found_on_every_path() -> None:
    tokens = torch.tensor([[4, 5, 9, 4, 4, 5, 5]])
    parents = torch.tensor([[-1, 0, 0, 1, 3, 4, 1]])
    tree = TokenTree(tokens, Topology(parents))
    recent = torch.tensor([[-2, -1, 4, 5]])
    found = repeating_nodes(tree, recent, 2)
    texts = {n: [] for n in range(7)}
    for n, parent in enumerate(parents[0].tolist()):
        texts[n] = [*(texts[parent] if parent >= 0 else [4, 5]), int(tokens[0, n])]
    expected = [n > 0 and repeats(texts[n], 1, 2) for n in range(7)]
    assert found[0].tolist() == expected and expected == [
        False,
        True,
        False,
        True,
        True,
        False,
        True,
    ]
    assert not repeating_nodes(tree, recent[:, :0], 0).any()
