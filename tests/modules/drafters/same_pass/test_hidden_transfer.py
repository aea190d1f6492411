"""Hidden Transfer: pseudo states see and change what they should, and learn what the loss says."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from modules.contracts.batches import TextBatch
from modules.contracts.drafter import Context, DraftState
from modules.contracts.rows import Rows, rows_at
from modules.contracts.sampling import Sampling
from modules.contracts.token_tree import TokenTree, Topology
from modules.contracts.verification import Accepted, Verified
from modules.decoding.decoder import SpeculativeDecoder
from modules.drafters.same_pass.base import GuessState
from modules.drafters.same_pass.guess_rows import GuessRows
from modules.drafters.same_pass.hidden_transfer import HiddenTransfer, transfer_layers
from modules.losses.divergences import forward_kl
from modules.trees.sampled.branching import DrawnTree
from modules.trees.static import StaticTree
from tests.fakes import tiny_batch, tiny_target
from tests.modules.conformance import check_decoding
from tests.modules.sampling import goodness, small_target

TEXT = [7, 8, 9, 10, 11, 12]
DEEPER = [0.25, 0.5, 1.0]
"""Shares of four layers, one for each offset."""


def drafter_for(target, **arguments) -> HiddenTransfer:
    """A drafter whose maps are far from the identity."""
    torch.manual_seed(3)
    drafter = HiddenTransfer(target.shape, **arguments)
    drafter.initialise(target)
    with torch.no_grad():
        for parameter in drafter.parameters():
            parameter += 0.3 * torch.randn_like(parameter)
    return drafter.double().eval()


def close(actual, expected) -> None:
    """Gemma computes its norms in float32."""
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)


def one_text(ids: list[int]) -> TextBatch:
    text = torch.tensor([ids])
    ones = torch.ones_like(text, dtype=torch.bool)
    return TextBatch(text, ones, torch.arange(len(ids))[None], torch.zeros_like(text))


def session_behind(target, texts: list[list[int]]):
    lengths = torch.tensor([len(text) for text in texts])
    padded = torch.tensor([text + [0] * (int(lengths.max()) - len(text)) for text in texts])
    session = target.open(len(texts), 64)
    session.prefill(padded, lengths)
    return session


# -- pseudo states ---------------------------------------------------------------------------------


@pytest.mark.parametrize("arch", ["llama", "gemma2", "opt"])
@pytest.mark.parametrize("transfer", [0.0, 0.5, 1.0, DEEPER])
def test_the_targets_own_logits_do_not_know_of_pseudo_states(arch, transfer):
    """In trees of several sequences, and in training."""
    target = tiny_target(arch, layers=4)
    drafter, texts = drafter_for(target, transfer=transfer), [TEXT, [5, 9]]
    tree = TokenTree(
        torch.tensor([[20, 21, 22, 23]] * 2), Topology(torch.tensor([[-1, 0, 0, 1]] * 2))
    )
    lengths = torch.tensor([6, 2])
    state = drafter.start(Context(target, torch.zeros(2, 6), lengths, torch.tensor([20, 20])))
    found = session_behind(target, texts).verify(drafter.prepare(state, tree), ("pre_norm",))
    expected = session_behind(target, texts).verify(tree)
    close(found.logits_BNV, expected.logits_BNV)
    batch = tiny_batch(target)
    states = drafter.passed(batch, target, drafter.rows(batch, target))[0]
    close(states["final"], target.features(batch, ("final",))["final"])


@pytest.mark.parametrize("layer", [0, 1, 2, 3, 4])
@pytest.mark.parametrize("chained", [True, False])
def test_true_states_say_what_the_target_says_there(layer, chained):
    """States that are real at the layer give the target's own distributions, with the keys of the
    text up to t and of the earlier pseudo states, as well as with those of the text alone."""
    target, batch = tiny_target(layers=4), one_text([*TEXT, 3, 4, 5, 30, 31, 32])
    drafter = drafter_for(target, transfer=layer / 4, interaction=chained)
    counts = torch.zeros_like(batch.input_ids)
    counts[:, [2, 5, 8]] = 3
    rows = drafter.following(batch.rows(), counts, 9)
    owners = torch.tensor([[2, 2, 2, 5, 5, 5, 8, 8, 8]])
    later = owners + torch.tensor([[1, 2, 3] * 3])
    assert torch.equal(rows.position_ids_BP, later)
    if not chained:
        visible = rows.visible_BPX.clone()
        visible[:, :, :12] = torch.arange(12) < later[..., None]
        rows = replace(rows, visible_BPX=visible)
    rows = replace(rows, inputs=lambda hidden: rows_at(hidden, later))
    states = target.features(batch, ("final",), auxiliary=rows)["final"]
    close(states[:, 12:], states[0, later[0]][None])


def test_behind_the_last_layer_it_is_a_linear_medusa_head():
    target, batch = tiny_target(layers=3), tiny_batch(tiny_target())
    drafter = drafter_for(target, transfer=1.0)
    rows = drafter.rows(batch, target)
    states = target.features(batch, ("pre_norm",))["pre_norm"].flatten(0, 1)
    for offset, said in enumerate(drafter.teacher_forced(batch, target, rows)):
        linear = drafter.maps[offset]
        expected = target.logits(target.final_norm(linear(states[rows.flat_MK1[:, 0]])))
        close(drafter.head(offset, target)(said), expected)


def alone(target, drafter: HiddenTransfer, ids: list[int], layers: list[int]) -> Tensor:
    """Pseudo states after the last layer behind a text [K,H], layer by layer: `layers` of each."""
    batch, length, depth = one_text(ids), len(ids), target.shape.num_layers
    names = [*range(depth), "pre_norm"]
    real = target.features(batch, names)
    pseudo: dict[int, Tensor] = {}
    for k in range(depth + 1):
        for offset, first in enumerate(layers):
            if first == k:
                pseudo[offset] = drafter.maps[offset](real[names[k]][:, -1])
        if k == depth:
            return torch.cat([pseudo[offset] for offset in range(len(layers))])
        inside = sorted(pseudo)
        if not inside:
            continue
        # Real rows and the pseudo states that exist at this layer, each of which sees those before.
        hidden = torch.cat([real[k], *(pseudo[i][:, None] for i in inside)], dim=1)
        visible = torch.ones(hidden.shape[1], hidden.shape[1]).tril().bool()
        if not drafter.interaction:
            visible[length:, length:] = torch.eye(len(inside)).bool()
        positions = torch.tensor([[*range(length), *(length + i for i in inside)]])
        whole = Rows(positions, visible[None])
        after = target.forward_rows(hidden, whole, ("pre_norm",), None, (k, k + 1))["pre_norm"]
        pseudo |= {i: after[:, length + place] for place, i in enumerate(inside)}
    raise AssertionError


@pytest.mark.parametrize("transfer", [0.5, 1.0, DEEPER])
@pytest.mark.parametrize("interaction", [True, False])
def test_guesses_are_those_of_each_text_by_itself(transfer, interaction):
    """In a packed row every position says what its own document up to it says, layer by layer."""
    target = tiny_target("gemma2", layers=4)
    drafter = drafter_for(target, transfer=transfer, interaction=interaction, anchor_share=0.2)
    batch = tiny_batch(target)
    rows = drafter.rows(batch, target)
    said_MKH = drafter.passed(batch, target, rows)[1]["pre_norm"]
    layers = list(transfer_layers(transfer, 3, 4))
    assert len(said_MKH) > 5
    for flat, said in zip(rows.flat_MK1[:, 0].tolist(), said_MKH, strict=True):
        row, place = divmod(flat, batch.input_ids.shape[1])
        same = batch.document_ids[row] == batch.document_ids[row, place]
        ids = batch.input_ids[row, : place + 1][same[: place + 1]].tolist()
        close(said, alone(target, drafter, ids, layers))


@pytest.mark.parametrize("transfer", [0.5, DEEPER])
def test_after_every_call_the_guesses_are_those_behind_the_whole_text(transfer):
    target = tiny_target(layers=4)
    drafter, seen = drafter_for(target, transfer=transfer), []
    absorb = drafter.absorb

    def record(state: DraftState, verified: Verified, accepted: Accepted) -> GuessState:
        after = absorb(state, verified, accepted)
        assert after.states_BKX is not None
        seen.append((after.lengths_B.tolist(), after.states_BKX, list(after.available)))
        return after

    drafter.absorb = record  # type: ignore[method-assign]
    prompts, layers = [TEXT, [9, 5]], list(transfer_layers(transfer, 3, 4))
    decoder = SpeculativeDecoder(target, drafter, stop_ids=frozenset())
    traces = decoder.decode(prompts, Sampling(), 8)
    texts = [[*prompt, *trace.ids] for prompt, trace in zip(prompts, traces, strict=True)]
    owned = 0
    for lengths, states_BKX, available in (calls for calls in seen if len(calls[0]) == 2):
        for text, length, found, count in zip(texts, lengths, states_BKX, available, strict=True):
            expected = alone(target, drafter, text[:length], layers)
            close(found[:count], expected[:count])
            owned += count
    assert owned > 4


def test_maps_start_as_the_identity_and_low_rank_ones_are_smaller():
    target = tiny_target()
    for rank, size in ((None, 32 * 32 + 32), (2, 2 * 2 * 32 + 32)):
        drafter = HiddenTransfer(target.shape, rank=rank)
        hidden = torch.randn(2, 5, 32)
        assert all(torch.equal(offset(hidden), hidden) for offset in drafter.maps)
        assert drafter.trained_size == 3 * size


# -- training --------------------------------------------------------------------------------------


@pytest.mark.parametrize("labels", ["soft", "hard"])
@pytest.mark.parametrize("weight", [0.0, 0.1])
def test_the_loss_is_a_divergence_and_a_distance_to_the_real_state(labels, weight):
    """Σ_k 0.8^(k-1) [KL + μ SmoothL1], each by a slow computation."""
    target = tiny_target(layers=4)
    drafter, batch = (
        drafter_for(target, labels=labels, state_weight=weight, anchor_share=1.0),
        tiny_batch(target),
    )
    rows = drafter.rows(batch, target)
    said_MKH = drafter.passed(batch, target, rows)[1]["pre_norm"]
    real = target.features(batch, ("pre_norm", "final"))
    law_PV = target.logits(real["final"]).flatten(0, 1).softmax(-1)
    expected = torch.zeros(()).double()
    for k in (1, 2, 3):
        valid_M = rows.valid_MK[:, k - 1]
        said, there = said_MKH[valid_M, k - 1], rows.flat_MK1[valid_M, 0] + k
        logits = target.logits(target.final_norm(said))
        losses = (
            forward_kl(logits, law_PV[there])
            if labels == "soft"
            else F.cross_entropy(logits, batch.input_ids.flatten()[there + 1], reduction="none")
        )
        distance = F.smooth_l1_loss(said, real["pre_norm"].flatten(0, 1)[there])
        expected = expected + 0.8 ** (k - 1) * (losses.mean() + weight * distance)
    close(drafter.loss(batch, target, 1.0).total, expected)


def test_offsets_may_be_trained_one_after_another():
    """A stage changes its own map alone, by its own loss; the recipe trains the last one."""
    target, batch = tiny_target(), tiny_batch(tiny_target())
    drafter = drafter_for(target, sequential=True, anchor_share=1.0, state_weight=0.1).eval()
    joint = drafter_for(target, anchor_share=1.0, state_weight=0.1)
    assert joint.stages == () and drafter.trained_size == joint.trained_size
    joint.load_state_dict(drafter.state_dict())
    assert [id(p) for p in drafter.declared_parameters()] == [
        id(p) for p in drafter.maps[-1].parameters()
    ]
    assert [stage.name for stage in drafter.stages] == ["offset_1", "offset_2"]
    for offset, stage in enumerate(drafter.stages):
        before = {name: tensor.clone() for name, tensor in drafter.state_dict().items()}
        part = copy.deepcopy(stage.part).requires_grad_(True)
        loss = part.loss(batch, target, 0.0)
        joint.load_state_dict(before)
        ready, steps = joint.guessed(batch, target)
        close(loss.total, joint.step_loss(list(steps)[offset], ready))
        loss.total.backward()
        assert len(list(part.parameters())) == 2 and list(loss.metrics)[0].endswith(f"_{offset}")
        torch.optim.SGD(part.parameters(), 0.1).step()
        stage.part.load_state_dict(part.state_dict())
        after = drafter.state_dict()
        changed = {name for name in before if not torch.equal(before[name], after[name])}
        assert changed == {f"maps.{offset}.map.weight", f"maps.{offset}.map.bias"}


def test_anchors_are_a_share_of_the_tokens_and_drawn_anew_in_training():
    target = tiny_target()
    drafter, batch = drafter_for(target, anchor_share=0.25), tiny_batch(target)

    def chosen() -> list[int]:
        return drafter.rows(batch, target).flat_MK1[:, 0].tolist()

    assert chosen() == chosen() and len(chosen()) == 2 * 24 // 4
    drafter.train()
    assert len({tuple(chosen()) for _ in range(8)}) > 1


def test_a_share_of_each_document_is_of_its_own_tokens():
    """Twelve and nine tokens, of which a quarter; one at least."""
    target = tiny_target()
    drafter, batch = drafter_for(target, groups_per="document"), tiny_batch(target)
    for training in (True, False):
        drafter.train(training)
        for share, counts in ((0.25, [3, 2]), (0.5, [6, 4]), (0.01, [1, 1])):
            drafter.anchor_share = share
            flat_M = drafter.rows(batch, target).flat_MK1[:, 0]
            for row in range(2):
                documents = batch.document_ids[row, flat_M[flat_M // 24 == row] % 24]
                assert documents.bincount().tolist() == counts


def noisy_cycle(generator: torch.Generator, rows: int) -> TextBatch:
    """Texts whose tokens mostly follow one permutation of the vocabulary."""
    following = torch.randperm(32, generator=torch.Generator().manual_seed(5))
    columns = [torch.randint(32, (rows,), generator=generator)]
    for _ in range(23):
        anything = torch.randint(32, (rows,), generator=generator)
        rare = torch.rand(rows, generator=generator) < 0.1
        columns.append(torch.where(rare, anything, following[columns[-1]]))
    ids = torch.stack(columns, 1)
    ones = torch.ones_like(ids, dtype=torch.bool)
    return TextBatch(ids, ones, torch.arange(24).expand(rows, -1), torch.zeros_like(ids))


def trained_target(generator: torch.Generator):
    """A target of four layers that has learnt such texts."""
    target = tiny_target(layers=4, dtype=torch.float32, vocab=32)
    model = target.model.requires_grad_(True)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(0.3 if parameter.dim() > 1 else 1)
    optimiser = torch.optim.AdamW(model.parameters(), 3e-3)
    for _ in range(100):
        batch = noisy_cycle(generator, 8)
        states = target.features(batch, ("final",), gradient=True)["final"]
        logits = target.logits(states[:, :-1]).flatten(0, 1)
        optimiser.zero_grad()
        F.cross_entropy(logits, batch.input_ids[:, 1:].flatten()).backward()
        optimiser.step()
    model.requires_grad_(False)
    return target


def test_trained_pseudo_states_come_closer_to_real_ones_layer_by_layer():
    """On held-out text, for every offset; the accuracy falls with the offset."""
    generator = torch.Generator().manual_seed(0)
    target = trained_target(generator)
    drafter = HiddenTransfer(target.shape, transfer=0.25, anchor_share=1.0)
    optimiser = torch.optim.AdamW(drafter.parameters(), 1e-2)
    for _ in range(40):
        optimiser.zero_grad()
        drafter.loss(noisy_cycle(generator, 8), target, 0.0).total.backward()
        optimiser.step()
    held_out, before = noisy_cycle(generator, 32), HiddenTransfer(target.shape, transfer=0.25)
    drafter.eval()
    result = drafter.finish([held_out], target)
    sums_KL, counts_K = drafter.similarities(held_out, target)
    means_KL = sums_KL / counts_K[:, None]
    assert not means_KL[:, 0].any()
    assert bool((means_KL[:, 1:].diff(dim=1) > 0.01).all()), means_KL
    assert f"| offset 2 | {means_KL[1, 1]:.3f} |" in result.pages["hidden_states.md"]
    metrics = drafter.loss(held_out, target, 1.0).metrics
    accuracies = [float(metrics[f"top1_{k}"].total / metrics[f"top1_{k}"].count) for k in range(3)]
    assert accuracies[0] > accuracies[1] > accuracies[2] > 0.5
    # Without training they stay where they are.
    first, last = before.eval().similarities(held_out, target)[0][0, [1, 4]]
    assert float(last - first) < float(means_KL[0, 4] - means_KL[0, 1]) * counts_K[0]


def test_training_ends_with_measured_accuracies():
    target = tiny_target()
    drafter = drafter_for(target, rows=20)
    before = drafter.sparse_trees(19)
    result = drafter.finish([tiny_batch(target)], target)
    assert [len(row) for row in drafter.arguments["accuracies"]] == [10] * 3
    assert result.figures["tree/expected_tokens"] == drafter.sparse_trees(19).tokens
    assert drafter.sparse_trees(19) != before
    again = HiddenTransfer(**{**drafter.arguments, "shape": target.shape})
    assert again.accuracies == drafter.accuracies


# -- decoding --------------------------------------------------------------------------------------


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
        assert goodness(decoder, [3, 1], Sampling(0.7, top_p=0.9), runs=1500) > 1e-4


@pytest.mark.parametrize("arch", ["gemma2", "opt", "gpt2"])
def test_greedy_text_is_the_targets_own_in_other_architectures(arch):
    target = tiny_target(arch, layers=4)
    expected = SpeculativeDecoder(target).decode([TEXT, [5]], Sampling(), 16)
    for transfer in (0.25, DEEPER):
        drafter = drafter_for(target, transfer=transfer)
        found = SpeculativeDecoder(target, drafter).decode([TEXT, [5]], Sampling(), 16)
        assert [trace.ids for trace in found] == [trace.ids for trace in expected]


@pytest.mark.parametrize(
    "arguments",
    [
        {"offsets": 0},
        {"anchor_share": 0.0},
        {"rank": 0},
        {"owners": 0},
        {"transfer": 1.5},
        {"transfer": [0.5, 0.25, 0.5]},
        {"transfer": [0.5]},
        {"tree": "optimised_8"},
        {"rows": 4},
        {"accuracies": [[0.5]]},
        {"groups_per": "batch"},
        {"stage_epochs": 0},
    ],
)
def test_what_cannot_be_is_refused(arguments):
    with pytest.raises(ValueError, match=next(iter(arguments))):
        HiddenTransfer(tiny_target().shape, **arguments)


def test_a_given_tree_is_drafted_whole_by_default():
    target = tiny_target()
    drafter = drafter_for(target, tree=[[0], [1], [0, 0]], owners=2)
    assert drafter.default_budget == 3 + 2 * 3
    trace = SpeculativeDecoder(target, drafter, stop_ids=frozenset()).decode([TEXT], Sampling(), 9)
    assert set(trace[0].nodes) <= {0, 3} and isinstance(
        drafter.prepare(
            drafter.start(
                Context(target, torch.tensor([TEXT]), torch.tensor([6]), torch.tensor([20]))
            ),
            TokenTree.root(torch.tensor([20])),
        ).auxiliary,
        GuessRows,
    )
