"""Mined labels, checked against the raw model token by token."""

from __future__ import annotations

import pytest
import torch

from data.conversations import prompt_ids
from data.labelled.labelled import read_labelled, tokenize_labelled
from data.labelled.mining import first_divergence, mine
from modules.drafters.small_models.independent import Independent
from modules.runtime.numbers import final_number
from modules.target.target import Target
from tests.fakes import ScriptedDrafter, tiny_target

ASKED = [{"role": "user", "content": "how many?"}]
LIMIT = 12


def greedy(target: Target, ids: list[int], count: int) -> list[int]:
    said: list[int] = []
    while len(said) < count and not (said and said[-1] in target.eos_ids):
        logits = target.model(input_ids=torch.tensor([ids + said])).logits[0, -1]
        said.append(int(logits.argmax()))
    return said


class PrefixDrafter(ScriptedDrafter):
    """Its draft of a token depends on the text before it alone, as a language model's: the target's
    own token, or for one prefix in `every` the token behind that."""

    every = 3

    def draft(self, target: Target, ids: list[int]) -> int:
        token = greedy(target, ids, 1)[0]
        return (token + (sum(ids) % self.every == 0)) % self.vocab

    def _future(self, target: Target, ids: list[int]) -> list[int]:
        drafts: list[int] = []
        for _ in range(self.depth):
            drafts.append(self.draft(target, ids + drafts))
        return drafts


def siblings(drafter: PrefixDrafter, target: Target, ids: list[int]) -> list[int]:
    """What its trees hold behind a text, in their order."""
    token = drafter.draft(target, ids)
    return [*((token + 1 + decoy) % drafter.vocab for decoy in range(drafter.decoys)), token]


@pytest.mark.parametrize("depth", [1, 3])
@pytest.mark.parametrize("decoys", [0, 2])
def test_the_first_divergence_is_the_first_wrong_draft_of_all_positions(depth, decoys):
    target = tiny_target()
    prompt = prompt_ids(ASKED, target.tokenizer)
    own = greedy(target, prompt, LIMIT)
    drafter = PrefixDrafter(target.shape, depth=depth, decoys=decoys)
    wrong = [drafter.draft(target, prompt + own[:i]) != own[i] for i in range(LIMIT)]
    assert 2 < sum(wrong) < LIMIT - 2
    for start in range(LIMIT):
        found = first_divergence(target, drafter, prompt + own[:start], LIMIT - start)
        place = next((i for i in range(start, LIMIT) if wrong[i]), None)
        if place is None:
            assert found is None
            continue
        assert found is not None and found.text == own[start:place] and found.chosen == own[place]
        assert found.drafted == siblings(drafter, target, prompt + own[:place])
    always = ScriptedDrafter(target.shape, right=1.0, depth=depth)
    assert first_divergence(target, always, prompt, LIMIT) is None


def test_a_drafter_that_is_its_target_never_diverges():
    """Its cache and its drafts go on rightly from a path's last draft, and from any text."""
    for seed in range(3):
        target = tiny_target(seed=seed)
        drafter = Independent(target.shape, layers=2, draft_vocabulary=None)
        drafter.initialise(target)
        drafter.double().eval()
        prompt = prompt_ids(ASKED, target.tokenizer)
        for text in ([], [9], [9, 10, 11]):
            assert first_divergence(target, drafter, prompt + text, 24) is None


def answers(target: Target, text: list[int]) -> str | None:
    """The answer of the target's own end of a text; None where it does not end."""
    prompt = prompt_ids(ASKED, target.tokenizer)
    whole = text + (
        []
        if text and text[-1] in target.eos_ids
        else greedy(target, prompt + text, LIMIT - len(text))
    )
    return (final_number(written(target, whole)) or "") if whole[-1] in target.eos_ids else None


def slow_labels(target: Target, drafter: PrefixDrafter, most: int) -> dict[tuple[int, ...], int]:
    """The published search: over the whole of the current answer the first position, from behind
    the last mismatch on, whose token is not drafted there. Drafts that lead to the same final
    answer become the current one."""
    prompt, labels, border = prompt_ids(ASKED, target.tokenizer), {}, 0
    current = greedy(target, prompt, LIMIT)
    answer = answers(target, [])
    for _ in range(most if answer else 0):
        place = next(
            (
                i
                for i in range(border, len(current))
                if current[i] not in siblings(drafter, target, prompt + current[:i])
            ),
            None,
        )
        if place is None:
            break
        before, kept = current[:place], None
        for token in siblings(drafter, target, prompt + before):
            other = None if token in target.eos_ids else answers(target, [*before, token])
            if other is not None:
                labels[(*before, token)] = int(other == answer)
                kept = [*before, token] if kept is None and other == answer else kept
        if kept is not None:
            current = kept + greedy(target, prompt + kept, LIMIT - len(kept))
        border = place + 1
    return labels


def written(target: Target, ids: list[int]) -> str:
    return target.tokenizer.decode(ids, skip_special_tokens=True)


class Terse(Target):
    """A target that many tokens end, so that its answers do end."""

    @property
    def eos_ids(self) -> frozenset[int]:
        return frozenset({0, *range(60, 110)})


@pytest.mark.parametrize("every", [1, 2])
@pytest.mark.parametrize("decoys", [0, 2])
def test_labels_say_whether_the_answer_changes(decoys, every):
    """Consecutive mismatches too: with `every` 1 each position is one."""
    found, neighbours = [], 0
    for seed in (20, 22, 26, 27, 29, 41, 43):  # targets whose answers end, with a number
        plain = tiny_target(seed=seed)
        target = Terse(plain.model, plain.tokenizer, "terse")
        drafter = PrefixDrafter(target.shape, depth=2, decoys=decoys)
        drafter.every = every
        rows = list(mine(target, drafter, ASKED, LIMIT, 4))
        labels = {tuple(row["response_ids"]): row["spans"][0][2] for row in rows}
        assert labels == slow_labels(target, drafter, 4) and len(labels) == len(rows)
        lengths = {len(ids) for ids in labels}
        neighbours += sum(length + 1 in lengths for length in lengths)
        found += labels.values()
        for row in rows:
            (labelled,) = read_labelled(row)
            tokens = tokenize_labelled(labelled, target.tokenizer, 128)
            assert (
                tokens.input_ids.tolist()
                == prompt_ids(ASKED, target.tokenizer) + row["response_ids"]
            )
            assert tokens.loss_mask.nonzero()[:, 0].tolist() == [len(tokens) - 1]
            assert bool(tokens.labels[-1]) == bool(row["spans"][0][2])
    assert set(found) == {0, 1} and neighbours >= 3


def test_answers_that_are_cut_or_hold_no_number_give_no_label(monkeypatch):
    target = tiny_target()
    drafter = ScriptedDrafter(target.shape, right=0.0)
    assert greedy(target, prompt_ids(ASKED, target.tokenizer), LIMIT)[-1] not in target.eos_ids
    assert list(mine(target, drafter, ASKED, LIMIT, 4)) == []
    terse = Terse(target.model, target.tokenizer, "terse")
    monkeypatch.setattr("data.labelled.mining.final_number", lambda _: None)
    assert list(mine(terse, drafter, ASKED, LIMIT, 4)) == []


def test_tokens_of_another_tokenizer_are_refused():
    row = {"prompt": ASKED, "response": "abc", "response_ids": [5, 6], "spans": [[1, 2, 0]]}
    with pytest.raises(
        ValueError, match="not say what response does: they are another tokenizer's"
    ):
        tokenize_labelled(read_labelled(row)[0], tiny_target().tokenizer, 128)
    with pytest.raises(ValueError, match="inside the response"):
        read_labelled({**row, "spans": [[1, 3, 0]]})


def test_the_final_number():
    assert final_number("first 3, then 1,200.5 in all.") == "1200.5"
    assert final_number("$1,200.00") == final_number("so 1200") == "1200"
    # A hyphen after a number or a name is no sign.
    assert final_number("10-5") == final_number("x-5") == final_number("(1+2)-5") == "5"
    assert final_number("it is -5") == final_number("=-5") == final_number("$-5") == "-5"
    assert final_number("none") is None
