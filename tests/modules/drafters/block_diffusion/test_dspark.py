"""What makes DSpark: the acceptance that confidences learn, and verification by confidence."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from checkpoints.pretrained import Provenance, load_pretrained, save_pretrained
from modules.acceptance.rules import RULES
from modules.contracts.sampling import Sampling
from modules.contracts.token_tree import SiblingDraw, TokenTree, Topology
from modules.decoding.decoder import SpeculativeDecoder
from modules.drafters.block_diffusion.confidence import (
    calibration_error,
    sequential_temperatures,
    worth_verifying,
)
from modules.drafters.block_diffusion.dspark import DSpark
from modules.trees.sampled.branching import DrawnTree
from modules.trees.sampled.chain import SampledChain
from modules.trees.static import StaticTree
from tests.fakes import tiny_target
from tests.modules.conformance import SMALL_TREE, check_greedy
from tests.modules.drafters.block_diffusion.heads import made
from tests.modules.families import Reader, documents, filled
from tests.modules.sampling import goodness, small_target

TARGET = tiny_target(layers=4)


def text(*lengths: int, seed: int = 0, vocab: int = 128):
    generator = torch.Generator().manual_seed(seed)
    return documents([torch.randint(5, vocab, (n,), generator=generator).tolist() for n in lengths])


# -- what is learnt --------------------------------------------------------------------------------


@pytest.mark.parametrize("whole_law", [True, False])
@pytest.mark.parametrize("vocabulary", [None, 5])
def test_the_loss_by_hand(whole_law: bool, vocabulary: int | None) -> None:
    """Every slot's p and q, token by token, on eight tokens."""
    target = tiny_target(vocab=8, layers=4)
    drafter = made("dspark", target, draft_vocabulary=vocabulary, whole_law=whole_law, gamma=2.0)
    batch = filled(text(9, 7, vocab=8), drafter, target)
    batch.input_ids[0, 3:6] = torch.tensor([1, 2, 0])
    filled(batch, drafter, target)
    rows = drafter.blocks(batch, target)
    outputs_MKH = drafter.block_outputs(batch, target, rows).detach()
    drafter.requires_grad_(False)
    ids = list(range(8)) if vocabulary is None else drafter.vocabulary_D.tolist()
    drafts = weights = confidences = counted = 0.0
    for m, start in enumerate(rows.flat_MK1[:, 0].tolist()):
        b, t = divmod(start, 9)
        for d in range(3):
            if t + 2 + d >= (9, 7)[b]:
                continue
            # q of the slot, after the data's token before it; p of the target.
            before, label = int(batch.input_ids[b, t + 1 + d]), int(batch.input_ids[b, t + 2 + d])
            vector = drafter.markov_head.markov_w1.weight[before]
            bias = drafter.markov_head.markov_w2.weight @ vector
            q = (target.logits(outputs_MKH[m, d], drafter.vocabulary_D) + bias).softmax(-1)
            p = target.logits(batch.states["final"][b, t + 1 + d]).softmax(-1)
            if not whole_law and vocabulary:
                p = torch.where(torch.isin(torch.arange(8), torch.tensor(ids)), p, 0.0)
                p = p / p.sum()
            q_full = torch.zeros(8, dtype=q.dtype).index_put((torch.tensor(ids),), q)
            distance = sum(abs(p[v] - q_full[v]) for v in range(8))
            rate = float(1 - distance / 2)
            assert rate == pytest.approx(sum(min(float(p[v]), float(q_full[v])) for v in range(8)))
            rate = 0.0 if label not in ids and not whole_law else rate
            logit = drafter.confidence_head(outputs_MKH[m, d], vector)
            weight = float(torch.tensor(-d / 2.0).exp())
            entropy = F.binary_cross_entropy_with_logits(logit, logit.new_tensor(rate))
            confidences, counted = confidences + weight * float(entropy), counted + weight
            if label in ids:
                loss = -0.1 * q[ids.index(label)].log() + 0.9 * distance
                drafts, weights = drafts + weight * float(loss), weights + weight
    expected = drafts / weights + confidences / counted
    assert drafter.loss(batch, target, 0.0).total.item() == pytest.approx(expected)


def test_confidences_do_not_change_the_drafts() -> None:
    """Their own targets pass no gradient on: the Markov head learns the same without them."""
    batch, gradients = text(14, 9), []
    for weight in (1.0, 0.0):
        drafter = made("dspark", TARGET, confidence_weight=weight)
        filled(batch, drafter, TARGET)
        drafter.loss(batch, TARGET, 0.0).total.backward()
        gradients.append(drafter.markov_head.markov_w2.weight.grad)
    torch.testing.assert_close(*gradients)


@pytest.mark.parametrize("kind", ["vanilla", "gated", "rnn"])
@torch.no_grad()
def test_the_bias_by_hand(kind: str) -> None:
    """A slot's bias from the tokens before it, step by step."""
    drafter, batch = made("dspark", TARGET, markov=kind), text(12)
    reader = Reader(drafter, TARGET, filled(batch, drafter, TARGET), [6])
    logits_KV, head = reader.logits()[0], drafter.markov_head
    outputs_KH, state = reader.state.outputs_BKH[0], torch.zeros(6, dtype=torch.float64)
    for slot in range(3):
        vector = memory = head.markov_w1.weight[batch.input_ids[0, 6 + slot]]
        if kind == "gated":
            both = torch.cat([outputs_KH[slot], vector])
            memory = (head.gate_proj.weight @ both + head.gate_proj.bias).sigmoid() * vector
        if kind == "rnn":
            joint = head.joint_proj.weight @ torch.cat([state, vector, outputs_KH[slot]])
            forget, new, out = (joint + head.joint_proj.bias).split(6)
            state = forget.sigmoid() * state + (1 - forget.sigmoid()) * new.tanh()
            memory = out.tanh()
        expected = drafter.base_head(TARGET)(outputs_KH[slot]) + head.markov_w2.weight @ memory
        torch.testing.assert_close(logits_KV[slot], expected)


# -- how much is verified --------------------------------------------------------------------------


def test_a_path_ends_at_the_first_fall() -> None:
    """Expected tokens over cost by hand: (1 + Σ a) / (1 + cost · depth)."""
    chain = TokenTree.chain(torch.arange(5)[None])
    confidences = torch.tensor([[0.9, 0.5, 0.2, 0.99, 0.5]], dtype=torch.float64)
    # a = 0.9, 0.45, 0.09, 0.0891; with cost 0.1: 1, 1.727, 1.958, 1.877, 1.806.
    assert worth_verifying(confidences, chain, 0.1).tolist() == [[True, True, True, False, False]]
    assert worth_verifying(confidences, chain, 0.02).all()
    assert worth_verifying(confidences, chain, 1.0).sum() == 1
    # A fall ends the path, also where the ratio would rise again.
    confidences = torch.tensor([[0.2, 1.0, 1.0, 1.0, 1.0]], dtype=torch.float64)
    assert worth_verifying(confidences, chain, 0.25).sum() == 1
    # In a tree siblings stay together, and padding is nothing.
    tree = TokenTree(torch.arange(6)[None], Topology(torch.tensor([[-1, 0, 0, 1, 2, 5]])))
    confidences = torch.tensor([[0.8, 0.1, 0.9, 0.5, 0.5, 0.9]], dtype=torch.float64)
    assert worth_verifying(confidences, tree, 0.2)[0].tolist() == [1, 1, 1, 0, 1, 0]
    assert worth_verifying(confidences * 0, tree, 0.2)[0].tolist() == [1, 0, 0, 0, 0, 0]


def test_a_length_by_earlier_tokens_keeps_the_law_and_one_by_the_token_itself_does_not() -> None:
    """p = (.7, .3), q = (.5, .5): 0.70, and 0.85 where a token's own score decides."""
    law, look_ahead = 0.0, 0.0
    for token, score in ((0, 0.9), (1, 0.05)):
        tree = TokenTree.chain(torch.tensor([[0, token]]))
        confidences = torch.tensor([[0.6, score]], dtype=torch.float64)
        kept = bool(worth_verifying(confidences, tree, 0.2)[0, 1])
        late = bool(worth_verifying(confidences.flip(1), tree, 0.2)[0, 1])
        accepted = min(1.0, (0.7, 0.3)[token] / 0.5)
        # Accepted, or rejected for the residual (1, 0); plain sampling where it is not verified.
        verified = accepted * (token == 0) + (1 - accepted)
        law += 0.5 * (verified if kept else 0.7)
        look_ahead += 0.5 * (verified if late else 0.7)
    assert law == pytest.approx(0.70) and look_ahead == pytest.approx(0.85)


def test_the_end_of_a_path_depends_on_the_tokens_above_it_alone() -> None:
    """Other tokens of a node, or of other branches, change nothing of whether it is verified."""
    torch.manual_seed(0)
    tree = TokenTree(torch.arange(6)[None], Topology(torch.tensor([[-1, 0, 0, 1, 1, 2]])))
    for _ in range(50):
        confidences = torch.rand(1, 6, dtype=torch.float64)
        before = worth_verifying(confidences, tree, 0.2)
        for node, above in ((3, [0, 1]), (5, [0, 2])):
            other = torch.rand(1, 6, dtype=torch.float64)
            other[:, above] = confidences[:, above]
            assert worth_verifying(other, tree, 0.2)[0, node] == before[0, node]


@pytest.mark.parametrize("case", range(4))
def test_verification_by_confidence_keeps_the_law(case: int) -> None:
    """Through the whole loop, with confidences that differ by token."""
    target = small_target()
    drafter = made("dspark", target, row_cost=0.3)
    builder, rule = [
        (SampledChain(3), "ratio"),
        (DrawnTree(SMALL_TREE), "ratio"),
        (DrawnTree(SMALL_TREE, "independent"), "ratio"),
        (StaticTree(SMALL_TREE), "point"),
    ][case]
    decoder = SpeculativeDecoder(
        target, drafter, rule=RULES[rule](), builder=builder, budget=4, stop_ids=frozenset()
    )
    assert goodness(decoder, [3, 1], Sampling(1.0), runs=1000) > 1e-4
    sizes = [
        nodes
        for trace in decoder.decode([[3, 1]] * 40, Sampling(1.0, seed=7), 8)
        for nodes in trace.nodes
    ]
    assert min(sizes) < max(sizes)


def test_greedy_text_is_the_targets_with_few_verified_rows() -> None:
    check_greedy(made("dspark", TARGET, row_cost=0.3), TARGET)


def test_a_tree_without_some_nodes_carries_what_was_drawn() -> None:
    probs = torch.rand(2, 2, 8, dtype=torch.float64)
    tree = TokenTree(
        torch.arange(8).view(2, 4),
        Topology(torch.tensor([[-1, 0, 0, 2]])).expand(2),
        draw_BN=torch.tensor([[0, 1, 2, 2], [0, 2, 2, 1]]),
        probs_BRD=probs,
        prob_rows_BN=torch.tensor([[-1, 0, 0, 1], [-1, 0, 0, 1]]),
    )
    real = torch.tensor([[True, False, True, True], [True, True, False, False]])
    smaller = tree.only(real)
    assert smaller.tokens_BN.tolist() == [[0, 2, 3], [4, 5, 6]]
    assert smaller.parents_BN.tolist() == [[-1, 0, 1], [-1, 0, 2]]
    assert smaller.acceptable_BN.tolist() == [[True, True, True], [True, True, False]]
    assert smaller.draw_BN[:, :2].tolist() == [[0, 2], [0, 2]]
    assert smaller.prob_rows_BN[0].tolist() == [-1, 0, 1]
    assert smaller.draws_carried == {SiblingDraw.INDEPENDENT}
    assert torch.equal(smaller.probs_BRD, probs)


# -- calibration -----------------------------------------------------------------------------------


def test_temperatures_calibrate_the_products() -> None:
    torch.manual_seed(0)
    right = torch.randn(4000, 3, dtype=torch.float64)
    rates = right.sigmoid()
    heats = torch.tensor([3.0, 0.5, 1.0])
    valid = torch.arange(4000)[:, None] % 4 < torch.tensor([4, 3, 2])
    temperatures = sequential_temperatures(right * heats, rates, valid)
    assert temperatures == pytest.approx(heats.tolist(), rel=0.15)
    assert calibration_error(rates[:, 0], rates[:, 0]) == 0
    assert calibration_error(torch.tensor([0.95, 0.15]), torch.tensor([0.75, 0.05])) == (
        pytest.approx(0.15)
    )


def test_temperatures_are_found_after_training_and_saved(tmp_path) -> None:
    drafter = made("dspark", TARGET)
    with torch.no_grad():
        drafter.confidence_head.proj.bias.fill_(6.0)
    batches = [filled(text(20, 14, seed=seed), drafter, TARGET) for seed in (0, 1)]
    figures = drafter.finish(iter(batches), TARGET).figures
    assert figures["confidence/error_after"] < figures["confidence/error_before"]
    save_pretrained(drafter, tmp_path / "drafter", Provenance.of(TARGET))
    loaded = load_pretrained(tmp_path / "drafter", TARGET)
    assert loaded.temperatures == drafter.temperatures != [1.0] * 3
    # A hotter confidence verifies less.
    state = Reader(drafter, TARGET, batches[0], [8, 6]).state
    drafter.row_cost, tree = 0.3, StaticTree.chain(3).build(drafter, state, 3)
    drafter.temperatures = [1e-3] * 3
    assert drafter.prepare(state, tree).size == 4
    with torch.no_grad():
        drafter.confidence_head.proj.bias.fill_(-60.0)
    assert drafter.prepare(state, tree).size == 1


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"markov": "other"}, "markov must be one of vanilla, gated, rnn, got 'other'"),
        ({"rank": 0}, "rank must be at least 1"),
        ({"row_cost": -0.5}, "row_cost must not be negative"),
        ({"temperatures": [1.0]}, "temperatures must be 8 numbers above 0"),
    ],
)
def test_bad_settings_are_refused(arguments: dict, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        DSpark(TARGET.shape, **arguments)
