"""Prompt tokens on a draft model: its chains are the ones it drafts without them, in fewer of its
calls, and its cache holds what was accepted.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from modules.contracts.batches import TextBatch
from modules.contracts.drafter import DraftState
from modules.contracts.sampling import Sampling
from modules.contracts.token_tree import TokenTree
from modules.contracts.verification import Accepted, Verified
from modules.decoding.decoder import SpeculativeDecoder
from modules.drafters.same_pass.base import GuessState
from modules.drafters.small_models.independent import Independent
from modules.drafters.small_models.prompted import PromptedIndependent, PromptedState
from modules.trees.sampled.branching import DrawnTree
from modules.trees.static import StaticTree
from tests.fakes import tiny_batch, tiny_target
from tests.modules.conformance import check_decoding
from tests.modules.sampling import goodness, small_target

PROMPTS = [[1, 2, 3, 4, 5, 3], [3, 1], [4], [5, 5, 5]]


def drafter_for(target, **arguments) -> PromptedIndependent:
    """Two of three layers, moved off the target's: drafts are often right, not always."""
    torch.manual_seed(3)
    drafter = PromptedIndependent(target.shape, **{"layers": 2, **arguments})
    drafter.initialise(target)
    with torch.no_grad():
        for parameter in drafter.parameters():
            parameter += 0.05 * torch.randn_like(parameter)
        drafter.prompts.prompts_EH += torch.randn_like(drafter.prompts.prompts_EH)
    return drafter.double().eval()


def recorded(drafter: Independent) -> tuple[list[list[list[int]]], list[DraftState]]:
    """The chains that it proposes from now on, and its states after each step."""
    chains: list[list[list[int]]] = []
    states: list[DraftState] = []
    propose, absorb = drafter.propose, drafter.absorb

    def watch(state: DraftState, budget: int) -> TokenTree:
        tree = propose(state, budget)
        chains.append(tree.tokens_BN.tolist())
        return tree

    def after(state: DraftState, verified: Verified, accepted: Accepted) -> DraftState:
        states.append(absorb(state, verified, accepted))
        # A later proposal changes the state itself.
        return replace(states[-1])

    drafter.propose = watch  # type: ignore[method-assign]
    drafter.absorb = after  # type: ignore[method-assign]
    return chains, states


@pytest.mark.parametrize("vocabulary", [None, 4])
@pytest.mark.parametrize("ensemble", [1, 2])
def test_chains_are_those_of_the_model_without_prompt_tokens(vocabulary, ensemble):
    """Whatever the prompt tokens guess, also after sequences have ended."""
    target = small_target()
    drafter = drafter_for(target, draft_vocabulary=vocabulary, ensemble=ensemble)
    plain = Independent(target.shape, layers=2, draft_vocabulary=vocabulary, draft_length=5)
    plain.initialise(target)
    for one in (drafter, plain):
        if vocabulary is not None:
            one.set_vocabulary([0, 2, 3, 5])
    plain.double().load_state_dict(drafter.state_dict(), strict=False)
    chains, _ = recorded(drafter)
    expected, _ = recorded(plain)
    texts = []
    for one in (drafter, plain.eval()):
        decoder = SpeculativeDecoder(target, one)
        texts.append([trace.ids for trace in decoder.decode(PROMPTS, Sampling(), 30)])
    assert texts[0] == texts[1] and chains == expected
    assert any(len(chain) < 4 for chain in chains)


def test_right_guesses_save_calls_of_the_draft_model():
    """Trees that hold all six tokens are right about the first one, always."""
    target = small_target()
    drafter = drafter_for(target, rows=60)
    _, states = recorded(drafter)
    SpeculativeDecoder(target, drafter, stop_ids=frozenset()).decode([[3, 1]], Sampling(), 12)
    state = states[-1]
    assert isinstance(state, PromptedState)
    assert state.calls <= 3 * len(states)


@pytest.mark.parametrize("draft_length", [1, 5])
def test_the_cache_holds_the_accepted_text_and_the_rest_is_unread(draft_length):
    target = small_target()
    drafter = drafter_for(target, draft_length=draft_length)
    absorb, seen = drafter.absorb, []

    def watch(state: DraftState, verified: Verified, accepted: Accepted) -> DraftState:
        after = absorb(state, verified, accepted)
        assert isinstance(after, PromptedState)
        unread = [row[:n].tolist() for row, n in zip(after.unread_BP, after.unread_counts_B)]
        seen.append((after.session.lengths_B.tolist(), unread, after.lengths_B.tolist()))
        return after

    drafter.absorb = watch  # type: ignore[method-assign]
    decoder = SpeculativeDecoder(target, drafter, stop_ids=frozenset())
    traces = decoder.decode(PROMPTS, Sampling(), 20)
    texts = [[*prompt, *trace.ids] for prompt, trace in zip(PROMPTS, traces, strict=True)]
    counts = set()
    for held, unread, lengths in (calls for calls in seen if len(calls[0]) == len(PROMPTS)):
        for text, start, tokens, length in zip(texts, held, unread, lengths, strict=True):
            # The newest token is the last unread one.
            assert start + len(tokens) == length + 1
            assert tokens == text[start : length + 1] or len(text) <= length
            counts.add(len(tokens))
    assert {1} <= counts <= {1, 2} and (draft_length > 1 or counts == {1, 2})


def test_after_the_text_prompt_tokens_guess_behind_its_newest_token():
    """However many tokens of each sequence were unread."""
    target = small_target()
    drafter = drafter_for(target, draft_length=1)
    model, seen = drafter.language_model, []
    read = drafter._read_behind

    def watch(state: PromptedState) -> tuple[GuessState, Tensor]:
        counts = state.unread_counts_B.tolist()
        guesses, first = read(state)
        seen.append((counts, guesses.lengths_B.tolist(), guesses.states_BKX))
        return guesses, first

    drafter._read_behind = watch  # type: ignore[method-assign]
    decoder = SpeculativeDecoder(target, drafter, stop_ids=frozenset())
    traces = decoder.decode(PROMPTS, Sampling(), 20)
    texts = [[*prompt, *trace.ids] for prompt, trace in zip(PROMPTS, traces, strict=True)]
    whole = [calls for calls in seen if len(calls[0]) == len(PROMPTS)]
    assert {1, 2} <= {count for counts, _, _ in whole for count in counts}
    for _, lengths, states_BKX in whole:
        for text, length, found in zip(texts, lengths, states_BKX, strict=True):
            ids = torch.tensor([text[:length]])
            ones = torch.ones_like(ids, dtype=torch.bool)
            batch = TextBatch(ids, ones, torch.arange(length)[None], torch.zeros_like(ids))
            counts = torch.zeros_like(ids)
            counts[:, -1] = 3
            rows = drafter.prompts.following(batch.rows(), counts, 3)
            states = model.features(batch, ("final",), auxiliary=rows)["final"][0, length:]
            torch.testing.assert_close(found, states)


def test_it_decodes_losslessly_with_any_builder():
    check_decoding(drafter_for)
    target = small_target()
    paths = [(0,), (1,), (0, 0)]
    # Draws with replacement give equal siblings.
    drawn = DrawnTree(paths), DrawnTree(paths, "independent")
    for builder in (None, StaticTree(paths), *drawn):
        decoder = SpeculativeDecoder(
            target, drafter_for(target), builder=builder, stop_ids=frozenset()
        )
        assert goodness(decoder, [3, 1], Sampling(1.0), runs=1000) > 1e-4


def test_prompt_tokens_learn_of_the_draft_model_alone():
    """The loss is PPD's with the draft model as its target; its accuracies are stored."""
    target = tiny_target(layers=3)
    drafter, batch = drafter_for(target), tiny_batch(target)
    expected = drafter.prompts.loss(batch, drafter.language_model, 1.0).total
    batch.states = {"final": torch.zeros(2, 24, 32).double()}
    torch.testing.assert_close(drafter.loss(batch, target, 1.0).total, expected)
    assert [p.shape for p in drafter.declared_parameters()] == [(3, 32)]
    drafter.finish([batch], target)
    again = PromptedIndependent(**{**drafter.arguments, "shape": target.shape})
    assert again.prompts.accuracies == drafter.prompts.accuracies
