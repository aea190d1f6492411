"""Language models of words and bytes: causality, padding, decoding."""

from __future__ import annotations

import math
from copy import deepcopy
from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch import Tensor, nn
from transformers import DynamicCache

from modules.tokenization.byte2word import Byte2Word
from modules.tokenization.contract import PAD
from modules.tokenization.hierarchical import Hierarchical
from modules.tokenization.learn_your_tokens import LearnYourTokens
from modules.tokenization.lexinvariant import Lexinvariant
from modules.tokenization.subword import Subword
from modules.tokenization.units import ByteUnits, make_units
from modules.tokenization.word_model import WordModel
from modules.tokenization.words import unicode_words
from tests.modules.tokenization.small import SIZES, TEXT, draws, rows_of, seeded

SUBWORDS = make_units("subwords", unicode_words(TEXT * 3), 270)


def hierarchical() -> WordModel:
    return seeded(Hierarchical(ByteUnits(), **SIZES, unit_width=8, unit_layers=1, unit_heads=2))


def learned(pooled: int = 2, units: Any = None) -> WordModel:
    return seeded(LearnYourTokens(units or ByteUnits(), **SIZES, unit_layers=1, pooled=pooled))


WORD_MODELS = [hierarchical, learned, lambda: learned(1), lambda: learned(3, SUBWORDS)]


def with_empty(model: WordModel, rows: Tensor) -> Tensor:
    """Rows behind the empty word."""
    empty = torch.tensor([model._filled([])]).expand(len(rows), 1, -1)
    return torch.cat([empty, rows], 1)


@pytest.mark.parametrize("make", WORD_MODELS)
def test_a_word_is_spelled_from_earlier_words_and_its_own_earlier_units(make: Any) -> None:
    model = make()
    rows = rows_of(model)
    contexts = model.contexts(with_empty(model, rows)[:, :-1])
    logits = model.spell(contexts[0], rows[0])
    # Another second unit in word 3: what was written before it stays the same.
    changed = rows.clone()
    changed[0, 3, 1] = (rows[0, 3, 1] + 1) % model.units.size
    others = model.contexts(with_empty(model, changed)[:, :-1])
    again = model.spell(others[0], changed[0])
    same = (contexts - others).abs().amax(dim=(0, 2, 3)) < 1e-12
    assert same[:4].all() and not same[4:].any()
    assert torch.equal(logits[:3], again[:3])
    assert torch.allclose(logits[3, :2], again[3, :2]) and not torch.allclose(
        logits[3, 2], again[3, 2]
    )


@pytest.mark.parametrize("make", WORD_MODELS)
def test_padding_of_words_and_rows_changes_nothing(make: Any) -> None:
    model = make()
    rows = rows_of(model)
    one = model.score(rows, draws())
    padded = torch.cat([rows, torch.full_like(rows[:, :3], PAD)], 1)
    again = model.score(torch.cat([padded, torch.full_like(padded, PAD)]), draws())
    assert one.nll.item() == pytest.approx(again.nll.item(), abs=1e-9)
    assert (one.words, one.right, one.bytes) == (again.words, again.right, again.bytes)
    # A longer canvas: the same words with more room.
    wide = torch.tensor([[*model.units.encode("cat"), model.end, PAD, PAD]])
    narrow = wide[:, :4]
    assert torch.allclose(model._pool(wide), model._pool(narrow))


@pytest.mark.parametrize("make", WORD_MODELS)
def test_the_score_adds_up_the_log_likelihoods(make: Any) -> None:
    """Against one word and one unit at a time; all text is counted once."""
    model = make()
    rows = rows_of(model)
    nll, right = 0.0, 0
    for t in range(rows.shape[1]):
        contexts = model.contexts(with_empty(model, rows[:, :t]))[0, -1:]
        logits = model.spell(contexts, rows[0, t : t + 1])[0].log_softmax(-1)
        said = [unit for unit in rows[0, t].tolist() if unit != PAD]
        nll -= sum(float(logits[i, unit]) for i, unit in enumerate(said))
        right += len(said) > 1 and logits.argmax(-1)[: len(said)].tolist() == said
    score = model.score(rows, draws())
    assert float(score.nll) == pytest.approx(nll, abs=1e-8)
    assert score.bytes == len(TEXT.encode()) and score.right == right
    assert score.words == rows.shape[1] - 1
    assert score.bits_per_byte == pytest.approx(nll / math.log(2) / score.bytes)


@pytest.mark.parametrize("make", WORD_MODELS)
def test_words_are_written_as_they_are_scored(make: Any) -> None:
    """The words that greedy decoding writes are right in teacher forcing."""
    model = make()
    written = list(model.write(TEXT, 5))
    assert 0 < len(written) <= 5
    ids = [*model.words(TEXT), *_ids(model, TEXT, 5)]
    rows = torch.tensor([[model._filled(word) for word in ids]])
    contexts = model.contexts(with_empty(model, rows)[:, :-1])
    likeliest = model.spell(contexts[0], rows[0]).argmax(-1)
    for place in range(len(ids) - len(written), len(ids)):
        expected = [*ids[place], model.end][: model.most_bytes]
        assert likeliest[place, : len(expected)].tolist() == expected


@pytest.mark.parametrize("make", WORD_MODELS)
def test_word_by_word_and_unit_by_unit_the_logits_are_those_of_teacher_forcing(make: Any) -> None:
    model = make()
    rows, cache = rows_of(model), DynamicCache()
    read = with_empty(model, rows)[:, :-1]
    contexts = model.contexts(read)
    parts = [model.contexts(read[:, t : t + 1], cache) for t in range(read.shape[1])]
    torch.testing.assert_close(torch.cat(parts, 1), contexts)
    logits = model.spell(contexts[0], rows[0])
    for t, word in enumerate(rows[0]):
        ids = [unit for unit in word.tolist() if unit != PAD]
        for place in range(min(len(ids) + 1, model.most_bytes)):
            units = torch.tensor([[*ids[:place], PAD]])
            found = model.spell(contexts[0, t : t + 1], units)[0, -1]
            torch.testing.assert_close(found, logits[t, place])


def _ids(model: WordModel, prompt: str, limit: int) -> list[list[int]]:
    found: list[list[int]] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(model.units, "decode", lambda ids: found.append(list(ids)) or "")
        list(model.write(prompt, limit))
    return found


def test_sampling_is_of_the_models_law() -> None:
    """First units of many samples against the model's probabilities."""
    sizes = {**SIZES, "unit_width": 8, "unit_layers": 1, "unit_heads": 2, "most_bytes": 2}
    model = seeded(Hierarchical(ByteUnits(), **sizes))
    contexts = model.contexts(with_empty(model, rows_of(model, "It")[:, :1]))[0, -1:]
    chances = model.spell(contexts, torch.tensor([model._filled([])]))[0, 0].softmax(-1)
    generator, counts = draws(), torch.zeros(model.end + 1)
    for _ in range(800):
        first = model._spelled_word(contexts[0], 1.0, generator)[:1] or [model.end]
        counts[first[0]] += 1
    heavy = chances > 0.02
    observed = torch.cat([counts[heavy], counts[~heavy].sum()[None]])
    expected = 800 * torch.cat([chances[heavy], chances[~heavy].sum()[None]])
    assert float(((observed - expected) ** 2 / expected).sum()) < 3 * len(expected) + 12


def test_a_text_is_learnt_and_continued() -> None:
    torch.manual_seed(0)
    model = Hierarchical(ByteUnits(), **SIZES, unit_width=16, unit_layers=1, unit_heads=2)
    rows = rows_of(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(120):
        loss = model.score(rows, draws()).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert model.eval().score(rows, draws()).word_accuracy > 0.9
    assert "".join(model.write("The cat sat on", 40)) == TEXT.removeprefix("The cat sat on")


def test_subwords_count_a_word_only_whole() -> None:
    model = seeded(Subword(SUBWORDS, **SIZES))
    rows = rows_of(model)
    score = model.score(rows, draws())
    assert score.bytes == len(TEXT.encode()) and score.words == len(unicode_words(TEXT))
    tokens = rows[0, :, 0]
    starts = [i for i in range(len(tokens)) if i == 0 or rows[0, i, 1] != rows[0, i - 1, 1]]
    # Everything right is every word right; a wrong token spoils its word, and the word before it
    # where it goes on with that word.
    assert model._words(tokens[None], rows[..., 0], rows[..., 1]) == (score.words, score.words)
    (go_on,) = SUBWORDS.encode("s")
    likeliest = tokens.clone()
    likeliest[starts[3]] = go_on
    assert unicode_words(TEXT)[2] + "s" == " sats"
    assert model._words(likeliest[None], rows[..., 0], rows[..., 1]) == (
        score.words,
        score.words - 2,
    )
    parts = [float(model.score(rows[:, :t], draws()).nll) for t in (10, 11)]
    logits = model.logits(torch.cat([torch.tensor([model.end]), tokens[:10]])[None])[0, -1]
    assert parts[1] - parts[0] == pytest.approx(-float(logits.log_softmax(-1)[tokens[10]]))


def test_a_word_in_several_rows_is_no_word() -> None:
    model = seeded(Subword(SUBWORDS, **{**SIZES, "length": 5}))
    words = unicode_words("sat extraordinary sat. sat")
    pieces = [len(SUBWORDS.encode(word)) for word in words]
    assert pieces[0] < 5 < pieces[1] - 5, "the second word has a row of its own"
    ends = [sum(pieces[: i + 1]) for i in range(len(words))]
    # Whole are words between two borders of rows, with a token of the next word behind them.
    whole = sum((end - size) // 5 == end // 5 for end, size in zip(ends, pieces, strict=True))
    rows = rows_of(model, "".join(words))
    counted = model._words(rows[..., 0], rows[..., 0], rows[..., 1])
    assert counted == (whole, whole) and 0 < whole < len(words)


@pytest.mark.parametrize("make", [hierarchical, lambda: seeded(Subword(SUBWORDS, **SIZES))])
def test_a_copy_scores_as_the_model(make: Any) -> None:
    model = make()
    copied, rows = deepcopy(model), rows_of(model)
    assert torch.equal(copied.score(rows, draws()).nll, model.score(rows, draws()).nll)
    assert copied.settings == model.settings and "units" not in copied.settings


# -- pooled bytes ----------------------------------------------------------------------------------


def byte2word(**settings: Any) -> Byte2Word:
    sizes = {**SIZES, "byte_width": 8, "slots": 4, "most_bytes": 10, **settings}
    return seeded(Byte2Word(SUBWORDS, **sizes))


def test_word_vectors_read_their_own_bytes_and_no_padding() -> None:
    model = byte2word()
    units = rows_of(model)[0, :, : model.most_bytes]
    vectors = model.word_vectors(units.clone())
    others = units.clone()
    others[1:] = units[1:].flip(0)
    assert torch.equal(model.word_vectors(others)[0], vectors[0])
    model.embedding.weight.data[0] += 5.0  # the byte that padding is read as
    assert torch.allclose(model.word_vectors(units.clone()), vectors)
    new = torch.full((2, 10), PAD)
    new[0, :3], new[1, :3] = torch.tensor([200, 201, 202]), torch.tensor([202, 201, 200])
    first, second = model.word_vectors(new)
    assert not torch.allclose(first, second)


def test_swapped_letters_move_pooled_bytes_less_than_subwords() -> None:
    """By the share of a vector's length, with weights that tell places apart."""
    words = [" caterpillar", " remember", " something", " understand"]
    units = make_units("subwords", words * 9, 330)
    moved = {}
    for read in ("bytes", "pieces"):
        sizes = {**SIZES, "byte_width": 8, "most_bytes": 16}
        model = seeded(Byte2Word(units, **sizes, read=read))
        pairs = [(word, word[:4] + word[5] + word[4] + word[6:]) for word in words]
        ids = [[model.reads.encode(each) for each in pair] for pair in pairs]
        rows = [[*each, *[PAD] * (16 - len(each))] for pair in ids for each in pair]
        right, wrong = model.word_vectors(torch.tensor(rows)).unflatten(0, (-1, 2)).unbind(1)
        moved[read] = float(((wrong - right).norm(dim=-1) / right.norm(dim=-1)).mean())
    assert 0 < 3 * moved["bytes"] < moved["pieces"]


def test_all_bytes_of_a_masked_word_are_hidden() -> None:
    """Another word in a masked place: the same logits. In an unmasked place: others."""
    model = byte2word(share=0.3)
    rows = rows_of(model)
    with patch.object(model, "logits", wraps=model.logits) as spy:
        score = model.score(rows, draws())
    units, chosen = spy.call_args.args
    assert 0 < int(chosen.sum()) == score.words < rows.shape[1]
    hidden = units[chosen]
    assert set(hidden.flatten().tolist()) <= {256, PAD}
    assert not (units[~chosen] == 256).any()


def test_a_model_that_reads_pieces_is_told_as_much_of_a_masked_word() -> None:
    """As many masks as bytes, not as pieces: fewer pieces would tell which word it is."""
    masks = []
    for read in ("bytes", "pieces"):
        model = byte2word(share=0.9, read=read)
        with patch.object(model, "logits", wraps=model.logits) as spy:
            model.score(rows_of(model), draws())
        units, chosen = spy.call_args.args
        masks.append((units[chosen] == model.reads.size).sum(-1).tolist())
        assert not (units[~chosen] == model.reads.size).any()
    assert masks[0] == masks[1] and len(set(masks[0])) > 1


def test_pieces_that_do_not_fit_the_slots_are_not_predicted() -> None:
    model = byte2word(slots=1)
    rows = rows_of(model, "cat zzqqxx")
    said = rows[0, :, model.most_bytes :]
    assert said[1].tolist() == [PAD, PAD] and len(said[0]) == 2
    assert byte2word(read="pieces").table_size != byte2word().table_size


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: Byte2Word(SUBWORDS, read="letters"), "read 'letters' is unknown"),
        (lambda: Byte2Word(SUBWORDS, share=1.0), "share must be between 0 and 1"),
        (lambda: Lexinvariant(ByteUnits(), random_share=2), "random_share must be from 0 to 1"),
        (
            lambda: Lexinvariant(ByteUnits(), random_share=0.5, curriculum=True),
            "curriculum needs random_share 1, got 0.5",
        ),
        (
            lambda: Lexinvariant(ByteUnits(), width=256, orthonormal=True),
            "orthonormal needs a width above the 256 units, got 256",
        ),
        (lambda: Hierarchical(ByteUnits(), width=30), "width 30 must be an even multiple"),
        (lambda: Hierarchical(ByteUnits(), layers=0), "layers must be at least 1"),
        (lambda: Lexinvariant(ByteUnits(), length=0), "length must be at least 1"),
        (lambda: Lexinvariant(ByteUnits(), length=1 << 17), "length must be at most 65536"),
    ],
)
def test_settings_that_cannot_be_built_are_refused(make: Any, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        make()


def test_blocks_are_stock_modules() -> None:
    """No attention of our own."""
    kinds = {type(part).__module__.split(".")[0] for part in hierarchical().modules()}
    assert kinds <= {"modules", "torch", "transformers"} and nn.TransformerEncoder in {
        type(part) for part in hierarchical().modules()
    }
