"""Decoding byte by byte: one model, several of different vocabularies, and gaps in a text."""

from __future__ import annotations

from codecs import getincrementaldecoder
from copy import copy

import pytest
import torch

from modules.byte_level.covers import END
from modules.byte_level.decoding import ByteDecoder, fill_in_the_middle
from modules.byte_level.vocabulary import going_on
from modules.contracts.sampling import Sampling
from tests.fakes import tiny_target
from tests.modules.byte_level.test_covers import TARGETS

BYTES, PIECES = TARGETS["byte-level"], TARGETS["sentence pieces"]


def test_the_likeliest_byte_comes_next_until_the_limit() -> None:
    decoder = ByteDecoder(BYTES)
    trace = decoder.decode([[0]], Sampling(), 6)[0]
    (text,) = decoder.texts([0])
    answer = decoder._vocabularies[0].spelled(trace.ids)
    for byte in answer:
        assert int(decoder.next_byte([text]).argmax()) == byte
        text.extend(bytes([byte]))
    assert len(trace.ids) == 6 == len(trace.drafted) and trace.time_to_first_token > 0


def test_a_text_ends_where_no_byte_is_drawn(monkeypatch: pytest.MonkeyPatch) -> None:
    decoder, probs = ByteDecoder(BYTES), torch.zeros(END + 1).double()
    probs[END] = 1.0
    monkeypatch.setattr(decoder, "next_byte", lambda texts: probs)
    for sampling in (Sampling(), Sampling(1.0)):
        assert decoder.decode([[0]], sampling, 6)[0].ids == [0]


def test_bytes_are_drawn_from_their_distribution() -> None:
    decoder = ByteDecoder(BYTES)
    probs = decoder.next_byte(decoder.texts([0], b"th"))
    counts, draws = torch.zeros(END + 1), 300
    texts = decoder.texts([0], b"th")
    for seed in range(draws):
        drawn = list(_one(decoder, texts, Sampling(0.5, seed=seed)))
        counts[drawn[0] if drawn else END] += 1
    wanted = probs.square() / probs.square().sum()
    assert float((counts / draws - wanted).abs().sum() / 2) < 0.1


def _one(decoder: ByteDecoder, texts: list, sampling: Sampling) -> list[int]:
    """One drawn byte, which the texts then forget."""

    class Kept:
        def __init__(self, text) -> None:
            self.next_byte, self.extend = text.next_byte, lambda data: None

    return list(decoder.stream([Kept(text) for text in texts], sampling, 1))


@pytest.mark.parametrize("kind", TARGETS)
def test_answers_stay_readable_where_nothing_is_checked(kind: str) -> None:
    """A random model gives much to tokens that are no UTF-8."""
    decoder = ByteDecoder(TARGETS[kind], unchecked=1.0)
    for seed in range(6):
        trace = decoder.decode([[0]], Sampling(1.0, seed=seed), 6)[0]
        # The limit may lie inside of a character.
        data = decoder._vocabularies[0].spelled(trace.ids)
        getincrementaldecoder("utf-8")().decode(data)
        assert trace.ids
    assert going_on(b"") == (*range(0x80), *range(0xC2, 0xF5))
    assert going_on(b"\xed") == tuple(range(0x80, 0xA0)), "no surrogates"


def test_an_ensemble_is_the_mean_of_its_models() -> None:
    """The other model's prompt is the text of the first one's."""
    both = ByteDecoder(BYTES, [PIECES], [3.0, 1.0])
    before = BYTES.tokenizer.encode("the hat")
    mixed = both.next_byte(both.texts(before, b" sa"))
    alone = ByteDecoder(BYTES)
    first = alone.next_byte(alone.texts(before, b" sa"))
    other = ByteDecoder(PIECES)
    second = other.next_byte(other.texts(PIECES.tokenizer.encode("the hat"), b" sa"))
    torch.testing.assert_close(mixed, 0.75 * first + 0.25 * second)
    trace = both.decode([before], Sampling(), 3)[0]
    assert 1 <= len(trace.ids) <= 3
    twice = ByteDecoder(BYTES, [TARGETS["byte-level"]])
    torch.testing.assert_close(
        twice.next_byte(twice.texts(before, b"a")), alone.next_byte(alone.texts(before, b"a"))
    )


def test_the_word_before_a_gap_begins_the_answer() -> None:
    target = tiny_target()
    names = ("<|user|>", "<|system|>", "<|assistant|>")
    encode = target.tokenizer.encode
    gap = fill_in_the_middle(target, "def f(num", "): return", names)
    user, system, assistant = (target.tokenizer.get_vocab()[name] for name in names)
    assert gap.before == [user, *encode("def"), system, *encode("): return"), assistant]
    assert gap.begun == b" f(num"
    assert fill_in_the_middle(target, "a  ", "b", names).begun == b"  "
    assert fill_in_the_middle(target, "a", "b", names).begun == b"a"
    with pytest.raises(ValueError, match="tiny-llama has no token '<fim>'"):
        fill_in_the_middle(target, "a", "b", ("<fim>", "<|user|>", "<|system|>"))


def test_mistakes_are_refused() -> None:
    with pytest.raises(ValueError, match="one per model"):
        ByteDecoder(BYTES, weights=[1.0, 2.0])
    decoder = ByteDecoder(BYTES)
    with pytest.raises(ValueError, match="does not follow repetition_penalty: leave it out"):
        decoder.decode([[0]], Sampling(repetition_penalty=1.2), 4)
    with pytest.raises(ValueError, match="one prompt at a time"):
        decoder.decode([[0], [0]], Sampling(), 4)
    with pytest.raises(ValueError, match="1 tokens and 600 new ones exceed"):
        decoder.decode([[0]], Sampling(), 600)
    short = copy(PIECES)
    short.__class__ = type("Short", (type(PIECES),), {"max_positions": 20})
    before = BYTES.tokenizer.encode("the hat the hat the hat")
    with pytest.raises(ValueError, match=f"new ones exceed {PIECES.name}'s context of 20"):
        ByteDecoder(BYTES, [short]).decode([before], Sampling(), 20)
