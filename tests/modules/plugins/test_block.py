"""Drafters of whole blocks, written as a newcomer would: no line outside of this file knows them.

Shape legend: B sequences, N committed rows, M blocks of a batch, W frontier nodes, K tokens of a
block, R rank of the correction, H hidden size, D draft vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from modules.acceptance.rules import RULES
from modules.contracts.batches import TextBatch
from modules.contracts.drafter import Context, Frontier, TreeBuilder
from modules.contracts.rows import rows_at
from modules.contracts.sampling import Sampling
from modules.contracts.shapes import TargetShape
from modules.decoding.decoder import SpeculativeDecoder
from modules.drafters.blocks.base import BlockDrafter, BlockState
from modules.drafters.trained import DraftStep
from modules.losses.chunked import Head, TrainingRows, training_rows
from modules.target.target import Target
from modules.trees.reranked import RerankedTree
from modules.trees.sampled.branching import DrawnTree
from modules.trees.sampled.chain import SampledChain
from modules.trees.sampled.dyspec import DySpecTree
from modules.trees.sampled.sequoia import sequoia_tree
from modules.trees.sampled.stochastic_beam import StochasticBeamTree
from modules.trees.static import StaticTree
from modules.trees.threshold import ThresholdTree
from tests.fakes import tiny_target
from tests.modules.conformance import (
    PROMPTS,
    SMALL_TREE,
    check_decoding,
    check_gradients,
    check_loss,
    check_no_labels,
    check_target_unchanged,
    decode,
)
from tests.modules.families import Reader, documents, filled
from tests.modules.sampling import goodness, small_target


@dataclass
class LastState(BlockState):
    """The target's state in the last committed row [B,H]."""

    last_BH: Tensor


class LinearBlocks(BlockDrafter):
    """K tokens by K linear maps of the target's last state.

    Args:
        shape: the target's dimensions.
        block: K.
        decay: slot d weighs `decay ** d`.
    """

    def __init__(self, shape: TargetShape, block: int = 3, decay: float = 0.8) -> None:
        super().__init__(shape, block, None, decay)
        self.fc = nn.Linear(shape.hidden_size, block * shape.hidden_size)

    def slots(self, hidden: Tensor) -> Tensor:
        return self.fc(hidden).unflatten(-1, (self.block, -1))

    def block_outputs(self, batch: TextBatch, target: Any, rows: TrainingRows) -> Tensor:
        return self.slots(rows.take(batch.states["final"].to(self.precision)))

    def blank_state(self, context: Context) -> LastState:
        blank_BH = torch.zeros(len(context.lengths_B), self.shape.hidden_size)
        return LastState(context, context.newest_B, context.lengths_B, blank_BH)

    def read(self, state: Any, features_BNX, following_BN, counts_B, counts=None) -> LastState:
        return replace(state, last_BH=rows_at(features_BNX, counts_B[:, None] - 1)[:, 0])

    def block_logits(self, state: Any) -> Tensor:
        return self.head(0, state.context.target)(self.slots(state.last_BH))


class CorrectedBlocks(LinearBlocks):
    """The same with a correction of low rank by the token before each slot, in training and in
    decoding, and with further blocks, which start from the last token's embedding.
    """

    max_depth = None

    def __init__(self, shape: TargetShape, block: int = 3, decay: float = 0.8) -> None:
        super().__init__(shape, block, decay)
        self.before, self.after = nn.Embedding(shape.vocab_size, 4), nn.Linear(4, shape.vocab_size)

    def unrolled(
        self, batch: TextBatch, target: Any, rows: TrainingRows
    ) -> Iterator[tuple[Tensor, Tensor]]:
        for slot, output_MH in enumerate(self.block_outputs(batch, target, rows).unbind(1)):
            feature = torch.cat([output_MH, self.before(rows.tokens_MK1[:, slot])], 1)
            yield feature, feature

    def head(self, depth: int, target: Any) -> Head:
        base, size = super().head(depth, target), self.shape.hidden_size
        return lambda wide: base(wide[..., :size]) + self.after(wide[..., size:])

    def block_logits(self, state: Any) -> Tensor:
        return super().head(0, state.context.target)(self.slots(state.last_BH))

    def next_block_logits(self, state: Any, frontier: Frontier, above_BW: Tensor) -> Tensor:
        target = state.context.target
        hidden = target.embed(frontier.tokens_BW).to(self.precision)
        return super().head(0, target)(self.slots(hidden))

    def conditioned(self, state: Any, frontier: Frontier, logits_BWD: Tensor) -> Tensor:
        return logits_BWD + self.after(self.before(frontier.tokens_BW))


KINDS = (LinearBlocks, CorrectedBlocks)
BUILDERS: dict[str, Callable[[], TreeBuilder]] = {
    "static": lambda: StaticTree(SMALL_TREE),
    "threshold": lambda: ThresholdTree(3),
    "reranked": lambda: RerankedTree(3, 3),
    "sampled chain": lambda: SampledChain(3),
    "without replacement": lambda: DrawnTree(SMALL_TREE),
    "independent": lambda: DrawnTree(SMALL_TREE, "independent"),
    "beam": lambda: StochasticBeamTree(2, 3),
    "dyspec": lambda: DySpecTree(3),
    "sequoia": lambda: sequoia_tree([[0.6, 0.2]], 4, 3),
}
PAIRS = [
    (builder, rule)
    for builder, made in BUILDERS.items()
    for rule, kind in RULES.items()
    if kind().lossless and made().sibling_draw in kind().sibling_draws
]


def made(kind: type[LinearBlocks], target: Target, block: int = 3) -> LinearBlocks:
    torch.manual_seed(4)
    return kind(target.shape, block).double().eval()


@pytest.mark.parametrize("kind", KINDS)
def test_it_passes_what_conformance_checks(kind: type[LinearBlocks]) -> None:
    check_decoding(lambda target: made(kind, target))
    for check in (check_loss, check_gradients, check_no_labels, check_target_unchanged):
        target = tiny_target()
        check(made(kind, target), target)


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_decoding_computes_what_training_does(kind: type[LinearBlocks]) -> None:
    target = tiny_target()
    drafter, batch = made(kind, target), documents([list(range(20, 40))])
    filled(batch, drafter, target)
    rows = training_rows(batch, 3)
    features = enumerate(drafter.teacher_forced(batch, target, rows))
    expected_MKD = torch.stack([drafter.head(d, target)(one) for d, one in features], 1)
    reader = Reader(drafter, target, batch, [5])
    for accepted in (0, 2, 4):
        reader.accept([accepted]) if accepted else None
        torch.testing.assert_close(reader.logits()[0], expected_MKD[int(reader.read[0]) - 1])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", BUILDERS)
def test_every_builder_leaves_the_targets_greedy_text(kind: type[LinearBlocks], name: str) -> None:
    target = tiny_target()
    decoder = SpeculativeDecoder(target, made(kind, target), builder=BUILDERS[name](), budget=6)
    drafted = decoder.decode(PROMPTS, Sampling(), 24)
    assert [trace.ids for trace in drafted] == [trace.ids for trace in decode(None, target)]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("name", "rule"), PAIRS)
def test_every_rule_that_fits_keeps_the_distribution(
    kind: type[LinearBlocks], name: str, rule: str
) -> None:
    target = small_target()
    decoder = SpeculativeDecoder(
        target,
        made(kind, target, block=2 if kind is CorrectedBlocks else 3),
        rule=RULES[rule](),
        builder=BUILDERS[name](),
        budget=4,
        stop_ids=frozenset(),
    )
    sampling = Sampling(0.0 if rule == "greedy" else 1.0)
    if rule == "greedy":
        plain = SpeculativeDecoder(target, stop_ids=frozenset()).decode([[3, 1]], sampling, 9)
        assert decoder.decode([[3, 1]], sampling, 9)[0].ids == plain[0].ids
    else:
        assert goodness(decoder, [3, 1], sampling, runs=1000) > 1e-4


def test_a_single_block_ends_where_it_ends_and_further_blocks_do_not() -> None:
    target = tiny_target()
    single, further = (made(kind, target, block=2) for kind in KINDS)
    words = "depth 5, but the drafter has 2 tokens in a block: lower the depth or train more"
    with pytest.raises(ValueError, match=words):
        SpeculativeDecoder(target, single, builder=StaticTree.chain(5))
    with pytest.raises(ValueError, match="deeper than the drafter's 2 tokens in a block"):
        single.use_static_tree([(0,), (0, 0), (0, 0, 0)])
    assert single.default_budget == single.builder.depth == 2
    trace = SpeculativeDecoder(target, further, builder=StaticTree.chain(5), budget=5)
    assert trace.decode([[7, 8, 9]], Sampling(), 9)[0].offered[0] == 5
    with pytest.raises(ValueError, match="LinearBlocks drafts a single block of 2 tokens"):
        StaticTree.chain(3).build(
            single, Reader(single, target, documents([[7, 8, 9, 10]]), [3]).state, 3
        )
    with pytest.raises(ValueError, match="block must be at least 1"):
        LinearBlocks(target.shape, 0)


@torch.no_grad()
def test_the_loss_is_a_mean_over_slots() -> None:
    """Weights 1, 0.8, 0.64 of the slots that have a label, by hand."""
    target = tiny_target()
    drafter, batch = made(LinearBlocks, target), documents([[20, 21, 22, 23, 24], [30, 31, 32]])
    filled(batch, drafter, target)
    total, weight = 0.0, 0.0
    for b, length in ((0, 5), (1, 3)):
        for t in range(length - 2):
            for slot, output_H in enumerate(drafter.slots(batch.states["final"][b, t])):
                if t + 2 + slot < length:
                    logs, label = target.logits(output_H).log_softmax(-1), t + 2 + slot
                    total -= 0.8**slot * float(logs[batch.input_ids[b, label]])
                    weight += 0.8**slot
    assert float(drafter.loss(batch, target, 0.0).total) == pytest.approx(total / weight)


def test_an_accepted_run_ends_at_the_first_wrong_or_missing_token() -> None:
    """Blocks right in all slots, wrong in the second, wrong in the first, and two tokens long."""
    ranks_MK = torch.tensor([[0, 0, 0], [0, 4, 0], [2, 0, 0], [0, 0, 0]])
    valid_MK = torch.tensor([[1, 1, 1], [1, 1, 1], [1, 1, 1], [1, 1, 0]], dtype=torch.bool)
    nothing, zeros = torch.zeros(4, 1), torch.zeros(4)
    steps = [
        DraftStep(d, nothing, nothing, ranks, valid, zeros, ranks, ranks, None)
        for d, (ranks, valid) in enumerate(zip(ranks_MK.T, valid_MK.T, strict=True))
    ]
    drafter = made(LinearBlocks, tiny_target())
    total, count = drafter.weighted(steps, documents([[1]])).metrics["accepted"]
    assert (int(total), int(count)) == (3 + 1 + 0 + 2, 4)


def test_a_block_learns_a_cycle_and_drafts_all_of_it_from_its_first_slot_on() -> None:
    """On x_t = 50 + t mod 7 every slot is off by nothing, and accepted tokens are all of them."""
    target = tiny_target()
    drafter, batch = made(LinearBlocks, target).train(), documents([list(range(50, 57)) * 3])
    filled(batch, drafter, target)
    optimizer = torch.optim.Adam(drafter.parameters(), 1e-2)
    for _ in range(80):
        optimizer.zero_grad()
        drafter.loss(batch, target, 0.0).total.backward()
        optimizer.step()
    runs, count = drafter.eval().loss(batch, target, 0.0).metrics["accepted"]
    assert int(count) == 19 and int(runs) == 17 * 3 + 2 + 1
    for prompt in (7, 10):
        reader = Reader(drafter, target, batch, [prompt])
        tree = drafter.propose(reader.state, 3)
        assert tree.tokens_BN[0].tolist() == [50 + (prompt + i) % 7 for i in range(4)]
