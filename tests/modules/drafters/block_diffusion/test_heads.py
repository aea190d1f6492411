"""What all heads on DFlash's backbone hold: training is decoding, a zero head is DFlash, trees hold
conditional laws, and every rule keeps the target's.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from modules.acceptance.rules import RULES
from modules.contracts.drafter import Frontier, TreeBuilder
from modules.contracts.sampling import Sampling
from modules.decoding.decoder import SpeculativeDecoder
from modules.drafters.block_diffusion.dflash import DFlash
from modules.losses.chunked import training_rows
from modules.trees.reranked import RerankedTree
from modules.trees.sampled.branching import DrawnTree
from modules.trees.sampled.chain import SampledChain
from modules.trees.sampled.stochastic_beam import StochasticBeamTree
from modules.trees.static import StaticTree
from tests.fakes import tiny_batch, tiny_target
from tests.modules.conformance import (
    SMALL_TREE,
    check_batches,
    check_gradients,
    check_greedy,
    check_loss,
    check_no_labels,
    check_target_unchanged,
)
from tests.modules.drafters.block_diffusion.heads import HEADS, made
from tests.modules.families import Reader, documents, filled
from tests.modules.sampling import goodness, small_target

TARGET = tiny_target(layers=4)
CANDIDATES = ("lilicorr", "dflash2")
ZEROED = {
    "dspark": ["markov_w2"],
    "domino": ["embed_proj.2"],
    "lilicorr": ["in_vectors"],
    "dflash2": ["successor_codebook", "kernel_projection"],
}
"""The weights without which a head adds nothing."""
LAWS: list[tuple[Callable[[], TreeBuilder], str]] = [
    (lambda: SampledChain(3), "ratio"),
    (lambda: DrawnTree(SMALL_TREE), "ratio"),
    (lambda: DrawnTree(SMALL_TREE, "independent"), "ratio"),
    (lambda: StochasticBeamTree(2, 3), "ratio"),
    (lambda: StaticTree(SMALL_TREE), "point"),
]


def text(*lengths: int, seed: int = 0):
    generator = torch.Generator().manual_seed(seed)
    return documents([torch.randint(5, 128, (n,), generator=generator).tolist() for n in lengths])


@pytest.mark.parametrize("name", HEADS)
@pytest.mark.parametrize("layout", ["fill_in", "shift"])
@torch.no_grad()
def test_decoding_computes_what_training_does(name: str, layout: str) -> None:
    drafter, batch = made(name, TARGET, layout=layout, draft_vocabulary=90), text(20, 16)
    filled(batch, drafter, TARGET)
    rows = training_rows(batch, drafter.block)
    features = enumerate(drafter.teacher_forced(batch, TARGET, rows))
    logits_MKD = torch.stack([drafter.head(d, TARGET)(each) for d, each in features], 1)
    assert logits_MKD.shape[1:] == (3, 90)
    reader = Reader(drafter, TARGET, batch, [5, 3])
    for accepted in ([0, 0], [2, 4], [1, 1]):
        reader.accept(accepted) if accepted[0] else None
        starts = [int(reader.read[b]) - 1 + 20 * b for b in (0, 1)]
        index = [rows.flat_MK1[:, 0].tolist().index(start) for start in starts]
        for _ in range(2):
            torch.testing.assert_close(reader.logits(), logits_MKD[index], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", HEADS)
@torch.no_grad()
def test_without_its_last_weights_a_head_is_dflash(name: str) -> None:
    every = {"candidates": 128} if name in CANDIDATES else {}
    drafter, batch = made(name, TARGET, **every), text(14)
    plain = DFlash(TARGET.shape, 3, layout=drafter.layout).double().eval()
    state = drafter.state_dict()
    plain.load_state_dict({key: state[key] for key in plain.state_dict()})
    plain.mask_token = drafter.mask_token
    logits = [
        Reader(each, TARGET, filled(batch, each, TARGET), [6]).logits() for each in (plain, drafter)
    ]
    assert not torch.allclose(logits[0][:, 1:], logits[1][:, 1:])
    for key, parameter in drafter.named_parameters():
        if any(zeroed in key for zeroed in ZEROED[name.split("_")[0]]):
            parameter.zero_()
        if key.endswith("base_kernel"):
            parameter.copy_(torch.tensor([1.0, 0.0])[:, None].expand_as(parameter))
    logits[1] = Reader(drafter, TARGET, batch, [6]).logits()
    assert torch.equal(logits[0], logits[1])
    # And so does a drafter that has not been trained.
    torch.manual_seed(0)
    fresh = HEADS[name](TARGET.shape, **every).double().eval()
    if name in CANDIDATES:
        assert not any(
            parameter.any()
            for key, parameter in fresh.named_parameters()
            if any(zeroed in key for zeroed in ZEROED[name])
        )


@pytest.mark.parametrize("name", HEADS)
@torch.no_grad()
def test_every_node_of_a_tree_has_the_law_of_its_path(name: str) -> None:
    """Nodes of one level, in any order, and the same path alone."""
    drafter, batch = made(name, TARGET), text(12, 9)
    state = Reader(drafter, TARGET, filled(batch, drafter, TARGET), [7, 4]).state
    root = Frontier(state.newest_B[:, None], torch.full((2, 1), -1), 0)
    level = [[11, 12], [13, 14]], [[15, 16, 17], [18, 19, 20]]
    parents = [[0, 0], [0, 0]], [[2, 1, 2], [1, 1, 2]]
    frontiers = [Frontier(torch.tensor(level[d]), torch.tensor(parents[d]), d + 1) for d in (0, 1)]
    laws = [drafter.expand(state, one) for one in (root, *frontiers)]
    for b in (0, 1):
        for w in range(3):
            first = parents[1][b][w] - 1
            tokens = [int(state.newest_B[b]), level[0][b][first], level[1][b][w]]
            for d, token in enumerate(tokens):
                ids = state.newest_B[:, None].clone()
                ids[b] = token
                alone = drafter.expand(state, Frontier(ids, torch.full((2, 1), d - 1), d))[b, 0]
                expected = laws[d][b, (0, first, w)[d]]
                torch.testing.assert_close(alone, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", HEADS)
@pytest.mark.parametrize("case", range(len(LAWS)))
def test_every_rule_keeps_the_targets_distribution(name: str, case: int) -> None:
    """Through the whole loop, with laws far from the target's."""
    target, (builder, rule) = small_target(), LAWS[case]
    drafter = made(name, target)
    decoder = SpeculativeDecoder(
        target,
        drafter,
        rule=RULES[rule](),
        builder=builder(),
        budget=4,
        stop_ids=frozenset(),
    )
    assert goodness(decoder, [3, 1], Sampling(1.0), runs=1000) > 1e-4


@pytest.mark.parametrize("name", HEADS)
def test_it_passes_what_conformance_checks(name: str) -> None:
    for arguments in ({}, {"draft_vocabulary": 40}):
        check_greedy(made(name, TARGET, **arguments), TARGET)
        check_greedy(made(name, TARGET, **arguments), TARGET, coarse=True)
        for check in (check_loss, check_gradients, check_no_labels, check_target_unchanged):
            target = tiny_target()
            check(made(name, target, **arguments), target)
    check_batches(made(name, TARGET), TARGET)
    decoder = SpeculativeDecoder(TARGET, made(name, TARGET), builder=RerankedTree(3, 4), budget=6)
    plain = SpeculativeDecoder(TARGET)
    answers = [each.decode([[7, 8, 9], [20]], Sampling(), 16) for each in (decoder, plain)]
    assert [one.ids for one in answers[0]] == [one.ids for one in answers[1]]


@pytest.mark.parametrize("name", HEADS)
@torch.no_grad()
def test_losses_of_documents_add_up(name: str) -> None:
    """Other documents of a packed batch change nothing of a document's outputs."""
    drafter, batch = made(name, TARGET), tiny_batch(TARGET)
    alone = documents(batch.input_ids[:1, 12:21].tolist())
    filled(batch, drafter, TARGET), filled(alone, drafter, TARGET)
    rows, single = training_rows(batch, 3), training_rows(alone, 3)
    index = [rows.flat_MK1[:, 0].tolist().index(15), single.flat_MK1[:, 0].tolist().index(3)]
    packed, own = (
        [each[i] for each in drafter.teacher_forced(which, TARGET, chosen)]
        for which, chosen, i in ((batch, rows, index[0]), (alone, single, index[1]))
    )
    torch.testing.assert_close(packed, own, rtol=1e-9, atol=1e-9)
