"""The target drafts with a part of its KV cache: lossless, and by the verification's own scores."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from modules.contracts.sampling import Sampling
from modules.decoding.decoder import SpeculativeDecoder
from modules.drafters.self_speculative.sparse_kv.drafting import SparseKVDrafter
from modules.sparse_kv.act_qkv import ActQKV
from modules.sparse_kv.exact import ExactTopK
from modules.sparse_kv.full import Full
from modules.sparse_kv.policy import LayerCall, Policy
from modules.sparse_kv.reader import SparseReader
from modules.sparse_kv.sentence_kv import SentenceKV
from modules.sparse_kv.tidal import TidalDecode
from modules.sparse_kv.token_select import TokenSelect
from modules.sparse_kv.window import Window
from modules.trees.static import StaticTree
from tests.fakes import ids_by_batch, many_prompts, tiny_seq2seq, tiny_target
from tests.modules.conformance import check_greedy
from tests.modules.sampling import goodness, small_target
from tests.modules.sparse_kv.checks import prompts_of

POLICIES = {
    "window": Window(4, 1),
    "exact": ExactTopK(2),
    "tidal": TidalDecode(4, 0, []),
    "token_select": TokenSelect(budget=3, initial=1, local=2, threshold=0.5),
}
SAMPLED = POLICIES | {
    "sentence_kv": SentenceKV(
        5, 1.0, observed=2, kernel=1, start_tokens=1, recent=2, marks="abcdefgh"
    ),
    "act_qkv": ActQKV(blocks=1, block=2, initial=1, local=2, window=4),
}


def drafter(target: Any, policy: Policy, **settings: Any) -> SparseKVDrafter:
    return SparseKVDrafter(target.shape, policy, **settings).eval()


@pytest.mark.parametrize("name", SAMPLED)
@pytest.mark.parametrize("refresh", ["verification", "draft"])
def test_answers_are_the_targets(name: str, refresh: Any) -> None:
    """Alone and in batches, as a chain and as a tree, in float64 and in float32."""
    target, policy = tiny_target(), SAMPLED[name]
    check_greedy(drafter(target, policy, refresh=refresh), target)
    prompts = many_prompts(6)
    plain = ids_by_batch(SpeculativeDecoder(target), prompts, 6, 12)
    made = drafter(target, policy, refresh=refresh)
    tree = StaticTree([(0,), (1,), (0, 0), (1, 0), (0, 0, 0)])
    for builder, size in ((None, 4), (tree, 6)):
        decoder = SpeculativeDecoder(target, made, builder=builder)
        assert ids_by_batch(decoder, prompts, size, 12) == plain
    single = tiny_target(dtype=torch.float32)
    check_greedy(drafter(single, policy, refresh=refresh), single)


@pytest.mark.parametrize("name", SAMPLED)
def test_sampled_answers_have_the_targets_distribution(name: str) -> None:
    """Chains drawn from the sparse target, at temperature 1."""
    target = small_target()
    decoder = SpeculativeDecoder(
        target, drafter(target, SAMPLED[name], steps=2), stop_ids=frozenset()
    )
    prompt = [3, 1, 4, 0, 5, 2, 2, 1]
    assert goodness(decoder, prompt, Sampling(1.0), runs=750, batch=750) > 1e-4


def test_all_is_accepted_of_full_drafts_and_not_of_sparse_ones() -> None:
    target, prompt = tiny_target(), prompts_of((40,))
    counts = {}
    for policy in (Full(), Window(1, 0)):
        decoder = SpeculativeDecoder(target, drafter(target, policy, steps=3))
        counts[type(policy)] = decoder.decode(prompt, Sampling(), 25)[0].accepted
    assert counts[Full] == [4] * 6 and max(counts[Window]) < 4


def test_drafts_read_what_the_newest_row_of_the_verification_chose(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """And the rows since then."""
    target, prompt = tiny_target(), prompts_of((40,))
    chosen: list[set[int]] = []
    held = SparseReader._held
    made = drafter(target, ExactTopK(4, "layer"), steps=2)

    def watched(self: SparseReader, call: LayerCall) -> Any:
        slots = held(self, call)
        if call.layer == 1 and slots is not None:
            # The newest committed row, and what had its largest weights in that layer.
            newest = int(call.lengths_B[0]) - 1
            chosen.append(set(slots[0, 0, 0].tolist()) - {-1})
            assert newest in chosen[-1]
            assert set(call.pending_slots_BJ[0].tolist()) <= chosen[-1]
            assert len(chosen[-1]) <= 4 + 1 + call.pending
        return slots

    monkeypatch.setattr(SparseReader, "_held", watched)
    SpeculativeDecoder(target, made).decode(prompt, Sampling(), 16)
    assert len(chosen) > 4


def test_drafts_read_fewer_bytes_than_verification() -> None:
    """Held choices read their slots alone, with no key read for the choice."""
    target, prompt = tiny_target(), prompts_of((200,))
    slot, steps = 2 * 2 * 2 * 8 * 8, 2
    decoder = SpeculativeDecoder(target, drafter(target, ExactTopK(8, "key_value"), steps=steps))
    trace = decoder.decode(prompt, Sampling(), 12)[0]
    # The first proposal chooses by itself; later ones read 8 slots, the row that chose, the rows
    # since and, once more, the row itself in a column that is masked.
    for i in range(1, len(trace.kv_bytes)):
        context = 200 + sum(trace.accepted[:i])
        # The choice is made of the keys in the same call that verifies.
        verified = slot * (context + steps + 1) * 3 // 2
        drafted = sum(slot * (8 + 1 + depth + 1 + 1) for depth in range(steps))
        assert trace.kv_bytes[i] == verified + drafted


def test_other_targets_are_refused() -> None:
    target = tiny_seq2seq()
    with pytest.raises(ValueError, match="decoder-only"):
        SpeculativeDecoder(target, drafter(target, Full())).decode([[7, 8]], Sampling(), 4)
    with pytest.raises(ValueError, match="refresh 'never'"):
        drafter(tiny_target(), Full(), refresh="never")
