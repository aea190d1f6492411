"""Tree verification equals chains, commit equals re-prefill, and the clauses that later methods
rest on.
"""

from __future__ import annotations

import pytest
import torch

from modules.contracts.rows import Rows
from modules.contracts.token_tree import TokenTree, Topology
from modules.contracts.verification import Accepted
from tests.fakes import ARCHITECTURES, tiny_batch, tiny_target

PARENTS = [-1, 0, 0, 1, 1, 2, 3, 7]  # the last row is padding
ARCHS = sorted(ARCHITECTURES)


def close(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)


def prompts(lengths=(5, 9)):
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(5, 128, (len(lengths), max(lengths)), generator=generator)
    return ids, torch.tensor(lengths)


def some_tree(batch=2):
    tokens = torch.randint(
        5, 128, (batch, len(PARENTS)), generator=torch.Generator().manual_seed(2)
    )
    return TokenTree(tokens, Topology(torch.tensor(PARENTS).expand(batch, -1)))


def path_to(node):
    path = [node]
    while PARENTS[path[0]] >= 0:
        path.insert(0, PARENTS[path[0]])
    return path


def plain(target, ids):
    return target.model(input_ids=torch.tensor([ids]), output_hidden_states=True)


@pytest.mark.parametrize("arch", ARCHS)
def test_tree_logits_equal_chain_logits_for_every_path(arch):
    target = tiny_target(arch)
    ids, lengths = prompts()
    target.open(2, 64)
    logits, _ = target.prefill(ids, lengths)
    tree = some_tree()
    verified = target.verify(tree, states=(1, "final"))
    for b, length in enumerate(lengths.tolist()):
        prompt = ids[b, :length].tolist()
        close(logits[b], plain(target, prompt).logits[0, -1])
        for node in range(7):
            expected = plain(target, prompt + tree.tokens_BN[b, path_to(node)].tolist())
            close(verified.logits_BNV[b, node], expected.logits[0, -1])
            close(verified.states[1][b, node], expected.hidden_states[1][0, -1])
            close(verified.states["final"][b, node], expected.hidden_states[-1][0, -1])


@pytest.mark.parametrize("arch", ARCHS)
def test_commit_equals_prefilling_again_with_per_row_lengths(arch):
    target = tiny_target(arch)
    ids, lengths = prompts()
    target.open(2, 64)
    target.prefill(ids, lengths)
    tree = some_tree()
    target.verify(tree)
    accepted = Accepted(
        torch.tensor([[0, 1, 4], [0, 2, 0]]), torch.tensor([3, 2]), torch.tensor([9, 9])
    )
    target.commit(accepted)
    assert target.cache is not None and target.cache.lengths == [8, 11]
    again = target.verify(TokenTree.root(accepted.next_B))
    for b, length in enumerate(lengths.tolist()):
        kept = tree.tokens_BN[b, accepted.path_BA[b, : accepted.lengths_B[b]]].tolist()
        expected = plain(target, ids[b, :length].tolist() + kept + [9]).logits[0, -1]
        close(again.logits_BNV[b, 0], expected)


def test_prefill_appends_second_turns():
    target = tiny_target()
    ids, lengths = prompts()
    target.open(2, 64)
    target.prefill(ids, lengths)
    logits, states = target.prefill(ids, lengths, states=("pre_norm",))
    twice = ids[0, :5].tolist() * 2
    close(logits[0], plain(target, twice).logits[0, -1])
    close(target.logits(target.final_norm(states["pre_norm"][0, 4])), logits[0])


@pytest.mark.parametrize("arch", ARCHS)
def test_features_of_packed_documents_equal_separate_forwards(arch):
    target = tiny_target(arch)
    batch = tiny_batch(target)
    states = target.features(batch, (0, 1, "pre_norm", "final"))
    document = batch.input_ids[0, 12:21].tolist()
    expected = plain(target, document)
    close(states[1][0, 12:21], expected.hidden_states[1][0])
    close(target.logits(states["final"])[0, 12:21], expected.logits[0])


@pytest.mark.parametrize("arch", ARCHS)
def test_run_over_layer_ranges_composes_to_the_whole_model(arch):
    target = tiny_target(arch, layers=3)
    batch = tiny_batch(target)
    states = target.features(batch, (0, 1, "pre_norm", "final"))
    middle = target.run(batch.rows(), states[0], 0, 1)["pre_norm"]
    close(middle, states[1])
    end = target.run(batch.rows(), states[1], 1, 3, names=("final",))["final"]
    close(end, states["final"])


def test_run_carries_gradient_when_asked_and_early_exit_reads_the_cache():
    target = tiny_target(layers=3)
    ids, lengths = prompts((6,))
    target.open(1, 32)
    target.prefill(ids, lengths)
    root = TokenTree.root(torch.tensor([7]))
    rows = root.rows(lengths)
    early = target.run(rows, target.embed(root.tokens_BN), 0, 2)["pre_norm"]
    expected = plain(target, [*ids[0].tolist(), 7]).hidden_states[2][0, -1]
    close(early[0, 0], expected)
    batch = tiny_batch(target)
    hidden = target.features(batch, (1,))[1].requires_grad_()
    target.run(batch.rows(), hidden, 1, 2, gradient=True)["pre_norm"].sum().backward()
    assert hidden.grad is not None and hidden.grad.abs().sum() > 0


def test_inject_rewrites_the_input_of_a_layer():
    target = tiny_target()
    ids, lengths = prompts((6,))
    target.open(1, 32)
    target.prefill(ids, lengths)
    tree = some_tree(1)
    base = target.verify(tree, states=(1,))
    shifted = target.verify(tree, states=(1, "final"), inject={1: lambda hidden: hidden + 1})
    close(shifted.states[1], base.states[1] + 1)
    assert not torch.allclose(shifted.logits_BNV, base.logits_BNV)
    again = target.verify(tree)
    close(again.logits_BNV, base.logits_BNV)


def test_rows_without_tokens_enter_as_embeddings():
    target = tiny_target()
    ids, lengths = prompts((6,))
    target.open(1, 32)
    target.prefill(ids, lengths)
    tree = some_tree(1)
    embedded = torch.zeros_like(tree.tokens_BN, dtype=torch.bool)
    embedded[:, 2] = True
    other = torch.full_like(tree.tokens_BN, 5)
    replaced = torch.where(embedded, other, tree.tokens_BN)
    mixed = TokenTree(
        replaced, tree.topology, embeddings_BNH=target.embed(tree.tokens_BN), embedded_BN=embedded
    )
    close(target.verify(mixed).logits_BNV, target.verify(tree).logits_BNV)


def test_trimmed_head_equals_a_slice_of_the_full_head():
    target = tiny_target(dtype=torch.float32)
    hidden = torch.randn(3, 32)
    vocabulary = torch.tensor([3, 5, 77])
    close(target.logits(hidden, vocabulary), target.logits(hidden)[:, vocabulary])


def test_padding_sees_only_itself_and_depth_follows_parents():
    topology = Topology(torch.tensor([PARENTS]))
    assert topology.depth[0].tolist() == [0, 1, 1, 2, 2, 2, 3, 0]
    assert topology.ancestors[0, 7].tolist() == [False] * 7 + [True]
    assert topology.ancestors[0, 6].nonzero().flatten().tolist() == [0, 1, 3, 6]
    wide = topology.expand(3)
    assert wide.ancestors.shape == (3, 8, 8)


def test_dropping_sequences_keeps_the_others():
    target = tiny_target()
    ids, lengths = prompts()
    target.open(2, 64)
    target.prefill(ids, lengths)
    assert target.cache is not None
    target.cache.keep([1])
    logits = target.verify(TokenTree.root(torch.tensor([7]))).logits_BNV[0, 0]
    close(logits, plain(target, [*ids[1].tolist(), 7]).logits[0, -1])


def test_errors_name_the_fix():
    target = tiny_target()
    with pytest.raises(ValueError, match="not one of"):
        target.features(tiny_batch(target), (5,))
    target.open(1, 4)
    with pytest.raises(ValueError, match="more capacity"):
        target.prefill(*prompts((6,)))
    with pytest.raises(KeyError):
        target.copy_weight("layers.0.nothing")
    rows = Rows(torch.arange(2)[None], torch.eye(2, dtype=torch.bool)[None])
    assert (
        target.copy_weight("layers.1.self_attn.q_proj.weight").shape == (32, 32)
        and rows.cached is False
    )
    assert len({target.fingerprint(), tiny_target().fingerprint()}) == 1
    assert tiny_target(seed=1).fingerprint() != target.fingerprint()
