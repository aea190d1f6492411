"""`python -m eval.analysis.next_byte`: where texts are cut, and what is compared there."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch

import eval.analysis.next_byte
from eval.analysis.next_byte import Cut, command, cuts_inside_tokens, measure, plain_prompting
from modules.byte_level.covers import ByteText
from modules.byte_level.token_rows import TokenRows
from modules.byte_level.vocabulary import ByteVocabulary
from tests.modules.byte_level.test_covers import TARGETS


@pytest.mark.parametrize("kind", TARGETS)
def test_texts_are_cut_inside_of_tokens(kind: str) -> None:
    vocabulary = ByteVocabulary(TARGETS[kind].tokenizer, TARGETS[kind].shape.vocab_size)
    text = "the cat é that"
    cuts = list(cuts_inside_tokens(vocabulary, [text], 99, random.Random(0)))
    tokens = vocabulary.encode(vocabulary.begin(text.encode())) or ()
    ends = {len(vocabulary.spelled(tokens[:n])) for n in range(len(tokens) + 1)}
    assert cuts
    for cut in cuts:
        begun = vocabulary.begin(cut.text)
        assert len(begun) not in ends and text.encode()[len(cut.text)] == cut.byte
        assert text.encode().startswith(cut.text) and cut.text.decode()


def test_both_ways_are_measured_on_the_same_cuts(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    target = TARGETS["byte-level"]
    vocabulary = ByteVocabulary(target.tokenizer, target.shape.vocab_size)
    tokens = vocabulary.encode(b"the ca") or ()
    probs_V = target.model(torch.tensor([[0, *tokens]])).logits[0, -1].double().softmax(-1)
    plain = plain_prompting(target, vocabulary, 0, b"the ca")
    starts = [i for i, data in vocabulary.data.items() if data[:1] == b"t"]
    assert float(plain[ord("t")]) == pytest.approx(float(probs_V[starts].sum()))
    exact = ByteText(TokenRows(target, [0]), vocabulary, frozenset([0]), b"the ca").next_byte()
    figures = measure(target, [Cut(b"the ca", int(exact.argmax()))], 0)
    assert figures["exact"][0] == 1.0
    assert figures["exact"][1] == pytest.approx(float(exact.max().log2()), rel=1e-3)
    monkeypatch.setattr(eval.analysis.next_byte, "load_target", lambda *_, **__: target)
    (tmp_path / "texts").write_text("the cat sat\n\nthat hat\n")
    assert command(["--target", "tiny", "--texts", str(tmp_path / "texts"), "--per_text", "2"]) == 0
    printed = capsys.readouterr().out
    assert "4 cuts inside of tokens, 2 texts, tiny" in printed and "exact  next byte" in printed


@pytest.mark.parametrize(
    ("flags", "line"),
    [
        (["--limit", "0"], "limit must be at least 1, got 0"),
        (["--per_text", "-1"], "per_text must be at least 1, got -1"),
        (["--texts", "none"], "texts: none cannot be read"),
        (["--texts", "latin"], "texts: latin is not UTF-8"),
        (["--texts", "empty"], "texts 'empty' has no text"),
        (["--texts", "letters"], "texts 'letters' has no token of several bytes"),
    ],
)
def test_mistakes_are_named_before_anything_is_measured(
    flags: list[str], line: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    target = TARGETS["byte-level"]
    monkeypatch.setattr(eval.analysis.next_byte, "load_target", lambda *_, **__: target)
    monkeypatch.chdir(tmp_path)
    Path("texts").write_text("the cat sat on the mat\n")
    Path("empty").write_text("\n")
    Path("letters").write_text("t\n")
    Path("latin").write_bytes(b"\xe9t\xe9\n")
    with pytest.raises(ValueError, match=line):
        command(["--target", "tiny", "--texts", "texts", *flags])
