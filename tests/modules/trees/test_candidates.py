"""Rows that only compute are never accepted, and neither is what hangs under them."""

import pytest
import torch

from modules.acceptance.rules import Draws, rule_named
from modules.contracts.sampling import Sampling
from modules.contracts.token_tree import SiblingDraw, TokenTree, Topology
from modules.contracts.verification import Verified


@pytest.mark.parametrize(
    "rule,temperature", [("greedy", 0.0), ("point", 1.0), ("ratio", 1.0), ("typical", 0.0)]
)
def test_rows_that_are_no_candidates_are_passed_over(rule, temperature):
    """The target wants 1, then 2: node 1 is right but no candidate, node 3 is right too and may be
    taken.
    """
    tokens, parents = torch.tensor([[0, 1, 2, 1, 2]]), torch.tensor([[-1, 0, 1, 0, 3]])
    logits = torch.full((1, 5, 4), -1e9)
    logits[0, [0, 1, 2, 3, 4], [1, 2, 3, 2, 3]] = 0
    draws = Draws(Sampling(temperature=temperature), [torch.Generator().manual_seed(0)])

    drawn = (
        {
            "draw_BN": torch.full_like(tokens, SiblingDraw.INDEPENDENT),
            "probs_BRD": torch.full((1, 1, 4), 0.25),
            "prob_rows_BN": torch.zeros_like(tokens),
        }
        if rule == "ratio"
        else {}
    )

    def accepted(*candidates):
        tree = TokenTree(
            tokens, Topology(parents), candidate_BN=torch.tensor([candidates]), **drawn
        )
        return rule_named(rule)(tree, Verified(tree, logits), draws)

    assert accepted(True, False, True, True, True).paths == [[0, 3, 4]]
    blocked = accepted(True, False, True, False, True)
    assert blocked.lengths_B.tolist() == [1] and blocked.next_B.tolist() == [1]
