"""Layers that keep a state read each path of a tree by itself, and go on from what was accepted."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from modules.contracts.batches import PADDING_DOCUMENT
from modules.contracts.rows import DocumentRows, Rows
from modules.contracts.sampling import Sampling
from modules.contracts.token_tree import TokenTree, Topology
from modules.contracts.verification import Accepted
from modules.decoding.decoder import SpeculativeDecoder
from modules.target.stock.recurrent import (
    _GOES_ON,
    Paths,
    RecurrentStates,
    document_paths,
    paths_of,
)
from tests.fakes import tiny_batch, tiny_target

PARENTS = [-1, 0, 0, 1, 1, 2, 3, 7]  # the last row is padding
KINDS = ("qwen3_next", "granitemoehybrid", "lfm2", "jamba")


def close(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=1e-3, atol=1e-4)


def read_along(paths: Paths, values_BJ: Tensor) -> Tensor:
    """What each row reads, in order, as a number in base 10: by the paths."""
    outputs: list[Tensor] = []
    for sequence_P, rows_PD in paths.groups:
        read, total = values_BJ[sequence_P[:, None], rows_PD], torch.zeros(len(rows_PD)).double()
        for place in range(rows_PD.shape[1]):
            total = 10 * total + read[:, place]
            outputs.append(total)
        outputs[-rows_PD.shape[1] :] = [torch.stack(outputs[-rows_PD.shape[1] :], 1).flatten()]
    return torch.cat(outputs)[paths.outputs_BN]


def test_every_row_is_read_behind_what_it_sees() -> None:
    """Random trees behind earlier rows, some rows of which nobody sees; documents with padding."""
    generator = torch.Generator().manual_seed(0)
    for _ in range(40):
        batch, count, ahead = 3, 7, int(torch.randint(0, 3, (), generator=generator))
        visible = torch.zeros(batch, count, ahead + count, dtype=torch.bool)
        for b in range(batch):
            for row in range(count):
                parent = int(torch.randint(-1, row, (), generator=generator)) if row else -1
                start = torch.rand(ahead, generator=generator) < 0.5
                visible[b, row, :ahead] = visible[b, parent, :ahead] if parent >= 0 else start
                visible[b, row, ahead:] |= visible[b, parent, ahead:] if parent >= 0 else False
                visible[b, row, ahead + row] = True
        values = torch.randint(1, 9, (batch, ahead + count), generator=generator).double()
        expected = torch.zeros(batch, count).double()
        for b in range(batch):
            for row in range(count):
                for value in values[b][visible[b, row]]:
                    expected[b, row] = 10 * expected[b, row] + value
        assert torch.equal(read_along(paths_of(visible), values), expected)


def test_paths_are_few_and_padding_is_apart() -> None:
    chain = torch.ones(2, 5, 5, dtype=torch.bool).tril()
    paths = paths_of(chain)
    assert paths.whole and [rows.shape for _, rows in paths.groups] == [(2, 5)]
    tree = Topology(torch.tensor([PARENTS])).ancestors
    assert sum(len(rows) for _, rows in paths_of(tree).groups) == 4 and not paths_of(tree).whole
    # A long document and a thousand rows of padding are not a thousand long paths.
    padded = torch.eye(1600, dtype=torch.bool)
    padded[:600, :600] = torch.ones(600, 600, dtype=torch.bool).tril()
    assert sum(rows.numel() for _, rows in paths_of(padded[None]).groups) < 2000


def test_documents_are_paths_without_a_mask_of_all_pairs() -> None:
    generator = torch.Generator().manual_seed(0)
    for _ in range(20):
        documents = torch.randint(0, 4, (3, 9), generator=generator).sort(1).values
        documents = torch.where(documents == 3, PADDING_DOCUMENT, documents)
        rows = DocumentRows(torch.arange(9).expand(3, -1), documents, PADDING_DOCUMENT)
        values = torch.randint(1, 9, (3, 9), generator=generator).double()
        by_mask = read_along(paths_of(rows.visible_BNJ), values)
        assert torch.equal(read_along(document_paths(rows), values), by_mask)
    padded = torch.full((1, 1600), PADDING_DOCUMENT)
    padded[:, :600] = 0
    rows = DocumentRows(torch.arange(1600)[None], padded, PADDING_DOCUMENT)
    assert sum(rows.numel() for _, rows in document_paths(rows).groups) < 2000


@pytest.mark.parametrize("arch", KINDS)
def test_a_tree_its_commit_and_what_follows_are_those_of_chains(arch: str) -> None:
    target, lengths = tiny_target(arch), torch.tensor([5, 9])
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(5, 128, (2, 9), generator=generator)
    tokens = torch.randint(5, 128, (2, len(PARENTS)), generator=generator)
    session = target.open(2, 64)
    session.prefill(ids, lengths)
    tree = TokenTree(tokens, Topology(torch.tensor(PARENTS).expand(2, -1)))

    def plain(b: int, path: list[int], *more: int) -> Tensor:
        text = [*ids[b, : lengths[b]].tolist(), *tokens[b, path].tolist(), *more]
        return target.stock(input_ids=torch.tensor([text])).logits[0, -1]

    # 1. Twice, since nothing is committed by a call.
    for _ in range(2):
        logits = session.verify(tree).logits_BNV
        for b in range(2):
            for node in range(7):
                path = [node]
                while PARENTS[path[0]] >= 0:
                    path.insert(0, PARENTS[path[0]])
                close(logits[b, node], plain(b, path))
    # 2. Paths of different lengths, then only the second sequence, twice.
    paths = torch.tensor([[0, 1, 4], [0, 2, 0]])
    session.commit(Accepted(paths, torch.tensor([3, 2]), torch.tensor([9, 9])))
    chosen = session.select(torch.tensor([1, 0]))
    session.keep([1, 1])
    for each, order in ((session, [1, 1]), (chosen, [1, 0])):
        after = each.verify(TokenTree.root(torch.tensor([11, 12]))).logits_BNV[:, 0]
        for row, b in enumerate(order):
            close(after[row], plain(b, [[0, 1, 4], [0, 2]][b], 11 + row))


@pytest.mark.parametrize("arch", KINDS)
def test_rows_that_ran_in_parts_are_those_of_one_call(arch: str) -> None:
    target = tiny_target(arch)
    session, whole = target.open(1, 64), target.open(1, 64)
    for each in (session, whole):
        each.prefill(torch.arange(20, 29)[None], torch.tensor([9]))
    tree = TokenTree(torch.arange(30, 35)[None], Topology(torch.tensor([[-1, 0, 1, 1, 2]])))
    rows, expected = tree.rows(session.lengths_B), whole.verify(tree, ("final",)).states["final"]
    hidden = target.embed(tree.tokens_BN)
    # The first layer over two rows and then the others, the second one over all.
    first = [
        session.run_layers(
            Rows(rows.position_ids_BN[:, part], rows.visible_BNJ[:, part, :stop]),
            hidden[:, part],
            0,
            1,
        )["pre_norm"]
        for part, stop in ((slice(0, 2), 2), (slice(2, 5), 5))
    ]
    found = session.run_layers(rows, torch.cat(first, dim=1), 1, 2, ("final",))["final"]
    close(found, expected)


def test_what_the_library_reads_row_by_row_is_known_by_its_outputs() -> None:
    for arch, at_once in (("qwen3_next", True), ("jamba", False), ("lfm2", None)):
        target = tiny_target(arch)
        session = target.open(1, 64)
        session.prefill(torch.arange(20, 29)[None], torch.tensor([9]))
        session.verify(TokenTree(torch.tensor([[3, 4]]), Topology(torch.tensor([[-1, 0]]))))
        kind = type(target.architecture.recurrence.modules[0])
        assert _GOES_ON[kind] is (at_once is not False)


def test_plain_decoding_replays_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(RecurrentStates, "_replay", lambda *_: pytest.fail("a replay"))
    target = tiny_target("qwen3_next")
    SpeculativeDecoder(target).decode([[7, 8, 9], [9, 8, 7]], Sampling(), 5)


def test_documents_have_states_of_their_own_and_a_gradient() -> None:
    target, names = tiny_target("qwen3_next"), (1, "final")
    batch = tiny_batch(target)
    states = target.features(batch, names, gradient=True)
    ids = batch.input_ids[:, 12:21]
    alone = target.stock(input_ids=ids, output_hidden_states=True).hidden_states
    close(states[1][:, 12:21], alone[1])
    close(states["final"][:, 12:21], alone[-1])
    embeddings = target.embed(batch.input_ids).requires_grad_()
    final = target.forward_rows(embeddings, batch.rows(), ("final",))["final"]
    final[0, 20].sum().backward()
    assert embeddings.grad is not None
    assert embeddings.grad[0, 12].any() and not embeddings.grad[0, :12].any()


def test_what_states_cannot_do_is_refused() -> None:
    target = tiny_target("qwen3_next")
    session = target.open(1, 64)
    session.prefill(torch.arange(20, 29)[None], torch.tensor([9]))
    session.rewind(torch.tensor([9]))
    with pytest.raises(ValueError, match="cannot be forgotten"):
        session.rewind(torch.tensor([8]))
    with pytest.raises(ValueError, match="has recurrent layers"):
        target.compile_calls()
    rows = TokenTree.root(torch.tensor([3])).rows(session.lengths_B)
    with pytest.raises(ValueError, match="the whole context"):
        session.read(torch.tensor([[3]]), replace(rows, committed_BS=torch.tensor([[1]])))
