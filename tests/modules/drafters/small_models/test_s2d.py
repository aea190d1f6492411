"""An S2D drafter may be left anywhere, for targets of any depth: no token changes, every exit is
exact.
"""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from modules.contracts.batches import TextBatch
from modules.contracts.drafter import Frontier
from modules.contracts.sampling import Sampling
from modules.contracts.verification import Accepted, Verified
from modules.decoding.decoder import SpeculativeDecoder
from modules.drafters.small_models.s2d import S2D, AtThresholds
from modules.layers.decoder_layer import run_layers
from modules.trees.sampled.chain import SampledChain
from modules.trees.static import StaticTree
from tests.fakes import tiny_target
from tests.modules.families import Reader, documents
from tests.modules.sampling import first_two_tokens, homogeneous, small_target

TARGETS = [tiny_target(layers=4), tiny_target(layers=2, seed=1)]
DEEP = tiny_target(layers=6)
EXITS = [2, 4, 6]
PROMPTS = [[7, 8, 9, 10], [20, 30], [40, 41, 42, 43, 44]]


def drafter(thresholds: float, width: int) -> S2D:
    torch.manual_seed(0)
    made = S2D(TARGETS[0].shape, exits=[1, 2], thresholds=thresholds, width=width).double()
    made.initialise(TARGETS[0])
    return made.eval()


def deep(exits: list[int], thresholds: float = 0.5, **arguments) -> S2D:
    made = S2D(DEEP.shape, exits=exits, thresholds=thresholds, **arguments).double()
    made.initialise(DEEP)
    return made.eval()


def text(length: int = 20, rows: int = 1, seed: int = 0) -> TextBatch:
    generator = torch.Generator().manual_seed(seed)
    return documents(torch.randint(5, 128, (rows, length), generator=generator).tolist())


def along_text(made: S2D, reader: Reader, levels: int) -> Tensor:
    """Logits [B,levels,V] when every level's node is the text's own token."""
    parent = torch.full_like(reader.read, -1)[:, None]
    return torch.cat(
        [
            made.expand(reader.state, Frontier(reader.token(d)[:, None], parent + d, d))
            for d in range(levels)
        ],
        1,
    )


@torch.no_grad()
def in_full(made: S2D, batch: TextBatch) -> list[Tensor]:
    """Logits [B,T,V] of every exit when all layers run on all tokens."""
    hidden, found = made.embedding(batch.input_ids), []
    for exit_index in range(len(made.exits)):
        hidden = run_layers(made.part(exit_index), hidden, batch.rows())
        found.append(made.head(0, DEEP)(made.norm(hidden)))
    return found


# -- exits -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("thresholds", [0.0, 0.1, 2.0])
@pytest.mark.parametrize("width", [1, 2])
def test_every_exit_and_every_target_gives_the_targets_own_tokens(
    thresholds: float, width: int
) -> None:
    for target in TARGETS:
        plain = SpeculativeDecoder(target).decode(PROMPTS, Sampling(), 16)
        drafted = SpeculativeDecoder(target, drafter(thresholds, width)).decode(
            PROMPTS, Sampling(), 16
        )
        assert [trace.ids for trace in drafted] == [trace.ids for trace in plain]


@pytest.mark.parametrize(("thresholds", "depth"), [(2.0, 6), (0.0, 2)])
@pytest.mark.parametrize("width", [1, 2])
@torch.no_grad()
def test_extreme_thresholds_are_the_deepest_and_the_shallowest_draft(
    thresholds: float, depth: int, width: int
) -> None:
    """The deepest sub-model alone, or the shallowest: the same trees, verification by
    verification.
    """
    whole, alone = deep(EXITS, thresholds, width=width), deep([depth], width=width)
    alone.load_state_dict(
        {
            name: tensor
            for name, tensor in whole.state_dict().items()
            if not name.startswith("layers.") or int(name.split(".")[1]) < depth
        }
    )
    first, second = (
        SpeculativeDecoder(DEEP, made).decode(PROMPTS, Sampling(), 16) for made in (whole, alone)
    )
    assert [trace.accepted for trace in first] == [trace.accepted for trace in second]
    readers = [Reader(made, DEEP, text(), [7]) for made in (whole, alone)]
    trees = [
        StaticTree.chain(4).build(made, reader.state, 4)
        for made, reader in zip((whole, alone), readers)
    ]
    assert torch.equal(trees[0].tokens_BN, trees[1].tokens_BN)
    assert readers[0].state.exits == [depth] * 4


@pytest.mark.parametrize("script", [[0, 0, 2, 0, 1, 2], [0, 1, 0, 2, 2, 0], [2, 0, 0, 0, 0, 1]])
@torch.no_grad()
def test_layers_that_catch_up_give_what_running_all_of_them_gives(
    script: Sequence[int], monkeypatch
) -> None:
    """Forced exits within a proposal and over verifications, in a batch of unequal prompts."""
    made, batch = deep(EXITS), text(24, rows=2)
    expected, reader = in_full(made, batch), Reader(made, DEEP, batch, [5, 3])
    monkeypatch.setattr(
        made, "leaves", lambda logits, exit_index, state: exit_index == script[len(state.exits)]
    )
    for lengths in ([], [1, 3], [2, 1], [3, 3]):
        if lengths:
            reader.accept(lengths)
        found = along_text(made, reader, len(script))
        assert reader.state.exits == [EXITS[exit_index] for exit_index in script]
        for b, read in enumerate(reader.read.tolist()):
            for level, exit_index in enumerate(script):
                torch.testing.assert_close(
                    found[b, level], expected[exit_index][b, read + level], atol=1e-5, rtol=0
                )


@torch.no_grad()
def test_the_mean_exit_rises_with_the_thresholds() -> None:
    batch, means = text(24), []
    for threshold in (0.0, 0.1, 0.15, 0.2, 0.3, 2.0):
        made = deep(EXITS, threshold)
        reader = Reader(made, DEEP, batch, [6])
        along_text(made, reader, 12)
        means.append(sum(reader.state.exits) / 12)
    assert means == sorted(means) and means[0] == 2 and means[-1] == 6 and len(set(means)) > 3


@torch.no_grad()
def test_a_builder_sets_the_thresholds_of_its_row_alone() -> None:
    made = deep(EXITS, 2.0)
    for thresholds, depth in ((0.0, 2), ([2.0, 0.0], 4), (2.0, 6)):
        reader = Reader(made, DEEP, text(), [7])
        AtThresholds(thresholds, depth=3).build(made, reader.state, 3)
        assert reader.state.exits == [depth] * 3
    assert made.thresholds == [2.0, 2.0]


@pytest.mark.parametrize(
    ("thresholds", "calls"), [([1.0, 2.0], 1), ([2.0, 0.0], 1), ([0.0, 2.0], 1), ([0.99, 0.99], 3)]
)
@torch.no_grad()
def test_an_exit_that_is_never_taken_asks_no_lm_head(
    thresholds: list[float], calls: int, monkeypatch
) -> None:
    made, asked = deep(EXITS, 2.0), []
    made.thresholds = thresholds
    reader, head = Reader(made, DEEP, text(), [7]), made.head
    monkeypatch.setattr(made, "head", lambda *given: asked.append(given) or head(*given))
    along_text(made, reader, 4)
    assert len(asked) == 4 * calls


@torch.no_grad()
def test_the_chain_grows_no_further_than_the_budget_and_shrinks_at_the_first_rejection() -> None:
    made = deep(EXITS, 2.0, draft_length=4)
    reader, lengths = Reader(made, DEEP, text(30), [5]), []
    for accepted in (5, 6, 6, 1, 1, 4):
        tree = made.propose(reader.state, 5)
        lengths.append(tree.tokens_BN.shape[1] - 1)
        rows = torch.arange(accepted)[None]
        found = Accepted(rows, torch.tensor([accepted]), tree.tokens_BN[:, -1])
        reader.state = made.absorb(reader.state, Verified(tree, torch.zeros(1)), found)
    assert lengths == [4, 5, 5, 5, 4, 3]


@torch.no_grad()
def test_layers_catch_up_on_branches_too(monkeypatch) -> None:
    """Several nodes a level, each on a path of its own, exits forced, over verifications of unequal
    prompts.
    """
    made, batch, rows, script = deep(EXITS), text(24, rows=2), [], [0, 2, 0, 1]
    reader, expand = Reader(made, DEEP, batch, [5, 3]), made.expand
    monkeypatch.setattr(
        made, "leaves", lambda logits, exit_index, state: exit_index == script[len(state.exits)]
    )

    def watched(state, frontier):
        logits = expand(state, frontier)
        rows.extend(
            (frontier.tokens_BW[:, w], frontier.parents_BW[:, w], frontier.depth, logits[:, w])
            for w in range(logits.shape[1])
        )
        return logits

    monkeypatch.setattr(made, "expand", watched)
    paths = [[0], [1], [0, 0], [0, 1], [1, 0], [0, 0, 0], [0, 1, 0], [1, 0, 0], [1, 0, 0, 0]]
    for lengths in ([], [1, 3], [3, 1]):
        if lengths:
            reader.accept(lengths)
        rows.clear()
        StaticTree(paths).build(made, reader.state, len(paths))
        assert reader.state.exits == [EXITS[exit_index] for exit_index in script] and len(
            rows
        ) > len(script)
        for b, read in enumerate(reader.read.tolist()):
            for tokens, parents, depth, logits in rows:
                path, above = [int(tokens[b])], int(parents[b])
                while above >= 0:
                    path.insert(0, int(rows[above][0][b]))
                    above = int(rows[above][1][b])
                alone = documents([[*batch.input_ids[b, :read].tolist(), *path]])
                torch.testing.assert_close(
                    logits[b], in_full(made, alone)[script[depth]][0, -1], atol=1e-5, rtol=0
                )


def test_sampling_keeps_the_distribution_while_exits_mix(monkeypatch) -> None:
    """Mid thresholds at temperature 1: which exit drafts a token depends on the tokens before it,
    drawn or read.
    """
    target, left = small_target(), []
    torch.manual_seed(0)
    made = S2D(target.shape, exits=[1, 2], thresholds=0.45).double()
    made.initialise(target)
    leaves = made.eval().leaves
    monkeypatch.setattr(
        made, "leaves", lambda *given: left.append((given[1], leaves(*given))) or left[-1][1]
    )
    plain = SpeculativeDecoder(target, stop_ids=frozenset({-1}))
    fast = SpeculativeDecoder(
        target, made, builder=SampledChain(3), budget=3, stop_ids=frozenset({-1})
    )
    found = first_two_tokens(fast, 1000, batch=25)
    early = [gone for exit_index, gone in left if exit_index == 0]
    assert 0.2 < sum(early) / len(early) < 0.8
    assert homogeneous(first_two_tokens(plain, 2000), found) > 1e-4


def test_more_is_accepted_as_the_thresholds_rise() -> None:
    """The deepest exit is the target itself, the others are less and less of it."""
    prompts, means = [[seed, *PROMPTS[seed % 3]] for seed in range(30, 34)], []
    for threshold in (0.0, 0.1, 2.0):
        made = deep(EXITS, threshold, adaptive=False)
        traces = [
            SpeculativeDecoder(DEEP, made).decode([prompt], Sampling(), 12)[0] for prompt in prompts
        ]
        means.append(
            sum(sum(trace.accepted) for trace in traces)
            / sum(len(trace.accepted) for trace in traces)
        )
    assert means == sorted(means) and len(set(means)) == 3 and means[-1] > 2 * means[0], means


# -- training --------------------------------------------------------------------------------------


def sums(pairs: Sequence[tuple[int, int]]) -> TextBatch:
    """Rows of x_t = (x_{t-1} + x_{t-2}) mod 8 from pairs of first tokens."""
    rows = [[*pair] for pair in pairs]
    for row in rows:
        while len(row) < 12:
            row.append((row[-1] + row[-2]) % 8)
    return documents([[20 + token for token in row] for row in rows], labels_from=2)


def trained(
    sorted_training: bool, exits: list[int], batch: TextBatch, held_out: TextBatch, steps: int
) -> dict[str, float]:
    """Held-out cross-entropy of every exit after the same steps."""
    torch.manual_seed(0)
    made = deep(exits, sorted_training=sorted_training, draft_vocabulary=None).train()
    optimizer = torch.optim.Adam(made.declared_parameters(), 3e-3)
    for _ in range(steps):
        optimizer.zero_grad()
        made.loss(batch, DEEP, 0.0).total.backward()
        optimizer.step()
    metrics = made.eval().loss(held_out, DEEP, 0.0).metrics
    return {
        name: float(mean.total / mean.count)
        for name, mean in metrics.items()
        if name.startswith("cross")
    }


def test_sorted_training_makes_a_model_of_every_exit_and_plain_training_only_of_the_last() -> None:
    batch = sums([(1 + b % 8, 1 + b // 8) for b in range(16)])
    sorted_, plain = (trained(kind, [1, 3], batch, batch, 60) for kind in (True, False))
    assert sorted_["cross_entropy_exit_1"] < plain["cross_entropy_exit_1"] - 1
    assert sorted_["cross_entropy_exit_3"] < plain["cross_entropy_exit_3"] + 0.2
    assert plain["cross_entropy_exit_3"] < plain["cross_entropy_exit_1"] - 1


def test_deeper_exits_know_more_of_held_out_text() -> None:
    """After sorted training each exit more than the one before; after plain training the first next
    to nothing.
    """
    pairs = [(first, second) for first in range(8) for second in range(8)]
    order = torch.randperm(64, generator=torch.Generator().manual_seed(0)).tolist()
    batch, held_out = (sums([pairs[i] for i in part]) for part in (order[:48], order[48:]))
    sorted_, plain = (
        list(trained(kind, [1, 2, 3], batch, held_out, 24).values()) for kind in (True, False)
    )
    assert sorted_[0] > sorted_[1] > sorted_[2], sorted_
    assert sorted_[2] < plain[2] + 0.2 and plain[0] > sorted_[0] + 1, (sorted_, plain)


def test_wrong_sizes_are_refused() -> None:
    with pytest.raises(ValueError, match="at least 1"):
        S2D(TARGETS[0].shape, exits=[1, 2], width=0)
    with pytest.raises(ValueError, match="exits must ascend"):
        S2D(TARGETS[0].shape, exits=[2, 1])
    with pytest.raises(ValueError, match="thresholds must be 2"):
        S2D(DEEP.shape, exits=EXITS, thresholds=[0.5])
