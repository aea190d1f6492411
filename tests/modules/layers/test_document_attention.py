"""Long packed texts: attention without a mask of all pairs of tokens."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.nn import functional as F

from modules.contracts.rows import DocumentRows
from modules.drafters.feature.eagle3 import Eagle3
from modules.drafters.heads.clover import Clover
from modules.drafters.heads.medusa import Medusa
from modules.layers import document_attention as module
from modules.layers.document_attention import block_mask, document_attention
from tests.fakes import ARCHITECTURES, tiny_batch, tiny_target


@pytest.fixture
def parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every text is too long for one mask."""
    monkeypatch.setattr(module, "WHOLE_ROWS", 4)
    monkeypatch.setattr(module, "PART_ROWS", 5)


def refuse_masks(monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(rows: DocumentRows) -> None:
        raise AssertionError("a mask of all pairs")

    monkeypatch.setattr(DocumentRows, "visible_BNJ", property(refused))


@pytest.mark.parametrize("window", [None, 4])
def test_parts_are_attention_under_the_mask(parts: None, window: int | None) -> None:
    target = tiny_target()
    rows = tiny_batch(target).rows()
    coin = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(2, h, 24, 8, generator=coin, dtype=torch.float64)
                         for h in (4, 2, 2))  # fmt: skip
    query.requires_grad_()
    mask = rows.visible(0, 24, window=window)[:, None]
    expected = F.scaled_dot_product_attention(query, key, value, mask, enable_gqa=True)
    found = document_attention(query, key, value, rows, window=window)
    torch.testing.assert_close(found, expected)
    gradients = [torch.autograd.grad((o * o).sum(), query)[0] for o in (found, expected)]
    torch.testing.assert_close(*gradients)
    # The function that FlexAttention's mask is made of.
    seen = module._mask_function(rows, window)
    grid = torch.meshgrid(torch.arange(2), torch.arange(24), torch.arange(24), indexing="ij")
    assert torch.equal(seen(grid[0], grid[0], grid[1], grid[2]), mask[:, 0])
    assert block_mask(rows, window) is block_mask(rows, window)


@pytest.mark.parametrize("arch", sorted({*ARCHITECTURES} - {"gemma2"}))
def test_states_are_those_of_one_mask(
    arch: str, parts: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    target: Any = tiny_target(arch)
    batch = tiny_batch(target)
    with monkeypatch.context() as whole:
        whole.setattr(module, "WHOLE_ROWS", 100)
        expected = target.features(batch, [1, "final"])
    refuse_masks(monkeypatch)
    found = target.features(batch, [1, "final"])
    real = batch.document_ids >= 0
    for name in (1, "final"):
        torch.testing.assert_close(found[name][real], expected[name][real])


@pytest.mark.parametrize("kind", [Eagle3, Clover, Medusa])
def test_losses_are_those_of_one_mask(
    kind: Any, parts: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = tiny_target(layers=6)
    torch.manual_seed(0)
    drafter = kind(target.shape).double()
    drafter.initialise(target)
    batch = tiny_batch(target)
    batch.states = dict(target.features(batch, drafter.training_states))
    totals = []
    for most in (100, 4):
        monkeypatch.setattr(module, "WHOLE_ROWS", most)
        if most == 4:
            refuse_masks(monkeypatch)
            monkeypatch.setattr("modules.layers.hanging_attention.MAX_SCORES", 200)
        drafter.zero_grad()
        loss = drafter.loss(batch, target, 0.5).total
        loss.backward()
        gradients = [p.grad for p in drafter.parameters() if p.grad is not None]
        totals.append([loss.detach(), *gradients])
    torch.testing.assert_close(totals[1], totals[0])
