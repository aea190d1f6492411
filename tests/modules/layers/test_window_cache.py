"""A cache that drops what no row can read again gives what one gives that keeps everything."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from modules.contracts.rows import Rows, causal_rows
from modules.layers import window_cache
from modules.layers.decoder_layer import LayerCache
from modules.layers.window_cache import WindowCache
from tests.fakes import tiny_target

WINDOW, SINKS, BLOCK = 5, 2, 8


def reached(rows: Rows, committed_B: Tensor) -> Rows:
    """The rows with the committed positions that the first of them reaches."""
    near = rows.position_ids_BN[:, :1] + 1 - WINDOW
    slots = near.clamp(min=SINKS) + torch.arange(WINDOW)
    slots = torch.cat([torch.arange(SINKS).expand(len(slots), -1), slots], 1)
    return replace(rows, committed_BS=torch.where(slots < committed_B[:, None], slots, -1))


@pytest.mark.parametrize("even", [True, False])
def test_rows_read_what_a_whole_cache_holds(even: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """For sequences of one length and of several, after one of them has left, too."""
    monkeypatch.setattr(window_cache, "BLOCK", BLOCK)
    shape, none_B = tiny_target().shape, torch.zeros(3, dtype=torch.int64)
    coin = torch.Generator().manual_seed(0)
    whole = LayerCache.empty(shape, none_B, torch.float64)
    bounded = WindowCache.reaching(WINDOW, SINKS, shape, none_B, torch.float64)
    for call in range(40):
        batch, width = len(whole.lengths_B), 30 if call == 0 else 3
        rows = reached(causal_rows(bounded.positions_B, width), whole.lengths_B)
        new = torch.randn(2, batch, width, shape.num_kv_heads, shape.head_dim, generator=coin)
        read = [
            cache.chosen(rows, *cache.write(new[0].double(), new[1].double()))
            for cache in (whole, bounded)
        ]
        (keys, values, seen), (few_keys, few_values, few_seen) = read
        assert torch.equal(seen, few_seen)
        there = seen.any(1)
        assert torch.equal(keys[there], few_keys[there])
        assert torch.equal(values[there], few_values[there])
        counts = torch.randint(1, width + 1, (1 if even else batch,), generator=coin).expand(batch)
        for cache in (whole, bounded):
            cache.keep(counts, counts.tolist() if call % 2 else None)
        assert torch.equal(bounded.positions_B, whole.lengths_B)
        assert bounded.keys_BGCD.shape[2] <= WINDOW + SINKS + BLOCK
        if call == 20:
            left = torch.tensor([2, 0])
            whole, bounded = whole.select(left), bounded.select(left)
    assert whole.longest > 80 > bounded.longest
