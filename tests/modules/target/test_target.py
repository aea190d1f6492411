"""Tree verification equals chains, commit equals re-prefill, and the clauses that later methods
rest on.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from modules.contracts.rows import AuxiliaryRows, Entry, Rows
from modules.contracts.token_tree import PartialRows, TokenTree, Topology
from modules.contracts.verification import Accepted
from modules.target.beside import gradient_beside, rows_beside
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
    session = target.open(2, 64)
    logits, _ = session.prefill(ids, lengths)
    tree = some_tree()
    verified = session.verify(tree, states=(1, "final"))
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
    session = target.open(2, 64)
    session.prefill(ids, lengths)
    tree = some_tree()
    session.verify(tree)
    accepted = Accepted(
        torch.tensor([[0, 1, 4], [0, 2, 0]]), torch.tensor([3, 2]), torch.tensor([9, 9])
    )
    session.commit(accepted)
    assert session.lengths_B.tolist() == session.cache.lengths == [8, 11]
    again = session.verify(TokenTree.root(accepted.next_B))
    for b, length in enumerate(lengths.tolist()):
        kept = tree.tokens_BN[b, accepted.path_BA[b, : accepted.lengths_B[b]]].tolist()
        expected = plain(target, ids[b, :length].tolist() + kept + [9]).logits[0, -1]
        close(again.logits_BNV[b, 0], expected)


def test_prefill_appends_second_turns():
    target = tiny_target()
    ids, lengths = prompts()
    session = target.open(2, 64)
    session.prefill(ids, lengths)
    logits, states = session.prefill(ids, lengths, states=("pre_norm",))
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


def open_session(target, lengths=(6,), capacity=32):
    """A session that has read prompts of these lengths."""
    ids, lengths_B = prompts(lengths)
    session = target.open(len(lengths), capacity)
    session.prefill(ids, lengths_B)
    return session


@pytest.mark.parametrize("arch", ARCHS)
def test_layer_ranges_compose_to_the_whole_model(arch):
    target = tiny_target(arch, layers=3)
    session = open_session(target, (5, 9))
    tree = some_tree()
    rows, names = tree.rows(session.lengths_B), (1, 2, "pre_norm", "final")
    whole = session.verify(tree, states=names)
    first = session.run_layers(rows, target.embed(tree.tokens_BN), 0, 1)["pre_norm"]
    close(first, whole.states[1])
    middle = session.run_layers(rows, first, 1, 2, ("pre_norm",))["pre_norm"]
    close(middle, whole.states[2])
    end = session.run_layers(rows, middle, 2, 3, ("pre_norm", "final"))
    close(end["pre_norm"], whole.states["pre_norm"])
    close(end["final"], whole.states["final"])


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("handed", [1, 3, 8])
def test_rows_that_ran_in_part_are_completed(arch, handed):
    """Nodes run one at a time through the first layers, as a drafter would; the rest catches up."""
    target = tiny_target(arch, layers=3)
    expected = open_session(target, (5, 9))
    session = open_session(target, (5, 9))
    tree = some_tree()
    rows = tree.rows(session.lengths_B)
    hidden = []
    for node in range(handed):
        alone = Rows(
            rows.position_ids_BN[:, node : node + 1],
            rows.visible_BNJ[:, node : node + 1, : node + 1],
        )
        embedding = target.embed(tree.tokens_BN[:, node : node + 1])
        hidden.append(session.run_layers(alone, embedding, 0, 2)["pre_norm"])
    partial = replace(tree, already_run=PartialRows(torch.cat(hidden, 1), 2))
    found, whole = session.verify(partial, (2, "final")), expected.verify(tree, (2, "final"))
    close(found.logits_BNV, whole.logits_BNV)
    close(found.states[2], whole.states[2])
    # What is committed afterwards is the same in every layer.
    accepted = Accepted(
        torch.tensor([[0, 1, 4], [0, 2, 0]]), torch.tensor([3, 2]), torch.tensor([9, 9])
    )
    logits = []
    for each in (session, expected):
        each.commit(accepted)
        logits.append(each.verify(TokenTree.root(accepted.next_B)).logits_BNV)
    close(*logits)
    with pytest.raises(ValueError, match="state 1 is asked for of rows that have passed it"):
        session.verify(partial, (1,))


@pytest.mark.parametrize("arch", ARCHS)
def test_rows_read_the_committed_slots_that_are_chosen(arch):
    """As in one pass without a cache under a mask, in any order, of sequences of two lengths."""
    target, (ids, lengths) = tiny_target(arch), prompts((5, 9))
    session = open_session(target, (5, 9))
    chosen = torch.tensor([[4, 0, 2, -1], [5, 1, 8, 3]])
    tokens = torch.tensor([[20, 21], [30, 31]])
    visible = torch.ones(2, 2, 2, dtype=torch.bool).tril()
    rows = Rows(lengths[:, None] + torch.arange(2), visible, chosen)
    found = session.read(tokens, rows)
    for b, length in enumerate(lengths.tolist()):
        whole = torch.cat([ids[b, :length], tokens[b]])[None]
        seen = torch.ones(length + 2, length + 2, dtype=torch.bool).tril()
        seen[length:, :length] = False
        seen[length:, chosen[b][chosen[b] >= 0]] = True
        plain_rows = Rows(torch.arange(length + 2)[None], seen[None])
        expected = target.forward_rows(target.embed(whole), plain_rows, ("final",))["final"]
        close(found[b], expected[0, length:])
    # A call that reads every slot is as it was.
    close(
        session.read(tokens, replace(rows, committed_BS=None)),
        open_session(target, (5, 9)).read(tokens, replace(rows, committed_BS=None)),
    )


def twins(tree, lengths, layer, deeper=None):
    """Auxiliary rows that are what nodes 3 and 6 are, from `layer` on, and see what those see; that
    of node 6 from layer `deeper` on, where there is one.
    """
    nodes, size = [3, 6], tree.size
    seen = tree.topology.ancestors[:, nodes].clone()
    for row, node in enumerate(nodes):
        seen[:, row, node] = False
    visible = torch.cat([seen, torch.eye(2, dtype=torch.bool).expand(len(seen), -1, -1)], 2)
    assert visible.shape[2] == size + 2
    positions = lengths[:, None] + tree.topology.depth[:, nodes]
    whole = AuxiliaryRows(lambda hidden: hidden[:, nodes], positions, visible, layer)
    if deeper is None:
        return whole
    last = torch.tensor([[False, True]])
    return replace(
        whole,
        inputs=lambda hidden: torch.where(last[..., None], 7.0, hidden[:, nodes]),
        later=(Entry(lambda hidden: hidden[:, nodes], last, deeper),),
    )


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize(
    ("layer", "deeper"), [(0, None), (1, None), (3, None), (0, 1), (1, 2), (2, 3), (3, 3)]
)
def test_auxiliary_rows_compute_beside_the_nodes_and_leave_nothing(arch, layer, deeper):
    target, lengths = tiny_target(arch, layers=3), torch.tensor([5, 9])
    session, expected = open_session(target, (5, 9)), open_session(target, (5, 9))
    tree, names = some_tree(), (0, 2, "final")
    found = session.verify(replace(tree, auxiliary=twins(tree, lengths, layer, deeper)), names)
    plain_call = expected.verify(tree, names)
    close(found.logits_BNV, plain_call.logits_BNV)
    for name in names:
        close(found.states[name], plain_call.states[name])
    for name in (2, "final"):
        if name == "final" or (layer if deeper is None else deeper) <= name:
            close(found.auxiliary_states[name], plain_call.states[name][:, [3, 6]])
    assert found.auxiliary_states[0].shape[1] == (0 if layer else 2)
    accepted = Accepted(torch.tensor([[0, 1, 4]] * 2), torch.tensor([3, 3]), torch.tensor([9, 9]))
    after = []
    for each in (session, expected):
        each.commit(accepted)
        after.append(each.verify(TokenTree.root(accepted.next_B)).logits_BNV)
    close(*after)


def test_gradient_reaches_what_enters_as_auxiliary_rows():
    target = tiny_target(layers=3)
    batch = tiny_batch(target)
    size, prompts_PH = batch.input_ids.shape[1], torch.randn(2, 32).double().requires_grad_()
    visible = torch.zeros(2, 2, size + 2, dtype=torch.bool)
    visible[:, :, :4] = True
    visible[:, [0, 1], [size, size + 1]] = True
    rows = AuxiliaryRows(prompts_PH.expand(2, -1, -1), torch.full((2, 2), 4), visible)
    states = target.features(batch, ("final",), gradient=True, auxiliary=rows)["final"]
    close(states[:, :size].detach(), target.features(batch, ("final",))["final"])
    states[:, size].sum().backward()
    assert prompts_PH.grad is not None
    assert bool(prompts_PH.grad[0].abs().sum() > 0) and not prompts_PH.grad[1].any()
    partial = replace(some_tree(1), auxiliary=rows, already_run=PartialRows(states, 1))
    with pytest.raises(ValueError, match="not both"):
        open_session(target).verify(partial)


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize(
    ("layer", "deeper"), [(0, None), (1, None), (3, None), (0, 1), (1, 2), (2, 3)]
)
def test_gradient_through_auxiliary_rows_alone_is_that_of_the_whole_pass(arch, layer, deeper):
    target = tiny_target(arch, layers=3)
    batch = tiny_batch(target)
    size, first_PH, last_HH = batch.input_ids.shape[1], torch.randn(3, 32), torch.randn(32, 32)
    visible = torch.zeros(2, 3, size + 3, dtype=torch.bool)
    visible[:, :, 2:11] = True
    visible[:, :, size:] = torch.ones(3, 3, dtype=torch.bool).tril()
    found, embeddings = [], target.embed(batch.input_ids)
    for run in (rows_beside, gradient_beside):
        learnt, maps = (part.double().requires_grad_() for part in (first_PH, last_HH))
        later = Entry(
            lambda hidden, maps=maps: hidden[:, 8:11] @ maps,
            torch.tensor([[False, False, True]]),
            deeper or 0,
        )
        rows = AuxiliaryRows(
            lambda hidden, learnt=learnt: hidden[:, 8:11] + learnt,
            torch.tensor([[11, 12, 13]]).expand(2, -1),
            visible,
            layer,
            () if deeper is None else (later,),
        )
        names = (1, "pre_norm", "final")
        states = run(target, embeddings, batch.rows(), names, rows)
        sum(state[:, size:].square().sum() for state in states.values()).backward()
        found.append([*(state.detach() for state in states.values()), learnt.grad])
        found[-1] += [] if deeper is None else [maps.grad]
    for one, other in zip(*found, strict=True):
        close(one, other)
    asked = target.features(batch, names, gradient=True, auxiliary=rows)
    assert all(torch.equal(asked[name], states[name]) for name in names)


def test_a_session_forgets_what_is_rewound():
    """Later calls are those of a session that never read it; some ids are a slice of all."""
    target, lengths = tiny_target(), torch.tensor([4, 7])
    session, expected = open_session(target, (5, 9)), target.open(2, 64)
    expected.prefill(prompts((5, 9))[0][:, :7], lengths)
    session.rewind(lengths)
    found, tree = session.verify(some_tree()), some_tree()
    close(found.logits_BNV, expected.verify(tree).logits_BNV)
    assert session.lengths_B.tolist() == [4, 7]
    ids = torch.tensor([3, 20, 90])
    auxiliary = twins(tree, lengths, 1)
    for each in (tree, replace(tree, auxiliary=auxiliary)):
        close(session.verify(each, (), ids).logits_BNV, found.logits_BNV[..., ids])


def test_two_sessions_of_one_target_do_not_see_each_other():
    target = tiny_target()
    first, second = open_session(target, (6,)), open_session(target, (4,))
    tree = some_tree(1)
    before = first.verify(tree).logits_BNV
    second.verify(TokenTree.root(torch.tensor([9])))
    second.commit(Accepted(torch.tensor([[0]]), torch.tensor([1]), torch.tensor([9])))
    close(first.verify(tree).logits_BNV, before)
    assert first.lengths_B.tolist() == [6] and second.lengths_B.tolist() == [5]
    both = first.select(torch.tensor([0, 0]))
    doubled = TokenTree(tree.tokens_BN.expand(2, -1), tree.topology.expand(2))
    close(both.verify(doubled).logits_BNV, before.expand(2, -1, -1))


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
    session = target.open(2, 64)
    session.prefill(ids, lengths)
    session.keep([1])
    logits = session.verify(TokenTree.root(torch.tensor([7]))).logits_BNV[0, 0]
    close(logits, plain(target, [*ids[1].tolist(), 7]).logits[0, -1])


def test_errors_name_the_fix():
    target = tiny_target()
    with pytest.raises(ValueError, match="not one of"):
        target.features(tiny_batch(target), (5,))
    session = target.open(1, 4)
    with pytest.raises(ValueError, match="more capacity"):
        session.prefill(*prompts((6,)))
    with pytest.raises(KeyError):
        target.copy_weight("layers.0.nothing")
    rows = Rows(torch.arange(2)[None], torch.eye(2, dtype=torch.bool)[None])
    assert (
        target.copy_weight("layers.1.self_attn.q_proj.weight").shape == (32, 32)
        and rows.committed_BS is None
    )
    assert len({target.fingerprint(), tiny_target().fingerprint()}) == 1
    assert tiny_target(seed=1).fingerprint() != target.fingerprint()
