"""Mined labels, checked against the raw model token by token."""

from __future__ import annotations

import pytest
import torch

from data.conversations import prompt_ids
from data.divergences import final_number, first_divergence, mine
from data.labelled import read_labelled, tokenize_labelled
from modules.core.target import Target
from tests.fakes import ScriptedDrafter, tiny_target

ASKED = [{"role": "user", "content": "how many?"}]
LIMIT = 12


def greedy(target: Target, ids: list[int], count: int) -> list[int]:
    said: list[int] = []
    while len(said) < count and not (said and said[-1] in target.eos_ids):
        logits = target.model(input_ids=torch.tensor([ids + said])).logits[0, -1]
        said.append(int(logits.argmax()))
    return said


def test_the_first_divergence_is_the_first_wrong_draft():
    target = tiny_target()
    prompt = prompt_ids(ASKED, target.tokenizer)
    own = greedy(target, prompt, LIMIT)
    for seed in range(4):
        found = first_divergence(target, ScriptedDrafter(target.shape, right=0.6, seed=seed), prompt, LIMIT)
        assert found is not None and found.text == own[:len(found.text)]
        assert found.chosen == own[len(found.text)]
        assert found.drafted == [(found.chosen + 1) % target.shape.vocab_size]
    found = first_divergence(target, ScriptedDrafter(target.shape, right=0.0, decoys=2), prompt, LIMIT)
    assert found is not None and len(found.drafted) == 3
    assert first_divergence(target, ScriptedDrafter(target.shape, right=1.0), prompt, LIMIT) is None


def answers(target: Target, text: list[int]) -> str | None:
    """The answer of the target's own end of a text; None where it does not end."""
    prompt = prompt_ids(ASKED, target.tokenizer)
    whole = text + ([] if text and text[-1] in target.eos_ids else greedy(target, prompt + text, LIMIT - len(text)))
    return (final_number(written(target, whole)) or "") if whole[-1] in target.eos_ids else None


def slow_labels(target: Target, most: int, decoys: int) -> dict[tuple[int, ...], int]:
    """What `mine` should find when the drafts are the tokens behind the target's own and so many decoys."""
    prompt, text, labels = prompt_ids(ASKED, target.tokenizer), list[int](), {}
    answer = answers(target, text)
    for _ in range(most if answer else 0):
        own = greedy(target, prompt + text, LIMIT - len(text)) if len(text) < LIMIT else []
        if len(own) < 2:
            break
        tokens = [(own[1] + 2 + decoy) % target.shape.vocab_size for decoy in range(decoys)]
        tokens.append((own[1] + 1) % target.shape.vocab_size)
        said = {token: answers(target, [*text, own[0], token]) for token in tokens if token not in target.eos_ids}
        labels |= {(*text, own[0], token): int(one == answer) for token, one in said.items() if one is not None}
        text = [*text, own[0], next((token for token, one in said.items() if one == answer), own[1])]
        if text[-1] in target.eos_ids:
            break
    return labels


def written(target: Target, ids: list[int]) -> str:
    return target.tokenizer.decode(ids, skip_special_tokens=True)


class Terse(Target):
    """A target that many tokens end, so that its answers do end."""

    @property
    def eos_ids(self) -> frozenset[int]:
        return frozenset({0, *range(60, 110)})


@pytest.mark.parametrize("decoys", [0, 2])
def test_labels_say_whether_the_answer_changes(decoys):
    found = []
    for seed in range(8, 48):
        plain = tiny_target(seed=seed)
        target = Terse(plain.model, plain.tokenizer, "terse")
        rows = list(mine(target, ScriptedDrafter(target.shape, right=0.0, decoys=decoys), ASKED, LIMIT, 4))
        labels = {tuple(row["response_ids"]): row["spans"][0][2] for row in rows}
        assert labels == slow_labels(target, 4, decoys) and len(labels) == len(rows)
        found += labels.values()
        for row in rows:
            (labelled,) = read_labelled(row, "row")
            tokens = tokenize_labelled(labelled, target.tokenizer, 128)
            assert tokens.input_ids.tolist() == prompt_ids(ASKED, target.tokenizer) + row["response_ids"]
            assert tokens.loss_mask.nonzero()[:, 0].tolist() == [len(tokens) - 1]
            assert bool(tokens.labels[-1]) == bool(row["spans"][0][2])
    assert set(found) == {0, 1}


def test_answers_that_are_cut_or_hold_no_number_give_no_label(monkeypatch):
    target = tiny_target()
    drafter = ScriptedDrafter(target.shape, right=0.0)
    assert greedy(target, prompt_ids(ASKED, target.tokenizer), LIMIT)[-1] not in target.eos_ids
    assert list(mine(target, drafter, ASKED, LIMIT, 4)) == []
    terse = Terse(target.model, target.tokenizer, "terse")
    monkeypatch.setattr("data.divergences.final_number", lambda _: None)
    assert list(mine(terse, drafter, ASKED, LIMIT, 4)) == []


def test_tokens_of_another_tokenizer_are_refused():
    row = {"prompt": ASKED, "response": "abc", "response_ids": [5, 6], "spans": [[1, 2, 0]]}
    with pytest.raises(ValueError, match="response is 'abc': they are another tokenizer's"):
        tokenize_labelled(read_labelled(row, "row")[0], tiny_target().tokenizer, 128)
    with pytest.raises(ValueError, match="inside the response"):
        read_labelled({**row, "spans": [[1, 3, 0]]}, "row")


def test_the_final_number():
    assert final_number("first 3, then 1,200.5 in all.") == "1200.5"
    assert final_number("none") is None
