"""SAM decoding: a corpus beside the text, and a partner where neither has a long match."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from modules.contracts.drafter import Context, Drafter, DraftState
from modules.contracts.sampling import Sampling
from modules.contracts.token_tree import TokenTree
from modules.contracts.verification import Accepted
from modules.decoding.decoder import SpeculativeDecoder
from modules.drafters.retrieval.lookahead import Lookahead
from modules.drafters.retrieval.partner import as_trie
from modules.drafters.retrieval.suffix_array import Datastore
from modules.drafters.retrieval.suffix_automaton import Suffix, SuffixAutomaton
from modules.drafters.small_models.independent import Independent
from modules.trees.trie import likeliest
from tests.fakes import ScriptedDrafter, tiny_target
from tests.modules.families import built

TARGET = tiny_target()
PROMPTS = [[7, 8, 9, 7, 8], [20, 30], [40, 41, 42, 40, 41, 42, 40]]


def automaton(text: list[int]) -> SuffixAutomaton:
    found = SuffixAutomaton()
    for token in text:
        found.extend(token)
    return found


def context(texts: list[list[int]]) -> Context:
    whole = torch.tensor(texts)
    lengths = torch.full((len(texts),), whole.shape[1] - 1)
    return Context(TARGET, whole[:, :-1], lengths, whole[:, -1])


def paths(tree: TokenTree, sequence: int) -> set[tuple[int, ...]]:
    trie = as_trie(tree, sequence)
    return {tuple(trie.path(node)) for node in range(1, len(trie))}


def test_the_likeliest_chain_follows_the_commonest_token_at_every_step() -> None:
    rows = np.array([[1, 2, 3], [1, 4, 5], [1, 4, -1], [6, 7, 8], [1, 2, 9], [1, 4, 5]])
    assert likeliest(rows) == [1, 4, 5]
    assert likeliest(np.array([[5, -1, -1], [5, -1, -1], [5, 3, -1]])) == [5, 3]
    assert likeliest(np.empty((0, 3), dtype=np.int64)) == []


@pytest.mark.parametrize(
    ("text", "bias", "shortest", "expected"),
    [
        # `5 6` stood before in the text, `4 5 6` in the corpus: one longer.
        ([5, 6, 50, 51, 4, 5, 6], 0, 1, [60, 61]),
        ([5, 6, 50, 51, 4, 5, 6], 1, 1, [50, 51]),
        # `3 4 5 6`: two longer; the commonest continuation, up to the document's end.
        ([5, 6, 50, 51, 3, 4, 5, 6], 1, 1, [60, 61]),
        ([5, 6, 50, 51, 3, 4, 5, 6], 2, 1, [50, 51]),
        # Both below `shortest`, counted with the bias.
        ([5, 6, 50, 51, 3, 4, 5, 6], 1, 4, None),
        ([5, 6, 50, 51, 3, 4, 5, 6], 0, 4, [60, 61]),
        ([5, 6, 50, 51, 9, 5, 6], 5, 3, None),
        ([5, 6, 50, 51, 9, 5, 6], 5, 2, [50, 51]),
        # Nothing stood before in the text.
        ([70, 6], 0, 1, [60, 61]),
        ([70, 71], 0, 1, None),
    ],
)
def test_the_longer_match_is_drafted_behind(
    text: list[int], bias: int, shortest: int, expected: list[int] | None, tmp_path: Path
) -> None:
    corpus = [[3, 4, 5, 6, 60, 61], [3, 4, 5, 6, 62], [4, 5, 6, 60, 61]]
    Datastore.build(corpus, TARGET.shape.vocab_size).save(tmp_path)
    drafter = Suffix(TARGET.shape, shortest, datastore=str(tmp_path), bias=bias)
    assert drafter.continuation(automaton(text), 2) == expected


def test_a_partner_drafts_for_the_sequences_without_a_long_match() -> None:
    """It is asked once for all, and not at all where every sequence has a match."""
    scripted = ScriptedDrafter(TARGET.shape, depth=3)
    asked, propose = [], scripted.propose

    def counted(state, budget: int) -> TokenTree:
        asked.append(budget)
        return propose(state, budget)

    scripted.propose = counted  # type: ignore[method-assign]
    drafter = Suffix(TARGET.shape, shortest=2, tokens=4, partner=scripted)
    matched, unmatched = [5, 6, 50, 51, 9, 5, 6], [10, 11, 12, 13, 14, 15, 12]
    state = drafter.start(context([matched, unmatched]))
    tree = drafter.propose(state, 4)
    assert paths(tree, 0) == {(50,), (50, 51), (50, 51, 9), (50, 51, 9, 5)} and asked == [4]
    assert state.partner is not None
    assert paths(tree, 1) == paths(propose(state.partner, 4), 1)
    assert max(map(len, paths(tree, 1))) == 3
    assert drafter.propose(drafter.start(context([matched])), 4).size == 5 and asked == [4]
    with pytest.raises(ValueError, match="suffix: partner Lookahead needs rows that only compute"):
        Suffix(TARGET.shape, partner=Lookahead(TARGET.shape))
    with pytest.raises(ValueError, match="bias must not be negative, got -1"):
        Suffix(TARGET.shape, bias=-1)


class EveryThird(Suffix):
    """Has a match, of which nothing follows, but for every third call."""

    calls = 0

    def continuation(self, automaton: SuffixAutomaton, count: int) -> list[int] | None:
        self.calls += 1
        return None if self.calls % 3 == 0 else []


def independent() -> Drafter:
    drafter = Independent(TARGET.shape, layers=1, draft_length=3)
    drafter.initialise(TARGET)
    return drafter.double().eval()


@pytest.mark.parametrize(
    "name", ["medusa", "clover2", "hydra", "eagle", "eagle3", "falcon", "independent"]
)
def test_a_partner_that_was_not_asked_drafts_as_one_that_was(name: str) -> None:
    """Its state moves on with the text, whether its trees are asked for or not."""
    partner = independent() if name == "independent" else built(name, TARGET, shake=0.1)
    drafter = EveryThird(TARGET.shape, partner=partner)
    prompt = torch.tensor([PROMPTS[0]])
    session = TARGET.open(1, 64)
    _, states = session.prefill(prompt, torch.tensor([5]), drafter.decoding_states)
    begun = Context(TARGET, prompt, torch.tensor([5]), torch.tensor([9]), states, session=session)
    state, mirror = drafter.start(begun), partner.start(begun)
    for step in range(1, 10):
        tree, expected = drafter.propose(state, 7), partner.propose(mirror, 7)
        assert paths(tree, 0) == (paths(expected, 0) if step % 3 == 0 else set())
        state, mirror = accept_two(drafter, state, partner, mirror, step)


def accept_two(
    drafter: Drafter, state: DraftState, partner: Drafter, mirror: DraftState, step: int
) -> tuple[DraftState, DraftState]:
    """One call that emits two tokens, absorbed by the drafter and by the partner alone."""
    chain = TokenTree.chain(torch.tensor([[int(state.newest_B), 10 + step, 30 + step]]))
    session = state.context.session
    assert session is not None
    verified = session.verify(chain, drafter.decoding_states)
    accepted = Accepted(torch.tensor([[0, 1]]), torch.tensor([2]), torch.tensor([30 + step]))
    session.commit(accepted)
    return drafter.absorb(state, verified, accepted), partner.absorb(mirror, verified, accepted)


@pytest.mark.parametrize("count", [1, 3])
def test_greedy_output_is_the_targets_own(count: int, tmp_path: Path) -> None:
    plain = SpeculativeDecoder(TARGET).decode(PROMPTS[:count], Sampling(), 30)
    known = [prompt + trace.ids[:15] for prompt, trace in zip(PROMPTS, plain)]
    Datastore.build(known, TARGET.shape.vocab_size).save(tmp_path)
    scripted = ScriptedDrafter(TARGET.shape, right=0.7, decoys=1)
    calls = []
    for partner in (None, scripted):
        drafter = Suffix(TARGET.shape, 4, datastore=str(tmp_path), partner=partner)
        drafted = SpeculativeDecoder(TARGET, drafter).decode(PROMPTS[:count], Sampling(), 30)
        assert [trace.ids for trace in drafted] == [trace.ids for trace in plain]
        calls.append(len(drafted[0].accepted))
    assert calls[1] < calls[0] < len(plain[0].accepted)
