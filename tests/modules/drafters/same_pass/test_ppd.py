"""Parallel prompt decoding: what prompt tokens see and leave untouched, and what they learn."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from modules.contracts.batches import TextBatch
from modules.contracts.drafter import Context, DraftState
from modules.contracts.rows import Rows
from modules.contracts.sampling import Sampling
from modules.contracts.token_tree import TokenTree, Topology
from modules.contracts.verification import Accepted, Verified
from modules.decoding.decoder import SpeculativeDecoder
from modules.drafters.same_pass.base import GuessState
from modules.drafters.same_pass.guess_rows import GuessRows, HostCounts
from modules.drafters.same_pass.ppd import PPD
from modules.losses.divergences import forward_kl
from modules.losses.row_subsets import some_of_each
from modules.trees.sampled.branching import DrawnTree
from modules.trees.static import StaticTree
from tests.fakes import tiny_batch, tiny_target
from tests.modules.conformance import check_decoding
from tests.modules.sampling import goodness, small_target

TEXT = [7, 8, 9, 10, 11, 12]


def drafter_for(target, **arguments) -> PPD:
    torch.manual_seed(3)
    drafter = PPD(target.shape, **arguments)
    drafter.initialise(target)
    with torch.no_grad():
        drafter.prompts_EH += torch.randn_like(drafter.prompts_EH)
    return drafter.double().eval()


def some_tree() -> TokenTree:
    """The newest token, two children, and one below each of them."""
    return TokenTree(
        torch.tensor([[20, 21, 22, 23, 24]]), Topology(torch.tensor([[-1, 0, 0, 1, 2]]))
    )


def verified(
    target, drafter: PPD, counts=(3, 1, 2, 3, 1), change: Tensor | None = None
) -> Verified:
    """One call over `some_tree` behind `TEXT`; `change` is added to what enters as prompt rows."""
    session = target.open(1, 64)
    session.prefill(torch.tensor([TEXT]), torch.tensor([len(TEXT)]))
    lengths = torch.tensor([len(TEXT)])
    state = GuessState(
        Context(target, torch.tensor([TEXT]), lengths, torch.tensor([20])),
        torch.tensor([20]), lengths, None, HostCounts([0]),
    )  # fmt: skip
    tree = drafter.with_guesses(state, some_tree(), torch.tensor([counts]), (tuple(counts),))
    if change is not None:
        assert tree.auxiliary is not None and isinstance(tree.auxiliary.inputs, Tensor)
        inputs = tree.auxiliary.inputs + change[None, :, None]
        tree = replace(tree, auxiliary=replace(tree.auxiliary, inputs=inputs))
    return session.verify(tree, ("final",))


@pytest.mark.parametrize("ensemble", [1, 2])
def test_the_targets_own_logits_do_not_know_of_prompt_tokens(ensemble):
    target = tiny_target()
    session = target.open(1, 64)
    session.prefill(torch.tensor([TEXT]), torch.tensor([len(TEXT)]))
    found = verified(target, drafter_for(target, ensemble=ensemble))
    torch.testing.assert_close(found.logits_BNV, session.verify(some_tree()).logits_BNV)


@pytest.mark.parametrize("ensemble", [1, 2])
def test_a_prompt_row_is_seen_by_later_ones_of_its_chain_alone(ensemble):
    """Prompts of other nodes, other members of the ensemble, earlier prompts and nodes never
    change."""
    target, counts = tiny_target(), (3, 1, 2, 3, 1)
    drafter = drafter_for(target, ensemble=ensemble)
    plain = verified(target, drafter)
    names = [
        (node, member, prompt)
        for node, count in enumerate(counts)
        for prompt in range(count)
        for member in range(ensemble)
    ]
    for row, (node, member, prompt) in enumerate(names):
        change = torch.zeros(len(names)).double()
        change[row] = 1
        found = verified(target, drafter, change=change)
        torch.testing.assert_close(found.logits_BNV, plain.logits_BNV)
        moved = (found.auxiliary_states["final"] != plain.auxiliary_states["final"]).any(-1)[0]
        expected = [name[:2] == (node, member) and name[2] >= prompt for name in names]
        assert moved.tolist() == expected


@pytest.mark.parametrize("ensemble", [1, 2])
def test_a_nodes_guesses_are_those_of_a_plain_text_with_prompt_tokens_behind_it(ensemble):
    """One pass over a tree says of every node what a pass without KV cache and tree says."""
    target = tiny_target()
    drafter = drafter_for(target, ensemble=ensemble)
    counts, paths = (3, 1, 2, 3, 1), [[20], [20, 21], [20, 22], [20, 21, 23], [20, 22, 24]]
    found = verified(target, drafter, counts)
    behind = found.tree.auxiliary
    assert isinstance(behind, GuessRows) and behind.first_BN is not None
    for node, (path, count) in enumerate(zip(paths, counts, strict=True)):
        ids = torch.tensor([*TEXT, *path])
        whole = torch.cat([target.embed(ids), drafter.prompts_EH[: count * ensemble]])[None]
        length = len(ids)
        visible = torch.ones(whole.shape[1], whole.shape[1]).tril().bool()
        for one in range(count * ensemble):
            for other in range(count * ensemble):
                same = one % ensemble == other % ensemble
                visible[length + one, length + other] = same and other <= one
        ahead = 1 + torch.arange(count * ensemble) // ensemble
        positions = torch.cat([torch.arange(length), length - 1 + ahead])
        rows = Rows(positions[None], visible[None])
        states = target.forward_rows(whole, rows, ("final",))["final"][0, length:]
        first = int(behind.first_BN[0, node])
        here = found.auxiliary_states["final"][0, first : first + count * ensemble]
        torch.testing.assert_close(here, states)


def test_an_ensemble_says_the_mean_of_its_members_logits():
    target = tiny_target("gemma2")
    drafter = drafter_for(target, ensemble=2)
    states = torch.randn(5, 64).double()
    one, other = target.logits(states[:, :32]), target.logits(states[:, 32:])
    torch.testing.assert_close(drafter.head(0, target)(states), (one + other) / 2)


@pytest.mark.parametrize("arch", ["llama", "gemma2", "opt"])
def test_greedy_text_is_the_targets_own_in_other_architectures(arch):
    target = tiny_target(arch)
    drafter = drafter_for(target, ensemble=2)
    expected = SpeculativeDecoder(target).decode([TEXT, [5]], Sampling(), 16)
    found = SpeculativeDecoder(target, drafter).decode([TEXT, [5]], Sampling(), 16)
    assert [trace.ids for trace in found] == [trace.ids for trace in expected]


def test_it_decodes_losslessly_with_any_builder():
    check_decoding(drafter_for)
    target = small_target()
    paths = [(0,), (1,), (0, 0)]
    # Draws with replacement give equal siblings.
    drawn = DrawnTree(paths), DrawnTree(paths, "independent")
    for builder in (StaticTree(paths), *drawn):
        decoder = SpeculativeDecoder(
            target, drafter_for(target), builder=builder, stop_ids=frozenset()
        )
        assert goodness(decoder, [3, 1], Sampling(1.0), runs=1500) > 1e-4


def test_the_first_call_is_the_newest_token_with_prompt_tokens_behind_it():
    target = tiny_target()
    drafter = drafter_for(target)
    trace = SpeculativeDecoder(target, drafter, stop_ids=frozenset()).decode([TEXT], Sampling(), 9)
    assert trace[0].nodes[0] == 0 and trace[0].rows[0] == 1 + drafter.guesses
    assert min(trace[0].nodes[1:]) > 0


def test_after_every_call_the_guesses_are_those_behind_the_whole_text():
    target = tiny_target()
    drafter, seen = drafter_for(target, ensemble=2), []
    absorb = drafter.absorb

    def record(state: DraftState, verified: Verified, accepted: Accepted) -> GuessState:
        after = absorb(state, verified, accepted)
        assert after.states_BKX is not None
        seen.append((after.lengths_B.tolist(), after.states_BKX, list(after.available)))
        return after

    drafter.absorb = record  # type: ignore[method-assign]
    prompts = [TEXT, [9, 5]]
    decoder = SpeculativeDecoder(target, drafter, stop_ids=frozenset())
    traces = decoder.decode(prompts, Sampling(), 8)
    texts = [[*prompt, *trace.ids] for prompt, trace in zip(prompts, traces, strict=True)]
    whole = [calls for calls in seen if len(calls[0]) == 2]
    assert len(whole) > 2
    for lengths, states_BKX, available in whole[:3]:
        assert available == [drafter.guesses] * 2
        for text, length, found in zip(texts, lengths, states_BKX, strict=True):
            ids = torch.tensor([text[:length]])
            ones = torch.ones_like(ids, dtype=torch.bool)
            batch = TextBatch(ids, ones, torch.arange(length)[None], torch.zeros_like(ids))
            counts = torch.zeros_like(ids)
            counts[:, -1] = drafter.guesses
            behind = drafter.following(batch.rows(), counts, 6)
            states = target.features(batch, ("final",), auxiliary=behind)["final"][0, length:]
            torch.testing.assert_close(found, drafter.side_by_side(states))


def test_the_guesses_of_the_last_accepted_node_are_the_next_ones():
    """Root logits belong to that node too; prompt rows of other nodes are forgotten."""
    target, counts = tiny_target(), (3, 1, 2, 3, 1)
    drafter = drafter_for(target, ensemble=2)
    found = verified(target, drafter, counts)
    behind = found.tree.auxiliary
    assert isinstance(behind, GuessRows)
    found = replace(found, tree=replace(found.tree, auxiliary=replace(behind, counts=(counts,))))
    state = GuessState(
        Context(target, torch.tensor([TEXT]), torch.tensor([6]), torch.tensor([20])),
        torch.tensor([20]), torch.tensor([6]), None, HostCounts([0]),
    )  # fmt: skip
    for path, before in (([0], 0), ([0, 2], 4), ([0, 1, 3], 6), ([0, 2, 4], 9)):
        accepted = Accepted(torch.tensor([path]), torch.tensor([len(path)]), torch.tensor([30]))
        after = drafter.absorb(state, found, accepted)
        count = counts[path[-1]]
        assert after.available == [count] and int(after.lengths_B) == 6 + len(path)
        assert after.states_BKX is not None
        rows = found.auxiliary_states["final"][:, 2 * before : 2 * (before + count)]
        assert torch.equal(after.states_BKX[:, :count].flatten(1), rows.flatten(1))


# -- training --------------------------------------------------------------------------------------


@pytest.mark.parametrize("ensemble", [1, 2])
def test_many_groups_of_a_packed_row_say_what_each_says_alone(ensemble):
    """Behind a cut nothing is seen but its own document up to the cut."""
    target = tiny_target()
    drafter, batch = drafter_for(target, ensemble=ensemble), tiny_batch(target)
    rows = drafter.rows(batch, target)
    said_MKX = drafter.passed(batch, target, rows)[1]["final"]
    length = batch.input_ids.shape[1]
    assert len(rows.flat_MK1) > 8
    for flat, said in zip(rows.flat_MK1[:, 0].tolist(), said_MKX, strict=True):
        row, place = divmod(flat, length)
        own = (batch.document_ids[row] == batch.document_ids[row, place]).nonzero()[:, 0]
        ids = batch.input_ids[row, own[own <= place]][None]
        ones = torch.ones_like(ids, dtype=torch.bool)
        alone = TextBatch(ids, ones, torch.arange(ids.shape[1])[None], torch.zeros_like(ids))
        counts = torch.zeros_like(ids)
        counts[:, -1] = drafter.guesses
        behind = drafter.following(alone.rows(), counts, drafter.guesses * ensemble)
        states = target.features(alone, ("final",), auxiliary=behind)["final"][0, ids.shape[1] :]
        torch.testing.assert_close(said, drafter.side_by_side(states))


def test_the_loss_is_the_papers():
    """(1/m) Σ_i 0.8^i of the mean divergence from the target's distribution at x_{t+i}."""
    target = tiny_target()
    drafter, batch = drafter_for(target), tiny_batch(target)
    rows = drafter.rows(batch, target)
    said_MKX = drafter.passed(batch, target, rows)[1]["final"]
    own_PV = target.logits(target.features(batch, ("final",))["final"]).flatten(0, 1).softmax(-1)
    expected = torch.zeros(()).double()
    for i in range(drafter.guesses):
        valid_M = rows.valid_MK[:, i]
        losses = forward_kl(
            target.logits(said_MKX[valid_M, i]), own_PV[rows.flat_MK1[valid_M, 0] + i + 1]
        )
        expected = expected + 0.8 ** (i + 1) * losses.mean() / drafter.guesses
    torch.testing.assert_close(drafter.loss(batch, target, 1.0).total, expected)


def test_cuts_are_drawn_anew_in_training_and_evenly_spaced_in_validation():
    target = tiny_target()
    drafter, batch = drafter_for(target, groups=2), tiny_batch(target)

    def cuts() -> list[int]:
        return drafter.rows(batch, target).flat_MK1[:, 0].tolist()

    assert cuts() == cuts() and len(cuts()) == 4
    drafter.train()
    drawn = [tuple(cuts()) for _ in range(8)]
    assert len(set(drawn)) > 1 and all(len(one) == 4 for one in drawn)
    drafter.groups, drafter.groups_per = 1, "document"
    documents = batch.document_ids.flatten()[torch.tensor(cuts())]
    assert documents.tolist() == [0, 1, 0, 1]


def test_rows_of_a_unit_are_spaced_evenly():
    unit = torch.tensor([0] * 6 + [1] * 2 + [3] * 9)
    assert some_of_each(unit, 3, False).tolist() == [1, 3, 5, 6, 7, 10, 13, 16]
    drawn = some_of_each(unit, 3, True)
    assert unit[drawn].tolist() == [0, 0, 0, 1, 1, 3, 3, 3] and len(set(drawn.tolist())) == 8
    assert some_of_each(unit[:0], 3, True).tolist() == []


def test_it_starts_as_a_text_or_at_random():
    target = tiny_target()
    drafter = PPD(target.shape, prompts=2, ensemble=2, text="abc")
    drafter.initialise(target)
    ids = target.tokenizer("abca", add_special_tokens=False)["input_ids"]
    torch.testing.assert_close(drafter.prompts_EH.double(), target.embed(torch.tensor(ids)))
    for text in (None, ""):
        drafter = PPD(target.shape, text=text)
        drafter.initialise(target)
        spread = float(
            drafter.prompts_EH.detach().std() / target.model.get_input_embeddings().weight.std()
        )
        assert 0.5 < spread < 2


def test_without_the_ensemble_mask_members_see_each_other():
    """Those of earlier prompt tokens and of their own, not of later ones."""
    target, counts = tiny_target(), (2, 1, 1, 1, 1)
    drafter = drafter_for(target, ensemble=2, ensemble_mask=False)
    plain, change = verified(target, drafter, counts), torch.zeros(12).double()
    change[2] = 1
    found = verified(target, drafter, counts, change)
    moved = (found.auxiliary_states["final"] != plain.auxiliary_states["final"]).any(-1)[0]
    assert moved.tolist() == [False, False, True, True] + [False] * 8


def test_weights_of_an_ensemble_are_learnt():
    """They start as the mean, and have a gradient."""
    target, batch = tiny_target(), tiny_batch(tiny_target())
    drafter = drafter_for(target, ensemble=2, weighting="learned")
    mean = drafter_for(target, ensemble=2)
    assert drafter.member_weights is not None and mean.member_weights is None
    mean.prompts_EH.data.copy_(drafter.prompts_EH)
    loss = drafter.loss(batch, target, 1.0).total
    torch.testing.assert_close(loss, mean.loss(batch, target, 1.0).total)
    loss.backward()
    assert drafter.member_weights.grad is not None and drafter.member_weights.grad.any()
    drafter.member_weights.data.copy_(torch.tensor([0.0, 1.0]))
    states = torch.randn(5, 64).double()
    shares = torch.tensor([0.0, 1.0]).double().softmax(0)
    expected = shares[0] * target.logits(states[:, :32]) + shares[1] * target.logits(states[:, 32:])
    torch.testing.assert_close(drafter.head(0, target)(states), expected)


def test_fixed_cuts_are_the_same_in_every_step():
    target, batch = tiny_target(), tiny_batch(tiny_target())
    drafter = drafter_for(target, groups=2, random_cuts=False)
    drafter.train()
    cuts = {tuple(drafter.rows(batch, target).flat_MK1[:, 0].tolist()) for _ in range(4)}
    assert len(cuts) == 1


@pytest.mark.parametrize(
    "arguments",
    [
        {"prompts": 0},
        {"ensemble": 65},
        {"groups": 0},
        {"groups_per": "batch"},
        {"weighting": "max"},
        {"sparse": "best"},
    ],
)
def test_what_cannot_be_is_refused(arguments):
    with pytest.raises(ValueError, match=next(iter(arguments))):
        PPD(tiny_target().shape, **arguments)
