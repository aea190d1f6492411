"""What counts as the same answer, as a tie, and as another answer."""

from __future__ import annotations

import pytest
import torch

from eval.metrics import losslessness
from eval.metrics.acceptance import Identity
from eval.metrics.losslessness import LOW_PRECISION_GAP, judge, teacher_forced_logits
from modules.contracts.sampling import Sampling
from modules.decoding.decoder import SpeculativeDecoder
from modules.target.kv_cache import PromptMemory
from modules.target.target import Target
from tests.fakes import SEQ2SEQ, tiny_seq2seq, tiny_target

PROMPT = [10, 11, 12, 13, 20, 21]


@pytest.fixture(scope="module")
def target() -> Target:
    return tiny_target()


@pytest.fixture(scope="module")
def answer(target: Target) -> list[int]:
    ids = SpeculativeDecoder(target).decode([PROMPT], Sampling(), 12)[0].ids
    assert len(ids) == 12
    return ids


def test_teacher_forcing_predicts_the_answer_that_greedy_decoding_gave(
    target: Target, answer: list[int]
) -> None:
    logits = teacher_forced_logits(target, PROMPT, answer)
    assert logits.shape == (12, target.shape.vocab_size) and logits.argmax(-1).tolist() == answer


def test_a_long_prompt_is_read_once_for_all_answers(
    target: Target, answer: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = teacher_forced_logits(target, PROMPT, answer)
    monkeypatch.setattr(losslessness, "PROMPT_ROWS", 4)
    memory = PromptMemory()
    for spared in (False, True):
        with memory.used():
            found = teacher_forced_logits(target, PROMPT, answer)
        assert torch.allclose(found, expected, atol=1e-5)
        assert (memory.spared != 0) == spared
    assert teacher_forced_logits(target, PROMPT, []).shape[0] == 0


def test_identical(target: Target, answer: list[int]) -> None:
    assert judge(target, PROMPT, answer, answer).identity is Identity.IDENTICAL


def test_another_token_is_a_difference_with_its_place_and_gap(
    target: Target, answer: list[int]
) -> None:
    wrong = [*answer[:5], (answer[5] + 1) % 64, *answer[6:]]
    verdict = judge(target, PROMPT, answer, wrong)
    assert (
        verdict.identity is Identity.DIFFERENT
        and verdict.position == 5
        and (verdict.gap or 0) > 1e-3
    )
    assert (verdict.expected, verdict.actual) == (answer[5], wrong[5])


def test_a_shorter_or_longer_answer_is_a_difference(target: Target, answer: list[int]) -> None:
    assert judge(target, PROMPT, answer, answer[:-1]).identity is Identity.DIFFERENT
    assert judge(target, PROMPT, answer[:-1], answer).position == 11


def test_two_tokens_with_the_same_logit_are_a_tie_whatever_follows() -> None:
    target = tiny_target()
    answer = SpeculativeDecoder(target).decode([PROMPT], Sampling(), 8)[0].ids
    twin = next(token for token in range(5, 64) if token not in answer + PROMPT)
    with torch.no_grad():
        head = target.architecture.head.weight
        head[twin] = head[answer[3]]
    verdict = judge(target, PROMPT, answer, [*answer[:3], twin, 9, 9])
    assert verdict.identity is Identity.TIE and verdict.position == 3 and (verdict.gap or 0) <= 1e-3
    head_moved = head[answer[3]] * 1.5
    with torch.no_grad():
        head[twin] = head_moved
    assert judge(target, PROMPT, answer, [*answer[:3], twin, 9, 9]).identity is Identity.DIFFERENT


def test_low_precision_is_judged_by_every_tokens_gap_to_the_argmax() -> None:
    target = tiny_target(dtype=torch.bfloat16)
    answer = teacher_greedy(target, 8)
    verdict = judge(target, PROMPT, answer, answer)
    assert verdict.identity is Identity.IDENTICAL and verdict.flips is not None
    logits = teacher_forced_logits(target, PROMPT, answer)[4]
    worst = int(logits.argmin())
    assert float(logits.max() - logits[worst]) > LOW_PRECISION_GAP[torch.bfloat16]
    assert judge(target, PROMPT, answer, [*answer[:4], worst]).identity is Identity.DIFFERENT


def test_equal_answers_of_several_rows_are_read_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """By the target that gave them; another answer, prompt or target is read anew."""
    target, read = tiny_target(dtype=torch.bfloat16), []
    logits = losslessness.teacher_forced_logits
    monkeypatch.setattr(
        losslessness,
        "teacher_forced_logits",
        lambda target, *texts: read.append(texts) or logits(target, *texts),
    )
    answer = [5, 6, 7]
    first = judge(target, PROMPT, answer, answer)
    assert judge(target, PROMPT, answer, answer) == first and len(read) == 1
    forced = losslessness.teacher_forced(target, PROMPT, answer)
    assert len(read) == 1 and forced.first_T.double().mean() == 1 - (first.flips or 0)
    judge(target, PROMPT, answer, [5, 6, 8])
    judge(target, PROMPT[1:], answer, answer)
    judge(tiny_target("qwen2", dtype=torch.bfloat16), PROMPT, answer, answer)
    assert read == [(PROMPT, answer), (PROMPT, [5, 6, 8]), (PROMPT[1:], answer), (PROMPT, answer)]


def teacher_greedy(target: Target, length: int) -> list[int]:
    answer: list[int] = []
    for _ in range(length):
        answer.append(int(teacher_forced_logits(target, PROMPT, [*answer, 0])[-1].argmax()))
    return answer


@pytest.mark.parametrize("arch", SEQ2SEQ)
def test_answers_of_encoder_decoder_targets_are_judged_by_their_own_logits(arch: str) -> None:
    target, prompt = tiny_seq2seq(arch), [7, 8, 9]
    answer = SpeculativeDecoder(target).decode([prompt], Sampling(), 8)[0].ids
    for count in (1, 8):
        logits = teacher_forced_logits(target, prompt, answer[:count])
        read = [target.architecture.start_id, *answer[: count - 1]]
        expected = target.stock(
            input_ids=torch.tensor([prompt]), decoder_input_ids=torch.tensor([read])
        ).logits[0]
        assert (
            torch.allclose(logits, expected.float())
            and logits.argmax(-1).tolist() == answer[:count]
        )
    for position in (0, 3):
        wrong = [*answer[:position], (answer[position] + 1) % 128, *answer[position + 1 :]]
        verdict = judge(target, prompt, answer, wrong)
        assert verdict.identity is Identity.DIFFERENT and verdict.position == position
