"""Keys and values in host memory: the same answers, and rows that are not fetched twice."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from modules.contracts.verification import Accepted
from modules.drafters.self_speculative.sparse_kv.decoding import SparseDecoder
from modules.sparse_kv.exact import ExactTopK
from modules.sparse_kv.offload import Fetcher, HostCache
from modules.sparse_kv.policy import Policy, gathered_rows
from modules.sparse_kv.sentence_kv import SentenceKV
from modules.sparse_kv.session import SparseSession
from modules.sparse_kv.window import Window
from tests.fakes import tiny_target
from tests.modules.sparse_kv.checks import Opened, path_to, prompts_of, step, tree_of


@pytest.fixture(scope="module")
def target() -> Any:
    return tiny_target(layers=4)


POLICIES = [
    Window(12, 2),
    SentenceKV(24, 1.4, observed=4, kernel=3, start_tokens=2, recent=9, marks=".abcdefgh"),
]


@pytest.mark.parametrize("policy", POLICIES, ids=["window", "sentences"])
def test_sessions_on_the_host_compute_the_same(policy: Policy, target: Any) -> None:
    """Trees, commits of other branches and batches that shrink included."""
    prompts = prompts_of((40, 33))
    sessions = [Opened(target, policy).session(prompts)]
    sessions.append(SparseSession(target, HostCache(4, 2, 256), policy))
    ids = torch.tensor([prompts[0], prompts[1] + [0] * 7])
    sessions[1].prefill(ids, torch.tensor([40, 33]))
    seen = []
    for session in sessions:
        logits = [step(session, token) for token in (9, 20)]
        logits.append(session.verify(tree_of(2)).logits_BNV)
        paths = [path_to(7), path_to(5)]
        path = torch.tensor([nodes + [0] * (5 - len(nodes)) for nodes in paths])
        counts = torch.tensor([len(nodes) for nodes in paths])
        session.commit(Accepted(path, counts, counts))
        logits += [step(session, token) for token in (33, 44)]
        session.keep([1])
        logits += [step(session, token) for token in (33, 34, 50)]
        seen.append(torch.cat([part.flatten() for part in logits]))
    torch.testing.assert_close(seen[1], seen[0])
    assert all(store.device.type == "cpu" for store in sessions[1].cache._stores.values())


def test_rows_that_were_read_before_are_not_fetched_again() -> None:
    coin = torch.Generator().manual_seed(0)
    buffers = (torch.randn(2, 2, 30, 8, generator=coin), torch.randn(2, 2, 30, 8, generator=coin))
    fetcher, lengths = Fetcher(), torch.tensor([20, 9])
    first = torch.rand(2, 2, 1, 30, generator=coin).argsort(-1)[..., :12]
    second = first.clone()
    second[..., 3:5] = 29
    # Slots that are not committed may have changed since.
    served = int((second < lengths[:, None, None, None]).sum())
    for slots in (first, second):
        found = fetcher.fetch(0, buffers, slots, lengths, 2)
        for rows, buffer in zip(found, buffers):
            assert torch.equal(rows, gathered_rows(buffer, slots, 2))
    assert fetcher.served == served and fetcher.fetched == 2 * first.numel() - served
    alone = fetcher.select(torch.tensor([1]))
    found = alone.fetch(0, (buffers[0][1:], buffers[1][1:]), second[1:], lengths[1:], 2)
    assert torch.equal(found[0], gathered_rows(buffers[0][1:], second[1:], 2))


def test_a_window_fetches_its_newest_row_alone(target: Any) -> None:
    session = SparseSession(target, HostCache(4, 1, 256), Window(12, 2))
    session.prefill(torch.tensor(prompts_of((40,))), torch.tensor([40]))
    step(session, 9)
    fetcher = session.reader.fetcher
    assert fetcher is not None
    before = fetcher.fetched
    step(session, 20)
    # In each layer and head: the row itself, and the one before it, which was not committed when it
    # was read.
    assert fetcher.fetched - before == 4 * 2 * 2


def test_policies_that_read_keys_are_refused(target: Any) -> None:
    with pytest.raises(ValueError, match="offload: ExactTopK reads keys"):
        SparseDecoder(target, ExactTopK(8), offload=True)
