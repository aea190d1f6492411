"""Mined labels, checked against the raw model token by token."""

from __future__ import annotations

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
        assert found.drafted == (found.chosen + 1) % target.shape.vocab_size
    assert first_divergence(target, ScriptedDrafter(target.shape, right=1.0), prompt, LIMIT) is None


def slow_labels(target: Target, most: int) -> list[int]:
    """What `mine` should find when every draft is the token behind the target's own."""
    prompt, text, labels = prompt_ids(ASKED, target.tokenizer), [], []
    answer = final_number(written(target, greedy(target, prompt, LIMIT)))
    for _ in range(most):
        own = greedy(target, prompt + text, LIMIT - len(text)) if len(text) < LIMIT else []
        if len(own) < 2:
            break
        kept = [*text, own[0], (own[1] + 1) % target.shape.vocab_size]
        rest = [] if kept[-1] in target.eos_ids else greedy(target, prompt + kept, LIMIT - len(kept))
        labels.append(int(final_number(written(target, kept + rest)) == answer))
        text = kept if labels[-1] else [*text, *own[:2]]
        if text[-1] in target.eos_ids:
            break
    return labels


def written(target: Target, ids: list[int]) -> str:
    return target.tokenizer.decode(ids, skip_special_tokens=True)


def test_labels_say_whether_the_answer_changes():
    found = []
    for seed in range(3):
        target = tiny_target(seed=seed)
        rows = list(mine(target, ScriptedDrafter(target.shape, right=0.0), ASKED, LIMIT, 4))
        labels = [row["spans"][0][2] for row in rows]
        assert labels == slow_labels(target, 4) and len(labels) > 1
        found += labels
        for row in rows:
            (labelled,) = read_labelled(row, "row")
            tokens = tokenize_labelled(labelled, target.tokenizer, 128)
            assert bool(tokens.loss_mask[-1]) and bool(tokens.labels[-1]) == bool(row["spans"][0][2])
    assert set(found) == {0, 1}


def test_the_final_number():
    assert final_number("first 3, then 1,200.5 in all.") == "1200.5"
    assert final_number("none") is None
