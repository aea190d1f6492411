"""Drafters of another tokenizer: what they read, what they draft, and that nothing changes."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, processors
from transformers import PreTrainedTokenizerFast

from eval.methods.huggingface import HuggingFaceUniversal
from modules.byte_level.covers import ByteText
from modules.byte_level.retokenised import LOOSE, Retokenised, continued
from modules.byte_level.token_rows import TokenRows
from modules.byte_level.vocabulary import ByteVocabulary
from modules.contracts.drafter import Frontier
from modules.contracts.sampling import Sampling
from modules.decoding.decoder import SpeculativeDecoder
from modules.drafters.small_models.byte_matching import ByteMatching
from modules.drafters.small_models.universal import (
    ForeignText,
    StringMatching,
    TokenIntersection,
    Universal,
)
from modules.target.target import Target
from tests.fakes import tiny_target
from tests.modules.byte_level.test_covers import TARGETS
from tests.modules.sampling import goodness

BYTES, PIECES = TARGETS["byte-level"], TARGETS["sentence pieces"]
KINDS = [TokenIntersection, StringMatching, ByteMatching]
PROMPTS = ["the cat sat on the mat", "to the", "that é hat"]


def longest_match(*pieces: str) -> PreTrainedTokenizerFast:
    """A tokenizer that takes the longest piece; its first piece ends texts."""
    model = models.WordPiece({piece: i for i, piece in enumerate(pieces)}, unk_token=pieces[0])
    model.continuing_subword_prefix = ""
    backend = Tokenizer(model)
    backend.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token=pieces[0])


def six_tokens() -> tuple[Target, Target]:
    """A target and a drafter's model of few tokens, which share some."""
    ours = longest_match("<end>", "a", "b", "ab", "c", "ba")
    theirs = longest_match("<end>", "c", "bc", "b", "a")
    return (
        Target(tiny_target(vocab=6, seed=2).model, ours, "target"),
        Target(tiny_target(vocab=5, layers=1, seed=5).model, theirs, "drafter"),
    )


def drafter_of(kind: type[Universal], target: Target, model: Target, length: int = 3) -> Universal:
    drafter = kind(target.shape, model, length)
    drafter.initialise(target)
    return drafter


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("target, model", [(BYTES, PIECES), (PIECES, BYTES)])
def test_greedy_answers_stay_alone_and_in_batches(
    kind: type[Universal], target: Target, model: Target
) -> None:
    prompts = [target.tokenizer.encode(text) for text in PROMPTS]
    plain = [SpeculativeDecoder(target).decode([p], Sampling(), 16)[0].ids for p in prompts]
    drafter = drafter_of(kind, target, model)
    decoder = SpeculativeDecoder(target, drafter)
    assert [trace.ids for trace in decoder.decode(prompts, Sampling(), 16)] == plain
    assert decoder.decode(prompts[:1], Sampling(), 16)[0].ids == plain[0]


@pytest.mark.parametrize(
    "kind, sampling",
    [
        (TokenIntersection, Sampling(1.0)),
        (TokenIntersection, Sampling(0.7, top_p=0.9)),
        (StringMatching, Sampling(1.0)),
        (ByteMatching, Sampling(1.0)),
    ],
)
def test_sampled_answers_keep_the_targets_distribution(
    kind: type[Universal], sampling: Sampling
) -> None:
    target, model = six_tokens()
    decoder = SpeculativeDecoder(target, drafter_of(kind, target, model), stop_ids=frozenset())
    assert goodness(decoder, [3, 1], sampling, runs=750, batch=250) > 1e-4


class Watched(TokenIntersection):
    """Notes the text that is read, and the logits after it."""

    def expand(self, state: Any, frontier: Frontier) -> torch.Tensor:
        logits = super().expand(state, frontier)
        if frontier.depth == 0:
            self.seen = [*getattr(self, "seen", []), *zip(state.texts, logits[:, 0])]
            for one in state.texts:
                self.texts = [*getattr(self, "texts", []), list(one.text.ids)]
        return logits


def test_the_text_is_read_in_the_drafters_own_tokens() -> None:
    drafter = drafter_of(Watched, BYTES, PIECES)
    assert isinstance(drafter, Watched)
    prompts = [BYTES.tokenizer.encode(text) for text in PROMPTS[:2]]
    SpeculativeDecoder(BYTES, drafter).decode(prompts, Sampling(), 12)
    assert len(drafter.texts) > 6
    for ids, (_, logits_D) in zip(drafter.texts, drafter.seen, strict=True):
        whole_V = PIECES.model(torch.tensor([ids])).logits[0, -1]
        torch.testing.assert_close(logits_D, whole_V[drafter.columns_D])


def test_the_text_begins_as_the_drafters_tokenizer_begins_texts() -> None:
    backend = copy.deepcopy(PIECES.tokenizer.backend_tokenizer)
    begin = backend.token_to_id("<end>")
    backend.post_processor = processors.TemplateProcessing(
        single="<end> $A", special_tokens=[("<end>", begin)]
    )
    names = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<end>", bos_token="<end>")
    drafter = drafter_of(Watched, BYTES, Target(PIECES.model, names, "begins"))
    assert isinstance(drafter, Watched)
    encode = BYTES.tokenizer.encode
    for prompt in (encode(PROMPTS[0]), [BYTES.tokenizer.eos_token_id, *encode(PROMPTS[0])]):
        drafter.texts = []
        SpeculativeDecoder(BYTES, drafter).decode([prompt], Sampling(), 6)
        wanted = names.encode(PROMPTS[0])
        assert drafter.texts and all(ids[: len(wanted) - 1] == wanted[:-1] for ids in drafter.texts)
    bytewise = drafter_of(ByteMatching, BYTES, drafter.language_model)
    text = bytewise.rewritten(encode(PROMPTS[0]), BYTES)
    assert text.ids == names.encode(PROMPTS[0])


def test_only_tokens_of_the_same_bytes_are_shared() -> None:
    target, model = six_tokens()
    drafter = drafter_of(TokenIntersection, target, model)
    assert isinstance(drafter, TokenIntersection) and drafter.columns_D is not None
    # <end>, a, b and c.
    assert drafter.vocabulary_D is not None and drafter.vocabulary_D.tolist() == [0, 1, 2, 4]
    assert drafter.columns_D.tolist() == [0, 4, 3, 1]
    both = drafter_of(TokenIntersection, BYTES, PIECES)
    pairs = zip(both.vocabulary_D.tolist(), both.columns_D.tolist(), strict=True)
    assert all(both.theirs.data.get(a) == both.own.data.get(b) for a, b in pairs)
    letter = PIECES.tokenizer.get_vocab()["t"]
    assert letter in both.columns_D.tolist()


@pytest.mark.parametrize("kind", TARGETS)
def test_a_growing_text_has_the_tokens_of_the_whole(kind: str) -> None:
    vocabulary = ByteVocabulary(TARGETS[kind].tokenizer, TARGETS[kind].shape.vocab_size)
    text, whole = Retokenised(vocabulary, "the cat sa"), "the cat sa"
    for more in ("t on", " the", " m", "at to the é", " east", " the tea that hat", " sat on it"):
        text.extend(more.encode())
        whole += more
        assert text.ids == vocabulary.tokenizer.encode(whole, add_special_tokens=False)
    assert len(text.tail) < len(whole) - 10 and len(text.tail) >= LOOSE
    half = Retokenised(vocabulary, "the ")
    half.extend(b"\xc3")
    assert half.ids == vocabulary.tokenizer.encode("the ", add_special_tokens=False)


def with_turns() -> tuple[ByteVocabulary, Target]:
    """A tokenizer with a special token, and a tiny model of it that begins with a letter."""
    tokenizer = copy.deepcopy(BYTES.tokenizer)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|turn|>"]})
    model = tiny_target(vocab=len(tokenizer), seed=23).model
    return ByteVocabulary(tokenizer, len(tokenizer)), Target(model, tokenizer, "turns")


def test_a_text_goes_on_behind_its_last_special_token() -> None:
    vocabulary, _ = with_turns()
    encode = vocabulary.tokenizer.encode
    text = Retokenised(vocabulary, "the cat<|turn|>sat")
    assert text.tail == b"sat" and text.ids == encode("the cat<|turn|>sat")
    text.extend(b" on the mat")
    assert text.ids == encode("the cat<|turn|>sat on the mat")
    assert Retokenised(vocabulary, "the cat<|turn|>").tail == b""
    # As text of another tokenizer: its bytes count.
    whole = encode(" cat<|turn|>sat on the")
    drafted = continued(vocabulary, b" cat<|turn|>sat", b" on the")
    assert vocabulary.spelled(drafted) == b" on the" and drafted == whole[-len(drafted) :]


def test_drafts_begin_with_the_answer_of_a_chat() -> None:
    """Its template has special tokens right before it."""
    _, target = with_turns()
    prompt = target.tokenizer.encode("the cat sat<|turn|>on")
    strings = SpeculativeDecoder(target, drafter_of(StringMatching, target, target))
    (trace,) = strings.decode([prompt], Sampling(temperature=0.0), 6)
    assert min(trace.offered) > 0
    # Without a string that goes on, the distribution would be uniform.
    drafter, tables = drafter_of(ByteMatching, target, target), []
    assert isinstance(drafter, ByteMatching)
    distribution = drafter.distribution

    def noted(text: ByteText, target: Target) -> torch.Tensor:
        tables.append(distribution(text, target))
        return tables[-1]

    drafter.distribution = noted  # type: ignore[method-assign]
    SpeculativeDecoder(target, drafter).decode([prompt], Sampling(temperature=0.0), 3)
    assert float(tables[0].exp().sum()) <= 1 + 1e-6


def test_a_drafted_string_is_written_after_the_last_words() -> None:
    target, model = six_tokens()
    drafter = drafter_of(StringMatching, target, model)
    assert isinstance(drafter, StringMatching)
    one, ends = ForeignText(Retokenised(drafter.own)), drafter.ends(target)
    one.text.extend(b"a")
    assert ends == {0: 0}
    # The a stands: "ab" cannot begin with it any more, what follows is written as after it.
    assert drafter.written(one, [3, 4, 1, 4, 3], ends) == [2, 1, 4, 3]
    assert drafter.written(one, [4, 3, 0, 1], ends) == [3, 0]
    pieces, words = ByteVocabulary(PIECES.tokenizer, len(PIECES.tokenizer)), PIECES.tokenizer
    for before, data in ((" the", " cat"), (" the c", "at sat"), ("the h", "at é")):
        ids = continued(pieces, before.encode(), data.encode())
        assert pieces.spelled(ids) == data.encode()
    assert words.convert_ids_to_tokens(continued(pieces, b" the", b" the")) == ["\u2581the"]


def test_a_character_that_is_not_whole_yet_is_finished() -> None:
    drafter = drafter_of(StringMatching, BYTES, PIECES)
    assert isinstance(drafter, StringMatching)
    one = ForeignText(Retokenised(drafter.own))
    one.text.extend(b" the \xc3")
    letter = drafter.own.longest_matches("é t".encode())
    assert drafter.theirs.spelled(drafter.written(one, letter, {})) == b"\xa9 t"
    assert drafter.written(one, drafter.own.longest_matches(b"at"), {}) == []


def test_byte_matching_draws_the_first_token_of_what_comes_next() -> None:
    """Every cover of the text counts with what it has beyond the end."""
    target, model = six_tokens()
    drafter = drafter_of(ByteMatching, target, model)
    assert isinstance(drafter, ByteMatching)
    # Own tokens: c, bc, b, a; the target's: a, b, ab, c, ba. "bc" begins with b, its rest with c.
    assert drafter.first(b"").tolist() == [1, 2, 2, 4] and drafter.first(b"b").tolist() == [4]
    text = ByteText(TokenRows(model, [4]), drafter.own, frozenset([0]), b"b", 1.0)
    probs = {}
    for ids in ([4], [4, 3]):
        logits_V = model.model(torch.tensor([ids])).logits[0, -1].double()
        probs[len(ids)] = logits_V.softmax(-1).tolist()
    lone = probs[1][3]
    wanted = [
        lone * probs[2][0],
        lone * probs[2][4],
        lone * (probs[2][3] + probs[2][2]),
        0.0,
        lone * probs[2][1] + probs[1][2],
        0.0,
    ]
    found = drafter.distribution(text, target).exp()
    torch.testing.assert_close(found, torch.tensor(wanted, dtype=torch.double))


def test_the_same_model_drafts_what_the_target_writes() -> None:
    """Every draft is accepted but where the target writes what its tokenizer would not."""
    target, _ = six_tokens()
    prompts = [[1, 4, 2, 4]]
    for kind in (TokenIntersection, StringMatching):
        decoder = SpeculativeDecoder(target, drafter_of(kind, target, target), stop_ids=frozenset())
        trace = decoder.decode(prompts, Sampling(), 40)[0]
        assert sum(trace.drafted) > 20


def test_universal_assistants_of_the_library_answer_as_plain_decoding() -> None:
    prompt = BYTES.tokenizer.encode(PROMPTS[0])
    plain = SpeculativeDecoder(BYTES).decode([prompt], Sampling(), 12)[0]
    trace = HuggingFaceUniversal(BYTES, PIECES, 3).decode([prompt], Sampling(), 12)[0]
    assert trace.ids == plain.ids and sum(trace.accepted) <= 12


def test_mistakes_are_refused() -> None:
    target, model = six_tokens()
    with pytest.raises(ValueError, match="draft_length must be at least 1, got 0"):
        StringMatching(target.shape, model, 0)
    with pytest.raises(ValueError, match=r"no model yet: call `initialise\(target\)`"):
        TokenIntersection(target.shape, model).ends(target)
    with pytest.raises(ValueError, match="is not trained"):
        TokenIntersection(target.shape, model).loss(None, target, 0.5)
    foreign = Target(model.model, longest_match("<stop>", "x", "y", "z", "xy"), "other")
    with pytest.raises(ValueError, match="no token of the target target"):
        drafter_of(TokenIntersection, target, foreign)
    assert TokenIntersection(target.shape, model).compatibility(target) is None
    with pytest.raises(ValueError, match="has the target's tokenizer: use hf_assisted"):
        HuggingFaceUniversal(target, target)
