"""Lookup in the text and in a corpus: against brute force, and without a changed token."""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import pytest
import torch

from modules.contracts.drafter import Context
from modules.contracts.sampling import Sampling
from modules.decoding.decoder import SpeculativeDecoder
from modules.drafters.retrieval.rest import Rest
from modules.drafters.retrieval.suffix_array import Datastore
from modules.drafters.retrieval.suffix_automaton import Suffix, SuffixAutomaton
from modules.trees.trie import Trie, batch_of_trees, frequent_prefixes
from tests.fakes import tiny_target

TARGET = tiny_target()
PROMPTS = [[7, 8, 9, 7, 8], [20, 30], [40, 41, 42, 40, 41, 42, 40]]
CORPUS = [[7, 8, 9, 10, 11], [7, 8, 9, 10, 12], [7, 8, 5], [20, 30, 31]]


def contains(text: list[int], pattern: list[int]) -> list[int]:
    return [i for i in range(len(text) - len(pattern) + 1) if text[i : i + len(pattern)] == pattern]


def context(text: list[int]) -> Context:
    return Context(
        TARGET, torch.tensor([text[:-1]]), torch.tensor([len(text) - 1]), torch.tensor(text[-1:])
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> str:
    path: Path = tmp_path_factory.mktemp("datastore")
    own = [trace.ids for trace in SpeculativeDecoder(TARGET).decode(PROMPTS, Sampling(), 40)]
    Datastore.build(
        [*CORPUS, *(p + ids for p, ids in zip(PROMPTS, own))], TARGET.shape.vocab_size
    ).save(path)
    return str(path)


@pytest.mark.parametrize("seed", range(8))
def test_the_longest_suffix_match_is_brute_forces_at_every_step(seed: int) -> None:
    draw = random.Random(seed)
    automaton, text = SuffixAutomaton(), []
    for _ in range(120):
        text.append(draw.randrange(2 + seed % 3))
        automaton.extend(text[-1])
        sizes = [n for n in range(1, len(text)) if contains(text[:-1], text[-n:])]
        longest = max(sizes, default=0)
        assert automaton.matched == longest and len(automaton.moves) <= max(2, 2 * len(text) - 1)
        for shortest in (1, 3):
            assert automaton.continuation(5, shortest) == behind(text, longest, shortest, 5)


def behind(text: list[int], longest: int, shortest: int, count: int) -> list[int]:
    """What followed the first occurrence of the longest matching suffix; of shorter ones only where
    more followed them."""
    best: list[int] = []
    for n in range(longest, shortest - 1, -1):
        end = contains(text, text[-n:])[0] + n
        best = max(best, text[end : end + count], key=len)
    return best


def test_the_longest_match_is_drafted_behind_not_a_shorter_one() -> None:
    """`2` alone stood before 9 first, `1 2` before 8 and `4 1 2` before 7."""
    text = [2, 9, 9, 9, 1, 2, 8, 8, 8, 4, 1, 2, 7, 7, 7, 4, 1, 2]
    drafter = Suffix(TARGET.shape, tokens=3)
    assert drafter.propose(drafter.start(context(text)), 3).tokens_BN[0, 1:].tolist() == [7] * 3


def test_a_repeated_text_is_drafted_and_a_new_one_is_not() -> None:
    drafter = Suffix(TARGET.shape)
    for text, expected in (([5, 6, 7, 8, 9, 5, 6], [7, 8, 9, 5, 6]), ([5, 6, 7, 8], [])):
        assert (
            drafter.propose(drafter.start(context(text)), 7).tokens_BN[0, 1:].tolist() == expected
        )


@pytest.mark.parametrize("seed", range(3))
def test_ranges_of_the_suffix_array_are_brute_forces(seed: int) -> None:
    draw = random.Random(seed)
    documents = [[draw.randrange(3) for _ in range(draw.randrange(1, 40))] for _ in range(12)]
    store = Datastore.build(documents, 3)
    flat = store.tokens_M.tolist()
    for size in (1, 2, 3, 5):
        pattern = [draw.randrange(3) for _ in range(size)]
        begin, end = store.occurrences(pattern)
        assert sorted(store.suffixes_M[begin:end].tolist()) == contains(flat, pattern)
    text = [draw.randrange(3) for _ in range(20)]
    best = max((n for n in range(2, 17) if contains(flat, text[-n:])), default=0)
    assert store.longest_match(text, 16, 2)[0] == best


def test_prefixes_are_counted_and_counts_fall_along_paths() -> None:
    found = frequent_prefixes(np.array([[1, 2, 3], [1, 2, 4], [5, 6, -1], [1, 7, -1]]), 5)
    assert found[:2] == [([1], 3), ([1, 2], 2)] and found[2][1] == 1
    everything = dict(
        (tuple(path), count)
        for path, count in frequent_prefixes(np.random.randint(0, 3, (50, 4)), 999)
    )
    assert all(
        count <= everything[path[:-1]] for path, count in everything.items() if len(path) > 1
    )
    assert sum(count for path, count in everything.items() if len(path) == 1) == 50


def test_fusing_shares_prefixes_and_keeps_the_union() -> None:
    trie = Trie(9)
    for path in ([1, 2, 3], [1, 2, 4], [1, 2], [5]):
        trie.fuse(path, 99)
    assert {tuple(trie.path(node)) for node in range(1, len(trie))} == {
        (1,),
        (1, 2),
        (1, 2, 3),
        (1, 2, 4),
        (5,),
    }
    tree = batch_of_trees([trie, Trie(8)], torch.device("cpu"))
    assert (
        tree.topology.depth[0].tolist() == [0, 1, 2, 3, 3, 1] and tree.acceptable_BN[1].sum() == 1
    )


def test_rest_drafts_the_commonest_continuation_and_nothing_where_nothing_is_known(
    folder: str,
) -> None:
    drafter = Rest(TARGET.shape, folder)
    tree = drafter.propose(drafter.start(context([3, 7, 8, 9])), 3)
    assert tree.tokens_BN[0, 1:].tolist()[0] == 10
    assert drafter.propose(drafter.start(context([101, 102])), 3).size == 1


def test_of_many_occurrences_those_read_are_spread_evenly(tmp_path: Path) -> None:
    """Suffixes stand in the order of the ids that follow: the first ones would be the lowest ids,
    however rare.
    """
    Datastore.build([[7, 8, 10], [7, 8, 11], *[[7, 8, 90]] * 18], TARGET.shape.vocab_size).save(
        tmp_path
    )
    found = Rest(TARGET.shape, str(tmp_path), hits=5).retrieve([3, 7, 8], 3)
    assert found[0] == ([90], 4) and found[1] == ([10], 1)
    assert dict(
        (tuple(path), count)
        for path, count in Rest(TARGET.shape, str(tmp_path)).retrieve([3, 7, 8], 3)
    ) == {(90,): 18, (10,): 1, (11,): 1}


@pytest.mark.parametrize("prompts", [PROMPTS, PROMPTS[:1]])
@pytest.mark.parametrize("name", ["suffix", "rest", "rest_wide"])
def test_greedy_output_is_the_targets_own(name: str, prompts, folder: str) -> None:
    drafter = {
        "suffix": lambda: Suffix(TARGET.shape),
        "rest": lambda: Rest(TARGET.shape, folder),
        "rest_wide": lambda: Rest(TARGET.shape, folder, tokens=32),
    }[name]()
    plain = SpeculativeDecoder(TARGET).decode(prompts, Sampling(), 40)
    drafted = SpeculativeDecoder(TARGET, drafter).decode(prompts, Sampling(), 40)
    assert [trace.ids for trace in drafted] == [trace.ids for trace in plain]
    if name != "suffix":
        assert len(drafted[0].accepted) < len(plain[0].accepted) / 2


def test_a_wrong_datastore_is_refused(tmp_path: Path, folder: str) -> None:
    with pytest.raises(ValueError, match="does not exist: build it"):
        Rest(TARGET.shape, str(tmp_path / "none"))
    with pytest.raises(ValueError, match="vocabulary of 128"):
        Rest(tiny_target(vocab=96).shape, folder)
    with pytest.raises(ValueError, match="no tokens"):
        Datastore.build([[]], 5)
