"""What makes DFlash: blocks that see their context and themselves, layouts, weights of slots."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from checkpoints.pretrained import Provenance, save_pretrained, warm_start
from modules.contracts.batches import TextBatch
from modules.drafters.block_diffusion import context_attention
from modules.drafters.block_diffusion.dflash import DFlash, fused_states, unused_token
from modules.losses.averages import shared_counts
from modules.losses.block_weights import expected_length_weights
from modules.losses.chunked import training_rows
from modules.trees.reranked import RerankedTree
from modules.trees.static import StaticTree
from tests.fakes import tiny_batch, tiny_target
from tests.modules.conformance import (
    check_decoding,
    check_gradients,
    check_loss,
    check_no_labels,
    check_target_unchanged,
)
from tests.modules.families import Reader, documents, filled

TARGET = tiny_target(layers=4)
LAYOUTS = ("fill_in", "shift")


def dflash(layout="fill_in", block: int = 3, target=TARGET, **arguments) -> DFlash:
    """In float64 and evaluation mode, its parameters shaken by Gaussian noise."""
    torch.manual_seed(3)
    drafter = DFlash(target.shape, block, layout=layout, **arguments).double()
    if drafter.vocabulary_D is not None:
        drafter.set_vocabulary(torch.randperm(target.shape.vocab_size)[: drafter.draft_size])
    drafter.initialise(target)
    with torch.no_grad():
        for parameter in drafter.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.2)
    return drafter.eval()


def text(*lengths: int, seed: int = 0):
    generator = torch.Generator().manual_seed(seed)
    return documents([torch.randint(5, 128, (n,), generator=generator).tolist() for n in lengths])


# -- one pass --------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", LAYOUTS)
@torch.no_grad()
def test_decoding_computes_what_training_does(layout: str) -> None:
    """At every anchor, in ragged batches, behind calls that accept several tokens or one."""
    drafter, batch = dflash(layout), text(20, 16)
    filled(batch, drafter, TARGET)
    rows = training_rows(batch, 3)
    logits_MKD = drafter.head(0, TARGET)(drafter.block_outputs(batch, TARGET, rows))
    reader = Reader(drafter, TARGET, batch, [5, 3])
    for accepted in ([0, 0], [2, 4], [1, 1], [4, 3]):
        reader.accept(accepted) if accepted[0] else None
        starts = [int(reader.read[b]) - 1 + 20 * b for b in (0, 1)]
        index = [rows.flat_MK1[:, 0].tolist().index(start) for start in starts]
        torch.testing.assert_close(reader.logits(), logits_MKD[index], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("layout", LAYOUTS)
@torch.no_grad()
def test_a_block_knows_its_anchor_and_the_states_before_it_alone(layout: str) -> None:
    drafter, batch = dflash(layout), tiny_batch(TARGET)
    filled(batch, drafter, TARGET)
    rows = training_rows(batch, 3)

    def outputs(ids, states):
        changed = replace(batch, input_ids=ids, states=states)
        drawn = training_rows(changed, 3)
        return drafter.block_outputs(changed, TARGET, drawn)

    def states_with(noisy_BT):
        noise = {name: torch.randn_like(state) for name, state in batch.states.items()}
        return {n: s + noise[n] * noisy_BT[..., None] for n, s in batch.states.items()}

    before = outputs(batch.input_ids, batch.states)
    position = torch.arange(24).expand(2, -1)
    for index, start in enumerate(rows.flat_MK1[:, 0].tolist()):
        b, t = divmod(start, 24)
        same = batch.document_ids == batch.document_ids[b, t]
        same[1 - b] = False
        # Later tokens, states from the anchor on, and everything of other documents.
        ids = torch.where(same & (position <= t + 1), batch.input_ids, 100)
        states = states_with(~(same & (position <= t)))
        assert torch.equal(outputs(ids, states)[index], before[index])
        # The state before the anchor, and the anchor.
        last = same & (position == t)
        assert not torch.equal(outputs(batch.input_ids, states_with(last))[index], before[index])
        ids = torch.where(same & (position == t + 1), 100, batch.input_ids)
        assert not torch.equal(outputs(ids, batch.states)[index], before[index])


@torch.no_grad()
def test_rows_of_a_block_see_later_ones() -> None:
    """Another last row changes the first slot."""
    drafter, batch = dflash(), text(9)
    filled(batch, drafter, TARGET)
    rows = training_rows(batch, 3)
    inputs = drafter.pass_inputs
    before = drafter.block_outputs(batch, TARGET, rows)
    drafter.pass_inputs = lambda *given: torch.cat(
        [inputs(*given)[:, :-1], inputs(*given)[:, :1]], 1
    )
    assert not torch.equal(drafter.block_outputs(batch, TARGET, rows)[:, 0], before[:, 0])


@torch.no_grad()
def test_contexts_in_parts_are_the_same(monkeypatch) -> None:
    drafter, batch = dflash(), text(20, 16)
    filled(batch, drafter, TARGET)
    rows = training_rows(batch, 3)
    before = drafter.block_outputs(batch, TARGET, rows)
    monkeypatch.setattr(context_attention, "MAX_GATHERED", 4 * 20 * 16)
    torch.testing.assert_close(drafter.block_outputs(batch, TARGET, rows), before)


# -- what is trained -------------------------------------------------------------------------------


@pytest.mark.parametrize("training", [True, False])
def test_anchors_are_of_every_document_and_labels_themselves(training: bool) -> None:
    drafter, batch = dflash(anchors=4).train(training), tiny_batch(TARGET, rows=3)
    batch.loss_mask[:, 6] = False
    starts = [drafter.blocks(batch, TARGET).flat_MK1[:, 0] for _ in range(20)]
    assert training != all(torch.equal(starts[0], other) for other in starts)
    for start_M in starts:
        assert batch.loss_mask.flatten()[start_M + 1].all()
        assert batch.loss_mask.flatten()[start_M + 2].all()
        documents_M = batch.document_ids.flatten()[start_M] + 2 * (start_M // 24)
        assert (
            documents_M == batch.document_ids.flatten()[start_M + 2] + 2 * (start_M // 24)
        ).all()
        assert documents_M.bincount().tolist() == [4] * 6
    # Every anchor that may be drawn is.
    if training:
        mask = batch.loss_mask[0, :12]
        eligible = (mask[1:-1] & mask[2:]).nonzero()[:, 0].tolist()
        assert set(torch.cat(starts)[torch.cat(starts) < 12].tolist()) == set(eligible)


def test_d_pace_weighs_what_is_reached() -> None:
    probs = torch.tensor([[1.0, 0.5, 0.5]])
    every = torch.ones(1, 3, dtype=torch.bool)
    assert expected_length_weights(probs, every, 0.0).tolist() == [[1.75, 0.75, 0.25]]
    assert expected_length_weights(probs, every, 1.0).tolist() == [[3.0, 2.0, 1.0]]
    torch.manual_seed(0)
    probs, valid = torch.rand(20, 6), torch.arange(6).expand(20, -1) < 4
    weights = expected_length_weights(probs, valid, 0.5)
    assert bool((weights.diff(dim=1) <= 0).all()) and not weights[:, 4:].any()
    torch.testing.assert_close(
        weights[:, :4], expected_length_weights(probs[:, :4], valid[:, :4], 0.5)
    )


@pytest.mark.parametrize("weights", ["decay", "expected_length"])
def test_the_loss_is_a_weighted_mean_over_all_slots(weights: str) -> None:
    """By hand; labels outside of the draft vocabulary are certain misses without a loss."""
    drafter = dflash(weights=weights, draft_vocabulary=90, gamma=2.0)
    batch = filled(text(12, 9), drafter, TARGET)
    outputs = drafter.block_outputs(batch, TARGET, rows := drafter.blocks(batch, TARGET))
    logs_MKD = TARGET.logits(outputs, drafter.vocabulary_D).log_softmax(-1).detach()
    total, weight, index = 0.0, 0.0, drafter.vocabulary_D.tolist()
    for m, start in enumerate(rows.flat_MK1[:, 0].tolist()):
        b, t = divmod(start, 12)
        length, probs = (12, 9)[b], []
        labels = [int(batch.input_ids[b, t + 2 + d]) for d in range(3) if t + 2 + d < length]
        logs = [
            float(logs_MKD[m, d, index.index(label)]) if label in index else None
            for d, label in enumerate(labels)
        ]
        probs = [
            0.5 * (0.0 if log is None else float(torch.tensor(log).exp())) + 0.5 for log in logs
        ]
        reached = torch.tensor(probs).cumprod(0)
        for d, log in enumerate(logs):
            w = float(torch.tensor(-d / 2.0).exp())
            w = float(reached[d:].sum()) if weights == "expected_length" else w
            total, weight = (total, weight) if log is None else (total - w * log, weight + w)
    assert drafter.loss(batch, TARGET, 0.0).total.item() == pytest.approx(total / weight)


@pytest.mark.parametrize("weights", ["decay", "expected_length"])
def test_two_processes_learn_what_one_does(weights: str) -> None:
    """Gradients of two batches, averaged, are those of both as one."""
    drafter, whole = dflash(weights=weights, anchors=64), text(14, 6)
    names = ("input_ids", "loss_mask", "position_ids", "document_ids")
    parts = [TextBatch(*(getattr(whole, name)[b : b + 1] for name in names)) for b in (0, 1)]
    one = drafter.loss(filled(whole, drafter, TARGET), TARGET, 0.0).total
    losses, counts = [], []
    for part in parts:
        with shared_counts(lambda count: counts.append(count) or count):
            drafter.loss(filled(part, drafter, TARGET), TARGET, 0.0)
    mean = sum(counts) / 2
    for part in parts:
        with shared_counts(lambda count: mean):
            losses.append(drafter.loss(part, TARGET, 0.0).total)
    torch.testing.assert_close(sum(losses) / 2, one)
    gradients = [
        torch.autograd.grad(total, list(drafter.parameters())) for total in (sum(losses) / 2, one)
    ]
    torch.testing.assert_close(*gradients)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_block_learns_a_cycle_and_drafts_all_of_it_from_its_first_slot_on(layout: str) -> None:
    target = tiny_target(layers=4, dtype=torch.float32)
    torch.manual_seed(0)
    drafter = DFlash(target.shape, 3, layout=layout, anchors=64, gamma=8.0).train()
    drafter.initialise(target)
    batch = filled(documents([list(range(50, 57)) * 3]), drafter, target)
    optimizer = torch.optim.Adam(drafter.parameters(), 3e-3)
    for _ in range(60):
        optimizer.zero_grad()
        drafter.loss(batch, target, 0.0).total.backward()
        optimizer.step()
    drafter.eval()
    for prompt in (7, 10):
        reader = Reader(drafter, target, batch, [prompt])
        tree = drafter.propose(reader.state, 3)
        assert tree.tokens_BN[0].tolist() == [50 + (prompt + i) % 7 for i in range(4)]


# -- conformance, trees, bad input -----------------------------------------------------------------


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("labels", ["hard", "soft"])
def test_it_passes_what_conformance_checks(layout: str, labels: str) -> None:
    if labels == "hard":
        check_decoding(lambda target: dflash(layout, target=target))
    for check in (check_loss, check_gradients, check_no_labels, check_target_unchanged):
        target = tiny_target()
        check(dflash(layout, target=target, labels=labels), target)


@torch.no_grad()
def test_trees_hold_the_likeliest_tokens_of_every_slot() -> None:
    drafter, batch = dflash(), text(12)
    filled(batch, drafter, TARGET)
    reader = Reader(drafter, TARGET, batch, [6])
    logs_KV = reader.logits()[0].log_softmax(-1)
    best_KR = logs_KV.argsort(descending=True)
    tree = StaticTree([(0,), (1,), (0, 0), (0, 1), (1, 0)]).build(drafter, reader.state, 5)
    ranks = [best_KR[0, 0], best_KR[0, 1], best_KR[1, 0], best_KR[1, 1], best_KR[1, 0]]
    assert tree.tokens_BN[0, 1:].tolist() == [int(token) for token in ranks]
    # The most probable paths under independent slots.
    tree = RerankedTree(3, 128).build(drafter, reader.state, 6)
    nodes, logs = tree.tokens_BN[0], torch.zeros(7, dtype=torch.float64)
    for i in range(1, 7):
        parent, depth = int(tree.parents_BN[0, i]), int(tree.topology.depth[0, i])
        logs[i] = logs[parent] + logs_KV[depth - 1, nodes[i]]
    paths = (logs_KV[0][:, None] + logs_KV[1]).flatten()
    three = (paths[:, None] + logs_KV[2]).flatten()
    best = torch.cat([logs_KV[0], paths, three]).topk(6).values
    torch.testing.assert_close(logs[1:].sort(descending=True).values, best)


def test_default_states_and_mask_are_the_published_ones() -> None:
    assert fused_states(36, None, 5) == [2, 10, 18, 26, 34]
    assert fused_states(30, None, 2) == [2, 15, 28]
    assert fused_states(2, None, 2) == [0, 1] and fused_states(4, None, 1) == [2]
    assert dflash(fused_layers=[1, 3]).decoding_states == (1, 3)
    assert unused_token(TARGET) == dflash().arguments["mask_token"] == 3
    larger = tiny_target(vocab=140)
    larger.tokenizer = TARGET.tokenizer
    assert unused_token(larger) == 128


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"layers": 0}, "layers must be at least 1, got 0"),
        ({"anchors": 0}, "anchors must be at least 1, got 0"),
        ({"mask_token": 128}, "mask_token must be an id below 128"),
        ({"gamma": 0.0}, "gamma must be above 0"),
        ({"smoothing": 1.5}, "smoothing must lie in"),
        ({"layout": "both"}, "layout must be one of fill_in, shift, got 'both'"),
        ({"fused_layers": [4]}, "fused_layers must be layers of the target, 0 to 3"),
        ({"labels": "soft", "weights": "expected_length"}, "set labels to 'hard', or weights"),
    ],
)
def test_bad_settings_are_refused(arguments: dict, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        DFlash(TARGET.shape, **arguments)


def test_layouts_and_masks_do_not_mix_on_a_warm_start(tmp_path) -> None:
    save_pretrained(dflash("shift"), tmp_path / "run", Provenance.of(TARGET))
    warm_start(dflash("shift"), tmp_path / "run")
    with pytest.raises(ValueError, match=r"layout 'shift' there and 'fill_in' here: set layout"):
        warm_start(dflash("fill_in"), tmp_path / "run")
    with pytest.raises(ValueError, match=r"mask_token 3 there and 9 here: set mask_token to 3"):
        warm_start(dflash("shift", mask_token=9), tmp_path / "run")
