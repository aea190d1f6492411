"""Drafters without training: what they draft, what they remember, and that they change no token."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from checkpoints.pretrained import load_pretrained, save_pretrained
from checkpoints.provenance import Provenance
from modules.core.drafter import Context, DraftState, Sampling
from modules.core.trainable import TargetShape
from modules.decoding.decoder import SpeculativeDecoder
from modules.training_free.prompt_lookup import PromptLookup
from modules.training_free.text import TextState, chains
from modules.training_free.token_recycling import TEMPLATE, TokenRecycling
from modules.trees.static import StaticTree
from tests.fakes import tiny_target

TARGET = tiny_target()
PROMPTS = [[7, 8, 9, 7, 8], [20, 30], [40, 41, 42, 40, 41, 42, 40]]
DRAFTERS = {
    "prompt_lookup": lambda: PromptLookup(TARGET.shape), "token_recycling": lambda: TokenRecycling(TARGET.shape),
    "token_recycling_prompt": lambda: TokenRecycling(TARGET.shape, tokens=80, recycle_prompt=True)}


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
    assert isinstance(state, DraftState) and state.text_BL[0, :len(text)].tolist() == text
    return state


def test_the_longest_ngram_wins_and_of_equals_the_latest_that_a_whole_draft_follows() -> None:
    """A text that goes round is drafted as far as it is known, not only to its period."""
    lookup = PromptLookup(TARGET.shape, longest=2, tokens=3)
    for text, expected in (([1, 2, 50, 9, 2, 60, 61, 62, 63, 1, 2], [50, 9, 2]), ([5, 10, 5, 11, 12, 5], [11, 12, 5]),
                           ([1, 2, 3, 4], []), ([6, 6, 6, 6], [6, 6]), ([6] * 9, [6] * 3),
                           ([7, 5, 8, 9, 7, 5, 8, 4, 7, 5], [8, 4, 7]), ([5, 1, 5, 2, 5], [1, 5, 2])):
        assert lookup.propose(text_state(text), 3).tokens_BN[0, 1:].tolist() == expected


def test_chains_of_unequal_length_are_padded() -> None:
    tree = chains(torch.tensor([1, 2]), [torch.tensor([5, 6]), torch.tensor([], dtype=torch.long)])
    assert tree.tokens_BN[0].tolist() == [1, 5, 6]
    assert tree.topology.parents_BN.tolist() == [[-1, 0, 1], [-1, 1, 2]]
    assert tree.acceptable_BN.tolist() == [[True] * 3, [True, False, False]]


def test_the_template_is_the_papers() -> None:
    assert len(StaticTree(TEMPLATE).paths) == 80
    assert [sum(len(path) == depth for path in TEMPLATE) for depth in range(1, 7)] == [8, 21, 25, 15, 8, 3]
    for budget in (1, 7, 40, 80):
        StaticTree(TokenRecycling(TARGET.shape).paths[:budget])


def cycle(drafter: TokenRecycling, period: int) -> None:
    drafter.successors_VK.zero_()
    drafter.successors_VK[50:50 + period, 0] = 50 + (torch.arange(period, dtype=torch.int32) + 1) % period


def test_a_known_chain_is_drafted_to_full_depth() -> None:
    drafter = TokenRecycling(TARGET.shape, tokens=80)
    cycle(drafter, 3)
    state = drafter.start(Context(TARGET, torch.tensor([[9]]), torch.tensor([1]), torch.tensor([50])))
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
    assert drafter.successors_VK[30].tolist() == [9, 4] and drafter.successors_VK[31].tolist() == [7, 8]
    assert int(drafter.successors_VK.sum()) == 9 + 4 + 7 + 8
    drafter.forget()
    assert not drafter.successors_VK.any()


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
        calls[cold] = [len(decoder.decode([PROMPTS[1]], Sampling(), 40)[0].accepted) for _ in range(3)]
    assert len(set(calls[True])) == 1 and calls[False][0] == calls[True][0] > calls[False][1]


def test_the_table_of_a_real_vocabulary_stays_below_two_megabytes_in_memory_and_on_disk(tmp_path: Path) -> None:
    """And a drafter that is loaded again starts hot."""
    drafter = TokenRecycling(TargetShape(576, 49152, 30, 9, 3, 64, 1536))
    assert drafter.successors_VK.numel() * drafter.successors_VK.element_size() < 2e6
    drafter.recycle(torch.tensor([5]), torch.arange(49152.0)[None])
    save_pretrained(drafter, tmp_path, Provenance.of(TARGET))
    assert sum(file.stat().st_size for file in tmp_path.rglob("*") if file.is_file()) < 2e6
    loaded = load_pretrained(tmp_path)
    assert isinstance(loaded, TokenRecycling) and torch.equal(loaded.successors_VK, drafter.successors_VK)
    assert loaded.successors_VK[5].tolist() == list(range(49151, 49143, -1))


def test_sampled_output_keeps_the_targets_law() -> None:
    """First two sampled tokens with recycled drafts against the exact law (chi-square, 1e-4)."""
    target = tiny_target(vocab=12)
    prompt, draws = [7, 8], 1500
    decoder = SpeculativeDecoder(target, TokenRecycling(target.shape, successors=4, tokens=12))
    counts = torch.zeros(12, 12)
    for start in range(0, draws, 250):
        for trace in decoder.decode([prompt] * 250, Sampling(1.0, seed=start), 2):
            counts[trace.ids[0], trace.ids[1] if len(trace.ids) > 1 else 0] += 1
    with torch.no_grad():
        first = target.model(torch.tensor([prompt])).logits[0, -1].softmax(-1)
        second = torch.stack([target.model(torch.tensor([[*prompt, token]])).logits[0, -1].softmax(-1)
                              for token in range(12)])
    ends = torch.zeros(12, dtype=torch.bool)
    ends[list(target.eos_ids)] = True
    second[ends] = torch.eye(12)[0].double()
    law = (first[:, None] * second).flatten() * draws
    pooled = law < 5
    observed = torch.cat([counts.flatten()[~pooled], counts.flatten()[pooled].sum()[None]])
    expected = torch.cat([law[~pooled], law[pooled].sum()[None]])
    statistic, freedom = float(((observed - expected) ** 2 / expected).sum()), len(expected) - 1
    assert statistic < freedom + 4.5 * (2 * freedom) ** 0.5


def test_wrong_settings_are_refused_and_nothing_is_trained() -> None:
    for wrong in (lambda: PromptLookup(TARGET.shape, 2, 3), lambda: PromptLookup(TARGET.shape, tokens=0),
                  lambda: TokenRecycling(TARGET.shape, successors=9), lambda: TokenRecycling(TARGET.shape, tokens=0)):
        with pytest.raises(ValueError, match="shortest|tokens|successors"):
            wrong()
    with pytest.raises(ValueError, match="no parameters"):
        PromptLookup(TARGET.shape).loss(None, TARGET, 0.0)
