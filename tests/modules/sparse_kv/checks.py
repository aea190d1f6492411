"""What every policy of sparse KV caches is checked by."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from modules.contracts.token_tree import TokenTree, Topology
from modules.contracts.verification import Accepted
from modules.sparse_kv.policy import Policy
from modules.sparse_kv.session import SparseSession
from modules.target.kv_cache import SlotCache
from tests.fakes import tiny_target

PARENTS = [-1, 0, 0, 1, 1, 2, 3, 6]
"""Of a tree with branches."""
TOKENS = [9, 32, 31, 42, 53, 64, 34, 86]
"""Two of them end a sentence."""


@dataclass
class Opened:
    """Sessions under one policy over the same prompts."""

    target: Any
    policy: Policy

    def session(self, prompts: list[list[int]]) -> SparseSession:
        cache = SlotCache(self.target.shape.num_layers, len(prompts), 256)
        session = SparseSession(self.target, cache, self.policy)
        longest = max(map(len, prompts))
        ids = torch.tensor([prompt + [0] * (longest - len(prompt)) for prompt in prompts])
        session.prefill(ids, torch.tensor([len(prompt) for prompt in prompts]))
        return session

    def plain(self, prompts: list[list[int]], tokens: list[int]) -> Tensor:
        """Logits [B,N,V] after each token, one call and one commit each."""
        session = self.session(prompts)
        return torch.cat([step(session, token) for token in tokens], 1)

    def full(self, prompts: list[list[int]], tokens: list[int]) -> Tensor:
        """The same of the target itself."""
        session = self.target.open(len(prompts), 256)
        longest = max(map(len, prompts))
        ids = torch.tensor([prompt + [0] * (longest - len(prompt)) for prompt in prompts])
        session.prefill(ids, torch.tensor([len(prompt) for prompt in prompts]))
        return torch.cat([step(session, token) for token in tokens], 1)


def step(session: Any, token: int) -> Tensor:
    """Logits [B,1,V] after one more token of every sequence."""
    batch = session.cache.batch_size
    tree = TokenTree.root(torch.full((batch,), token))
    logits = session.verify(tree).logits_BNV
    one = torch.ones(batch, dtype=torch.int64)
    session.commit(Accepted(torch.zeros(batch, 1, dtype=torch.int64), one, one))
    return logits


def step_bytes(session: Any, tokens: list[int]) -> list[int]:
    """Bytes of keys and values that a call for each of these tokens reads."""
    counts = [session.cache.bytes_read]
    for token in tokens:
        step(session, token)
        counts.append(session.cache.bytes_read)
    return [after - before for before, after in zip(counts, counts[1:])]


def prompts_of(lengths: tuple[int, ...], seed: int = 0) -> list[list[int]]:
    coin = torch.Generator().manual_seed(seed)
    return [torch.randint(5, 128, (n,), generator=coin).tolist() for n in lengths]


def tree_of(batch: int) -> TokenTree:
    return TokenTree(
        torch.tensor(TOKENS).expand(batch, -1), Topology(torch.tensor(PARENTS).expand(batch, -1))
    )


def path_to(node: int) -> list[int]:
    path = [node]
    while PARENTS[path[0]] >= 0:
        path.insert(0, PARENTS[path[0]])
    return path


def check_tree(policy: Policy, target: Any = None, lengths: tuple[int, ...] = (40, 23)) -> None:
    """Each node of a tree, in batches too, has the logits of its path decoded token by token, and
    a commit of some path leaves the state that plain decoding has there.
    """
    opened = Opened(target or tiny_target(layers=4), policy)
    prompts = prompts_of(lengths)
    first, after = [75, 20, 66], [33, 35, 44]
    session = opened.session(prompts)
    for token in first:
        step(session, token)
    logits = session.verify(tree_of(len(prompts))).logits_BNV
    # 1. Every node, against its path alone.
    for node in (0, 4, 5, 7):
        expected = opened.plain(prompts, [*first, *(TOKENS[n] for n in path_to(node))])[:, -1]
        torch.testing.assert_close(logits[:, node], expected)
    # 2. Other paths for the sequences, and what follows.
    paths = [path_to(7), path_to(5)]
    width = max(map(len, paths))
    path = torch.tensor([p + [0] * (width - len(p)) for p in paths])
    counts = torch.tensor([len(p) for p in paths])
    session.commit(Accepted(path, counts, counts))
    later = torch.cat([step(session, token) for token in after], 1)
    for row, nodes in enumerate(paths):
        text = [*first, *(TOKENS[n] for n in nodes), *after]
        expected = opened.plain([prompts[row]], text)[:, -len(after) :]
        torch.testing.assert_close(later[row : row + 1], expected)


def check_whole(policy: Policy, target: Any = None) -> None:
    """A policy whose budget holds the whole text is full attention."""
    opened = Opened(target or tiny_target(layers=4), policy)
    prompts = prompts_of((40, 23))
    tokens = [9, 20, 31, 42]
    torch.testing.assert_close(opened.plain(prompts, tokens), opened.full(prompts, tokens))


def check_batches(policy: Policy, target: Any = None) -> None:
    """A sequence in a batch is decoded as alone, also after another one has left."""
    opened = Opened(target or tiny_target(layers=4), policy)
    prompts = prompts_of((40, 23, 31))
    tokens = [9, 20, 31, 42, 53, 64]
    session = opened.session(prompts)
    seen = [step(session, token) for token in tokens[:3]]
    session.keep([2, 1])
    seen += [step(session, token) for token in tokens[3:]]
    for row, places in ((1, (1, 1)), (2, (2, 0))):
        alone = opened.plain([prompts[row]], tokens)[0]
        together = torch.cat([seen[i][places[i >= 3]] for i in range(6)])
        torch.testing.assert_close(together, alone)


def differs(policy: Policy, target: Any = None) -> bool:
    """Whether the policy leaves out anything that matters."""
    opened = Opened(target or tiny_target(layers=4), policy)
    prompts, tokens = prompts_of((40,)), [9, 20]
    ours, theirs = opened.plain(prompts, tokens), opened.full(prompts, tokens)
    return bool((ours - theirs).abs().max() > 1e-3)
