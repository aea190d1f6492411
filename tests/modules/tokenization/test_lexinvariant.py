"""Lexinvariant models: drawn vectors, the curriculum over them, attention that copies."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from modules.tokenization.blocks import backbone
from modules.tokenization.contract import PAD
from modules.tokenization.lexinvariant import Lexinvariant
from modules.tokenization.units import ByteUnits, make_units
from tests.modules.tokenization.small import SIZES, TEXT, draws, rows_of, seeded


def lexinvariant(share: float = 1.0) -> Lexinvariant:
    return seeded(Lexinvariant(ByteUnits(), **SIZES, random_share=share))


def test_permuted_tokens_with_permuted_vectors_change_nothing() -> None:
    model = lexinvariant()
    rows = rows_of(model)
    tables = model.tables(len(rows), draws())
    order = torch.randperm(model.units.size, generator=draws())
    order = torch.cat([order, torch.tensor([model.end])])
    permuted = torch.empty_like(tables)
    permuted[:, order] = tables
    moved = torch.where(rows == PAD, PAD, order[rows.clamp(min=0)])
    states, again = model.states(rows, tables), model.states(moved, permuted)
    assert torch.equal(states[rows != PAD], again[rows != PAD])
    # By layer: the vectors themselves, and the states.
    vectors = torch.stack([table[row] for table, row in zip(tables, rows.clamp(min=0))])
    assert torch.equal(model.states(rows, tables, 0), vectors.to(model.dtype))
    assert torch.equal(model.states(rows, tables, 2), states)


def test_vectors_are_drawn_anew_for_every_row() -> None:
    model = lexinvariant()
    tables = model.tables(3, draws())
    assert not torch.allclose(tables[0], tables[1])
    assert float(tables.var()) == pytest.approx(1 / 16, rel=0.1)
    row = rows_of(model)[:1]
    losses = model.token_losses(row.expand(2, -1), draws())
    assert not torch.allclose(losses[0], losses[1])


def test_the_share_of_drawn_vectors() -> None:
    model = lexinvariant(0.2)
    assert model.embedding_VH is not None
    drawn = (model.tables(50, draws()).double() != model.embedding_VH).any(-1)
    assert float(drawn.double().mean()) == pytest.approx(0.2, abs=0.02)
    # A whole number, as YAML writes it, is a share too: an ordinary model.
    ordinary = Lexinvariant(ByteUnits(), **SIZES, random_share=0)
    assert torch.equal(*ordinary.tables(2, draws()))
    assert ordinary.settings == {
        **SIZES,
        "random_share": 0,
        "orthonormal": False,
        "curriculum": False,
        "induction": False,
    }


def test_a_curriculum_draws_each_row_s_share_in_training_alone() -> None:
    model = seeded(Lexinvariant(ByteUnits(), **SIZES, curriculum=True))
    assert model.embedding_VH is not None
    tables = model.tables(5, draws())
    assert torch.equal(tables, lexinvariant().tables(5, draws()))  # in evaluation all are drawn
    drawn = (model.train().tables(400, draws()).double() != model.embedding_VH).any(-1)
    shares = drawn.double().mean(1)
    assert float((shares == 1).double().mean()) == pytest.approx(0.25, abs=0.05)
    # Else from 0 to 1, with the density 2s: squares are uniform.
    squares = shares[shares < 1].sort().values.square()
    even = torch.linspace(0, 1, len(squares), dtype=torch.float64)
    assert torch.allclose(squares, even, atol=0.08)
    # The others are learned, and begin with the length of drawn ones.
    model.score(rows_of(model), draws()).loss.backward()
    assert model.embedding_VH.grad is not None and bool(model.embedding_VH.grad.any())
    fresh = Lexinvariant(ByteUnits(), **SIZES, curriculum=True).embedding_VH
    assert fresh is not None and float(fresh.var()) == pytest.approx(1 / 16, rel=0.1)


def train(
    model: Lexinvariant, batch: Callable[[], Tensor], steps: int, generator: torch.Generator
) -> None:
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(steps):
        loss = model.score(batch(), generator).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


def test_it_learns_to_read_repetition() -> None:
    """Rows that repeat random letters: late tokens become likely, first ones stay near uniform."""
    torch.manual_seed(0)
    model = Lexinvariant(ByteUnits(), width=32, layers=2, heads=2, length=24)
    generator = torch.Generator().manual_seed(0)

    def batch(count: int) -> Tensor:
        return torch.randint(0, 256, (count, 4), generator=generator).repeat(1, 6)

    train(model, lambda: batch(16), 250, generator)
    with torch.no_grad():
        losses = model.token_losses(batch(32), generator).mean(0)
    assert float(losses[:4].mean()) > 0.9 * math.log(257)
    assert float(losses[12:].mean()) < 0.5 * math.log(257)
    figures = model.details(batch(32))
    assert figures["loss_last_quarter"] < 0.5 * figures["loss_first_quarter"]


def test_orthonormal_vectors_are_drawn_evenly() -> None:
    units = make_units("characters", ["abcde"], 6)
    model = Lexinvariant(units, **SIZES, orthonormal=True)
    tables = model.tables(4000, draws())
    size = units.size + 1
    assert torch.allclose(tables @ tables.mT, torch.eye(size).expand(4000, -1, -1), atol=1e-5)
    # Also the entries whose sign a decomposition fixes: mean 0, variance 1/16.
    assert float(tables.mean(0).abs().max()) < 5 / 4 / 4000**0.5
    assert torch.allclose(tables.var(0), torch.full((size, 16), 1 / 16), rtol=0.15)


def test_smeared_keys_mix_each_key_with_the_one_before() -> None:
    torch.manual_seed(0)
    plain, smeared = backbone(8, 1, 2), backbone(8, 2, 2, induction=True)
    attention, other = smeared.layers[1].self_attn, plain.layers[0].self_attn
    shares = attention.k_proj.shares
    assert torch.equal(shares.sigmoid(), torch.full((2,), 0.5))  # half and half before training
    maps = [
        part
        for layer in smeared.layers
        for part in (layer.self_attn.v_proj, layer.self_attn.o_proj)
    ]
    assert all(torch.equal(part.weight, torch.eye(8) / 2) for part in maps)
    assert len({part.weight.data_ptr() for part in maps}) == 4
    shares.data = torch.tensor([-1.0, 3.0])
    attention.k_proj.keys.weight.data = other.k_proj.weight.data
    states = torch.randn(3, 5, 8)
    keys, mixed = other.k_proj(states), attention.k_proj(states)
    for row, position, head in itertools.product(range(3), range(5), range(2)):
        part = slice(4 * head, 4 * head + 4)
        share = 1 / (1 + math.exp(-float(shares.detach()[head])))
        expected = share * keys[row, position, part]
        if position > 0:
            expected = expected + (1 - share) * keys[row, position - 1, part]
        assert torch.allclose(mixed[row, position, part], expected, atol=1e-6)


def test_one_layer_with_smeared_keys_reads_what_followed() -> None:
    """Pairs of letters in an order that is new each time. Who knows only which eight letters there
    are needs log 8 nats, 2.08; plain attention of one layer needs 5.0 after these steps.
    """
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"width": 32, "layers": 1, "heads": 2, "length": 24}
    model = Lexinvariant(ByteUnits(), **sizes, induction=True)
    generator = torch.Generator().manual_seed(0)

    def batch(count: int) -> Tensor:
        return torch.stack([pairs_shuffled(generator) for _ in range(count)])

    train(model, lambda: batch(16), 300, generator)
    with torch.no_grad():
        losses = model.token_losses(batch(64), generator)
    # The second letter of a pair, in the last round.
    assert float(losses[:, 17::2].mean()) < 1.8


def pairs_shuffled(generator: torch.Generator) -> Tensor:
    """A row [24]: four pairs of letters, three times, each time in another order."""
    pairs = torch.randperm(256, generator=generator)[:8].view(4, 2)
    return torch.cat([pairs[torch.randperm(4, generator=generator)].flatten() for _ in range(3)])


def test_held_out_rows_are_scored_some_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    model, counts = lexinvariant(0.0), []
    rows = rows_of(model, TEXT * 10)
    losses = model.token_losses(rows, draws())
    tables = model.tables

    def noted(count: int, generator: torch.Generator) -> Tensor:
        counts.append(count)
        return tables(count, generator)

    monkeypatch.setattr(model, "tables", noted)
    figures = model.details(rows)
    first = float(losses[:, :8].sum() / (rows[:, :8] != PAD).sum())
    assert figures["loss_first_quarter"] == pytest.approx(first)
    assert sum(counts) == len(rows) > 2 * max(counts)
