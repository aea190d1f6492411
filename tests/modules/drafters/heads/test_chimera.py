"""Chimera: what its rows may see, how its heads start, and that decoding computes what training
does."""

from __future__ import annotations

from copy import deepcopy

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from modules.contracts.batches import TextBatch
from modules.contracts.drafter import Frontier
from modules.contracts.rows import Rows
from modules.contracts.sampling import Sampling
from modules.decoding.decoder import SpeculativeDecoder
from modules.drafters.heads.chimera import Chimera, ChimeraState
from modules.drafters.heads.trigrams import TrigramMemo, document_trigrams, trigram_encoder
from modules.layers.token_scale import token_scale
from modules.losses.chunked import training_rows
from modules.trees.sampled.branching import DrawnTree
from tests.fakes import tiny_batch, tiny_target
from tests.modules.families import Reader, documents, filled
from tests.modules.sampling import goodness, small_target

TARGET = tiny_target()
TEXT = [[9, 20, 31, 42, 53, 64, 75, 86, 97, 18, 29]]


def chimera(target=TARGET, shake: float = 0.1, **arguments) -> Chimera:
    torch.manual_seed(2)
    drafter = Chimera(target.shape, 3, **arguments).double()
    drafter.initialise(target)
    with torch.no_grad():
        for parameter in drafter.parameters():
            parameter += shake * torch.randn_like(parameter)
    return drafter.eval()


def heads(drafter: Chimera, batch: TextBatch) -> tuple[Tensor, Tensor]:
    """Logits [M,K,D] and draft states [M,K,H] of all training rows."""
    rows = training_rows(batch, drafter.heads)
    steps = list(drafter.unrolled(batch, TARGET, rows))
    logits = [drafter.head(d, TARGET)(feature) for d, (feature, _) in enumerate(steps)]
    return torch.stack(logits, 1), torch.stack([drafted for _, drafted in steps], 1)


def spoilt(batch: TextBatch, position: int) -> TextBatch:
    """The batch with another state f at one position."""
    final = batch.states["final"].clone()
    final[:, position] += 3.0
    return TextBatch(
        batch.input_ids, batch.loss_mask, batch.position_ids, batch.document_ids, {"final": final}
    )


@torch.no_grad()
def test_a_row_does_not_see_the_state_that_it_estimates() -> None:
    drafter = chimera()
    batch = filled(documents(TEXT), drafter, TARGET)
    before, drafted = heads(drafter, batch)
    for i in range(2, 6):
        after, drafted_after = heads(drafter, spoilt(batch, i + 1))
        assert torch.equal(after[: i + 1], before[: i + 1])
        assert torch.equal(drafted_after[: i + 1], drafted[: i + 1])
        assert bool(((after - before)[i + 1 :].abs().amax(-1) > 1e-9).all())


@torch.no_grad()
def test_a_trigram_depends_on_its_three_tokens_alone() -> None:
    drafter, batch = chimera(), documents(TEXT)
    before, j = drafter.encode(document_trigrams(batch), TARGET)[0], 5
    for other in range(len(TEXT[0])):
        batch = documents(TEXT)
        batch.input_ids[0, other] = 99
        after = drafter.encode(document_trigrams(batch), TARGET)[0]
        assert torch.equal(after[j], before[j]) == (other not in (j - 2, j - 1, j))


def test_a_document_begins_with_its_first_token_repeated() -> None:
    batch = tiny_batch(TARGET)
    found, ids = document_trigrams(batch)[0].tolist(), batch.input_ids[0].tolist()
    for start in (0, len(ids) // 2):
        assert found[start] == [ids[start]] * 3
        assert found[start + 1] == [ids[start], ids[start], ids[start + 1]]
        assert found[start + 2] == ids[start : start + 3]


@torch.no_grad()
@pytest.mark.parametrize("lm_head", ["own", "tied", "shared"])
def test_heads_start_as_the_targets_own_twice(lm_head) -> None:
    """Without z, head 0 repeats the target's law of the token before; of the true next state alone
    it would be right."""
    drafter = chimera(shake=0.0, lm_head=lm_head, feature_weight=0.0)
    batch = filled(documents(TEXT, labels_from=2), drafter, TARGET)
    final_TH = batch.states["final"][0]
    nothing = torch.zeros_like(final_TH)
    head = drafter.head(0, TARGET)
    torch.testing.assert_close(head(drafter.feature(0, final_TH, nothing)), TARGET.logits(final_TH))
    torch.testing.assert_close(head(drafter.feature(0, nothing, final_TH)), TARGET.logits(final_TH))
    # The loss of the first head at the start, with z = 0.
    for part in (drafter.block.self_attn.o_proj, drafter.block.mlp.down_proj, drafter.trigrams[1]):
        nn.init.zeros_(part.weight)
    step = next(drafter.steps(batch, TARGET))
    labels_M = batch.input_ids[0, 2:]
    slowly = F.cross_entropy(TARGET.logits(final_TH[: len(labels_M)]), labels_M)
    torch.testing.assert_close(drafter.step_loss(step, batch), slowly, check_dtype=False)


@torch.no_grad()
def test_embeddings_are_scaled_unless_they_are_the_releases() -> None:
    """Alone and in trigrams: W_o (c + SiLU(W c + b))."""
    assert token_scale(TARGET) != 1
    ids = torch.tensor([[7, 8, 9], [30, 31, 32]])
    vectors = TARGET.embed(ids)
    for scaled, scale in ((True, token_scale(TARGET)), (False, 1.0)):
        single = chimera(scale_tokens=scaled, trigrams=False)
        torch.testing.assert_close(single.encode(ids, TARGET), scale * vectors[:, 2])
        three = chimera(scale_tokens=scaled)
        inner, outer = three.trigrams[0].linear, three.trigrams[1]
        joined = scale * vectors.flatten(1)
        mixed = joined + F.silu(joined @ inner.weight.T + inner.bias)
        torch.testing.assert_close(three.encode(ids, TARGET), mixed @ outer.weight.T)


@torch.no_grad()
def test_the_layer_starts_at_random_or_as_the_targets_last_one() -> None:
    for start in ("random", "target"):
        for name, parameter in chimera(shake=0.0, block_start=start).block.named_parameters():
            theirs = TARGET.copy_weight(f"layers.1.{name}")
            assert torch.equal(parameter, theirs) == (start == "target"), name


@torch.no_grad()
def test_the_true_next_state_gives_the_targets_next_token() -> None:
    drafter = chimera(shake=0.0)
    batch = filled(documents(TEXT), drafter, TARGET)
    drafter.lm_heads[0].weight[:, : TARGET.shape.hidden_size] = 0
    final_TH = batch.states["final"][0]
    found = drafter.head(0, TARGET)(drafter.feature(0, final_TH[:-1], final_TH[1:]))
    assert torch.equal(found.argmax(-1), TARGET.logits(final_TH[1:]).argmax(-1))


def slow_step(drafter: Chimera, final_NH: Tensor, later: list[tuple[Tensor, int]]) -> Tensor:
    """The layer over f_0 … f_t and further rows with their positions, the last of which sees
    everything: its output [H]. One call without a cache, all rows in one softmax."""
    hidden = torch.cat([final_NH, torch.stack([vector for vector, _ in later])])
    positions = [*range(len(final_NH)), *(position for _, position in later)]
    visible = torch.ones(1, len(hidden), len(hidden), dtype=torch.bool)
    return drafter.block(hidden[None], Rows(torch.tensor([positions]), visible))[0, -1]


@torch.no_grad()
@pytest.mark.parametrize("self_fed", [True, False])
def test_training_computes_what_is_drafted_behind_every_prefix(self_fed: bool) -> None:
    """By explicit rows, and by decoding: with the drafter's own tokens or with the text's."""
    drafter = chimera(self_fed=self_fed)
    batch = filled(documents(TEXT), drafter, TARGET)
    expected, _ = heads(drafter.train(), batch)
    ids, final = TEXT[0], batch.states["final"][0]
    vectors = drafter.encode(document_trigrams(batch), TARGET)[0]
    for i in (1, 2, 4):
        tokens, estimates = ids[: i + 2], []
        for d in range(3):
            vector = vectors[i + 1]
            if d:
                vector = drafter.encode(torch.tensor(tokens[-3:]), TARGET)
                later = [(z, i + 1 + n) for n, z in enumerate(estimates)]
            else:
                later = [(vectors[j], j) for j in range(1, i + 1)]
            drafted = slow_step(drafter, final[: i + 1], [*later, (vector, i + 1 + d)])
            logits = drafter.head(d, TARGET)(drafter.feature(d, final[i], drafted))
            torch.testing.assert_close(logits, expected[i, d])
            estimates.append(drafted)
            tokens.append(int(logits.argmax()) if self_fed else ids[i + 2 + d])
        reader = Reader(drafter, TARGET, batch, [i + 1])
        reader.ids[0, i + 1 : i + 5] = torch.tensor(tokens[i + 1 :])
        torch.testing.assert_close(reader.logits()[0], expected[i])


@torch.no_grad()
def test_a_node_sees_its_own_branch_alone() -> None:
    drafter = chimera()
    batch = documents([TEXT[0], [5, 6, 7, 8]])
    reader = Reader(drafter, TARGET, batch, [5, 3])
    reader.accept([2, 1])
    state, root = reader.state, reader.token(0)[:, None]
    assert isinstance(state, ChimeraState)
    wide = torch.tensor([[30, 31, 32], [40, 41, 42]])
    deep = torch.tensor([[33, 34], [43, 44]])
    drafter.expand(state, Frontier(root, torch.full((2, 1), -1), 0))
    drafter.expand(state, Frontier(wide, torch.zeros(2, 3, dtype=torch.long), 1))
    found = drafter.expand(state, Frontier(deep, torch.tensor([[3, 1], [2, 2]]), 2))
    for w, columns in enumerate(([2, 1], [0, 1])):
        above = wide[torch.arange(2), torch.tensor(columns)][:, None]
        drafter.expand(state, Frontier(root, torch.full((2, 1), -1), 0))
        drafter.expand(state, Frontier(above, torch.zeros(2, 1, dtype=torch.long), 1))
        alone = drafter.expand(state, Frontier(deep[:, w : w + 1], torch.ones(2, 1).long(), 2))
        torch.testing.assert_close(found[:, w], alone[:, 0])


def test_the_loss_slowly() -> None:
    drafter = chimera(feature_weight=0.7).train()
    batch = filled(documents([TEXT[0], [5, 6, 7, 8, 9, 10]], labels_from=2), drafter, TARGET)
    logits, drafted = heads(drafter, batch)
    rows, total = training_rows(batch, 3), 0.0
    ids, final = batch.input_ids.flatten(), batch.states["final"].flatten(0, 1)
    flat_M = rows.flat_MK1[:, 0]
    for d in range(3):
        entropies = [
            F.cross_entropy(logits[m, d], ids[t + 2 + d])
            for m, t in enumerate(flat_M.tolist())
            if rows.valid_MK[m, d]
        ]
        total = total + torch.stack(entropies).mean()
    total = total + 0.7 * F.smooth_l1_loss(drafted[:, 0], final[flat_M + 1])
    losses = drafter.loss(batch, TARGET, 0.0)
    torch.testing.assert_close(losses.total, total, check_dtype=False)
    assert not any(name.startswith("likely") for name in losses.metrics)


@torch.no_grad()
def test_validation_also_counts_the_targets_likely_tokens() -> None:
    drafter = chimera(draft_vocabulary=40)
    drafter.set_vocabulary(range(0, 120, 3))
    batch = filled(documents(TEXT), drafter, TARGET)
    metrics = drafter.loss(batch, TARGET, 0.0).metrics
    logits, _ = heads(drafter, batch)
    likely_T = TARGET.logits(batch.states["final"][0]).argmax(-1).tolist()
    ids = drafter.vocabulary_D.tolist()
    for d in range(3):
        for best in (1, 3, 5):
            hits = [
                likely_T[m + 1 + d] in [ids[r] for r in logits[m, d].topk(best).indices.tolist()]
                for m in range(len(likely_T) - 2 - d)
            ]
            found = metrics[f"likely_top{best}_{d}"]
            assert (int(found.total), int(found.count)) == (sum(hits), len(hits))
    greedy = chimera(draft_vocabulary=40, labels="greedy")
    greedy.set_vocabulary(range(0, 120, 3))
    metrics = greedy.loss(batch, TARGET, 0.0).metrics
    assert metrics["top4_1"] == metrics["likely_top4_1"]


def test_no_gradient_flows_to_earlier_steps_unless_asked_to() -> None:
    for detach in (True, False):
        drafter = chimera(detach=detach)
        batch = filled(documents(TEXT), drafter, TARGET)
        steps = list(drafter.unrolled(batch, TARGET, training_rows(batch, 3)))
        (slope,) = torch.autograd.grad(steps[1][1].sum(), steps[0][1], allow_unused=True)
        assert (slope is None) == detach


# -- the memo --------------------------------------------------------------------------------------


def test_remembered_vectors_are_the_computed_ones() -> None:
    """Also with so few entries that trigrams replace each other, within a call too."""
    encoder = trigram_encoder(4).double()
    table = torch.randn(50, 4).double()
    computed = []

    def encode(ids: Tensor) -> Tensor:
        computed.append(len(ids))
        return encoder(table[ids].flatten(-2))

    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for entries in (1, 7, 4096):
            memo = TrigramMemo(entries)
            for _ in range(8):
                ids = torch.randint(3, (12, 3), generator=generator)
                found = memo.vectors(ids, encode, encoder, TARGET)
                torch.testing.assert_close(found, encoder(table[ids].flatten(-2)))
        # Everything is known by now.
        computed.clear()
        memo.vectors(ids, encode, encoder, TARGET)
        assert computed == []
        # A copy knows nothing, and neither does a memo of other weights or of another target.
        deepcopy(memo).vectors(ids, encode, encoder, TARGET)
        assert computed == [12]
        encoder[1].weight += 1
        changed = memo.vectors(ids, encode, encoder, TARGET)
        torch.testing.assert_close(changed, encoder(table[ids].flatten(-2)))
        memo.vectors(ids, encode, encoder, tiny_target(seed=1))
        assert computed == [12, 12, 12]


def test_a_memo_changes_no_draft() -> None:
    prompts = [[7, 8, 9, 10], [20, 30], [7, 8, 9, 10]]
    answers = []
    for memo in (0, 3, 4096):
        decoder = SpeculativeDecoder(TARGET, chimera(memo=memo))
        traces = [decoder.decode(prompts, Sampling(), 10) for _ in range(2)]
        answers.append([[(t.ids, t.accepted) for t in each] for each in traces])
    assert answers[0] == answers[1] == answers[2] and answers[0][0] == answers[0][1]


# -- decoding --------------------------------------------------------------------------------------


@pytest.mark.parametrize("draw", ["independent", "without_replacement"])
def test_drawn_trees_keep_the_targets_distribution(draw) -> None:
    """With equal siblings, and with a drafter far from the target; four ragged prompts at once
    decode what each does alone."""
    target = small_target()
    drafter = chimera(target, shake=1.0)
    builder = DrawnTree([(0,), (1,), (2,), (0, 0), (0, 1), (1, 0)], draw)
    decoder = SpeculativeDecoder(target, drafter, builder=builder, stop_ids=frozenset())
    assert goodness(decoder, [3, 1], Sampling(1.0), runs=1500) > 1e-4
    prompts = [[3, 1], [2], [4, 5, 1, 2, 2], [1, 1, 1]]
    together = decoder.decode(prompts, Sampling(), 8)
    alone = [decoder.decode([prompt], Sampling(), 8)[0] for prompt in prompts]
    assert [(t.ids, t.accepted) for t in together] == [(t.ids, t.accepted) for t in alone]


def test_mistakes_are_one_line() -> None:
    for arguments, words in (
        ({"lm_head": "x"}, "lm_head"),
        ({"labels": "x"}, "labels"),
        ({"block_start": "x"}, "block_start"),
        ({"memo": 2**21}, "memo must be at most"),
        ({"feature_weight": -1.0}, "feature_weight"),
    ):
        with pytest.raises(ValueError, match=words):
            Chimera(TARGET.shape, 2, **arguments)
