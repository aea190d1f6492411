"""Probabilities of bytes: the toy of the method, and sums over every cover written plainly."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Iterator, Sequence
from copy import deepcopy

import pytest
import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from modules.byte_level.covers import END, ByteText
from modules.byte_level.token_rows import TokenRows
from modules.byte_level.vocabulary import ByteVocabulary, completions, unfinished
from modules.target.target import Target
from tests.fakes import tiny_target

ALPHA, BETA, START = 0.7, 0.4, 0.6
"""P(A after A), P(A after B), P(A at the beginning)."""


def longest_match() -> ByteVocabulary:
    """The tokens A, B and AA, of which the longest that fits is taken."""
    model = models.WordPiece({"A": 0, "B": 1, "AA": 2, "?": 3}, unk_token="?")
    model.continuing_subword_prefix = ""
    return ByteVocabulary(PreTrainedTokenizerFast(tokenizer_object=Tokenizer(model)), 3)


class TwoStates:
    """The law of these tokens for texts of a Markov chain."""

    def __init__(self) -> None:
        self.committed: tuple[int, ...] = ()

    def log_probs(self, contexts: Sequence[tuple[int, ...]]) -> list[Tensor]:
        return [self.after((*self.committed, *tokens)) for tokens in contexts]

    def after(self, tokens: tuple[int, ...]) -> Tensor:
        last = tokens[-1] if tokens else None
        if last == 0:
            # A lone A only stands before a B.
            return torch.tensor([0.0, 1.0, 0.0], dtype=torch.double).log()
        a = {None: START, 1: BETA, 2: ALPHA}[last]
        return torch.tensor([a * (1 - ALPHA), 1 - a, a * ALPHA], dtype=torch.double).log()

    def commit(self, tokens: tuple[int, ...]) -> None:
        self.committed += tokens


def chain(text: str) -> float:
    """The probability of a text in the Markov chain."""
    value, a = 1.0, START
    for character in text:
        value *= a if character == "A" else 1 - a
        a = ALPHA if character == "A" else BETA
    return value


def test_the_toy_gives_the_chain_where_tokens_never_do() -> None:
    text = ByteText(TwoStates(), longest_match(), frozenset(), b"A")
    probs = text.next_byte()
    assert float(probs[ord("A")]) == pytest.approx(ALPHA, abs=1e-12)
    # After the token A alone, the model gives another A no probability.
    assert TwoStates().after((0,))[[0, 2]].exp().sum() == 0
    assert float(probs.sum()) == pytest.approx(1.0)


@pytest.mark.parametrize("length", range(7))
def test_every_text_has_its_probability_in_the_chain(length: int) -> None:
    vocabulary = longest_match()
    for letters in itertools.product("AB", repeat=length):
        text = ByteText(TwoStates(), vocabulary, frozenset(), "".join(letters).encode(), 0.0)
        assert math.exp(text.log_prob()) == pytest.approx(chain("".join(letters)), abs=1e-12)
        a = {"A": ALPHA, "B": BETA}.get("".join(letters)[-1:], START)
        assert float(text.next_byte()[ord("A")]) == pytest.approx(a, abs=1e-12)


def test_a_text_grown_byte_by_byte_is_the_text_read_at_once() -> None:
    vocabulary, text = longest_match(), ByteText(TwoStates(), longest_match(), frozenset())
    product = 0.0
    for place, byte in enumerate(b"AAABABBAAAAAB"):
        product += math.log(float(text.next_byte()[byte]))
        text.extend(bytes([byte]))
        once = ByteText(TwoStates(), vocabulary, frozenset(), b"AAABABBAAAAAB"[: place + 1])
        assert text.log_prob() == pytest.approx(once.log_prob(), abs=1e-12)
        torch.testing.assert_close(text.next_byte(), once.next_byte())
        assert text.log_prob() == pytest.approx(product, abs=1e-12)
    assert text.text == b"AAABABBAAAAAB" and text.tokens == (2, 0, 1, 0, 1, 1, 2, 2, 0, 1)


SAMPLE = ["the cat sat on the mat", "that hat é the é cat", "to the east the tea 12 123 a a  b"]


def byte_level() -> PreTrainedTokenizerFast:
    """Byte-level BPE of 40 merges."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    backend.train_from_iterator(
        SAMPLE,
        trainers.BpeTrainer(
            vocab_size=296, initial_alphabet=alphabet, special_tokens=["<end>"], show_progress=False
        ),
    )
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<end>")


def sentence_pieces() -> PreTrainedTokenizerFast:
    """BPE over words that begin with a mark, with bytes for unknown characters."""
    backend = Tokenizer(models.BPE(byte_fallback=True, unk_token="<end>"))
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    trainer = trainers.BpeTrainer(vocab_size=40, special_tokens=["<end>"], show_progress=False)
    backend.train_from_iterator([text.replace("é", "") for text in SAMPLE], trainer)
    vocab = backend.get_vocab()
    vocab |= {f"<0x{byte:02X}>": len(vocab) + byte for byte in range(256)}
    merges = [tuple(pair) for pair in json.loads(backend.to_str())["model"]["merges"]]
    backend.model = models.BPE(vocab, merges, byte_fallback=True, unk_token="<end>")
    backend.decoder = decoders.Sequence(
        [decoders.ByteFallback(), decoders.Metaspace(prepend_scheme="always")]
    )
    backend.add_special_tokens([AddedToken("<end>")])
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<end>")


def target_of(tokenizer: PreTrainedTokenizerFast) -> Target:
    model = tiny_target(vocab=len(tokenizer), layers=1).model
    return Target(model, tokenizer, "tiny")


TARGETS = {"byte-level": target_of(byte_level()), "sentence pieces": target_of(sentence_pieces())}


def covers_of(
    target: Target, vocabulary: ByteVocabulary, text: bytes
) -> Iterator[tuple[tuple[int, ...], float]]:
    """Every cover of a text that the tokenizer writes, with its probability."""
    waiting: list[tuple[tuple[int, ...], float]] = [((), 1.0)]
    while waiting:
        tokens, value = waiting.pop()
        probs_V = target.model(torch.tensor([[0, *tokens]])).logits[0, -1].softmax(-1)
        spelled = vocabulary.spelled(tokens)
        for i, data in vocabulary.data.items():
            grown = spelled + data
            if not (grown.startswith(text) or text.startswith(grown)):
                continue
            cover = (*tokens, i)
            if not vocabulary.written([cover])[0]:
                continue
            if len(grown) < len(text):
                waiting.append((cover, value * float(probs_V[i])))
            else:
                yield cover, value * float(probs_V[i])


@pytest.mark.parametrize("kind", TARGETS)
@pytest.mark.parametrize("text", ["t", "the c", "the cat sa", "é", "12"])
def test_probabilities_are_sums_over_all_covers(kind: str, text: str) -> None:
    target, data = TARGETS[kind], text.encode()
    vocabulary = ByteVocabulary(target.tokenizer, target.shape.vocab_size)
    begun = vocabulary.begin(data)
    covers = dict(covers_of(target, vocabulary, begun))
    found = ByteText(TokenRows(target, [0]), vocabulary, frozenset([0]), data, 0.0)
    assert math.exp(found.log_prob()) == pytest.approx(sum(covers.values()), rel=1e-9)
    # The next byte: of covers that are longer, and of tokens after the one that is not.
    wanted = torch.zeros(END + 1, dtype=torch.double)
    for cover, value in covers.items():
        spelled = vocabulary.spelled(cover)
        if len(spelled) > len(begun):
            wanted[spelled[len(begun)]] += value
            continue
        probs_V = target.model(torch.tensor([[0, *cover]])).logits[0, -1].double().softmax(-1)
        wanted[END] += value * float(probs_V[0])
        for i, piece in vocabulary.data.items():
            if vocabulary.written([(*cover, i)])[0]:
                wanted[piece[0]] += value * float(probs_V[i])
    torch.testing.assert_close(found.next_byte(), wanted / wanted.sum(), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("kind", TARGETS)
def test_growing_a_text_commits_words_and_changes_nothing(kind: str) -> None:
    target = TARGETS[kind]
    vocabulary = ByteVocabulary(target.tokenizer, target.shape.vocab_size)
    rows = TokenRows(target, [0])
    text, data = (
        ByteText(rows, vocabulary, frozenset([0]), b"", 0.0),
        "the tea é on 12".encode(),
    )
    for place in range(len(data)):
        if place in (5, 9, 10, 13):
            once = ByteText(TokenRows(target, [0]), vocabulary, frozenset([0]), data[:place], 0.0)
            torch.testing.assert_close(text.next_byte(), once.next_byte(), rtol=1e-9, atol=1e-12)
            assert text.log_prob() == pytest.approx(once.log_prob(), abs=1e-9)
            assert text.text == once.text == data[:place]
        text.next_byte()
        text.extend(data[place : place + 1])
    assert rows._session.cache.lengths[0] > 1 and text.tokens == vocabulary.encode(
        vocabulary.begin(data)
    )


def test_a_branch_goes_on_without_the_text() -> None:
    """It runs rows of its own, and the text's words stay uncommitted."""
    target = TARGETS["byte-level"]
    vocabulary = ByteVocabulary(target.tokenizer, target.shape.vocab_size)
    rows = TokenRows(target, [0])
    text = ByteText(rows, vocabulary, frozenset([0]), b"the", 0.0)
    text.next_byte()
    branch = text.branch()
    branch.extend(b" tea on the mat")
    apart = ByteText(TokenRows(target, [0]), vocabulary, frozenset([0]), branch.text, 0.0)
    torch.testing.assert_close(branch.next_byte(), apart.next_byte())
    assert rows._session.cache.lengths == [1] and text.text == b"the"
    text.extend(b" hat")
    apart = ByteText(TokenRows(target, [0]), vocabulary, frozenset([0]), b"the hat", 0.0)
    torch.testing.assert_close(text.next_byte(), apart.next_byte())


def test_a_copied_text_goes_on_by_itself() -> None:
    """It shares the model and the vocabulary, and no rows."""
    target = TARGETS["byte-level"]
    vocabulary = ByteVocabulary(target.tokenizer, target.shape.vocab_size)

    def text_of(data: bytes) -> ByteText:
        return ByteText(TokenRows(target, [0]), vocabulary, frozenset([0]), data, 0.0)

    text = text_of(b"the cat sat on")
    text.next_byte()
    other = deepcopy(text)
    assert isinstance(other.model, TokenRows)
    assert other.vocabulary is vocabulary and other.model.target is target
    for each, more in ((text, b" the mat"), (other, b" that h")):
        each.extend(more)
        alone = text_of(b"the cat sat on" + more)
        torch.testing.assert_close(each.next_byte(), alone.next_byte())
        assert each.log_prob() == pytest.approx(alone.log_prob(), abs=1e-9)


def test_single_bytes_are_the_plain_model() -> None:
    target = tiny_target()
    vocabulary = ByteVocabulary(target.tokenizer, target.shape.vocab_size)
    data, ids = b"the cat", target.tokenizer.encode("the cat")
    found = ByteText(TokenRows(target, [1]), vocabulary, frozenset([0]), data, 0.0).next_byte()
    probs_V = target.model(torch.tensor([[1, *ids]])).logits[0, -1].double().softmax(-1)
    singles = {i: piece[0] for i, piece in vocabulary.data.items() if len(piece) == 1}
    wanted = torch.zeros(END + 1, dtype=torch.double)
    for i, byte in singles.items():
        wanted[byte] = probs_V[i]
    wanted[END] = probs_V[0]
    torch.testing.assert_close(found, wanted / wanted.sum())


def test_unchecked_covers_are_the_least_likely_ones() -> None:
    target = TARGETS["byte-level"]
    vocabulary = ByteVocabulary(target.tokenizer, target.shape.vocab_size)
    exact, close, fast = (
        ByteText(TokenRows(target, [0]), vocabulary, frozenset([0]), b"th", share).next_byte()
        for share in (0.0, 1e-3, 1.0)
    )
    assert float((exact - close).abs().sum()) < float((exact - fast).abs().sum()) < 1e-3


def test_ends_inside_of_characters() -> None:
    assert [unfinished(data) for data in (b"a", b"\xc3", b"\xe2\x82", b"a\xf0", "é".encode())] == [
        (0, 0), (1, 1), (2, 1), (1, 3), (0, 0),
    ]  # fmt: skip
    assert completions(b"a\xe2")[0] == b"\x80\x80" and len(completions(b"a\xe2")) == 64
    assert completions(b"ab") == [b""]
    target = TARGETS["byte-level"]
    vocabulary = ByteVocabulary(target.tokenizer, target.shape.vocab_size)
    text = ByteText(TokenRows(target, [0]), vocabulary, frozenset([0]), b"the \xc3", 0.0)
    probs = text.next_byte()
    assert float(probs[0x80:0xC0].sum()) == pytest.approx(1.0) and probs[0xA9] > 0


def test_a_text_may_go_on_with_another_one() -> None:
    """SentencePiece then puts no space before it."""
    target = TARGETS["sentence pieces"]
    vocabulary, ids = ByteVocabulary(target.tokenizer, 999), target.tokenizer.get_vocab()
    assert vocabulary.encode(b"b1") == (ids["b"], ids["1"])
    whole, word = vocabulary.encode(b" the cat"), vocabulary.encode(b" the")
    assert whole is not None and word is not None and whole[: len(word)] == word
    both = ByteText(TokenRows(target, [0]), vocabulary, frozenset([0]), b"the cat", 0.0)
    rest = ByteText(TokenRows(target, [0, *word]), vocabulary, frozenset([0]), b" cat", 0.0, False)
    torch.testing.assert_close(both.next_byte(), rest.next_byte())
    assert rest.text == b" cat" and both.text == b"the cat"


def test_mistakes_are_refused() -> None:
    vocabulary = longest_match()
    with pytest.raises(ValueError, match="no token goes on with b'AC'"):
        ByteText(TwoStates(), vocabulary, frozenset(), b"AC").next_byte()
    with pytest.raises(ValueError, match="unchecked must lie between 0 and 1, got 2"):
        ByteText(TwoStates(), vocabulary, frozenset(), b"A", 2)
    with pytest.raises(ValueError, match="nothing stands before the text"):
        TokenRows(tiny_target(), [])
    backend = Tokenizer(models.WordLevel({"a": 0}, unk_token="a"))
    backend.decoder = decoders.WordPiece()
    with pytest.raises(ValueError, match="byte-level BPE or SentencePiece"):
        ByteVocabulary(PreTrainedTokenizerFast(tokenizer_object=backend), 1)
