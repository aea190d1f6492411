"""Quality of answers, and the metrics as Hugging Face loads them."""

from __future__ import annotations

from pathlib import Path

import evaluate
import pytest

from eval.tasks.answer_checks import (
    answer_number,
    common_prefix,
    paired_outcome,
    passes,
    program_of,
    rouge_l,
    same_number,
)

METRICS = Path(__file__).resolve().parents[3] / "eval" / "evaluate_metrics"


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr("evaluate.config.HF_METRICS_CACHE", str(tmp_path))


def load(name: str):
    return evaluate.load(str(METRICS / name))


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("so 3 apples and 4 pears. #### 7", 7.0),
        ("The answer is 1,250.", 1250.0),
        ("-2.5 degrees", -2.5),
        ("none", None),
        ("#### 12 dollars, not 13", 12.0),
        ("it is 5 ####", 5.0),
    ],
)
def test_the_answer_of_a_solution(text, number):
    assert answer_number(text) == number


def test_same_number_asks_for_both():
    assert same_number("It is 7.0", "#### 7")
    assert not same_number("no idea", "#### 7") and not same_number("8", "#### 7")


def test_rouge_l_by_hand():
    assert rouge_l("the cat sat", "The cat sat.") == 1.0
    assert rouge_l("a b c d", "b d x") == pytest.approx(2 * 2 / 7)
    assert rouge_l("", "word") == 0.0


def test_programs_run_apart_with_limits():
    assert passes("def double(n):\n    return 2 * n", "assert double(2) == 4")
    assert not passes("def double(n):\n    return n", "assert double(2) == 4")
    assert not passes("while True:\n    pass", "", seconds=1.0)
    assert not passes("block = bytearray(1 << 31)", "", memory=1 << 29)


def test_acceptance_length():
    found = load("acceptance_length").compute(predictions=[[1, 3], [2]])
    assert found["mean_accepted_tokens"] == 2.0
    assert found["acceptance_by_depth"] == [pytest.approx(2 / 3), pytest.approx(1 / 3)]
    assert found["accepted_length_histogram"] == [1, 1, 1]


def test_lossless_speedup_is_null_when_a_token_differs():
    metric, times = (
        load("lossless_speedup"),
        {"seconds": [1.0, 1.0], "reference_seconds": [2.0, 2.0]},
    )
    same = metric.compute(
        predictions=[[1, 2, 3], [4, 5, 6]], references=[[1, 2, 3], [4, 5, 6]], **times
    )
    assert same["speedup"] == pytest.approx(2.0) and same["ci95"] == (
        pytest.approx(2.0),
        pytest.approx(2.0),
    )
    other = metric.compute(
        predictions=[[1, 2, 3], [4, 5, 7]], references=[[1, 2, 3], [4, 5, 6]], **times
    )
    assert (
        other["speedup"] is None
        and other["ratio"] == pytest.approx(2.0)
        and other["identical_outputs"] == 1
    )
    with pytest.raises(ValueError, match="one entry per prompt"):
        metric.compute(predictions=[[1]], references=[[1]], **times)


def test_quality_metrics():
    numbers = load("exact_match_number").compute(
        predictions=["7", "8"], references=["#### 7", "#### 9"]
    )
    assert numbers == {"exact_match": 0.5}
    assert load("rouge_l").compute(predictions=["a b"], references=["a b"]) == {"rouge_l": 1.0}
    programs = load("pass_at_1").compute(
        predictions=["x = 1", "x = 2"], references=["assert x == 1"] * 2
    )
    assert programs == {"pass_at_1": 0.5}


def test_programs_are_taken_from_blocks_and_completions():
    given = "import math\n\ndef f(x):\n    pass\n"
    assert (
        program_of("Sure:\n```python\ndef f(x):\n    return 1\n```\nDone.", given, "f")
        == "import math\n\n\ndef f(x):\n    return 1\n"
    )
    assert program_of("    return 1", given, "f") == given + "    return 1"
    assert program_of("```\ndef f(x):\n    return 1", given, "f").endswith("return 1")


def test_paired_outcomes():
    better = paired_outcome([1, 1, 1, 1, 1, 0], [0, 0, 0, 0, 0, 0])
    assert (better["win"], better["tie"], better["loss"], better["verdict"]) == (5, 1, 0, "win")
    assert paired_outcome([0, 0, 0, 0], [1, 1, 1, 1])["verdict"] == "loss"
    even = paired_outcome([1, 0, 1, 0], [0, 1, 0, 1])
    assert (
        even["verdict"] == "tie"
        and even["ci95"][0] < 0 < even["ci95"][1]
        and even["difference"] == 0.0
    )
    assert paired_outcome([1], [0])["ci95"] is None


def test_common_prefix():
    assert common_prefix([1, 2, 9], [1, 2, 3, 4]) == 0.5
    assert common_prefix([], []) == 1.0 and common_prefix([1], []) == 0


def test_agreement_metrics():
    found = load("target_log_likelihood").compute(predictions=[[-1.0, -2.0], [-3.0]])
    assert found["log_likelihood_per_token"] == -2.0 and found["perplexity"] == pytest.approx(
        7.389, abs=1e-3
    )
    agreement = load("greedy_agreement").compute(
        predictions=[[1, 2], [3, 9]], references=[[1, 2], [3, 4]]
    )
    assert agreement == {"common_prefix": 0.75, "identical": 0.5}
    preference = load("paired_preference").compute(predictions=[1.0, 1.0], references=[0.0, 1.0])
    assert (preference["win"], preference["tie"], preference["loss"]) == (1, 1, 0)
