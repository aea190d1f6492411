"""What makes Falcon: blocks that see themselves, glancing, an LSTM carried along every path, passes
of k tokens.
"""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from modules.contracts.sampling import Sampling
from modules.decoding.decoder import SpeculativeDecoder
from modules.drafters.blocks.documents import Documents, block_ends, random_phases
from modules.drafters.blocks.falcon import Falcon
from modules.drafters.blocks.glancing import reveal, revealed_positions
from modules.drafters.feature.eagle import Eagle
from modules.losses.chunked import training_rows
from modules.trees.named_trees import NAMED
from modules.trees.reranked import RerankedTree
from modules.trees.sampled.chain import SampledChain
from modules.trees.static import StaticTree
from tests.fakes import tiny_batch, tiny_target
from tests.modules.families import Reader, documents, filled
from tests.modules.sampling import first_two_tokens, homogeneous, small_target

TARGET = tiny_target()
PROMPTS = [[7, 8, 9, 10], [20], [40, 41, 42, 43, 44, 45, 46]]


def falcon(block: int = 2, shake: float = 0.05, **arguments) -> Falcon:
    """In float64 and evaluation mode, its parameters shaken by Gaussian noise."""
    torch.manual_seed(2)
    drafter = Falcon(TARGET.shape, block, **arguments).double()
    drafter.initialise(TARGET)
    with torch.no_grad():
        for parameter in drafter.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=shake)
    return drafter.eval()


def text(length: int, seed: int = 0, rows: int = 1):
    generator = torch.Generator().manual_seed(seed)
    return documents(torch.randint(5, 128, (rows, length), generator=generator).tolist())


# -- blocks ----------------------------------------------------------------------------------------


def test_rows_see_their_block_and_what_stands_before_it(monkeypatch) -> None:
    """The mask of six positions in blocks of two."""
    drafter, batch, seen = falcon(), text(6), []
    filled(batch, drafter, TARGET)
    attend = drafter.attention.attend
    monkeypatch.setattr(
        drafter.attention, "attend", lambda *parts: seen.append(parts[3][0].int()) or attend(*parts)
    )
    ends = block_ends(batch.position_ids, 2).flatten().nonzero()[:, 0]
    for relaxed, expected in ((True, [2, 2, 4, 4, 6, 6]), (False, [1, 2, 3, 4, 5, 6])):
        drafter.relaxed_mask = relaxed
        drafter.outputs(batch, TARGET, ends, *drafter.inputs(batch))
        assert seen.pop().tolist() == [[1] * count + [0] * (6 - count) for count in expected]


@torch.no_grad()
def test_a_token_changes_all_of_its_block_and_nothing_before_it() -> None:
    drafter, batch = falcon(block=3), text(12)
    filled(batch, drafter, TARGET)
    ends, (features, following) = torch.tensor([2, 5, 8, 11]), drafter.inputs(batch)
    before = drafter.outputs(batch, TARGET, ends, features, following)
    following = following.clone()
    following[8] = 3
    changed = (drafter.outputs(batch, TARGET, ends, features, following) - before).abs().amax(-1)
    assert bool((changed[:2] == 0).all()) and bool((changed[2:] > 0).all())


@torch.no_grad()
def test_blocks_of_one_are_eagle() -> None:
    eagle, drafter, batch = Eagle(TARGET.shape).double().eval(), falcon(1, lstm=False), text(14)
    eagle.load_state_dict(drafter.state_dict())
    filled(batch, drafter, TARGET)
    rows = training_rows(batch, 1)
    (expected, _), (found, _) = (
        next(iter(one.unrolled(batch, TARGET, rows))) for one in (eagle, drafter)
    )
    torch.testing.assert_close(found, expected)
    paths = [[0], [1], [0, 0], [0, 1], [1, 0], [0, 0, 0], [1, 0, 0]]
    trees = [
        StaticTree(paths).build(one, Reader(one, TARGET, batch, [5]).state, 7)
        for one in (eagle, drafter)
    ]
    assert torch.equal(trees[0].tokens_BN, trees[1].tokens_BN)


def test_blocks_are_whole_and_begin_where_their_phase_says() -> None:
    positions = torch.tensor([[0, 1, 2, 3, 4, 0, 1, 2]])
    assert block_ends(positions, 2).int().tolist() == [[0, 1, 0, 1, 0, 0, 1, 0]]
    assert block_ends(positions, 3).int().tolist() == [[0, 0, 1, 0, 0, 0, 0, 1]]
    assert block_ends(positions, 3, 1).int().tolist() == [[0, 0, 0, 1, 0, 0, 0, 0]]
    both = torch.tensor([[2] * 5 + [0] * 3])
    assert block_ends(positions, 3, both).int().tolist() == [[0, 0, 0, 0, 1, 0, 0, 1]]


def test_phases_are_drawn_per_document_and_in_training_only(monkeypatch) -> None:
    batch = tiny_batch(TARGET)
    found = Documents.of(batch.document_ids)
    assert found.lengths_S.tolist() == [12, 9, 3] * 2
    torch.manual_seed(0)
    drawn = torch.stack([random_phases(found, 3) for _ in range(40)])
    assert all(
        len(part.unique(dim=1).T) == 1
        for row in drawn[:, None]
        for part in row.split([12, 9, 3] * 2, dim=1)
    )
    assert drawn[:, 0].unique().tolist() == [0, 1, 2] and not torch.equal(drawn[:, 0], drawn[:, 12])
    phases = []
    monkeypatch.setattr(
        "modules.drafters.blocks.falcon.block_ends",
        lambda *given: phases.append(given[2]) or block_ends(*given),
    )
    for drafter in (falcon().train(), falcon(random_phase=False).train(), falcon()):
        drafter.loss(filled(batch, drafter, TARGET), TARGET, 1.0)
    assert isinstance(phases[0], torch.Tensor) and phases[1:] == [0, 0]


@torch.no_grad()
def test_packed_documents_do_not_know_of_each_other() -> None:
    """The second document of a packed row, and the same document alone."""
    drafter, batch = falcon(block=3), tiny_batch(TARGET)
    alone = documents(batch.input_ids[:, 12:21].tolist())
    filled(batch, drafter, TARGET), filled(alone, drafter, TARGET)
    ends = torch.tensor([14, 17, 24 + 17])
    packed = drafter.outputs(batch, TARGET, ends, *drafter.inputs(batch))
    single = drafter.outputs(alone, TARGET, torch.tensor([2, 5, 9 + 5]), *drafter.inputs(alone))
    torch.testing.assert_close(packed, single)


# -- glancing --------------------------------------------------------------------------------------


def test_a_share_of_each_sequences_mistakes_is_revealed() -> None:
    torch.manual_seed(0)
    sequences = torch.tensor([0] * 20 + [1] * 20)
    for size in (2, 3, 4):
        wrong, valid = (
            torch.zeros(40, size, dtype=torch.bool),
            torch.ones(40, size, dtype=torch.bool),
        )
        wrong[:15], wrong[20:, 0] = True, True
        valid[3, 0] = valid[5, 1] = False
        counts = [int(0.4 * (15 * size - 2)), int(0.4 * 20)]
        for _ in range(20):
            shown = revealed_positions(wrong, valid, sequences, 0.4)
            starts = [int(shown[:20, 0].sum()), int(shown[20:, 0].sum())]
            assert starts == [count if size == 2 else count // size for count in counts]
            assert not bool((shown & ~valid).any()) and not bool(shown.all(1).any())
            assert bool((shown[:, 1:] <= shown[:, :-1]).all()), "runs begin with their block"
        assert not bool(shown[3].any()) and not bool(shown[5, 1:].any())
    assert not bool(revealed_positions(wrong[:, :1], valid[:, :1], sequences, 1.0).any())
    assert not bool(revealed_positions(wrong, valid, sequences, 0.0).any())


def test_feature_and_token_are_revealed_together() -> None:
    features, following = torch.arange(10.0)[:, None].expand(-1, 3), torch.arange(100, 110)
    shown_features, shown_following = reveal(features, following, torch.tensor([0, 4, 5]), 2)
    assert shown_features[:, 0].tolist() == [2, 1, 2, 3, 6, 7, 6, 7, 8, 9]
    assert shown_following.tolist() == [102, 101, 102, 103, 106, 107, 106, 107, 108, 109]


def test_glancing_fades_and_is_for_training_only(monkeypatch) -> None:
    batch, rates = tiny_batch(TARGET), []
    for drafter in (falcon().train(), falcon(glancing=0.0).train(), falcon()):
        filled(batch, drafter, TARGET)
        monkeypatch.setattr(
            drafter, "glance", lambda *given: rates.append(round(given[5], 9)) or (given[4], None)
        )
        for progress in (0.0, 0.5, 1.0):
            drafter.loss(batch, TARGET, progress)
    assert rates == [0.4, 0.2]


def test_only_what_was_wrong_counts(monkeypatch) -> None:
    """A drafter that is right everywhere is shown nothing; one that never is, λ of all rows, within
    its documents.
    """
    drafter, batch = falcon(), tiny_batch(TARGET)
    filled(batch, drafter, TARGET)
    rows = training_rows(batch, 2, block_ends(batch.position_ids, 2))
    final = batch.states["final"].flatten(0, 1)
    distributions, inputs, steps = (
        drafter.distributions(batch, TARGET, rows),
        drafter.inputs(batch),
        rows.flat_MK1[:, 1:],
    )
    for sign, rate in ((1, 1.0), (-1, 0.5)):
        monkeypatch.setattr(drafter, "outputs", lambda *_, sign=sign: sign * final[steps])
        (features, following), shown = drafter.glance(
            batch, TARGET, rows, distributions, inputs, rate
        )
        changed = (features != inputs[0]).any(-1).nonzero()[:, 0]
        per_row = torch.bincount(changed // 24, minlength=2).tolist()
        allowed = torch.bincount(steps[rows.valid_MK] // 24, minlength=2).tolist()
        assert per_row == torch.bincount(rows.flat_MK1[shown[:, 0], 0] // 24, minlength=2).tolist()
        assert per_row == ([0, 0] if sign == 1 else [int(0.5 * count) for count in allowed])
        assert bool(
            (
                batch.document_ids.flatten()[changed] == batch.document_ids.flatten()[changed + 2]
            ).all()
        )
        assert bool((following[changed] == inputs[1][changed + 2]).all())


def test_revealed_rows_can_be_left_out_of_the_loss(monkeypatch) -> None:
    """What a revealed row puts out does not matter then, and what the others put out does."""
    for counted in (True, False):
        drafter, batch = (
            falcon(revealed_loss=counted, noise=0.0, random_phase=False, dropout=0.0),
            tiny_batch(TARGET),
        )
        filled(batch, drafter.train(), TARGET)
        rows = training_rows(batch, 2, block_ends(batch.position_ids, 2))
        shown, outputs, gradients = torch.zeros_like(rows.valid_MK), drafter.outputs, []
        shown[::2, 0] = True

        def kept(*given, outputs=outputs, gradients=gradients):
            out = outputs(*given).detach().requires_grad_()
            gradients.append(out)
            return out

        monkeypatch.setattr(drafter, "outputs", kept)
        monkeypatch.setattr(drafter, "glance", lambda *given, shown=shown: (given[4], shown))
        drafter.loss(batch, TARGET, 0.0).total.backward()
        taught = gradients[0].grad.abs().sum(-1) > 0
        assert torch.equal(taught, rows.valid_MK if counted else rows.valid_MK & ~shown)
        assert bool((rows.valid_MK & shown).any())


def pairs(count: int, seed: int) -> list[int]:
    """Tokens u and 60 + u in turn, u random: the second of a block follows from the first, which
    nothing tells.
    """
    drawn = torch.randint(8, (count,), generator=torch.Generator().manual_seed(seed)) + 20
    return torch.stack([drawn, drawn + 40], 1).flatten().tolist()


def test_glancing_tells_the_rest_of_a_block(monkeypatch) -> None:
    """Trained with glancing, the second row of a block is right when the first is revealed, and not
    otherwise.

    Where rows start from the newest one, a drafter of this size learns these pairs by heart and
    needs no revelation.
    """
    torch.manual_seed(0)
    drafter = (
        Falcon(
            TARGET.shape,
            2,
            glancing=1.0,
            newest_row=False,
            random_phase=False,
            feature_weight=0.0,
            token_weight=1.0,
            noise=0.0,
            dropout=0.0,
        )
        .double()
        .train()
    )
    batch = documents([pairs(12, seed)[1:] for seed in range(12)])
    filled(batch, drafter, TARGET)
    sharp = F.one_hot(batch.input_ids.roll(-1, 1).flatten(), 128).double()
    monkeypatch.setattr(drafter, "distributions", lambda *_: lambda flat: sharp[flat])
    optimizer = torch.optim.Adam(drafter.parameters(), 1e-2)
    for _ in range(60):
        optimizer.zero_grad()
        drafter.loss(batch, TARGET, 0.0).total.backward()
        optimizer.step()
    drafter.eval()
    rows = training_rows(batch, 2, block_ends(batch.position_ids, 2))
    ends, inputs = rows.flat_MK1[rows.valid_MK.all(1), 0], drafter.inputs(batch)
    labels = batch.input_ids.flatten()[ends + 3]

    def accuracy(given) -> float:
        outputs = drafter.outputs(batch, TARGET, ends, *given)[:, 1]
        return float((TARGET.logits(outputs).argmax(-1) == labels).double().mean())

    assert accuracy(reveal(*inputs, ends - 1, 2)) > accuracy(inputs) + 0.3


# -- loss ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("block", [2, 3])
def test_the_loss_is_what_its_equation_says(block: int) -> None:
    """Smooth L1, KL to the target's distribution and cross-entropy to its best token, up to the
    distribution's entropy; row by row.
    """
    drafter, batch = falcon(block, draft_vocabulary=64), tiny_batch(TARGET)
    drafter.set_vocabulary(range(0, 128, 2))
    filled(batch, drafter, TARGET)
    final, ids = batch.states["final"], batch.input_ids
    expected = torch.zeros(())
    for d in range(block):
        distances, losses = [], []
        for b in range(2):
            for t in range(24):
                label = t + 2 + d
                if (
                    int(batch.position_ids[b, t]) % block != block - 1
                    or label >= 24
                    or not batch.loss_mask[b, label]
                ):
                    continue
                if batch.document_ids[b, t] != batch.document_ids[b, label]:
                    continue
                output = drafter.outputs(
                    batch, TARGET, torch.tensor([24 * b + t]), *drafter.inputs(batch)
                )[0, d]
                distances.append(F.smooth_l1_loss(output, final[b, t + 1 + d]))
                if int(ids[b, label]) % 2 == 0:
                    probs = TARGET.logits(final[b, t + 1 + d])[::2].log_softmax(0)
                    draft = TARGET.logits(output)[::2].log_softmax(0)
                    divergence = (probs.exp() * (probs - draft)).sum() - (probs.exp() * probs).sum()
                    losses.append(0.9 * divergence - 0.1 * draft[probs.argmax()])
        expected = expected + torch.stack(distances).mean() + 0.1 * torch.stack(losses).mean()
    torch.testing.assert_close(drafter.loss(batch, TARGET, 0.0).total, expected)


@pytest.mark.parametrize("block", [2, 3])
def test_a_cycle_is_continued_after_any_prefix(block: int, monkeypatch) -> None:
    """Trained with glancing, noise and random phases on x_t = t mod 7, all of a block is right,
    wherever it begins.
    """
    batch, drafter = (
        documents([list(range(50, 57)) * 4]),
        falcon(block, dropout=0.0, token_weight=1.0, shake=0.0),
    )
    filled(batch, drafter, TARGET)
    sharp = F.one_hot(batch.input_ids.roll(-1, 1).flatten(), 128).double()
    monkeypatch.setattr(drafter, "distributions", lambda *_: lambda flat: sharp[flat])
    drafter.feature_weight = 0.0
    drafter.train()
    optimizer = torch.optim.Adam(drafter.parameters(), 1e-2)
    for step in range(70):
        optimizer.zero_grad()
        drafter.loss(batch, TARGET, step / 70).total.backward()
        optimizer.step()
    drafter.eval()
    for prompt in (10, 13, 15):
        tree = StaticTree.chain(block).build(
            drafter, Reader(drafter, TARGET, batch, [prompt]).state, block
        )
        assert tree.tokens_BN[0].tolist() == [50 + (prompt + i) % 7 for i in range(block + 1)]


# -- decoding --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "arguments",
    [
        {},
        {"lstm": False},
        {"pass_through": False},
        {"relaxed_mask": False},
        {"newest_row": False},
        {"newest_row": False, "pass_through": False},
    ],
)
@pytest.mark.parametrize("block", [1, 2, 3])
@torch.no_grad()
def test_every_pass_is_the_first_pass_of_a_longer_prefix(block: int, arguments) -> None:
    """A block on any branch of a tree puts out what training does over the text that the branch
    spells, its features being those drafted on the way: LSTM state, positions and the tree's mask
    are those of that text."""
    drafter = falcon(block, **arguments)
    prefix = torch.randint(5, 128, (7,), generator=torch.Generator().manual_seed(1)).tolist()
    reader = Reader(drafter, TARGET, documents([prefix + [0]]), [6])
    paths = [[0], [1]]
    for level in range(2 * block - 1):
        paths += [
            path + [rank]
            for path in paths
            if len(path) == level + 1
            for rank in ((0, 1) if level < 2 else (0,))
        ]
    tree = StaticTree(paths).build(drafter, reader.state, len(paths))
    proposal, passes = reader.state.proposal, reader.state.passes
    assert proposal is not None and passes is not None and tree.topology.depth.max() == 2 * block
    checked = 0
    for row in range(proposal.tokens_BR.shape[1]):
        path, above = [], row
        while above >= 0:
            path.insert(0, int(proposal.tokens_BR[0, above]))
            above = int(proposal.parents_BR[0, above])
        if (len(path) - 1) % block or len(path) == 1:
            continue
        ids = prefix[:6] + path
        batch = documents([ids])
        filled(batch, drafter, TARGET)
        features, following = drafter.inputs(batch)
        first = int(proposal.blocks_BR[0, row])
        known = features.clone()
        for back, outputs in enumerate(_outputs_on_path(proposal, passes, row)):
            known[6 + back * block : 6 + (back + 1) * block] = outputs
        following = torch.tensor(ids[1:] + [0])
        found = drafter.outputs(batch, TARGET, torch.tensor([len(ids) - 2]), known, following)[0]
        torch.testing.assert_close(passes.features_BCKH[0, first], found)
        checked += 1
    assert checked > 1


def _outputs_on_path(proposal, passes, row: int) -> list[torch.Tensor]:
    """Outputs of the blocks above the block of a row, from the prefix's on."""
    found, above = [], int(proposal.parents_BR[0, row])
    while above >= 0:
        number = int(proposal.blocks_BR[0, above])
        if not found or found[0][0] != number:
            found.insert(0, (number, passes.features_BCKH[0, number]))
        above = int(proposal.parents_BR[0, above])
    return [features for _, features in found]


@pytest.mark.parametrize("block, passes", [(2, 4), (3, 2), (4, 2)])
def test_a_step_takes_one_reading_and_a_pass_every_k_levels(
    block: int, passes: int, monkeypatch
) -> None:
    levels = block * passes
    drafter = falcon(block, tree="falcon_8" if levels == 8 else "falcon_8_cut_6")
    calls = {"reads": 0, "passes": 0}
    read, after = drafter.read, drafter.layer.after_attention
    monkeypatch.setattr(
        drafter, "read", lambda *given: calls.update(reads=calls["reads"] + 1) or read(*given)
    )
    monkeypatch.setattr(
        drafter.layer,
        "after_attention",
        lambda hidden: calls.update(passes=calls["passes"] + 1) or after(hidden),
    )
    trace = SpeculativeDecoder(TARGET, drafter).decode([[7, 8, 9]], Sampling(), 9)[0]
    steps = len(trace.accepted)
    assert trace.offered == [levels] * steps
    assert trace.nodes == [drafter.default_budget] * steps
    assert calls == {"reads": steps + 1, "passes": passes * steps}


@pytest.mark.parametrize("block", [1, 2, 3, 4])
def test_output_is_the_targets_own_for_any_block_and_tree(block: int) -> None:
    plain = SpeculativeDecoder(TARGET).decode(PROMPTS, Sampling(), 8)
    drafter = falcon(block, draft_vocabulary=64)
    for builder in (StaticTree(NAMED["falcon_8_cut_6"]), RerankedTree(4, 3)):
        decoder = SpeculativeDecoder(TARGET, drafter, builder=builder, budget=12)
        assert [trace.ids for trace in decoder.decode(PROMPTS, Sampling(), 8)] == [
            trace.ids for trace in plain
        ]
        assert decoder.decode(PROMPTS[:1], Sampling(), 8)[0].ids == plain[0].ids


@pytest.mark.parametrize("arch", ["qwen3", "gemma2", "gpt2"])
def test_other_architectures_are_drafted_for(arch: str) -> None:
    target = tiny_target(arch)
    drafter = Falcon(target.shape, 3, tree=None).double()
    drafter.initialise(target)
    plain = SpeculativeDecoder(target).decode(PROMPTS, Sampling(), 8)
    drafted = SpeculativeDecoder(target, drafter.eval()).decode(PROMPTS, Sampling(), 8)
    assert [trace.ids for trace in drafted] == [trace.ids for trace in plain]


@pytest.mark.parametrize("builder", [RerankedTree(2, 2), SampledChain(2)])
def test_sampling_keeps_the_distribution(builder) -> None:
    """Within a block a distribution does not depend on the sibling above it, and is still the
    distribution its tokens were drawn from.
    """
    target = small_target()
    drafter = Falcon(target.shape, 2, draft_vocabulary=4).double()
    drafter.set_vocabulary([0, 2, 3, 5])
    drafter.initialise(target)
    plain = SpeculativeDecoder(target, stop_ids=frozenset({-1}))
    fast = SpeculativeDecoder(
        target, drafter.eval(), builder=builder, budget=4, stop_ids=frozenset({-1})
    )
    assert homogeneous(first_two_tokens(plain, 1000), first_two_tokens(fast, 1000)) > 1e-4


def test_mistakes_are_one_line() -> None:
    for arguments, words in (
        ({"block": 0}, "block must be at least 1"),
        ({"glancing": 1.5}, "glancing must lie in"),
        ({"tree": "oak"}, "tree 'oak'"),
    ):
        with pytest.raises(ValueError, match=words):
            Falcon(TARGET.shape, **arguments)
