"""A prompt that was read before is not read again, and nothing else changes."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch

from modules.contracts.sampling import Sampling
from modules.decoding.decoder import SpeculativeDecoder
from modules.drafters.retrieval.prompt_lookup import PromptLookup
from modules.drafters.self_speculative.sparse_kv.decoding import SparseDecoder
from modules.sparse_kv.exact import ExactTopK
from modules.sparse_kv.policy import Policy
from modules.sparse_kv.sentence_kv import SentenceKV
from modules.sparse_kv.token_select import TokenSelect
from modules.target.kv_cache import PromptMemory
from modules.target.target import Target
from tests.fakes import tiny_target

PROMPTS = [[5, 9, 5, 9, 7, 3, 6, 2, 11, 5, 9], [4, 4, 8]]


@pytest.fixture(scope="module")
def target() -> Target:
    return tiny_target()


class Calls:
    """Counts the rows that the target's layers read in one call."""

    def __init__(self, target: Target, monkeypatch: pytest.MonkeyPatch) -> None:
        self.widths: list[int] = []
        forward = target.forward_rows

        def counted(hidden_BNH: torch.Tensor, *others: object, **named: object) -> object:
            self.widths.append(hidden_BNH.shape[1])
            return forward(hidden_BNH, *others, **named)  # type: ignore[arg-type]

        monkeypatch.setattr(target, "forward_rows", counted)


def test_answers_and_later_calls_are_the_same(
    target: Target, monkeypatch: pytest.MonkeyPatch
) -> None:
    decoder = SpeculativeDecoder(target, PromptLookup(target.shape))
    expected = [trace.ids for trace in decoder.decode(PROMPTS, Sampling(), 12)]
    memory, calls = PromptMemory(), Calls(target, monkeypatch)
    for reads in (1, 0, 0):
        calls.widths.clear()
        with memory.used():
            traces = decoder.decode(PROMPTS, Sampling(), 12)
        assert [trace.ids for trace in traces] == expected
        assert calls.widths.count(11) == reads
        assert (memory.spared > 0) == (not reads)
    # Outside of `used` nothing is recalled.
    decoder.decode(PROMPTS, Sampling(), 2)
    assert calls.widths.count(11) == 1


def test_other_prompts_lengths_and_states_are_read(target: Target) -> None:
    memory = PromptMemory()
    ids_BT, counts_B = torch.tensor([[5, 9, 0], [4, 4, 8]]), torch.tensor([2, 3])

    def read(ids: torch.Tensor, counts: torch.Tensor, states: Sequence[str] = ()) -> torch.Tensor:
        with memory.used():
            logits_BV, seen = target.open(2, 8).prefill(ids, counts, list(states))
        assert list(seen) == list(states)
        return logits_BV

    first = read(ids_BT, counts_B)
    assert memory.spared == 0
    assert torch.equal(read(ids_BT, counts_B), first) and memory.spared != 0
    assert not torch.allclose(read(ids_BT, torch.tensor([3, 3])), first) and memory.spared == 0
    assert read(ids_BT + 1, counts_B) is not None and memory.spared == 0
    read(ids_BT + 1, counts_B, ["pre_norm"])
    assert memory.spared == 0
    read(ids_BT + 1, counts_B, ["pre_norm"])
    assert memory.spared != 0
    # What a reader does to what it got changes nothing.
    again = read(ids_BT + 1, counts_B)
    assert torch.equal(again.clone().zero_(), torch.zeros_like(again))
    assert torch.equal(read(ids_BT + 1, counts_B), again)


@pytest.mark.parametrize(
    "policy, recalled",
    [
        (ExactTopK(3), True),
        (TokenSelect(budget=4, initial=1, local=2, chunk=4), False),
        (SentenceKV(budget=8, start_tokens=1, recent=2, observed=2), False),
    ],
)
def test_sparse_policies_share_prompts_that_they_read_in_full(
    target: Target, policy: Policy, recalled: bool
) -> None:
    prompt = [[3, 5, 7, 9, 11, 2, 4, 6, 8, 10, 12, 5, 7]]
    decoder = SparseDecoder(target, policy)
    expected = decoder.decode(prompt, Sampling(), 6)[0].ids
    memory = PromptMemory()
    with memory.used():
        SpeculativeDecoder(target).decode(prompt, Sampling(), 2)
    with memory.used():
        assert decoder.decode(prompt, Sampling(), 6)[0].ids == expected
    assert (memory.spared != 0) == recalled


def test_the_limit_keeps_some_prompts(target: Target) -> None:
    def spared(memory: PromptMemory, ids: list[int]) -> bool:
        with memory.used():
            target.open(1, 8).prefill(torch.tensor([ids]), torch.tensor([len(ids)]))
        return memory.spared != 0

    one, two = [5, 9, 7], [4, 4, 8]
    newest, both = PromptMemory(), PromptMemory(limit=1 << 20)
    for memory in (newest, both):
        assert not spared(memory, one) and not spared(memory, two) and spared(memory, two)
    assert spared(both, one) and not spared(newest, one)
