"""Units as drafts: what they are counted as, and which of their tokens are drafted."""

from __future__ import annotations

from pathlib import Path

import pytest

from modules.contracts.sampling import Sampling
from modules.decoding.decoder import SpeculativeDecoder
from modules.drafters.merged.merged_tokens import MergedTokens, likely_tree
from modules.drafters.merged.unit_counts import UnitCounts, counted
from modules.drafters.retrieval.suffix_array import Datastore
from modules.tokenization.transfer.base_units import UnitRules
from modules.trees.trie import Trie
from tests.fakes import tiny_target

TARGET = tiny_target()
IDS = TARGET.tokenizer.get_vocab()
RULES = UnitRules.of(TARGET.tokenizer, "word")


def ids(text: str) -> list[int]:
    return [IDS[letter] for letter in text]


def paths(trie: Trie) -> list[list[int]]:
    return [trie.path(node) for node in range(1, len(trie))]


def test_units_are_runs_of_base_tokens_within_words() -> None:
    end = IDS["<|end|>"]
    (row,) = RULES.merged([[*ids("the cat the"), end, *ids("the")]], 99, least=2)
    assert [RULES.bytes_of(unit) for unit in row] == [
        b"the", b" ", b"c", b"a", b"t", b" ", b"the", b"", b"the",
    ]  # fmt: skip
    assert row[-2] == (end,)
    # A space in front belongs to the unit where it is frequent.
    (row,) = RULES.merged([ids("a the a the a the")], 99, least=2)
    assert (*ids(" the"),) in row
    assert max(map(len, RULES.merged([ids("the the")], 0)[0])) == 1


def test_the_rest_of_a_begun_unit_is_drafted_and_then_what_follows_it() -> None:
    rows = [[(1, 2, 3), (4, 5)], [(1, 2, 3), (4, 5)], [(1, 2, 3), (6,)], [(1, 7)]]
    counts = UnitCounts(rows)
    assert counts.beginning((1,)) == [((1, 2, 3), 0.75), ((1, 7), 0.25)]
    assert counts.following((1, 2, 3)) == [((4, 5), 2 / 3), ((6,), 1 / 3)]
    tree = likely_tree([9, 1], [counts], 4)
    assert tree.tokens[0] == 1
    # Shares: 2, 2 3: 3/4 each; 2 3 4, 2 3 4 5: 1/2 each; 7 and 2 3 6: 1/4 each.
    assert sorted(paths(tree)) == [[2], [2, 3], [2, 3, 4], [2, 3, 4, 5]]
    assert sorted(paths(likely_tree([9, 1], [counts], 6)))[-1] == [7]
    # Inside of a unit, and at its end.
    assert paths(likely_tree([1, 2], [counts], 2)) == [[3], [3, 4]]
    assert paths(likely_tree([1, 2, 3], [counts], 3)) == [[4], [4, 5], [6]]
    assert paths(likely_tree([8], [counts], 3)) == []


def test_shares_of_units_add_up_where_they_begin_alike() -> None:
    """Two units of three tenths each outweigh one of four."""
    counts = UnitCounts([[(1, 5, 6)]] * 4 + [[(1, 2, 3)], [(1, 2, 4)]] * 3)
    assert paths(likely_tree([1], [counts], 2)) == [[2], [5]]
    # The longer end of the text counts more than the shorter one.
    counts = UnitCounts([[(0, 1, 8)], *[[(1, 9)]] * 5])
    assert paths(likely_tree([0, 1], [counts], 2)) == [[8], [9]]


def test_base_tokens_are_counted_beside_the_units() -> None:
    """Else nothing would follow a unit's last token where another unit ends with it."""
    counts = counted([ids("the cat the cat the")], RULES, 99, 2)
    assert (tuple(ids("the")), 1) not in counts.beginning(tuple(ids("t")))
    assert dict(counts.beginning(tuple(ids("h")))) == {tuple(ids("h")): 1.0}
    assert counts.following(tuple(ids("h"))) == [(tuple(ids("e")), 1.0)]


def test_committed_text_is_merged_again() -> None:
    """A phrase that only the answer has is drafted once the answer has it."""
    drafter = MergedTokens(TARGET.shape, every=4)
    prompts = [[7, 8, 9, 7, 8], [20, 30]]
    seen: list[list[int]] = []
    decoder = SpeculativeDecoder(TARGET, drafter)
    run = decoder.begin(prompts, Sampling(), 24)
    for _ in run:
        state = run._state
        if state is not None and run._alive:
            texts = [len(text) for text in state.texts()]  # type: ignore[attr-defined]
            read = [units.read for units in state.units]  # type: ignore[attr-defined]
            seen.append([length - old for length, old in zip(texts, read, strict=True)])
    assert max(max(row) for row in seen) < 4 and any(0 in row for row in seen[1:])


def test_the_corpus_is_drafted_from(tmp_path: Path) -> None:
    plain = SpeculativeDecoder(TARGET).decode([[20, 30]], Sampling(), 16)[0].ids
    Datastore.build([[20, 30, *plain], [5, 6]], TARGET.shape.vocab_size).save(tmp_path)
    assert Datastore.load(str(tmp_path), TARGET.shape.vocab_size).documents() == [
        [20, 30, *plain], [5, 6],
    ]  # fmt: skip
    drafter = MergedTokens(TARGET.shape, str(tmp_path), least=1, boundary="sentence")
    trace = SpeculativeDecoder(TARGET, drafter).decode([[20, 30]], Sampling(), 16)[0]
    assert trace.ids == plain
    alone = SpeculativeDecoder(TARGET, MergedTokens(TARGET.shape)).decode(
        [[20, 30]], Sampling(), 16
    )
    assert len(trace.accepted) < len(alone[0].accepted)


def test_mistakes_are_refused() -> None:
    with pytest.raises(ValueError, match="at least 1, got 1000, 0, 16 and 7"):
        MergedTokens(TARGET.shape, least=0)
    with pytest.raises(ValueError, match="boundary 'line' is unknown"):
        MergedTokens(TARGET.shape, boundary="line")
    with pytest.raises(ValueError, match="datastore 'nowhere' does not exist"):
        MergedTokens(TARGET.shape, "nowhere")
