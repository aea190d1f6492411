"""Words and units: joined words are the text, and ids spell what was encoded."""

from __future__ import annotations

import pytest

from modules.tokenization.units import SubwordUnits, make_units, units_of
from modules.tokenization.words import capped, spaced_words, unicode_words, with_typos

TEXTS = [
    "Hello, world!  Isn't it\n\n\tfine? (yes) -- 3.14 camelCase foo_bar a.b",
    "  leading and trailing  ",
    "Ünïcode 東京タワー 👩‍👩‍👧 e\u0301",
    "'quoted' \"twice\"...",
    "",
    "\n",
]


@pytest.mark.parametrize("text", TEXTS)
def test_words_joined_are_the_text(text: str) -> None:
    for split in (unicode_words, spaced_words):
        words = split(text)
        assert "".join(words) == text and all(words)
        assert "".join(part for word in words for part in capped(word, 8)) == text


def test_unicode_words_keep_a_space_in_front_and_punctuation_behind() -> None:
    assert unicode_words("Hello, world!") == ["Hello,", " world!"]
    assert unicode_words("camelCase don't") == ["camel", "Case", " don'", "t"]
    assert unicode_words('say "no" now') == ["say", ' "no"', " now"]
    assert unicode_words("a  b") == ["a", " ", " b"]


def test_long_words_are_cut_between_characters() -> None:
    assert list(capped("東京タワー", 7)) == ["東京", "タワ", "ー"]
    with pytest.raises(ValueError, match="has 4 bytes, a word at most 3"):
        list(capped("👩", 3))


@pytest.mark.parametrize("kind", ["bytes", "characters", "subwords"])
def test_units_spell_what_they_encode_and_survive_being_saved(kind: str) -> None:
    text = TEXTS[0] + TEXTS[2]
    units = units_of(make_units(kind, unicode_words(text), 300).config())
    for word in unicode_words(text):
        ids = units.encode(word)
        assert units.decode(ids) == word
        assert sum(units.widths[i] for i in ids) == len(word.encode())
        assert max(ids) < units.size == len(units.widths)


def test_subwords_never_cross_a_word() -> None:
    units = make_units("subwords", [" ab", " ab", " ab", "ab"] * 20, 300)
    assert isinstance(units, SubwordUnits) and len(units.encode(" ab")) == 1


def test_units_that_cannot_be_made_or_read_are_refused() -> None:
    with pytest.raises(ValueError, match="units 'letters' is unknown"):
        make_units("letters", [], 9)
    with pytest.raises(ValueError, match="no room for all bytes"):
        make_units("subwords", [], 255)
    for config in ({}, {"kind": "subwords", "tokenizer": "{"}, {"kind": "characters"}):
        with pytest.raises(ValueError, match="units cannot be read"):
            units_of(config)


def test_typos_swap_letters_and_nothing_else() -> None:
    text = "several longer words stand here, 12345 too"
    spoiled = with_typos(text, 1.0, 0)
    assert spoiled != text and sorted(spoiled) == sorted(text)
    assert with_typos(text, 0.0, 0) == text
    assert "12345" in spoiled
