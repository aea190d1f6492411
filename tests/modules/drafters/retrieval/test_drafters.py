"""Drafters without training: what they draft, what they remember, and that they change no token."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from scipy import stats

from checkpoints.pretrained import load_pretrained, save_pretrained
from checkpoints.provenance import Provenance
from modules.contracts.drafter import Context, DraftState
from modules.contracts.sampling import Sampling
from modules.contracts.shapes import TargetShape
from modules.contracts.token_tree import TokenTree
from modules.decoding.decoder import SpeculativeDecoder
from modules.drafters.retrieval.base import TextState, chains
from modules.drafters.retrieval.prompt_lookup import PromptLookup
from modules.drafters.retrieval.token_recycling import TEMPLATE, UNKNOWN, TokenRecycling
from modules.trees.static import StaticTree
from tests.fakes import tiny_target

TARGET = tiny_target()
PROMPTS = [[7, 8, 9, 7, 8], [20, 30], [40, 41, 42, 40, 41, 42, 40]]
DRAFTERS = {
    "prompt_lookup": lambda: PromptLookup(TARGET.shape),
    "token_recycling": lambda: TokenRecycling(TARGET.shape),
    "token_recycling_prompt": lambda: TokenRecycling(TARGET.shape, tokens=80, recycle_prompt=True),
}


@pytest.mark.parametrize("name", DRAFTERS)
@pytest.mark.parametrize("prompts", [PROMPTS, PROMPTS[:1]])
def test_greedy_output_is_the_targets_own(name: str, prompts) -> None:
    plain = SpeculativeDecoder(TARGET).decode(prompts, Sampling(), 40)
    drafted = SpeculativeDecoder(TARGET, DRAFTERS[name]()).decode(prompts, Sampling(), 40)
    assert [trace.ids for trace in drafted] == [trace.ids for trace in plain]


def text_state(text: list[int]) -> TextState:
    ids, length = torch.tensor([text]), torch.tensor([len(text) - 1])
    context = Context(TARGET, ids[:, :-1], length, ids[:, -1])
    state = PromptLookup(TARGET.shape).start(context)
    assert isinstance(state, DraftState) and state.text_BL[0, : len(text)].tolist() == text
    return state


def test_the_longest_ngram_wins_and_of_equals_the_latest_that_a_whole_draft_follows() -> None:
    """A text that goes round is drafted as far as it is known, not only to its period."""
    lookup = PromptLookup(TARGET.shape, longest=2, tokens=3)
    for text, expected in (
        ([1, 2, 50, 9, 2, 60, 61, 62, 63, 1, 2], [50, 9, 2]),
        ([5, 10, 5, 11, 12, 5], [11, 12, 5]),
        ([1, 2, 3, 4], []),
        ([6, 6, 6, 6], [6, 6]),
        ([6] * 9, [6] * 3),
        ([7, 5, 8, 9, 7, 5, 8, 4, 7, 5], [8, 4, 7]),
        ([5, 1, 5, 2, 5], [1, 5, 2]),
    ):
        assert lookup.propose(text_state(text), 3).tokens_BN[0, 1:].tolist() == expected


def test_chains_of_unequal_length_are_padded() -> None:
    tree = chains(torch.tensor([1, 2]), [torch.tensor([5, 6]), torch.tensor([], dtype=torch.long)])
    assert tree.tokens_BN[0].tolist() == [1, 5, 6]
    assert tree.topology.parents_BN.tolist() == [[-1, 0, 1], [-1, 1, 2]]
    assert tree.acceptable_BN.tolist() == [[True] * 3, [True, False, False]]


def test_the_template_is_the_papers() -> None:
    assert len(StaticTree(TEMPLATE).paths) == 80
    assert [sum(len(path) == depth for path in TEMPLATE) for depth in range(1, 7)] == [
        8,
        21,
        25,
        15,
        8,
        3,
    ]
    for budget in (1, 7, 40, 80):
        StaticTree(TokenRecycling(TARGET.shape).paths[:budget])


def cycle(drafter: TokenRecycling, period: int) -> None:
    size, count = drafter.successors_VK.shape
    drafter.successors_VK[:] = (torch.arange(size)[:, None] + torch.arange(1, count + 1)) % size
    drafter.successors_VK[50 : 50 + period, 0] = (
        50 + (torch.arange(period, dtype=torch.int32) + 1) % period
    )


def test_a_known_chain_is_drafted_to_full_depth() -> None:
    drafter = TokenRecycling(TARGET.shape, tokens=80)
    cycle(drafter, 3)
    state = drafter.start(
        Context(TARGET, torch.tensor([[9]]), torch.tensor([1]), torch.tensor([50]))
    )
    tree = drafter.propose(state, 80)
    assert tree.size == 81
    deepest = int(tree.topology.depth[0].argmax())
    path = []
    while deepest > 0:
        path, deepest = [int(tree.tokens_BN[0, deepest]), *path], int(tree.parents_BN[0, deepest])
    assert path == [51, 52, 50, 51, 52, 50]


def test_every_verified_node_is_recycled_and_the_last_row_of_a_token_counts() -> None:
    drafter = TokenRecycling(TARGET.shape, successors=2)
    logits = torch.zeros(3, TARGET.shape.vocab_size)
    logits[0, [5, 6]] = torch.tensor([2.0, 1.0])
    logits[1, [7, 8]] = torch.tensor([2.0, 1.0])
    logits[2, [9, 4]] = torch.tensor([2.0, 1.0])
    drafter.recycle(torch.tensor([30, 31, 30]), logits)
    assert drafter.successors_VK[30].tolist() == [9, 4] and drafter.successors_VK[31].tolist() == [
        7,
        8,
    ]
    assert int((drafter.successors_VK != UNKNOWN).sum()) == 4
    drafter.forget()
    assert bool((drafter.successors_VK == UNKNOWN).all())


def test_successors_of_tokens_that_were_never_read_are_not_drafted() -> None:
    """The first sequence knows 30 and 5, the second nothing; unused rows are not verified."""
    drafter = TokenRecycling(TARGET.shape, successors=2, tokens=80)
    drafter.successors_VK[-1] = torch.tensor([3, 4])
    drafter.successors_VK[30] = torch.tensor([5, 6])
    drafter.successors_VK[5] = torch.tensor([30, 0])
    context = Context(TARGET, torch.tensor([[9], [9]]), torch.tensor([1, 1]), torch.tensor([30, 7]))
    tree = drafter.propose(drafter.start(context), 80)
    paths = paths_of(tree, 0)
    assert {(5,), (6,), (5, 30), (5, 0), (5, 30, 5), (5, 30, 6)} <= paths
    assert not {
        path
        for path in paths
        for unread in ((6,), (5, 0))
        if path[: len(unread)] == unread and len(path) > len(unread)
    }
    assert tree.size == len(paths) + 1 and paths_of(tree, 1) == set()
    alone = Context(TARGET, torch.tensor([[9]]), torch.tensor([1]), torch.tensor([7]))
    assert drafter.propose(drafter.start(alone), 80).tokens_BN.tolist() == [[7]]


def paths_of(tree: TokenTree, sequence: int) -> set[tuple[int, ...]]:
    """The drafted paths of a sequence; no two of them may be equal."""
    tokens, parents = tree.tokens_BN[sequence].tolist(), tree.parents_BN[sequence].tolist()
    paths: dict[int, tuple[int, ...]] = {0: ()}
    for node in range(1, tree.size):
        if parents[node] != node:
            paths[node] = (*paths[parents[node]], tokens[node])
    assert len(set(paths.values())) == len(paths)
    return set(paths.values()) - {()}


def test_what_was_predicted_once_is_drafted_the_second_time() -> None:
    drafter = TokenRecycling(TARGET.shape, tokens=20)
    decoder = SpeculativeDecoder(TARGET, drafter)
    cold, hot = (decoder.decode([PROMPTS[1]], Sampling(), 40)[0] for _ in range(2))
    assert hot.ids == cold.ids and len(hot.accepted) < len(cold.accepted)


def test_a_cold_start_knows_nothing_of_earlier_prompts() -> None:
    """Every answer takes as many calls as the first time; hot, the second takes fewer."""
    calls = {}
    for cold in (True, False):
        decoder = SpeculativeDecoder(TARGET, TokenRecycling(TARGET.shape, tokens=20, cold=cold))
        calls[cold] = [
            len(decoder.decode([PROMPTS[1]], Sampling(), 40)[0].accepted) for _ in range(3)
        ]
    assert len(set(calls[True])) == 1 and calls[False][0] == calls[True][0] > calls[False][1]


def test_the_table_of_a_real_vocabulary_stays_below_two_megabytes_in_memory_and_on_disk(
    tmp_path: Path,
) -> None:
    """And a drafter that is loaded again starts hot."""
    drafter = TokenRecycling(TargetShape(576, 49152, 30, 9, 3, 64, 1536))
    assert drafter.successors_VK.numel() * drafter.successors_VK.element_size() < 2e6
    drafter.recycle(torch.tensor([5]), torch.arange(49152.0)[None])
    save_pretrained(drafter, tmp_path, Provenance.of(TARGET))
    assert sum(file.stat().st_size for file in tmp_path.rglob("*") if file.is_file()) < 2e6
    loaded = load_pretrained(tmp_path)
    assert isinstance(loaded, TokenRecycling) and torch.equal(
        loaded.successors_VK, drafter.successors_VK
    )
    assert loaded.successors_VK[5].tolist() == list(range(49151, 49143, -1))


@pytest.mark.parametrize("tokens", [7, 40])
def test_sampled_text_keeps_the_targets_distribution_behind_a_token_zero(tokens: int) -> None:
    """The distribution of the third token where the second is 0, from a cold table: chi-square
    against the exact one. Without an end of sequence, which would hide it."""
    target, prompt, third = tiny_target(vocab=5, seed=6), [3, 1], torch.zeros(5, 5)
    drafter = TokenRecycling(target.shape, successors=5, tokens=tokens, cold=True)
    decoder = SpeculativeDecoder(target, drafter, stop_ids=frozenset({-1}))
    for seed in range(30):
        for trace in decoder.decode([prompt] * 100, Sampling(1.0, seed=1000 * seed), 3):
            third[trace.ids[0], trace.ids[2]] += trace.ids[1] == 0
    statistic, freedom = 0.0, 0
    for first in range(5):
        with torch.no_grad():
            probs = target.model(torch.tensor([[*prompt, first, 0]])).logits[0, -1].softmax(-1)
        expected = probs * third[first].sum()
        statistic += float(((third[first] - expected) ** 2 / expected).sum())
        freedom += 4
    assert stats.chi2.sf(statistic, freedom) > 0.01


def test_wrong_settings_are_refused_and_nothing_is_trained() -> None:
    for wrong in (
        lambda: PromptLookup(TARGET.shape, 2, 3),
        lambda: PromptLookup(TARGET.shape, tokens=0),
        lambda: TokenRecycling(TARGET.shape, successors=9),
        lambda: TokenRecycling(TARGET.shape, tokens=0),
    ):
        with pytest.raises(ValueError, match="shortest|tokens|successors"):
            wrong()
    with pytest.raises(ValueError, match="no parameters"):
        PromptLookup(TARGET.shape).loss(None, TARGET, 0.0)
