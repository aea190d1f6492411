"""GAD: what the masked block sees, its blocks and glancing in training, and its copied encoder."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from checkpoints.pretrained import Provenance, load_pretrained, save_pretrained
from modules.contracts.batches import TextBatch
from modules.contracts.drafter import Context
from modules.contracts.sampling import Sampling
from modules.decoding.decoder import SpeculativeDecoder
from modules.drafters.blocks import gad
from modules.drafters.blocks.gad import Gad, block_rows
from modules.drafters.blocks.glancing import random_positions
from modules.target.seq2seq.pairs import Pairs
from modules.target.target import Target
from tests.fakes import SEQ2SEQ, ids_by_batch, tiny_batch, tiny_seq2seq, tiny_target
from tests.modules.conformance import (
    check_batches,
    check_gradients,
    check_greedy,
    check_loss,
    check_no_labels,
    check_sampled,
    check_target_unchanged,
)

TARGETS: dict[str, Target] = {arch: tiny_seq2seq(arch) for arch in SEQ2SEQ} | {
    "llama": tiny_target()
}


def made(target: Target, shake: float = 0.1, **arguments) -> Gad:
    """A small one in float64, off its special beginnings."""
    torch.manual_seed(0)
    drafter = Gad(target.shape, **{"block": 4, "layers": 1, "heads": 2, **arguments}).double()
    drafter.initialise(target)
    with torch.no_grad():
        for parameter in drafter.parameters():
            parameter += shake * torch.randn_like(parameter)
    return drafter


@pytest.fixture(params=TARGETS)
def target(request: pytest.FixtureRequest) -> Target:
    return TARGETS[request.param]


def block_after(drafter: Gad, target: Target, prompts: list[list[int]], answers) -> Tensor:
    """Logits [B,K,V] after these answers, whose last token is the newest."""
    width = max(map(len, prompts))
    ids = torch.tensor([row + [9] * (width - len(row)) for row in prompts])
    lengths = torch.tensor([len(row) for row in prompts])
    state = drafter.start(Context(target, ids, lengths, torch.tensor([row[0] for row in answers])))
    longest = max(map(len, answers))
    state.answer_BL = torch.tensor([row + [8] * (longest - len(row)) for row in answers])
    state.lengths_B = lengths + torch.tensor([len(row) - 1 for row in answers])
    return drafter.block_logits(state)


def test_decoding_keeps_the_targets_text_and_law(target: Target) -> None:
    drafter = made(target).eval()
    check_greedy(drafter, target)
    check_batches(drafter, target)
    check_greedy(made(target).eval(), target, coarse=True)


@pytest.mark.parametrize("arch", SEQ2SEQ)
def test_sampled_text_keeps_its_law(arch: str) -> None:
    small = tiny_seq2seq(arch, vocab=6, seed=2)
    check_sampled(made(small).eval(), small)


def test_a_thousand_answers_are_plain_decodings() -> None:
    """With random weights."""
    target = TARGETS["t5"]
    generator = torch.Generator().manual_seed(1)
    lengths = torch.randint(2, 12, (1000,), generator=generator).tolist()
    prompts = [torch.randint(5, 128, (n,), generator=generator).tolist() for n in lengths]
    plain = ids_by_batch(SpeculativeDecoder(target), prompts, 250, 6)
    drafted = SpeculativeDecoder(target, made(target).eval())
    assert ids_by_batch(drafted, prompts, 250, 6) == plain


def test_training_holds_the_contract(target: Target) -> None:
    for check in (check_loss, check_gradients, check_no_labels, check_target_unchanged):
        check(made(target), target)


def test_a_sequence_drafts_the_same_in_any_batch(target: Target) -> None:
    """Neither the padding of prompts nor that of answers is seen."""
    drafter = made(target).eval()
    prompts, answers = [[7, 8, 9], [20] * 9, [5]], [[30, 31, 32, 33], [40], [50, 51]]
    together = block_after(drafter, target, prompts, answers)
    for row, (prompt, answer) in enumerate(zip(prompts, answers, strict=True)):
        alone = block_after(drafter, target, [prompt], [answer])[0]
        assert torch.allclose(together[row], alone)


def test_every_slot_sees_the_prompt_and_the_whole_answer(target: Target) -> None:
    drafter = made(target).eval()
    before = block_after(drafter, target, [[7, 8, 9]], [[30, 31, 32]])
    for prompt, answer in (([6, 8, 9], [30, 31, 32]), ([7, 8, 9], [29, 31, 32])):
        after = block_after(drafter, target, [prompt], [answer])
        assert ((after - before).abs().amax(-1) > 1e-9).all()


def test_rows_beyond_the_table_of_positions_share_its_last_one() -> None:
    """The order of two of them means nothing, that of earlier ones does."""
    target = TARGETS["llama"]
    drafter = made(target, positions=4).eval()
    prompt, answer = [7, 8, 9, 10, 11, 12], [30, 31, 32, 33, 34]
    before = block_after(drafter, target, [prompt], [answer])
    for text, beyond in ((prompt, 3), (answer, 2)):
        for place in range(len(text) - 1):
            text[place : place + 2] = reversed(text[place : place + 2])
            after = block_after(drafter, target, [prompt], [answer])
            assert torch.allclose(after, before) == (place >= beyond), place
            text[place : place + 2] = reversed(text[place : place + 2])
    check_greedy(drafter, target)


def test_a_revealed_token_is_seen_by_all_slots(target: Target) -> None:
    drafter = made(target).eval()
    memory = drafter.read_sources(torch.tensor([[7, 8]]), torch.tensor([2]))
    prefix, counts = torch.tensor([[30, 31]]), torch.tensor([2])
    fill = drafter.transformer.fill
    masks = fill(drafter.embedding, memory, prefix, counts)
    blank = fill(drafter.embedding, memory, prefix, counts, torch.tensor([[-1] * 4]))
    assert torch.equal(masks, blank)
    shown = fill(drafter.embedding, memory, prefix, counts, torch.tensor([[-1, -1, 60, -1]]))
    assert ((shown - masks).abs().amax(-1) > 1e-9).all()


def test_blocks_are_cut_uniformly_and_end_with_their_answer() -> None:
    drafter, lengths = made(TARGETS["t5"]), torch.full((6000,), 3)
    counts = drafter.drawn_cuts(lengths).bincount(minlength=3)
    assert len(counts) == 3 and (counts > 1800).all()
    drafter.eval()
    assert torch.equal(drafter.drawn_cuts(lengths), drafter.drawn_cuts(lengths))
    batch = tiny_batch(TARGETS["t5"])
    pairs = Pairs.of(batch)
    assert pairs is not None
    cuts = (pairs.answer_lengths_P - 2).clamp(min=0)
    rows = block_rows(batch, pairs, cuts, 4)
    for p, (cut, length) in enumerate(zip(cuts.tolist(), pairs.answer_lengths_P.tolist())):
        labels = rows.tokens_MK1[p, 1:][rows.valid_MK[p]].tolist()
        assert labels == pairs.answers_PN[p, cut:length].tolist()


def plain_loss(drafter: Gad, batch: TextBatch, revealed_PK: Tensor | None = None) -> float:
    """The block's label-smoothed cross-entropy, computed answer by answer."""
    pairs = Pairs.of(batch)
    assert pairs is not None
    cuts = drafter.drawn_cuts(pairs.answer_lengths_P)
    memory = drafter.read_sources(pairs.sources_PS, pairs.source_lengths_P)
    hidden = drafter.transformer.fill(
        drafter.embedding, memory, pairs.answers_PN, cuts, revealed_PK
    )
    losses = []
    for p, (cut, length) in enumerate(zip(cuts.tolist(), pairs.answer_lengths_P.tolist())):
        for slot, label in enumerate(pairs.answers_PN[p, cut:length][:4].tolist()):
            if revealed_PK is None or revealed_PK[p, slot] < 0:
                logits = hidden[p, slot] @ drafter.embedding.weight.T
                losses.append(F.cross_entropy(logits, torch.tensor(label), label_smoothing=0.1))
    return float(torch.stack(losses).mean().detach())


def test_without_glancing_the_loss_is_that_of_masked_blocks(target: Target) -> None:
    """In training, with dropout: the first pass leaves the random numbers as they were."""
    drafter, batch = made(target, glancing=0.0, glancing_end=0.0).train(), tiny_batch(target)
    torch.manual_seed(3)
    expected = plain_loss(drafter, batch)
    torch.manual_seed(3)
    assert drafter.loss(batch, target, 0.4).total.item() == pytest.approx(expected)


def test_revealed_slots_are_inputs_and_have_no_loss(
    target: Target, monkeypatch: pytest.MonkeyPatch
) -> None:
    drafter, batch = made(target).train(), tiny_batch(target)
    rates: list[float] = []
    shown: list[Tensor] = []

    def second_slot(wrong_MK: Tensor, valid_MK: Tensor, rate: float) -> Tensor:
        rates.append(rate)
        chosen = torch.zeros_like(valid_MK)
        chosen[:, 1] = valid_MK[:, 1]
        shown.append(chosen)
        return chosen

    monkeypatch.setattr(gad, "random_positions", second_slot)
    torch.manual_seed(3)
    losses = drafter.loss(batch, target, 0.5)
    assert losses.metrics["top1_1"].count == 0 and losses.metrics["top1_0"].count == 4
    torch.manual_seed(3)
    pairs = Pairs.of(batch)
    assert pairs is not None
    cuts = drafter.drawn_cuts(pairs.answer_lengths_P)
    labels = block_rows(batch, pairs, cuts, 4).tokens_MK1[:, 1:]
    torch.manual_seed(3)
    expected = plain_loss(drafter, batch, torch.where(shown[0], labels, -1))
    assert losses.total.item() == pytest.approx(expected)
    drafter.loss(batch, target, 0.0)
    drafter.loss(batch, target, 1.0)
    assert rates == pytest.approx([0.4, 0.5, 0.3])


def test_a_share_of_the_mistakes_is_revealed_at_random() -> None:
    wrong = torch.tensor([[True, True, True, True, False, True], [False] * 6, [True] * 6])
    valid = torch.tensor([[True] * 5 + [False], [True] * 6, [True] * 2 + [False] * 4])
    torch.manual_seed(0)
    chosen = torch.stack([random_positions(wrong, valid, 0.5) for _ in range(300)])
    assert (chosen.sum(-1) == torch.tensor([2, 0, 1])).all()
    assert not (chosen & ~valid).any()
    # Right predictions are revealed too.
    assert (chosen.sum(0)[0, :5] > 80).all() and (chosen.sum(0)[2, :2] > 80).all()


def test_blocks_of_any_row_are_those_that_decoding_drafts(target: Target) -> None:
    """What measures ranks reads as decoding does."""
    drafter, batch = made(target).eval(), tiny_batch(target)
    rows = drafter.measured_rows(batch, target)
    outputs = drafter.block_outputs(batch, target, rows)
    pairs = Pairs.of(batch)
    assert pairs is not None
    for row in range(len(rows.tokens_MK1)):
        label = int(rows.flat_MK1[row, 1]) + 1
        owner = int((pairs.places_P <= label).sum()) - 1
        cut = label - int(pairs.places_P[owner])
        if cut:
            source = pairs.sources_PS[owner, : pairs.source_lengths_P[owner]].tolist()
            answer = pairs.answers_PN[owner, :cut].tolist()
            expected = block_after(drafter, target, [source], [answer])[0]
            assert torch.allclose(outputs[row] @ drafter.embedding.weight.T, expected)


@pytest.mark.parametrize("arch", SEQ2SEQ)
def test_it_begins_with_the_targets_encoder_and_loads_without_it(arch: str, tmp_path: Path) -> None:
    target = TARGETS[arch]
    drafter = made(target, shake=0).eval()
    ids, lengths = torch.tensor([[7, 8, 9, 10], [20, 21, 0, 0]]), torch.tensor([4, 2])
    memory = drafter.read_sources(ids, lengths)
    encoded = target.architecture.encode(ids, lengths)
    assert torch.allclose(
        memory.states_BSH[~memory.padding_BS], encoded.states_BSH[~memory.padding_BS]
    )
    save_pretrained(drafter, tmp_path / "drafter", Provenance.of(target))
    loaded = load_pretrained(tmp_path / "drafter", target).double().eval()
    assert isinstance(loaded, Gad) and loaded.config() == drafter.config()
    prompts = [[7, 8, 9], [20, 21]]
    first, second = (
        SpeculativeDecoder(target, each).decode(prompts, Sampling(), 9)
        for each in (drafter, loaded)
    )
    assert [trace.accepted for trace in first] == [trace.accepted for trace in second]
    own = made(target, shake=0, copy_encoder=False)
    assert own.encoder is None and own.config()["encoder"] is None


def test_bad_settings_are_refused_by_name() -> None:
    shape = TARGETS["t5"].shape
    for arguments, message in (
        ({"heads": 5}, "heads must divide the target's hidden size of 32, got 5"),
        ({"layers": 0}, "layers, heads and positions must be at least 1, got 0"),
        ({"glancing": 1.5}, "glancing must lie in"),
        (
            {"encoder": {"model_type": "llama"}},
            "encoder.model_type is 'llama': use one of t5, bart",
        ),
        ({"encoder": {"model_type": "t5", "vocab_size": 9}}, "encoder.vocab_size is 9"),
    ):
        with pytest.raises(ValueError, match=message):
            Gad(shape, **arguments)
