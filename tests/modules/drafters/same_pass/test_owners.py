"""Which drafted nodes have pseudo states: the likeliest ones, and what follows from it."""

from __future__ import annotations

import pytest
import torch

from modules.contracts.sampling import Sampling
from modules.contracts.token_tree import TokenTree
from modules.decoding.decoder import SpeculativeDecoder
from modules.drafters.same_pass.base import GuessState
from modules.drafters.same_pass.hidden_transfer import HiddenTransfer
from modules.drafters.same_pass.sparse_tree import SparseTrees, owned_trees
from tests.modules.sampling import goodness, small_target

TABLE = ((0.55, 0.2, 0.1, 0.05), (0.41, 0.2, 0.1, 0.05), (0.3, 0.2, 0.05, 0.05))


def stationary(trees: SparseTrees) -> float:
    """Tokens per call of a tree whose states are all rows or none, by hand."""
    tree = trees.trees[3]
    again = sum(stop for stop, held in zip(tree.stops, tree.prompts, strict=True) if held)
    # From a state without guesses the next one always has some.
    share = 1 / (1 + (1 - again))
    return share * tree.tokens + (1 - share)


@pytest.mark.parametrize("owners", [1, 2, 3, 4, 8])
def test_pseudo_states_belong_to_the_likeliest_nodes(owners):
    """To no more than were asked for, in calls that keep their size."""
    trees = owned_trees(TABLE, 12 + 3 * owners, owners)
    tree = trees.trees[3]
    assert trees.trees[0].paths == ((),) and tree.prompts[0] == 3
    assert tree.rows() <= 12 + 3 * owners and set(tree.prompts) <= {0, 3}
    assert trees.tokens == pytest.approx(stationary(trees))
    owned = [chance for chance, held in zip(tree.reached, tree.prompts, strict=True) if held]
    others = [chance for chance, held in zip(tree.reached, tree.prompts, strict=True) if not held]
    assert len(owned) == owners and min(owned) > max(others, default=0)


@pytest.mark.parametrize("rows", [5, 8, 12, 20, 32])
def test_there_are_as_many_owners_as_promise_the_most_tokens(rows):
    fewer = [owned_trees(TABLE, rows, owners).tokens for owners in range(1, 12)]
    assert fewer == sorted(fewer) and fewer[-1] == owned_trees(TABLE, rows).tokens
    assert owned_trees(TABLE, rows).rows() <= rows


def test_unlikely_nodes_own_nothing_and_a_pattern_is_drafted_in_its_order():
    tree = owned_trees(TABLE, 32, least=0.15).trees[3]
    for held, reached in zip(tree.prompts, tree.reached, strict=True):
        assert held == 0 or reached >= 0.15
    pattern = ((3,), (0,), (0, 1), (0, 0), (0, 0, 12))
    tree = owned_trees(TABLE, 1 + 3 + 6, 2, pattern=pattern).trees[3]
    assert tree.paths == ((), (0,), (3,), (0, 1)) and tree.prompts == (3, 3, 0, 0)
    whole = owned_trees(TABLE, 30, pattern=pattern).trees[3]
    assert len(whole.paths) == 6 and whole.reached[-1] == 0
    with pytest.raises(ValueError, match="no room for a draft"):
        owned_trees(TABLE, 4)


class AmongOthers(SpeculativeDecoder):
    """A decoder that decodes each prompt together with three others of other lengths."""

    def decode(self, prompts, sampling, limit):
        batch = [other for prompt in prompts for other in (prompt, [4], [5, 5, 5, 1], [2, 0])]
        return super().decode(batch, sampling, limit)[::4]


@pytest.mark.parametrize(("transfer", "owners"), [(0.5, 2), ([0.0, 0.5, 1.0], None)])
def test_sequences_with_and_without_guesses_decode_together(transfer, owners):
    """Calls keep their size, and after an owner-less node only the newest token is verified."""
    target = small_target()
    torch.manual_seed(3)
    drafter = HiddenTransfer(target.shape, transfer=transfer, owners=owners, rows=14)
    with torch.no_grad():
        for parameter in drafter.parameters():
            parameter += 0.3 * torch.randn_like(parameter)
    drafter = drafter.double().eval()
    states, prepare = [], drafter.prepare

    def record(state: GuessState, tree: TokenTree) -> TokenTree:
        if state.states_BKX is not None:
            nodes_B = tree.acceptable_BN.sum(1).tolist()
            states.append(list(zip(state.available, nodes_B, strict=True)))
        return prepare(state, tree)

    drafter.prepare = record  # type: ignore[method-assign,assignment]
    prompts = [[1, 2, 3, 4, 5, 3], [3, 1], [4], [5, 5, 5]]
    plain = SpeculativeDecoder(target, stop_ids=frozenset())
    decoder = SpeculativeDecoder(target, drafter, stop_ids=frozenset())
    expected = plain.decode(prompts, Sampling(), 40)
    found = decoder.decode(prompts, Sampling(), 40)
    assert [trace.ids for trace in found] == [trace.ids for trace in expected]
    assert any({count for count, _ in call} == {0 if owners else 1, 3} for call in states)
    assert all(nodes == 1 if count == 0 else nodes > 1 for call in states for count, nodes in call)
    for trace, prompt in zip(found, prompts, strict=True):
        assert max(trace.rows) <= 14 + 4 and max(trace.accepted) > 1
        assert decoder.decode([prompt], Sampling(), 40)[0].ids == trace.ids
    ragged = AmongOthers(target, drafter, stop_ids=frozenset())
    assert goodness(ragged, [3, 1], Sampling(1.0), runs=1500) > 1e-4
