"""SentenceKV: tokens that stay, sentences, and what rows read."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from modules.sparse_kv.policy import Step
from modules.sparse_kv.sentence_kv import (
    Observed,
    PendingRows,
    SentenceKV,
    SentenceSelection,
    importance,
)
from modules.target.tokenizers.sentences import ending_ids
from tests.fakes import tiny_target, tiny_tokenizer
from tests.modules.sparse_kv.checks import (
    Opened,
    check_batches,
    check_tree,
    check_whole,
    differs,
    prompts_of,
    step,
    step_bytes,
)

MARKS = ".?!abcdefgh"
"""Many tokens end a sentence, so that texts of random tokens have some."""


@pytest.fixture(scope="module")
def target() -> Any:
    return tiny_target(layers=4)


def small(**more: Any) -> SentenceKV:
    settings: dict[str, Any] = {"budget": 18, "factor": 1.4, "observed": 4, "kernel": 3}
    return SentenceKV(**(settings | {"start_tokens": 2, "recent": 9, "marks": MARKS} | more))


@pytest.mark.parametrize("more", [{}, {"observed": 30, "factor": 2.0}, {"marks": "z"}])
def test_rows_decode_as_alone(more: dict[str, Any], target: Any) -> None:
    policy = small(**more)
    check_tree(policy, target)
    check_batches(policy, target)
    assert differs(policy, target)


def test_a_whole_budget_is_full_attention(target: Any) -> None:
    check_whole(small(budget=44, factor=1.0), target)
    # The shorter of two sequences is read in full by way of its sentences.
    opened, prompts = Opened(target, small(budget=30, factor=1.0)), prompts_of((60, 23))
    tokens = [9, 32, 31, 34]
    ours, theirs = opened.plain(prompts, tokens), opened.full(prompts, tokens)
    torch.testing.assert_close(ours[1], theirs[1])
    assert (ours[0] - theirs[0]).abs().max() > 1e-3


def test_means_of_long_sentences_are_right_at_16_bits(target: Any) -> None:
    policy, one = small(budget=600, factor=1.0), torch.ones(1, dtype=torch.int64)
    selection, lengths = policy.start(target, 1), torch.tensor([600])
    keys = torch.rand(1, 2, 600, 8, generator=torch.Generator().manual_seed(0)).bfloat16()
    selection.read_prompt(torch.full((1, 600), 20), lengths)
    selection.observed = {0: Observed(torch.zeros(1, 4, 4, 8).bfloat16(), 0.3)}
    selection.end_prompt([keys], lengths)
    found = selection.layers[0].means_BKCD[:, :, 0]
    torch.testing.assert_close(found, keys.float().mean(2).bfloat16())
    # The queries of a sentence that is being written, a token at a time.
    zero = torch.zeros(1, 1, dtype=torch.int64)
    for written in range(400):
        selection.pending = {0: PendingRows(torch.ones(1, 1, 16).bfloat16(), zero > 0, zero)}
        selection.commit(Step(zero, one, torch.full((1, 1), 20), lengths + written))
    assert (selection.layers[0].sum_BKD == 400).all()


def test_endings_are_found_in_every_spelling() -> None:
    tokenizer: Any = tiny_tokenizer()
    assert {tokenizer.decode([i]) for i in ending_ids(tokenizer)} == {".", "?", "!"}

    class Spelled:
        texts = (".", ". ", " .", ".\n", '?"', "。", "...", "a.", "\n", "", "3.5", ")")

        def get_vocab(self) -> dict[str, int]:
            return {str(i): i for i in range(len(self.texts))}

        def batch_decode(self, ids: list[list[int]], **_: Any) -> list[str]:
            return [self.texts[i] for (i,) in ids]

    assert ending_ids(Spelled()) == frozenset(range(7))
    assert ending_ids(Spelled(), ".\n") == frozenset({0, 1, 2, 3, 6, 8})


def test_importance_is_the_attention_of_the_newest_queries() -> None:
    coin = torch.Generator().manual_seed(0)
    query, keys = (torch.randn(2, h, n, 8, generator=coin, dtype=torch.float64)
                   for h, n in ((4, 3), (2, 12)))  # fmt: skip
    lengths = torch.tensor([12, 2])
    found = importance(Observed(query, 0.3), keys, lengths, 3)
    for b, length in enumerate(lengths.tolist()):
        expected = torch.zeros(2, 12, dtype=torch.float64)
        for head in range(4):
            for i in range(3):
                place = length - 3 + i
                if place >= 0:
                    scores = query[b, head, i] @ keys[b, head // 2, : place + 1].T * 0.3
                    expected[head // 2, : place + 1] += scores.softmax(-1)
        pooled = [expected[:, max(0, s - 1) : s + 2].amax(-1) for s in range(12)]
        torch.testing.assert_close(found[b], torch.stack(pooled, -1))


def memory_of(target: Any, lengths: tuple[int, ...] = (60, 41)) -> tuple[SentenceSelection, Any]:
    session = Opened(target, small()).session(prompts_of(lengths))
    selection = session.reader.selection
    assert isinstance(selection, SentenceSelection)
    return selection, session


def test_every_token_that_stays_is_in_one_sentence_of_its_mean_key(target: Any) -> None:
    lengths = (60, 41)
    selection, session = memory_of(target, lengths)
    ids = prompts_of(lengths)
    ends = ending_ids(target.tokenizer, MARKS)
    keys = session.cache.layer_keys(4)
    for layer, memory in selection.layers.items():
        for b, text in enumerate(ids):
            number = [sum(token in ends for token in text[:t]) for t in range(len(text))]
            for head in range(2):
                stay = [slot for slot in memory.slots_BKM[b, head].tolist() if slot >= 0]
                # ⌊1.4 · 18⌋ tokens, each once, the observed ones among them.
                assert len(stay) == len(set(stay)) == 25 and set(stay) < set(range(len(text)))
                assert {len(text) - 1 - i for i in range(4)} < set(stay)
                sentences = memory.sentence_BKM[b, head][memory.slots_BKM[b, head] >= 0].tolist()
                assert sentences == [number[slot] for slot in stay]
                for c in range(selection.sentences):
                    mine = [slot for slot in stay if number[slot] == c]
                    assert bool(memory.filled_BKC[b, head, c]) == bool(mine)
                    if mine:
                        mean = keys[layer][b, head, mine].mean(0)
                        torch.testing.assert_close(memory.means_BKCD[b, head, c], mean)
        # Heads may keep different tokens.
        assert not torch.equal(memory.slots_BKM[:, 0], memory.slots_BKM[:, 1])


def test_written_sentences_join_when_they_end(target: Any) -> None:
    """Without an end one sentence grows."""
    selection, session = memory_of(target)
    for token in (75, 76, 32, 77, 78):
        step(session, token)
    assert selection.written_BP2.tolist() == [[[60, 63]], [[41, 44]]]
    assert selection.open_B.tolist() == [63, 44] and selection.count_B.tolist() == [2, 2]
    memory = selection.layers[2]
    mean = session.cache.layer_keys(4)[2][1, :, 41:44].mean(1)
    torch.testing.assert_close(memory.means_BKCD[1, :, -1], mean)
    for token in (75, 76, 77):
        step(session, token)
    assert selection.count_B.tolist() == [5, 5] and selection.written_BP2.shape[1] == 1


def test_rows_read_the_nearest_sentences_up_to_the_budget(target: Any) -> None:
    """Bytes: the budget, with the mean keys; at a sentence's first token all that stays."""
    selection, session = memory_of(target, (100,))
    slot, layers, tokens = 2 * 2 * 8 * 8, 4, [75, 76, 32, 77, 78, 79]
    means = slot // 2 * layers * selection.sentences
    for i, count in enumerate(step_bytes(session, tokens)):
        # The first token of the answer, and the one after the end of a sentence.
        written = int(i > 2)
        begins = i in (0, 3)
        # The prompt's tokens that stay and the answer's, or as many as the budget leaves; a mean
        # key is made of the keys of its sentence when it is needed first.
        room = 25 + i if begins else 18 - 2 - 9
        read = slot * layers * (2 + 9 + 1 + room + 1)
        made = 3 if i == 3 else 0
        assert count == read + means + slot // 2 * layers * (written + made)


def test_bad_settings_are_refused(target: Any) -> None:
    for wrong in ({"budget": 11}, {"kernel": 2}, {"factor": 0}, {"observed": 0}):
        with pytest.raises(ValueError, match="must be"):
            small(**wrong)
    with pytest.raises(ValueError, match="no token"):
        small(marks="§").start(target, 1)
