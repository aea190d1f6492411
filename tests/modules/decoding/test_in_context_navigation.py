"""In-context navigation and self-consistency: which tokens begin answers, and how these go on."""

from __future__ import annotations

import pytest
import torch

from modules.contracts.sampling import Sampling
from modules.decoding.decoder import SpeculativeDecoder
from modules.decoding.lossy.in_context_navigation import (
    InContextNavigation,
    KeptText,
    SelfConsistency,
    last_value,
)
from tests.fakes import tiny_target

TARGET = tiny_target()
PROMPT = [7, 8, 9, 7, 8]
LIST = {"opening": "see:\n", "item": "{number}. "}


def plain(prompt: list[int], limit: int) -> list[int]:
    return SpeculativeDecoder(TARGET).decode([prompt], Sampling(), limit)[0].ids


def test_one_answer_is_greedy_decoding() -> None:
    for kind in (InContextNavigation, SelfConsistency):
        decoder = kind(TARGET, 1, **LIST)
        trace = decoder.decode([PROMPT], Sampling(), 12)[0]
        assert trace.answers == [trace.ids] == [plain(decoder.listed(PROMPT, []), 12)]
    bare = SelfConsistency(TARGET, 1)
    assert bare.decode([PROMPT], Sampling(), 12)[0].ids == plain(PROMPT, 12)


def test_answers_follow_the_list_and_go_on_without_it() -> None:
    decoder = InContextNavigation(TARGET, 4, **LIST)
    trace = decoder.decode([PROMPT], Sampling(), 8)[0]
    start, texts, first = decoder.listed(PROMPT, []), [], []
    for ids in trace.answers:
        context = decoder.listed(PROMPT, texts)
        logits_V = TARGET.model(torch.tensor([context])).logits[0, -1]
        used = {decoder.spelled(token) for token in first}
        ranked = logits_V.argsort(descending=True).tolist()
        assert ids[0] == next(token for token in ranked if decoder.spelled(token) not in used)
        assert ids[1:] == ([] if ids[0] == 0 else plain([*start, ids[0]], 7))
        first.append(ids[0])
        texts.append(TARGET.tokenizer.decode(ids, skip_special_tokens=True))
    assert len({decoder.spelled(token) for token in first}) == 4
    text = TARGET.tokenizer.decode(decoder.listed(PROMPT, ["ab \n", "c"])[len(PROMPT) :])
    assert text.replace(" ", "") == "see:\n1.ab\n2.c\n3."


def test_an_answer_of_several_lines_is_one_item(monkeypatch: pytest.MonkeyPatch) -> None:
    """Otherwise its own lists are taken for items."""
    decoder, listed = InContextNavigation(TARGET, 2, **LIST), []
    monkeypatch.setattr(TARGET.tokenizer, "encode", lambda text, **_: listed.append(text) or [1])
    decoder.listed(PROMPT, [" a b\n2. c \n\n d\n", "\ne"])
    assert listed == ["see:\n1.  a b 2. c d\n2.  e\n3. "]


@pytest.mark.parametrize("item", ["{n}.", "{", "{}.", "{number.x}"])
def test_an_item_with_another_field_is_refused(item: str) -> None:
    with pytest.raises(ValueError, match="item .* write {number}"):
        InContextNavigation(TARGET, 2, item=item)


def test_cosines_with_the_keys_found_before_are_stated() -> None:
    decoder = InContextNavigation(TARGET, 3, **LIST)
    trace = decoder.decode([PROMPT], Sampling(), 5)[0]
    start = decoder.listed(PROMPT, [])
    texts = [TARGET.tokenizer.decode(trace.answers[0], skip_special_tokens=True)]
    key = TARGET.architecture.head.weight[trace.answers[0][0]].float()
    for name, ids in (("plain", start), ("listed", decoder.listed(PROMPT, texts))):
        hidden = TARGET.model(torch.tensor([ids]), output_hidden_states=True).hidden_states[-1]
        cosine = torch.cosine_similarity(hidden[0, -1].float(), key, dim=0)
        assert trace.figures[f"explored_cosine_{name}"][0] == pytest.approx(float(cosine), abs=1e-5)
    assert len(trace.figures["explored_cosine_listed"]) == 2
    assert set(decoder.quality_of([trace])) >= {"explored_cosine_plain", "distinct_2"}


def test_a_batch_of_answers_is_each_alone() -> None:
    decoder = SelfConsistency(TARGET, 5, **LIST)
    trace = decoder.decode([PROMPT], Sampling(), 20)[0]
    start = decoder.listed(PROMPT, [])
    logits_V = TARGET.model(torch.tensor([start])).logits[0, -1]
    first = decoder.unused(logits_V, ())[:5]
    wanted = [[token, *([] if token == 0 else plain([*start, token], 19))] for token in first]
    assert sorted(trace.answers) == sorted(wanted)
    assert len({decoder.spelled(ids[0]) for ids in trace.answers}) == 5


def test_the_majority_has_the_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    texts = {9: "it is 3", 8: "1,000.5 and 4", 7: "is 5, no 4.0", 6: "none"}
    decoder = SelfConsistency(TARGET, 4)
    monkeypatch.setattr(decoder, "unused", lambda logits_V, used: [9, 8, 7, 6])
    monkeypatch.setattr(
        "modules.decoding.lossy.in_context_navigation.greedy",
        lambda session, first, *_: [[token] for token in first],
    )
    monkeypatch.setattr(TARGET.tokenizer, "decode", lambda ids, **_: texts[ids[0]])
    trace = decoder.decode([PROMPT], Sampling(), 4)[0]
    assert trace.answers == [[8], [7], [9], [6]] and trace.figures == {"agreement": [0.5]}
    assert last_value("costs -1,234.50 now") == -1234.5 and last_value("none") is None
    assert last_value("10-5") == 5 and last_value("=-5") == -5


def test_reading_another_text_keeps_the_common_beginning() -> None:
    text = KeptText(TARGET, 40)
    for ids in ([5, 6, 7, 8], [5, 6, 9], [5, 6, 9], [5, 6, 9, 10, 11], [7]):
        logits_V, _ = text.read(ids)
        torch.testing.assert_close(logits_V, TARGET.model(torch.tensor([ids])).logits[0, -1])
        assert text.session.cache.lengths == [len(ids)]


def test_mistakes_are_refused() -> None:
    with pytest.raises(ValueError, match="between 1 and candidates, got 0 and 100"):
        InContextNavigation(TARGET, 0)
    with pytest.raises(ValueError, match="a prompt has no tokens"):
        InContextNavigation(TARGET).decode([[]], Sampling(), 4)
    with pytest.raises(ValueError, match="exceed the target's context of 512"):
        InContextNavigation(TARGET, 9, **LIST).decode([PROMPT], Sampling(), 100)
