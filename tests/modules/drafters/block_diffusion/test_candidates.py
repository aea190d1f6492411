"""What makes LiLiCorr and DFlash2: candidates, scores of pairs, convolutions inside of a block; and
Domino's schedule.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from modules.drafters.block_diffusion.candidates import injected
from modules.drafters.block_diffusion.dflash2 import BlockConvolution, DFlash2
from modules.drafters.block_diffusion.domino import Domino
from modules.drafters.block_diffusion.lilicorr import LiLiCorr
from modules.losses.chunked import IGNORED, training_rows
from modules.trees.static import StaticTree
from tests.fakes import tiny_target
from tests.modules.drafters.block_diffusion.heads import made
from tests.modules.families import Reader, documents, filled

TARGET = tiny_target(layers=4)
NAMES = ("lilicorr", "dflash2")


def text(*lengths: int, seed: int = 0):
    generator = torch.Generator().manual_seed(seed)
    return documents([torch.randint(5, 128, (n,), generator=generator).tolist() for n in lengths])


def score(drafter, lattice, slot: int, block: int, token: int) -> torch.Tensor:
    """Scores [C] of a slot's candidates after a token that is one itself, by the definition."""
    if drafter.__class__ is LiLiCorr:
        before = lattice.tokens_MKC[block, slot - 1].tolist().index(token) if slot else 0
        return lattice.pairs_MKPC[block, slot, before]
    selector, ids_C = drafter.candidate_selector, lattice.ids_MKC[block, slot]
    hidden = selector.hidden_projection.weight @ lattice.outputs_MKH[block, slot]
    return selector.successor_codebook.weight[ids_C] @ (
        selector.predecessor_codebook.weight[token] * hidden
    )


@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_a_walk_over_the_whole_vocabulary_is_the_greedy_chain(name: str) -> None:
    """By the definition: argmax over b of U_d(b) + score(a, b), token by token."""
    drafter, batch = made(name, TARGET, candidates=128), text(12, 9)
    state = Reader(drafter, TARGET, filled(batch, drafter, TARGET), [7, 4]).state
    tree = StaticTree.chain(3).build(drafter, state, 3)
    lattice = state.lattice
    base_BKV = drafter.base_head(TARGET)(lattice.outputs_MKH)
    token_B = state.newest_B
    for slot in range(3):
        scores_BC = torch.stack([score(drafter, lattice, slot, b, int(token_B[b])) for b in (0, 1)])
        by_id_BV = torch.zeros(2, 128, dtype=scores_BC.dtype)
        by_id_BV = by_id_BV.scatter(1, lattice.ids_MKC[:, slot], scores_BC)
        token_B = (base_BKV[:, slot] + by_id_BV).argmax(-1)
        assert tree.tokens_BN[:, slot + 1].tolist() == token_B.tolist()
        assert by_id_BV.any()


@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_only_the_likeliest_tokens_are_drafted(name: str) -> None:
    drafter, batch = made(name, TARGET, candidates=4, draft_vocabulary=50), text(12)
    reader = Reader(drafter, TARGET, filled(batch, drafter, TARGET), [7])
    logits_KD = reader.logits()[0]
    base_KD = drafter.base_head(TARGET)(reader.state.outputs_BKH[0])
    for slot in range(3):
        inside = logits_KD[slot].isfinite().nonzero()[:, 0].tolist()
        assert sorted(inside) == sorted(base_KD[slot].topk(4).indices.tolist())


def test_labels_are_injected_only_where_they_are_absent() -> None:
    ids = torch.tensor([[[4, 7, 9], [1, 2, 3]], [[5, 6, 8], [3, 2, 1]]])
    labels = torch.tensor([[9, 8], [IGNORED, 3]])
    assert injected(ids, labels).tolist() == [[[4, 7, 9], [1, 2, 8]], [[5, 6, 8], [3, 2, 1]]]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("training", [True, False])
def test_the_pairs_loss_by_hand(name: str, training: bool) -> None:
    """Softmax over the candidates, of the slots that count."""
    drafter = made(name, TARGET, candidates=40, draft_vocabulary=90, gamma=2.0, pair_weight=0.5)
    batch = filled(text(14, 9), drafter, TARGET)
    drafter.anchors = 100
    drafter.train(training)
    rows = drafter.blocks(batch, TARGET)
    with torch.no_grad():
        outputs_MKH = drafter.block_outputs(batch, TARGET, rows)
        best = drafter.likeliest(outputs_MKH, TARGET)
        lattice = drafter.lattice(outputs_MKH, rows.tokens_MK1[:, 0], best, TARGET)
        base_MKD = drafter.base_head(TARGET)(outputs_MKH)
        index = drafter.vocabulary_D.tolist()
        sums = {"base": [0.0, 0.0], "pair": [0.0, 0.0]}
        injected_slots = 0
        for m, start in enumerate(rows.flat_MK1[:, 0].tolist()):
            b, t = divmod(start, 14)
            for d in range(min(3, (14, 9)[b] - t - 2)):
                label, before = (int(batch.input_ids[b, t + ahead + d]) for ahead in (2, 1))
                if label not in index:
                    continue
                weight = float(torch.tensor(-d / 2.0).exp())
                loss = -base_MKD[m, d].log_softmax(-1)[index.index(label)]
                sums["base"][0] += weight * float(loss)
                sums["base"][1] += weight
                ids = lattice.ids_MKC[m, d].tolist()
                scores = drafter.pair_scores(
                    lattice, d, torch.tensor([[before]]).expand(len(rows.flat_MK1), 1)
                )
                scores = scores[m, 0]
                here = index.index(label) in ids
                previous = d == 0 or before in lattice.tokens_MKC[m, d - 1].tolist()
                if name == "dflash2" and training and not here:
                    injected_slots += 1
                    ids[-1] = index.index(label)
                    vector = drafter.candidate_selector.predecessor_codebook.weight[before]
                    hidden = drafter.candidate_selector.hidden_projection(outputs_MKH[m, d])
                    after = drafter.candidate_selector.successor_codebook.weight[ids[-1]]
                    scores = torch.cat([scores[:-1], (vector * hidden * after).sum()[None]])
                elif not here or (name == "lilicorr" and not previous):
                    continue
                logits = base_MKD[m, d, ids] + scores
                sums["pair"][0] -= weight * float(
                    logits.log_softmax(-1)[ids.index(index.index(label))]
                )
                sums["pair"][1] += weight
        assert (injected_slots > 0) == (name == "dflash2" and training)
        expected = sum(
            share * total / weight
            for share, (total, weight) in zip((1, 0.5), sums.values(), strict=True)
        )
        assert drafter.loss(batch, TARGET, 0.0).total.item() == pytest.approx(expected)


@pytest.mark.parametrize("name", NAMES)
def test_soft_labels_are_of_the_candidates_and_variation_of_all(name: str) -> None:
    drafter = made(name, TARGET, labels="soft", variation_weight=2.0)
    logits = torch.tensor([[1.0, 2.0, -torch.inf, 0.5]], dtype=torch.float64, requires_grad=True)
    probs = torch.tensor([[0.1, 0.3, 0.4, 0.2]], dtype=torch.float64)
    found = drafter.divergence(logits, probs)
    q = torch.tensor([1.0, 2.0, 0.5], dtype=torch.float64).softmax(0)
    p = torch.tensor([0.1, 0.3, 0.2], dtype=torch.float64)
    expected = -(p / 0.6 * q.log()).sum() + 2 * 0.5 * ((p - q).abs().sum() + 0.4)
    torch.testing.assert_close(found[0], expected)
    found.sum().backward()
    assert logits.grad.isfinite().all() and logits.grad[0, 2] == 0
    with pytest.raises(
        ValueError, match="variation_weight is 2.0, which needs .* labels to 'soft'"
    ):
        made(name, TARGET, variation_weight=2.0)


@pytest.mark.parametrize("name", NAMES)
def test_soft_labels_count_where_the_text_is_no_candidate(name: str) -> None:
    """LiLiCorr after a candidate or the anchor, DFlash2 everywhere; nothing is injected."""
    drafter = made(name, TARGET, labels="soft", candidates=8, draft_vocabulary=90).train()
    batch = filled(text(14, 9), drafter, TARGET)
    rows = drafter.blocks(batch, TARGET)
    outputs_MKH, labels_MK = (
        drafter.block_outputs(batch, TARGET, rows),
        drafter.labels(batch, TARGET, rows),
    )
    best = drafter.likeliest(outputs_MKH, TARGET)
    lattice = drafter.lattice(outputs_MKH, rows.tokens_MK1[:, 0], best, TARGET)
    learnt_MK = drafter.learnt(lattice, labels_MK, rows)
    for m, d in (labels_MK != IGNORED).nonzero().tolist():
        token = int(rows.tokens_MK1[m, d])
        after = d == 0 or token in lattice.tokens_MKC[m, d - 1].tolist()
        assert bool(learnt_MK[m, d]) == (after or name == "dflash2")
    assert not learnt_MK[labels_MK == IGNORED].any() and learnt_MK[:, 0].any()
    drafter.injects = False
    first = drafter.loss(batch, TARGET, 0.0).total.item()
    drafter.injects = True
    assert drafter.loss(batch, TARGET, 0.0).total.item() == pytest.approx(first)


@torch.no_grad()
def test_a_score_reads_all_candidates_of_the_block() -> None:
    """LiLiCorr: another anchor, or another candidate anywhere, changes it."""
    drafter, batch = made("lilicorr", TARGET, candidates=5), text(12)
    state = Reader(drafter, TARGET, filled(batch, drafter, TARGET), [7]).state
    StaticTree.chain(3).build(drafter, state, 3)
    lattice = state.lattice
    best = (lattice.ids_MKC, lattice.logs_MKC)

    def scores(anchor, best, outputs):
        return drafter.lattice(outputs, anchor, best, TARGET).pairs_MKPC

    before = scores(state.newest_B, best, lattice.outputs_MKH)
    assert not torch.allclose(scores(state.newest_B + 1, best, lattice.outputs_MKH), before)
    for slot in range(3):
        ids = best[0].clone()
        ids[:, slot, 4] = (ids[:, slot, 4] + 1) % 128
        changed = scores(state.newest_B, (ids, best[1]), lattice.outputs_MKH) - before
        assert bool((changed.abs().amax((0, 2, 3)) > 0).all())


@torch.no_grad()
def test_a_pairs_score_is_of_its_own_two_candidates() -> None:
    """LiLiCorr without mixing layers: another candidate changes its row and its column alone."""
    drafter, batch = made("lilicorr", TARGET, candidates=4), text(12)
    for layer in drafter.transformer.layers:
        layer.self_attn.o_proj.weight.zero_()
        layer.mlp.down_proj.weight.zero_()
    state = Reader(drafter, TARGET, filled(batch, drafter, TARGET), [7]).state
    StaticTree.chain(3).build(drafter, state, 3)
    lattice, anchor = state.lattice, state.newest_B
    before = lattice.pairs_MKPC[0]
    for slot in range(3):
        tokens = lattice.tokens_MKC.clone()
        tokens[:, slot, 2] += 1
        changed = replace(lattice, tokens_MKC=tokens)
        moved = drafter.scored_lattice(changed, anchor, TARGET).pairs_MKPC[0] != before
        expected = torch.zeros_like(moved)
        expected[slot, :, 2] = True
        if slot < 2:
            expected[slot + 1, 2] = True
        assert torch.equal(moved, expected)
    moved = drafter.scored_lattice(lattice, anchor + 1, TARGET).pairs_MKPC[0] != before
    assert moved[0].all() and not moved[1:].any()


@torch.no_grad()
def test_convolutions_by_hand() -> None:
    """Two taps, per channel and per group of channels, none across the beginning of a block."""
    torch.manual_seed(0)
    conv = BlockConvolution(8, 4).double()
    rows, inputs = torch.randn(2, 2, 3, 8, dtype=torch.float64)
    assert torch.equal(conv(rows, conv.kernels(inputs), 0), rows)
    for parameter in conv.parameters():
        parameter.normal_()
    delta = inputs @ conv.kernel_projection.weight.T
    for side in (0, 1):
        found = conv(rows, conv.kernels(inputs), side)
        for m in range(2):
            for k in range(3):
                for c in range(8):
                    total = 0.0
                    for j in (0, 1):
                        at = (side * 2 + j) * 2 + c // 4
                        kernel = conv.base_kernel[side, j, c] + delta[m, k, at]
                        total += kernel * (rows[m, k - j, c] if k >= j else 0.0)
                    torch.testing.assert_close(found[m, k, c], total)


def test_dominos_first_slot_is_pure_and_its_loss_moves_to_the_final_logits() -> None:
    drafter, batch = made("domino", TARGET), text(14, 9)
    filled(batch, drafter, TARGET)
    rows = training_rows(batch, 3)
    features = list(drafter.teacher_forced(batch, TARGET, rows))
    bias = [
        drafter.head(d, TARGET)(one) - drafter.base_head(TARGET)(one[:, :32])
        for d, one in enumerate(features)
    ]
    assert [bool(one.any()) for one in bias] == [False, True, True]
    start, half, end = (drafter.loss(batch, TARGET, p).total for p in (0.0, 0.25, 0.5))
    torch.testing.assert_close(half, (start + end) / 2)
    torch.testing.assert_close(end, drafter.loss(batch, TARGET, 1.0).total)
    drafter.requires_grad_(False)
    drafter.embed_proj[2].weight.zero_()
    torch.testing.assert_close(drafter.loss(batch, TARGET, 1.0).total, start.detach())


@torch.no_grad()
def test_dominos_bias_reads_all_tokens_from_the_anchor_on() -> None:
    """W_b SiLU(W_a [h ; s]), s the GRU's state over the embeddings of the whole path."""
    drafter, batch = made("domino", TARGET), text(12)
    reader = Reader(drafter, TARGET, filled(batch, drafter, TARGET), [6])
    logits_KV = reader.logits()[0]
    outputs_KH = reader.state.outputs_BKH[0]
    states, _ = drafter.prefix_gru(TARGET.embed(batch.input_ids[:, 6:9]))
    for slot in (1, 2):
        both = torch.cat([outputs_KH[slot], states[0, slot]])
        memory = torch.nn.functional.silu(drafter.embed_proj[0].weight @ both)
        expected = drafter.base_head(TARGET)(outputs_KH[slot]) + (
            drafter.embed_proj[2].weight @ memory
        )
        torch.testing.assert_close(logits_KV[slot], expected)


@pytest.mark.parametrize(
    ("kind", "arguments", "words"),
    [
        (LiLiCorr, {"candidates": 0}, "candidates must be at least 1"),
        (LiLiCorr, {"lattice_size": 30}, "lattice_size must be an even multiple of lattice_heads"),
        (DFlash2, {"group": 5}, "group must divide the hidden size of the target, 32, got 5"),
        (Domino, {"pure_slots": 8}, r"pure_slots must be below block \(8\), got 8"),
        (Domino, {"base_share": 0.0}, r"base_share must lie in \(0, 1\]"),
        (Domino, {"hidden": 0}, "hidden must be at least 1"),
    ],
)
def test_bad_settings_are_refused(kind: type, arguments: dict, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        kind(TARGET.shape, **arguments)
