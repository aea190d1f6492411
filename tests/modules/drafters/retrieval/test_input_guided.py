"""Input-guided drafting: where copying goes on, and how many calls an edited copy takes."""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import one_hot

from modules.acceptance.rules import Draws, GreedyRule
from modules.contracts.drafter import Context
from modules.contracts.sampling import Sampling
from modules.contracts.verification import Verified
from modules.drafters.retrieval.input_guided import InputGuided, Source
from tests.fakes import tiny_target

TARGET = tiny_target()
EOS = 0
A, B, C, Z = 11, 12, 13, 99


def calls(
    inputs: list[list[int]], answers: list[list[int]], tokens: int = 64, longest: int = 3
) -> list[list[int]]:
    """Tokens of each call, per sequence, of a batch whose answers are known whatever is drafted.
    Sequences that have ended leave.
    """
    drafter = InputGuided(TARGET.shape, longest, tokens)
    width = max(map(len, inputs))
    ids_BT = torch.tensor([row + [5] * (width - len(row)) for row in inputs])
    lengths_B = torch.tensor([len(row) for row in inputs])
    first_B = torch.tensor([answer[0] for answer in answers])
    generators = tuple(torch.Generator() for _ in inputs)
    state = drafter.start(Context(TARGET, ids_BT, lengths_B, first_B, generators=generators))
    counts: list[list[int]] = [[] for _ in inputs]
    emitted, alive = [1] * len(inputs), list(range(len(inputs)))
    while alive:
        tree = drafter.propose(state, drafter.default_budget)
        # The target's next token depends on how many came before it alone.
        wanted_BN = torch.tensor(
            [
                [(answers[row] + [EOS] * 99)[emitted[row] + depth] for depth in range(tree.size)]
                for row in alive
            ]
        )
        verified = Verified(tree, one_hot(wanted_BN, TARGET.shape.vocab_size).double())
        accepted = GreedyRule()(tree, verified, Draws(Sampling(), []))
        state = drafter.absorb(state, verified, accepted)
        for row, count in zip(alive, accepted.lengths, strict=True):
            counts[row].append(count)
            emitted[row] += count
        going = [i for i, row in enumerate(alive) if emitted[row] < len(answers[row])]
        state, alive = (
            state.select(torch.tensor(going, dtype=torch.long)),
            [alive[i] for i in going],
        )
    return counts


def test_the_shortest_suffix_that_occurs_once_says_where_copying_goes_on() -> None:
    source = Source([A, B, A, C], 3)
    for output, place in (
        ([A], None),
        ([B, A], 3),
        ([Z, B, A], 3),
        ([Z, A], None),
        ([Z], None),
        ([A, B], 2),
        ([C], 4),
        ([], None),
    ):
        assert source.match(output) == place, output
    assert Source([A, B, C, Z, A, B, C], 3).match([A, B, C]) is None
    assert Source([5, A, B, C, Z, A, B, C], 4).match([5, A, B, C]) == 4


def test_an_answer_that_is_the_input_takes_one_call() -> None:
    text = [A, B, A, C, A, B, 20, 21]
    assert calls([text], [[*text, EOS]]) == [[len(text)]]
    # An end-of-sequence token in the input is the target's to give.
    assert calls([[*text, EOS]], [[*text, EOS]]) == [[len(text)]]


def test_one_new_token_takes_three_calls() -> None:
    """In parallel up to it, one token alone that finds the place again, in parallel to the end."""
    text = [20, 21, 22, 23, 24, 25, 26]
    answer = [20, 21, 22, Z, 24, 25, 26, EOS]
    assert calls([text], [answer]) == [[3, 1, 3]]
    # A token of the input that stands elsewhere misleads one draft.
    assert calls([text], [[20, 21, 22, 26, 24, 25, 26, EOS]]) == [[3, 1, 3]]


def test_sequences_of_a_batch_go_on_each_at_its_own_place() -> None:
    inputs = [[20, 21, 22, 23, 24, 25, 26], [30, 31], [A, B, A, C, 40, 41]]
    answers = [
        [20, 21, 22, Z, 24, 25, 26, EOS],
        [30, 31, EOS],
        [Z, A, B, A, C, 40, 41, EOS],
    ]
    alone = [calls([each], [answer])[0] for each, answer in zip(inputs, answers, strict=True)]
    assert calls(inputs, answers) == alone == [[3, 1, 3], [2], [1, 1, 5]]


def test_a_draft_that_the_budget_cuts_goes_on_although_its_suffix_is_ambiguous() -> None:
    text = [20, A, A, A, A, A, A, A, A, 21, 22]
    assert calls([text], [[*text, EOS]], tokens=4) == [[5, 5, 1]]


def test_only_the_answer_is_looked_up_and_not_the_prompt_before_it() -> None:
    text = [9, A, B, 50, 8, A, B, 51, 9]
    assert calls([text], [[A, B, 50, 8, EOS]]) == [[1, 1, 2]]


def test_lengths_below_one_are_refused_by_name() -> None:
    for name in ("longest", "tokens"):
        with pytest.raises(ValueError, match=f"{name} must be at least 1, got 0"):
            InputGuided(TARGET.shape, **{name: 0})
