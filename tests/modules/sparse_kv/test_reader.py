"""Gathered attention, and the policies without a state."""

from __future__ import annotations

import pytest
import torch

from modules.contracts.sampling import Sampling
from modules.drafters.self_speculative.sparse_kv.decoding import SparseDecoder
from modules.sparse_kv.exact import ExactTopK
from modules.sparse_kv.full import Full
from modules.sparse_kv.policy import KVReads, LayerCall, Policy
from modules.sparse_kv.reader import _on_device, consecutive, gathered_attention
from modules.sparse_kv.window import Window
from tests.fakes import ARCHITECTURES, ScriptedDrafter, tiny_seq2seq, tiny_target
from tests.modules.sparse_kv.checks import (
    Opened,
    check_batches,
    check_tree,
    check_whole,
    differs,
    prompts_of,
)

POLICIES = [
    Window(window=12, sinks=2),
    ExactTopK(8),
    ExactTopK(8, heads="key_value"),
    ExactTopK(8, heads="layer"),
]


def random_call(rows: int = 3, slots: int = 20) -> tuple[LayerCall, torch.Tensor]:
    """Two sequences of 20 and 16 slots, four query heads on two key/value heads."""
    coin = torch.Generator().manual_seed(1)
    query, keys, values = (
        torch.randn(2, heads, count, 8, generator=coin, dtype=torch.float64)
        for heads, count in ((4, rows), (2, slots), (2, slots))
    )
    lengths = torch.tensor([slots - rows, slots - rows - 4])
    own = lengths[:, None] + torch.arange(rows)
    visible = torch.arange(slots) <= own[..., None]
    places = torch.arange(slots).expand(2, -1)
    tokens, counts = torch.zeros(2, rows, dtype=torch.int64), torch.full((2,), rows)
    call = LayerCall(
        0, query, keys, 0.3, visible, lengths, own, own, places, tokens, counts, rows, KVReads()
    )
    return call, values


@pytest.mark.parametrize("heads", [1, 2, 4])
@pytest.mark.parametrize("alone", [True, False])
def test_gathered_attention_is_attention_under_a_mask(heads: int, alone: bool) -> None:
    call, values = random_call()
    rows, slots = 3, 20
    coin = torch.Generator().manual_seed(2)
    chosen = torch.rand(2, heads, rows if alone else 1, slots, generator=coin).argsort(-1)[..., :7]
    chosen[:, :, :, 2] = -1
    # The same by a mask over all slots.
    allowed = torch.zeros(2, heads, rows, slots + 1, dtype=torch.bool)
    index = torch.where(chosen < 0, slots, chosen).expand(-1, -1, rows, -1)
    allowed = allowed.scatter(3, index, True)[..., :slots]
    always = call.row_slots_BN if alone else call.pending_slots_BJ
    mark = torch.zeros(2, 1, rows, slots, dtype=torch.bool)
    place = always[:, None, :, None] if alone else always[:, None, None].expand(-1, 1, rows, -1)
    allowed = (allowed | mark.scatter(3, place, True)) & call.visible_BNS[:, None]
    allowed = allowed.repeat_interleave(4 // heads, 1)
    keys, wide = (part.repeat_interleave(2, 1) for part in (call.keys_BKSD, values))
    scores = (call.query_BQND @ keys.transpose(2, 3) * 0.3).masked_fill(~allowed, -torch.inf)
    expected = (scores.softmax(-1) @ wide).transpose(1, 2)
    torch.testing.assert_close(gathered_attention(call, chosen, _on_device(call, values)), expected)
    # Buffers that do not lie in rows are read too.
    call.keys_BKSD = call.keys_BKSD.transpose(2, 3).contiguous().transpose(2, 3)
    torch.testing.assert_close(gathered_attention(call, chosen, _on_device(call, values)), expected)


def test_consecutive_positions_are_those_of_a_text_without_gaps() -> None:
    """17 and 13 tokens are committed; the three rows since then are in a chain."""
    call, _ = random_call()
    slots = torch.tensor([9, -1, 3, 18, 17, 1]).expand(2, 1, 3, -1)
    # 1. Each row counts what it sees of its own choice, and is the last of it.
    seen = torch.tensor([[1, 0, 1, 0, 1, 1], [1, 0, 1, 1, 1, 1], [1, 0, 0, 1, 1, 0]]).bool()
    places, rows = consecutive(call, slots, seen.expand(2, 1, -1, -1))
    assert rows[0, 0].tolist() == [3, 4, 2]
    assert places[0, 0][seen].tolist() == [2, 1, 3, 0, 2, 1, 4, 3, 0, 0, 2, 1]
    # 2. One choice for all: what is committed, then the rows, each at its depth.
    slots = torch.tensor([[9, -1, 3, 17, 18, 19], [9, 2, 3, 13, 14, 15]])[:, None, None]
    places, rows = consecutive(call, slots, (slots >= 0).expand(-1, -1, 3, -1))
    assert places[0, 0, 0, [0, 2, 3, 4, 5]].tolist() == [1, 0, 2, 3, 4]
    assert places[1, 0, 0].tolist() == [2, 0, 1, 3, 4, 5]
    assert rows[:, 0].tolist() == [[2, 3, 4], [3, 4, 5]]


@pytest.mark.parametrize("policy", POLICIES)
def test_rows_of_trees_are_rows_of_plain_decoding(policy: Policy) -> None:
    check_tree(policy)
    assert differs(policy)


@pytest.mark.parametrize("policy", POLICIES)
def test_sequences_of_a_batch_do_not_see_each_other(policy: Policy) -> None:
    check_batches(policy)


@pytest.mark.parametrize("arch", sorted({*ARCHITECTURES} - {"gemma2"}))
def test_whole_budgets_are_full_attention_in_every_architecture(arch: str) -> None:
    target = tiny_target(arch)
    for policy in (Full(), Window(window=300), ExactTopK(44, "query"), ExactTopK(300)):
        check_whole(policy, target)
    check_tree(Window(window=12, sinks=2), target)


def test_bytes_read_are_those_of_the_chosen_slots() -> None:
    target, prompt = tiny_target(layers=4), prompts_of((100,))
    slot = 2 * 4 * 2 * 8 * 8
    rows = {}
    for policy in (Full(), Window(20, 4), ExactTopK(16, "key_value")):
        decoder = SparseDecoder(target, policy)
        traces = decoder.decode(prompt, Sampling(), 8)
        rows[type(policy)] = traces[0].kv_bytes, decoder.quality_of(traces)
    calls = len(rows[Full][0])
    assert rows[Full][0] == [slot * (101 + i) for i in range(calls)]
    assert rows[Full][1]["kv_share"] == 1.0
    # A window gathers its newest slots in the room of all rows since the commit.
    assert rows[Window][0] == [slot * (20 + 4 + 1 + 1)] * calls
    # All keys, and 16 slots beside the row itself.
    exact = [slot // 2 * (101 + i) + slot * 17 for i in range(calls)]
    assert rows[ExactTopK][0] == exact


def test_a_lossy_target_is_drafted_for_without_further_loss() -> None:
    """Drafts verified with the same slots give what the sparse target says alone."""
    target = tiny_target(layers=4)
    for policy in POLICIES:
        drafter = ScriptedDrafter(target.shape, right=0.6, decoys=1)
        prompts = prompts_of((40, 23))
        plain = SparseDecoder(target, policy).decode(prompts, Sampling(), 16)
        drafted = SparseDecoder(target, policy, drafter).decode(prompts, Sampling(), 16)
        assert [trace.ids for trace in drafted] == [trace.ids for trace in plain]


def test_prompts_are_read_in_parts() -> None:
    """Also by sessions of the target itself."""
    target, prompts = tiny_target(layers=4), prompts_of((40, 23))
    opened = Opened(target, Full())
    expected = opened.full(prompts, [9])
    whole, part = (target.open(2, 64) for _ in range(2))
    part.prompt_rows = 7
    ids = torch.tensor([prompts[0], prompts[1] + [0] * 17])
    lengths = torch.tensor([40, 23])
    one, other = (session.prefill(ids, lengths, [1, "final"]) for session in (whole, part))
    torch.testing.assert_close(one[0], other[0])
    for name in (1, "final"):
        torch.testing.assert_close(one[1][name][0], other[1][name][0])
        torch.testing.assert_close(one[1][name][1, :23], other[1][name][1, :23])
    assert part.cache.lengths == [40, 23] and expected.shape[1] == 1


def test_other_sessions_keep_the_models_attention() -> None:
    target, prompts = tiny_target(layers=4), prompts_of((40,))
    opened = Opened(target, Window(window=1, sinks=0))
    before = opened.full(prompts, [9, 20])
    opened.plain(prompts, [9, 20])
    assert torch.equal(opened.full(prompts, [9, 20]), before)


def test_bad_settings_are_refused() -> None:
    for wrong in (
        lambda: Window(window=0),
        lambda: Window(sinks=-1),
        lambda: ExactTopK(0),
        lambda: ExactTopK(8, heads="key"),  # pyright: ignore[reportArgumentType]
        lambda: SparseDecoder(tiny_seq2seq(), Full()),
        # Its scores are capped, which the gathered attention does not do.
        lambda: SparseDecoder(tiny_target("gemma2"), Full()),
    ):
        with pytest.raises(ValueError, match="must be at least|unknown|decoder-only"):
            wrong()
