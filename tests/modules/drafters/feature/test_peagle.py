"""What makes P-EAGLE: mask slots in one pass, drop-out of slots in training, no leak."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from checkpoints.pretrained import Provenance, save_pretrained, warm_start
from modules.contracts.batches import TextBatch
from modules.contracts.rows import causal_rows
from modules.drafters.feature.eagle3 import Eagle3
from modules.drafters.feature.peagle import PEagle
from modules.layers import document_attention
from modules.losses.chunked import training_rows
from modules.trees.reranked import RerankedTree
from tests.fakes import tiny_batch, tiny_target
from tests.modules.conformance import check_decoding
from tests.modules.families import Reader, documents, filled

TARGET = tiny_target(layers=4)


def peagle(block: int = 4, target=TARGET, shake: float = 0.2, **arguments: Any) -> PEagle:
    """In float64 and evaluation mode, its parameters shaken by Gaussian noise."""
    torch.manual_seed(3)
    drafter = PEagle(target.shape, block, **arguments).double()
    if drafter.vocabulary_D is not None:
        drafter.set_vocabulary(torch.randperm(target.shape.vocab_size)[: drafter.draft_size])
    drafter.initialise(target)
    with torch.no_grad():
        for parameter in drafter.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=shake)
    return drafter.eval()


def batch_of(drafter: PEagle, rows: int = 2) -> TextBatch:
    return filled(tiny_batch(TARGET, rows=rows, length=30), drafter, TARGET)


def slowly(drafter: PEagle, batch: TextBatch, flat: int) -> Tensor:
    """The LM head's inputs [K,H] behind one row: its document's rows written out, then the masks,
    one causal sequence."""
    b, t = divmod(flat, batch.input_ids.shape[1])
    first = t - int(batch.position_ids[b, t])
    following = [*batch.input_ids[b, first + 1 : t + 2], *[drafter.mask_token] * 3]
    vectors = drafter.vectors(torch.tensor(following), TARGET)
    states = [batch.states[k][b, first : t + 1] for k in drafter.fused_layers]
    joined = torch.cat([torch.cat(states, -1), drafter.mask_hidden[0].expand(3, -1)])
    inputs, hidden = (part[None] for part in drafter.fuse(vectors, drafter.fusion(joined)))
    rows = causal_rows(torch.zeros(1, dtype=torch.long), len(following))
    hidden = drafter.layer(inputs, rows, residual_BNH=hidden)
    for layer in drafter.layers:
        hidden = layer(hidden, rows)
    return drafter.norm(hidden)[0, -4:]


# -- one pass --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"layers": 1, "norm_before_residual": True},
        {"partitions": 3, "embeddings": "own", "norm_before_fc": True, "layers": 3},
    ],
    ids=str,
)
@torch.no_grad()
def test_every_slot_sees_the_text_up_to_its_row_and_the_slots_before_it(options) -> None:
    """In training, some slots of which are left out, as in decoding slot by slot."""
    drafter = peagle(**options).train()
    batch = batch_of(drafter)
    rows = training_rows(batch, 4)
    torch.manual_seed(0)
    chosen_MK = drafter.chosen(rows, batch)
    slots = drafter.slots(batch, TARGET, rows, chosen_MK)
    assert [len(each) for each in slots] == chosen_MK.sum(0).tolist()
    for m, flat in enumerate(rows.flat_MK1[:, 0].tolist()):
        expected = slowly(drafter, batch, flat)
        for d in chosen_MK[m].nonzero()[:, 0].tolist():
            fast = slots[d][int(chosen_MK[:m, d].sum())]
            torch.testing.assert_close(fast, expected[d], atol=1e-9, rtol=1e-9)


@torch.no_grad()
def test_slots_know_the_text_up_to_their_row_alone() -> None:
    """Later tokens, later states and other documents change nothing at all; its own do."""
    drafter = peagle()
    batch = batch_of(drafter)
    rows, every = training_rows(batch, 4), torch.arange(30).expand(2, -1)

    def outputs(ids: Tensor, noisy_BT: Tensor) -> Tensor:
        noise = {name: state + noisy_BT[..., None] for name, state in batch.states.items()}
        changed = replace(batch, input_ids=ids, states=noise)
        drawn = training_rows(changed, 4)
        return torch.stack([one for one, _ in drafter.unrolled(changed, TARGET, drawn)], 1)

    nowhere = torch.zeros_like(batch.loss_mask)
    before = outputs(batch.input_ids, nowhere)
    for m, flat in list(enumerate(rows.flat_MK1[:, 0].tolist()))[::4]:
        b, t = divmod(flat, 30)
        same = batch.document_ids == batch.document_ids[b, t]
        same[1 - b] = False
        ids = torch.where(same & (every <= t + 1), batch.input_ids, 4)
        assert torch.equal(outputs(ids, ~(same & (every <= t)))[m], before[m])
        for ids, noisy in (
            (torch.where(same & (every == t + 1), 4, batch.input_ids), nowhere),
            (batch.input_ids, same & (every == t)),
        ):
            changed = (outputs(ids, noisy)[m] - before[m]).abs().amax(-1)
            assert bool((changed > 1e-6).all())


@torch.no_grad()
def test_the_first_slot_of_one_layer_is_eagle_3() -> None:
    drafter = peagle(layers=1, draft_vocabulary=40, norm_before_fc=True)
    eagle = Eagle3(TARGET.shape, 40, norm_before_fc=True).double().eval()
    eagle.load_state_dict(drafter.state_dict(), strict=False)
    batch = batch_of(drafter)
    rows = training_rows(batch, 4)
    ours, theirs = (next(iter(one.unrolled(batch, TARGET, rows)))[0] for one in (drafter, eagle))
    torch.testing.assert_close(ours, theirs)


# -- what is trained -------------------------------------------------------------------------------


@pytest.mark.parametrize("training", [True, False])
def test_each_slot_is_trained_by_a_share_of_the_rows_of_the_slot_before(training: bool) -> None:
    drafter = peagle(ratio=0.7, least_ratio=0.3).train(training)
    batch = documents([list(range(5, 47)), list(range(60, 80))])
    rows = training_rows(batch, 4)
    count, drawn, packed_M = len(rows.valid_MK), set(), rows.flat_MK1[:, 0] // 42
    for _ in range(10):
        chosen_MK = drafter.chosen(rows, batch)
        # The share is of each packed row, whichever other rows are in the batch.
        for b, each in enumerate((40, 18)):
            assert chosen_MK[packed_M == b].sum(0).tolist() == [
                each,
                round(0.7 * each),
                round(0.49 * each),
                round(0.343 * each),
            ]
        assert bool((chosen_MK[:, 1:] <= (chosen_MK[:, :-1] & rows.valid_MK[:, 1:])).all())
        drawn.add(tuple(chosen_MK.flatten().tolist()))
    assert count == 58 and (len(drawn) > 5) == training
    least = peagle(ratio=0.1, least_ratio=0.5).chosen(rows, batch)
    # Of the last ones of a document some have no label further on.
    assert int(least[:, 1].sum()) == 29 and 29 - 4 <= int(least[:, 3].sum()) < 29
    # Without drop-out: all slots with labels.
    assert torch.equal(peagle(ratio=1.0).chosen(rows, batch), rows.valid_MK)
    # The cap is of each packed row, and the first slot has none.
    capped = peagle(ratio=1.0, anchors=5).train(training).chosen(rows, batch)
    assert int(capped[:, 0].sum()) == 58
    assert [int(capped[packed_M == b, 1].sum()) for b in (0, 1)] == pytest.approx([5, 5], abs=1)


def test_no_slot_reaches_over_the_end_of_its_document_or_a_text_without_labels() -> None:
    batch = tiny_batch(TARGET, rows=3)
    batch.loss_mask[:, 8] = False
    rows = training_rows(batch, 4)
    chosen_MK = peagle(ratio=1.0).train().chosen(rows, batch)
    flat_ids, mask = batch.document_ids.flatten(), batch.loss_mask.flatten()
    for m, flat in enumerate(rows.flat_MK1[:, 0].tolist()):
        assert flat >= 0
        for d in chosen_MK[m].nonzero()[:, 0].tolist():
            labels = slice(flat + 2, flat + 3 + d)
            assert bool(mask[labels].all()) and bool((flat_ids[labels] == flat_ids[flat]).all())


@pytest.mark.parametrize("divergence", ["cross_entropy", "expected_length"])
@torch.no_grad()
def test_the_loss_is_the_plain_mean_over_the_slots_that_are_left(divergence: str) -> None:
    drafter = peagle(divergence=divergence)
    batch = batch_of(drafter)
    rows = training_rows(batch, 4)
    chosen_MK, final = drafter.chosen(rows, batch), batch.states["final"].flatten(0, 1)
    assert 0 < int(chosen_MK[:, 3].sum()) < int(chosen_MK[:, 1].sum()) < len(chosen_MK)
    total, count = 0.0, 0
    for m, flat in enumerate(rows.flat_MK1[:, 0].tolist()):
        reached = 1.0
        for d in chosen_MK[m].nonzero()[:, 0].tolist():
            logits = drafter.head(d, TARGET)(slowly(drafter, batch, flat)[d])
            p, q = TARGET.logits(final[flat + 1 + d]).softmax(-1), logits.softmax(-1)
            reached *= float(torch.minimum(p, q).sum())
            crossed = -float((p * q.log()).sum())
            total += crossed if divergence == "cross_entropy" else 1 - reached
            count += 1
    assert drafter.loss(batch, TARGET, 0.0).total.item() == pytest.approx(total / count)


def test_partitions_change_neither_loss_nor_gradients() -> None:
    found = []
    for partitions in (1, 3):
        drafter = peagle(partitions=partitions)
        loss = drafter.loss(batch_of(drafter), TARGET, 0.0).total
        found.append([loss, *torch.autograd.grad(loss, list(drafter.parameters()))])
    torch.testing.assert_close(*found)


def test_rows_too_long_for_one_mask_give_the_same(monkeypatch) -> None:
    found = []
    for most in (99, 4):
        monkeypatch.setattr(document_attention, "WHOLE_ROWS", most)
        monkeypatch.setattr(document_attention, "PART_ROWS", 5)
        drafter = peagle()
        loss = drafter.loss(batch_of(drafter), TARGET, 0.0).total
        found.append([loss, *torch.autograd.grad(loss, list(drafter.parameters()))])
    torch.testing.assert_close(*found)


def test_all_slots_learn_a_cycle_whose_tokens_follow_from_the_newest_one() -> None:
    torch.manual_seed(0)
    target = tiny_target(layers=4, dtype=torch.float32)
    drafter = PEagle(target.shape, 4).train()
    drafter.initialise(target)
    batch = filled(documents([list(range(50, 57)) * 4]), drafter, target)
    sharp = torch.nn.functional.one_hot(batch.input_ids.roll(-1, 1).flatten(), 128).float()
    drafter.distributions = lambda *_: lambda flat_M: sharp[flat_M]
    optimizer = torch.optim.Adam(drafter.parameters(), 3e-3)
    for _ in range(60):
        optimizer.zero_grad()
        drafter.loss(batch, target, 0.0).total.backward()
        optimizer.step()
    drafter.eval()
    for prompt in (7, 10):
        tree = drafter.propose(Reader(drafter, target, batch, [prompt]).state, 4)
        assert tree.tokens_BN[0].tolist() == [50 + (prompt + i) % 7 for i in range(5)]


# -- decoding, trees, bad input --------------------------------------------------------------------


@pytest.mark.parametrize("embeddings", ["target", "own"])
def test_it_passes_what_conformance_checks(embeddings) -> None:
    check_decoding(
        lambda target: peagle(3, target, 0.05, embeddings=embeddings, fused_layers=[0, 1])
    )


@torch.no_grad()
def test_one_pass_of_all_layers_drafts_all_tokens_of_any_tree() -> None:
    drafter, calls = peagle(), []
    batch = filled(documents([list(range(30, 50)), list(range(60, 75))]), drafter, TARGET)
    reader = Reader(drafter, TARGET, batch, [8, 5])
    for layer in drafter.stack:
        layer.register_forward_hook(lambda *_: calls.append(1))
    reader.accept([3, 1])
    logs_KV = drafter.head(0, TARGET)(reader.state.outputs_BKH)[0].log_softmax(-1)
    tree = RerankedTree(3, 128).build(drafter, reader.state, 6)
    assert len(calls) == 2
    # The most probable paths under independent slots.
    paths = (logs_KV[0][:, None] + logs_KV[1]).flatten()
    three = (paths[:, None] + logs_KV[2]).flatten()
    nodes, logs = tree.tokens_BN[0], torch.zeros(7, dtype=torch.float64)
    for i in range(1, 7):
        depth = int(tree.topology.depth[0, i])
        logs[i] = logs[int(tree.parents_BN[0, i])] + logs_KV[depth - 1, nodes[i]]
    best = torch.cat([logs_KV[0], paths, three]).topk(6).values
    torch.testing.assert_close(logs[1:].sort(descending=True).values, best)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"block": 1}, r"block must be at least 2 tokens \(1 is EAGLE-3\), got 1"),
        ({"layers": 0}, "layers must be at least 1, got 0"),
        ({"anchors": 0}, "anchors must be at least 1, got 0"),
        ({"partitions": 0}, "partitions must be at least 1, got 0"),
        ({"mask_token": 128}, "mask_token must be an id below 128"),
        ({"ratio": 1.5}, r"ratio must lie in \[0, 1\], got 1.5"),
        ({"embeddings": "none"}, "embeddings must be one of target, own, got 'none'"),
        ({"fused_layers": [4]}, "fused_layers must be layers of the target, 0 to 3"),
        ({"tree": [[0], [0, 0], [0, 0, 0]], "block": 2}, "deeper than the drafter's 2 tokens in"),
    ],
)
def test_bad_settings_are_refused(arguments: dict, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        PEagle(TARGET.shape, **arguments)


def test_masks_do_not_mix_on_a_warm_start(tmp_path) -> None:
    save_pretrained(peagle(), tmp_path / "run", Provenance.of(TARGET))
    with pytest.raises(ValueError, match=r"mask_token 3 there and 9 here: set mask_token to 3"):
        warm_start(peagle(mask_token=9), tmp_path / "run")
