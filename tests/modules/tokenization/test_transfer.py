"""Tokenizer transfer: drawn tokenizers, pieces of tokens, and predictions that depend on them
alone.
"""

from __future__ import annotations

import json

import pytest
import torch
from tokenizers import Regex, Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from modules.tokenization.contract import PAD
from modules.tokenization.transfer.hypernetwork import Hypernetwork, mean_of_pieces, pieces_of
from modules.tokenization.transfer.sampled_tokenizers import LONGEST, TokenizerSampler
from tests.modules.tokenization.folders import BASE, TEXTS, bpe


def network(tied: bool = True, bias: bool = False) -> Hypernetwork:
    torch.manual_seed(0)
    table = torch.randn(290, 8) * torch.linspace(0.5, 2, 8) + torch.arange(8.0)
    return Hypernetwork(
        table, None if tied else torch.randn(290, 8), 16, 2, 2, length=4, bias=bias
    ).eval()


def test_pieces_are_the_base_tokenizers() -> None:
    names = BASE.get_vocab()
    tokens = [b"the", "Ü".encode(), b"\xff", b"caterpillar times over"]
    rows = pieces_of(tokens, BASE, 4)
    assert rows.shape == (4, 4)
    first = [i for i in rows[0].tolist() if i != PAD]
    assert BASE.decode(first) == "the"
    assert BASE.decode([i for i in rows[1].tolist() if i != PAD]) == "Ü"
    assert rows[2].tolist() == [names["ÿ"], PAD, PAD, PAD]
    assert (rows[3] != PAD).all()  # longer tokens are cut
    # A token of the base vocabulary is a single piece, itself.
    whole = next(name for name in names if len(name) > 2 and name.isascii() and name.isalpha())
    assert pieces_of([whole.encode()], BASE, 4)[0].tolist() == [names[whole], PAD, PAD, PAD]


def test_a_prediction_depends_on_its_pieces_alone() -> None:
    """Not on the batch, its order or its padding."""
    made, source = network(), torch.randn(290, 8)
    pieces = pieces_of([b"the", b"cat on", b"mat", b"123"], BASE, 4)
    embeddings, rows, bias = made(source, pieces)
    assert embeddings is rows or torch.equal(embeddings, rows)
    assert bias is None
    order = torch.tensor([2, 0, 3, 1])
    moved, _, _ = made(source, pieces[order])
    assert torch.allclose(moved, embeddings[order], atol=1e-6)
    alone, _, _ = made(source, pieces[1:2])
    assert torch.allclose(alone[0], embeddings[1], atol=1e-6)
    # The padding's own row is read by no one.
    changed = source.clone()
    changed[0] += 100.0
    unused = torch.tensor([[5, 6, PAD, PAD]])
    assert torch.allclose(made(source, unused)[0], made(changed, unused)[0], atol=1e-6)
    swapped = torch.tensor([[6, 5, PAD, PAD]])
    assert not torch.allclose(made(source, unused)[0], made(source, swapped)[0])


def test_tables_of_their_own_scale_and_biases() -> None:
    made, source = network(tied=False, bias=True), torch.randn(290, 16)
    embeddings, rows, bias = made(source, pieces_of([b"the", b"cat"], BASE, 4))
    assert bias is not None and bias.shape == (2,) and not torch.allclose(embeddings, rows)
    labels = made.labels([embeddings, rows])
    predicted, _ = made.normalised(source, pieces_of([b"the", b"cat"], BASE, 4))
    assert all(torch.allclose(*pair, atol=1e-4) for pair in zip(labels, predicted, strict=True))
    many = torch.randint(0, 290, (9, 4))
    whole = made.all_of(source, many)
    assert torch.allclose(whole[0], made(source, many)[0], atol=1e-6)


def test_the_mean_of_pieces() -> None:
    table = torch.randn(290, 8)
    pieces = torch.tensor([[3, 5, PAD, PAD], [7, PAD, PAD, PAD]])
    means = mean_of_pieces(table, pieces)
    assert torch.allclose(means, torch.stack([(table[3] + table[5]) / 2, table[7]]))


def test_drawn_tokenizers_write_any_text_and_differ() -> None:
    sampler = TokenizerSampler(TEXTS, 320, seed=1)
    drawn = [sampler.sample() for _ in range(6)]
    text = "the cat Ü 🙂 zzz"
    for tokenizer in drawn:
        assert tokenizer.get_vocab_size() == 320
        assert tokenizer.decode(tokenizer.encode(text).ids) == text
        assert max(len(tokenizer.id_to_token(i) or "") for i in range(320)) <= LONGEST
    assert len({tuple(sorted(tokenizer.get_vocab())) for tokenizer in drawn}) > 1
    again = TokenizerSampler(TEXTS, 320, seed=1)
    assert [each.get_vocab() for each in drawn] == [again.sample().get_vocab() for _ in drawn]
    with pytest.raises(ValueError, match="no room for all bytes"):
        TokenizerSampler(TEXTS, 255)


def test_half_of_the_tokenizers_have_the_words_of_the_given_one() -> None:
    """A pattern as Qwen's joins a full stop with line breaks, GPT-2's never does."""
    texts, joined = ["It sat.\n\nThe end.\n\n"] * 4, ".ĊĊ"
    pattern = Regex(r"[^\r\n\p{L}\p{N}]?\p{L}+|[^\s\p{L}\p{N}]+[\r\n]*|\s+")
    cut = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(pattern, "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    like = bpe(texts, 300)
    like.backend_tokenizer.pre_tokenizer = cut
    sampler = TokenizerSampler(texts, 300, like=like)
    drawn = [sampler.sample().encode(texts[0]).tokens for _ in range(40)]
    assert 4 < sum(joined in tokens for tokens in drawn) < 36
    # Others, whose words are no bytes, are left out.
    like.backend_tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    for other in (None, like):
        sampler = TokenizerSampler(texts, 300, like=other)
        assert not any(joined in sampler.sample().get_vocab() for _ in range(20))


def test_frequent_strings_come_first_where_there_is_no_noise(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    sampler = TokenizerSampler(TEXTS, 270)
    monkeypatch.setattr("modules.tokenization.transfer.sampled_tokenizers.NOISE", 1e-300)
    vocabulary = sampler.sample().get_vocab()
    extra = [name for name in vocabulary if len(name) > 1]
    assert len(extra) == 270 - 256 and "at" in extra  # in cat, sat and mat, caterpillar


def test_bytes_without_a_token_of_their_own_are_left_out() -> None:
    """SmolLM2's vocabulary lacks 21 bytes."""
    backend = Tokenizer.from_str(BASE.backend_tokenizer.to_str())
    content = json.loads(backend.to_str())
    removed = content["model"]["vocab"].pop("ÿ")
    content["model"]["vocab"] = {
        name: i - (i > removed) for name, i in content["model"]["vocab"].items()
    }
    base = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(content)), eos_token="<end>"
    )
    names = base.get_vocab()
    assert "ÿ" not in names
    rows = pieces_of([b"a\xffb", b"\xff", b"a"], base, 4)
    assert rows.tolist() == [
        [names["a"], names["b"], PAD, PAD],
        [base.eos_token_id, PAD, PAD, PAD],
        [names["a"], PAD, PAD, PAD],
    ]
    words = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel({"the": 0, "<end>": 1}, "<end>"))
    )
    with pytest.raises(ValueError, match="no byte-level BPE"):
        pieces_of([b"the"], words, 4)


@pytest.mark.parametrize("tied", [True, False])
def test_a_residual_network_begins_with_the_mean_of_pieces(tied: bool) -> None:
    table, head = torch.randn(290, 8) + torch.arange(8.0), torch.randn(290, 8)
    made = Hypernetwork(table, None if tied else head, 16, 2, 2, length=4, residual=True)
    source = table if tied else torch.cat([table, head], 1)
    pieces = pieces_of([b"the", b"cat on", b"mat", b"123"], BASE, 4)
    embeddings, rows, _ = made(source, pieces)
    assert torch.allclose(embeddings, mean_of_pieces(table, pieces), atol=1e-5)
    assert torch.allclose(rows, mean_of_pieces(table if tied else head, pieces), atol=1e-5)
    embeddings.square().sum().backward()
    assert made.heads[0][-1].weight.grad.abs().sum() > 0  # type: ignore[index]


@pytest.mark.parametrize("tied", [True, False])
def test_a_residual_network_keeps_the_embeddings_of_the_base_models_tokens(tied: bool) -> None:
    table, head = torch.randn(290, 8) + torch.arange(8.0), torch.randn(290, 8)
    made = Hypernetwork(table, None if tied else head, 16, 2, 2, length=4, residual=True)
    for last in (each[-1] for each in made.heads):  # type: ignore[index]
        torch.nn.init.normal_(last.weight)
    source = table if tied else torch.cat([table, head], 1)
    pieces = torch.tensor([[7, 8, PAD, PAD], [5, PAD, PAD, PAD], [9, PAD, PAD, PAD]])
    embeddings, rows, _ = made(source, pieces)
    assert torch.allclose(embeddings[1:], table[[5, 9]], atol=1e-5)
    assert torch.allclose(rows[1:], (table if tied else head)[[5, 9]], atol=1e-5)
    assert not torch.allclose(embeddings[0], table[[7, 8]].mean(0), atol=0.1)


def test_added_tokens_are_text_and_special_ones_are_not() -> None:
    base = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(BASE.backend_tokenizer.to_str()), eos_token="<end>"
    )
    base.add_tokens(["  \t x"])
    added, special = pieces_of([b"  \t x", b"<end>"], base, 8).tolist()
    assert added == [base.get_vocab()["  \t x"], *[PAD] * 7]
    spelled = [i for i in special if i != PAD]
    assert base.eos_token_id not in spelled and base.decode(spelled) == "<end>"
