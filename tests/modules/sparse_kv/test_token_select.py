"""TokenSelect: votes, and when a choice is used again."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from modules.contracts.sampling import Sampling
from modules.drafters.self_speculative.sparse_kv.decoding import SparseDecoder
from modules.sparse_kv.policy import LayerCall
from modules.sparse_kv.session import SparseSession
from modules.sparse_kv.token_select import TokenSelect, TokenSelection, soft_vote
from modules.target.kv_cache import SlotCache
from modules.target.stock.key_rotation import key_rotation
from tests.fakes import tiny_target
from tests.modules.sparse_kv.checks import (
    Opened,
    check_batches,
    check_tree,
    check_whole,
    differs,
    prompts_of,
    step,
    step_bytes,
)
from tests.modules.sparse_kv.test_reader import random_call


@pytest.fixture(scope="module")
def target() -> Any:
    return tiny_target(layers=4)


def small(threshold: float = 0.6, **more: Any) -> TokenSelect:
    return TokenSelect(**({"budget": 5, "initial": 2, "local": 3, "threshold": threshold} | more))


@pytest.mark.parametrize(
    "settings",
    [(0.6, 64, 1), (1.01, 9, 1), (-1.0, 9, 3), (0.6, 24, 1, "reassigned")],
    ids=["reused", "fresh", "frozen", "reassigned"],
)
def test_rows_decode_as_alone(settings: tuple[Any, ...], target: Any) -> None:
    threshold, chunk, pool, *positions = settings
    policy = small(threshold, chunk=chunk, pool=pool, positions=[*positions, "original"][0])
    check_tree(policy, target)
    check_batches(policy, target)
    assert differs(policy, target)


def test_contexts_that_grow_past_the_budget_decode_as_alone(target: Any) -> None:
    """In a batch the shorter sequence still reads all."""
    check_tree(small(budget=22, local=4), target, (40, 23))
    check_batches(small(budget=22, local=4), target)


def test_a_whole_budget_is_full_attention(target: Any) -> None:
    check_whole(small(budget=39), target)
    check_whole(small(budget=39, chunk=9), target)


def test_re_assigned_positions_of_a_whole_text_are_its_own(target: Any) -> None:
    """A text that the set holds is read as it is, alone and beside a longer one."""
    for prompts in (prompts_of((40, 23)), prompts_of((60, 23))):
        ours, theirs = (
            Opened(target, small(budget=39, chunk=9, positions=positions)).plain(prompts, [9, 20])
            for positions in ("reassigned", "original")
        )
        torch.testing.assert_close(ours[1], theirs[1], rtol=1e-5, atol=1e-5)
        assert bool((ours[0] - theirs[0]).abs().max() > 1e-3) == (len(prompts[0]) == 60)


@pytest.mark.parametrize("length", [60, 600])
def test_a_set_is_read_as_a_text_of_its_own(length: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """At consecutive positions. Keys of a first layer do not depend on the text before them: a
    model of one layer answers as after the set alone, to texts beyond its context of 512 too.
    """
    target, sets = tiny_target(layers=1), []
    for name in ("choose_prompt", "choose"):
        choose = getattr(TokenSelection, name)

        def watched(self: Any, call: LayerCall, choose: Any = choose) -> Any:
            slots = choose(self, call)
            sets.append([] if slots is None else sorted({*slots[0, 0, 0].tolist()} - {-1}))
            return slots

        monkeypatch.setattr(TokenSelection, name, watched)
    policy = small(1.01, chunk=16, positions="reassigned")
    session = SparseSession(target, SlotCache(1, 1, 1024), policy)
    text = prompts_of((length,))[0]
    # 1. The last part of a prompt reads its set and itself.
    logits, _ = session.prefill(torch.tensor([text]), torch.tensor([length]))
    seen = [text[slot] for slot in sets[-1]] + text[(length - 1) // 16 * 16 :]
    whole, _ = target.open(1, 64).prefill(torch.tensor([seen]), torch.tensor([len(seen)]))
    torch.testing.assert_close(logits, whole, rtol=1e-5, atol=1e-5)
    assert len(sets[-1]) == 10
    # 2. So does every token after it.
    for token in (9, 20, 31):
        text, logits = [*text, token], step(session, token)
        seen = [text[slot] for slot in sets[-1]]
        whole, _ = target.open(1, 64).prefill(torch.tensor([seen]), torch.tensor([len(seen)]))
        torch.testing.assert_close(logits[:, 0], whole, rtol=1e-5, atol=1e-5)
        assert len(seen) == 10 and sets[-1][-1] == len(text) - 1


def test_decoding_goes_beyond_the_context_with_re_assigned_positions_alone(target: Any) -> None:
    prompts = prompts_of((520,))
    decoder = SparseDecoder(target, small(chunk=256, positions="reassigned"))
    assert decoder.decode(prompts, Sampling(), 6)[0].prompt_tokens == 520
    with pytest.raises(ValueError, match="exceed the target's context of 512"):
        SparseDecoder(target, small(chunk=256)).decode(prompts, Sampling(), 6)
    with pytest.raises(ValueError, match="reach 522 .* lower chunk"):
        SparseDecoder(target, small(chunk=512, positions="reassigned"))


def test_votes_for_re_assigned_positions_have_none(target: Any) -> None:
    """The votes of a call before its queries and keys are turned."""
    plain, _ = random_call(rows=1, slots=24)
    rotation, none = key_rotation(target), torch.tensor(0)
    turned = replace(
        plain,
        query_BQND=rotation.turned(0, plain.query_BQND, none, plain.positions_BN[:, None]),
        keys_BKSD=rotation.turned(0, plain.keys_BKSD, none, plain.positions_BS[:, None]),
    )
    kept: Any = small(1.01, chunk=16)
    moved: Any = small(1.01, chunk=16, positions="reassigned")
    expected = kept.start(target, 2).choose(plain)
    assert torch.equal(moved.start(target, 2).choose(turned), expected)
    assert not torch.equal(kept.start(target, 2).choose(turned), expected)


def test_heads_have_one_vote_each() -> None:
    coin = torch.Generator().manual_seed(0)
    logits = torch.randn(2, 4, 3, 30, generator=coin, dtype=torch.float64)
    candidates = torch.rand(2, 3, 30, generator=coin) > 0.3
    votes = soft_vote(logits, candidates)[:, 0]
    torch.testing.assert_close(votes.sum(-1), torch.full((2, 3), 4.0, dtype=torch.float64))
    assert not votes[~candidates].any()
    # A head is its softmax: no level of its logits changes the votes, and no scale outvotes others.
    level = torch.tensor([0.0, 100.0, -50.0, 3.0])[:, None, None]
    torch.testing.assert_close(soft_vote(logits + level, candidates)[:, 0], votes)
    loud = logits.clone()
    loud[:, 0] *= 1000
    assert (soft_vote(loud, candidates)[:, 0] - votes).abs().max() <= 1
    # Equal heads elect what one of them does.
    same = logits[:, :1].expand(-1, 4, -1, -1)
    order = logits[:, 0].masked_fill(~candidates, -torch.inf).argsort(-1, descending=True)
    assert torch.equal(soft_vote(same, candidates)[:, 0].argsort(-1, descending=True)[..., :5],
                       order[..., :5])  # fmt: skip
    # The maximum over neighbours lifts the slots beside an elected one.
    sharp = torch.zeros(1, 1, 1, 9, dtype=torch.float64)
    sharp[..., 4] = 9
    pooled = soft_vote(sharp, torch.ones(1, 1, 9, dtype=torch.bool), 3)[0, 0, 0]
    assert pooled.argsort(descending=True)[:3].sort().values.tolist() == [3, 4, 5]


def test_a_choice_is_made_again_where_the_query_has_turned(target: Any) -> None:
    """Above 1 in every step; at -1 never again, so that only the first step reads all keys."""
    slot, layers = 2 * 2 * 8 * 8, 4
    gathered = slot * layers * (5 + 2 + 3 + 1 + 1)
    keys = [slot // 2 * layers * (61 + i) for i in range(6)]
    read = {}
    for threshold in (1.01, -1.0):
        session = Opened(target, small(threshold)).session(prompts_of((60,)))
        counts = step_bytes(session, [9, 20, 31, 42, 53, 64])
        read[threshold] = [count - gathered for count in counts]
    assert read[1.01] == keys
    assert read[-1.0] == [keys[0], *[0] * 5]


def test_a_chunk_reads_what_the_mean_of_its_queries_finds(target: Any) -> None:
    """Of its real rows: what padding asks for does not count."""
    policy = small(budget=1, initial=1, local=2)
    call, _ = random_call(rows=4, slots=24)
    key = torch.randn(8, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    call.keys_BKSD[:, :, 9] = key * 9
    call.query_BQND[:] = key
    call.query_BQND[:, :, 2:] = -5 * key
    call.counts_B = torch.tensor([2, 2])
    chosen = policy.start(target, 2).choose_prompt(call)
    assert chosen is not None
    # First, elected, and the newest two before these rows (20 and 16 are committed).
    assert chosen[:, 0, 0].tolist() == [[0, 9, 19, 18], [0, 9, 15, 14]]


def test_a_hidden_token_is_read(target: Any) -> None:
    """A key that a query points at is among the elected ones."""
    call, _ = random_call(rows=1, slots=24)
    call.keys_BKSD[:, :, 9] = call.query_BQND[:, ::2, 0] * 5
    chosen = small(1.01, budget=2).start(target, 2).choose(call)
    assert chosen is not None and (chosen == 9).any(-1).all()


def test_bad_settings_are_refused() -> None:
    bad: Any = "other"
    for wrong in ({"budget": 0}, {"local": 0}, {"initial": -1}, {"pool": 2}, {"chunk": 0}):
        with pytest.raises(ValueError, match=f"{next(iter(wrong))} must be"):
            small(**wrong)
    with pytest.raises(ValueError, match="positions 'other' is unknown"):
        small(positions=bad)
