"""What every head family must hold to: decoding is training, alignment, dependence, losslessness,
gradients.
"""

from __future__ import annotations

import pytest
import torch

from modules.contracts.sampling import Sampling
from modules.decoding.decoder import SpeculativeDecoder
from modules.drafters.heads.clover import Clover
from modules.drafters.heads.hydra import Hydra
from modules.drafters.heads.medusa import Medusa
from modules.drafters.trained import TrainedDrafter
from modules.losses.chunked import draft_labels, training_rows
from modules.trees.reranked import RerankedTree
from modules.trees.static import StaticTree
from tests.fakes import tiny_batch, tiny_target
from tests.modules.families import FAMILIES, Reader, built, documents, filled

TARGET = tiny_target("llama")
SEES_TOKENS = [
    name
    for name in FAMILIES
    if not name.startswith(("medusa", "falcon", "peagle")) and name != "clover_no_token"
]


def train(drafter: TrainedDrafter, batch, steps: int, lr: float = 1e-2) -> float:
    optimizer = torch.optim.Adam(drafter.parameters(), lr)
    loss = torch.zeros(())
    for _ in range(steps):
        optimizer.zero_grad()
        loss = drafter.loss(batch, TARGET, 0.0).total
        loss.backward()
        optimizer.step()
    drafter.eval()
    return float(loss)


@pytest.mark.parametrize("name", FAMILIES)
@torch.no_grad()
def test_decoding_computes_what_training_does(name: str) -> None:
    generator = torch.Generator().manual_seed(0)
    batch = documents([torch.randint(5, 128, (n,), generator=generator).tolist() for n in (22, 19)])
    drafter = filled_drafter(name, batch)
    rows = training_rows(batch, drafter.draft_steps)
    expected = torch.stack(
        [
            drafter.head(d, TARGET)(feature)
            for d, feature in enumerate(drafter.teacher_forced(batch, TARGET, rows))
        ],
        1,
    )
    row_of = {int(flat): m for m, flat in enumerate(rows.flat_MK1[:, 0])}
    reader = Reader(drafter, TARGET, batch, [5, 3])
    for lengths in ([], [1, 3], [3, 1], [2, 2], [1, 1]):
        if lengths:
            reader.accept(lengths)
        found = reader.logits()
        for b, read in enumerate(reader.read.tolist()):
            m = row_of[b * batch.input_ids.shape[1] + read - 1]
            torch.testing.assert_close(found[b], expected[m], atol=3e-5, rtol=1e-4)


def filled_drafter(name: str, batch) -> TrainedDrafter:
    drafter = built(name, TARGET, shake=0.05)
    filled(batch, drafter, TARGET)
    return drafter


@pytest.mark.parametrize("name", FAMILIES)
def test_greedy_output_is_the_targets_own(name: str) -> None:
    prompts = [[7, 8, 9, 10], [20, 30], [40, 41, 42, 43, 44, 45, 46]]
    plain = SpeculativeDecoder(TARGET).decode(prompts, Sampling(), 14)
    drafted = SpeculativeDecoder(TARGET, built(name, TARGET, shake=0.05)).decode(
        prompts, Sampling(), 14
    )
    assert [trace.ids for trace in drafted] == [trace.ids for trace in plain]


@pytest.mark.parametrize("name", FAMILIES)
def test_a_batch_drafts_what_each_prompt_alone_does(name: str) -> None:
    prompts = [[7, 8, 9, 10], [20, 30], [40, 41, 42, 43, 44, 45, 46]]
    drafter = built(name, TARGET, shake=0.02)
    together = SpeculativeDecoder(TARGET, drafter).decode(prompts, Sampling(), 12)
    alone = [
        SpeculativeDecoder(TARGET, drafter).decode([prompt], Sampling(), 12)[0]
        for prompt in prompts
    ]
    assert [trace.accepted for trace in together] == [trace.accepted for trace in alone]


@pytest.mark.parametrize("name", ["eagle", "eagle3", "fspad", "chimera", "clover", "falcon"])
def test_reranked_trees_change_no_token(name: str) -> None:
    prompts = [[7, 8, 9, 10], [20, 30]]
    decoder = SpeculativeDecoder(
        TARGET, built(name, TARGET, shake=0.02), builder=RerankedTree(3, 3), budget=6
    )
    plain = SpeculativeDecoder(TARGET).decode(prompts, Sampling(), 14)
    assert [trace.ids for trace in decoder.decode(prompts, Sampling(), 14)] == [
        trace.ids for trace in plain
    ]


@pytest.mark.parametrize("name", FAMILIES)
def test_gradients_reach_every_parameter_and_never_the_target(name: str) -> None:
    drafter = built(name, TARGET, shake=0.05)
    losses = drafter.loss(filled(tiny_batch(TARGET), drafter, TARGET), TARGET, 0.0)
    losses.total.backward()
    assert torch.isfinite(losses.total)
    for key, parameter in drafter.named_parameters():
        assert not parameter.requires_grad or bool(parameter.grad.any()), key
    assert all(parameter.grad is None for parameter in TARGET.parameters())
    assert {"top1_0", "top5_2", "cross_entropy_1"} <= losses.metrics.keys()


@pytest.mark.parametrize("name", FAMILIES)
def test_a_batch_without_labels_costs_nothing(name: str) -> None:
    drafter, batch = built(name, TARGET), tiny_batch(TARGET)
    batch.loss_mask.zero_()
    loss = drafter.loss(filled(batch, drafter, TARGET), TARGET, 0.0).total
    loss.backward()
    assert float(loss) == 0


def teach(drafter: TrainedDrafter, batch, monkeypatch) -> None:
    """Let the target's distributions be the text itself, and nothing else count."""
    labels = draft_labels(batch.input_ids.roll(-1, 1).flatten(), drafter.vocabulary_D).clamp(min=0)
    sharp = torch.nn.functional.one_hot(labels, drafter.draft_size).double()
    monkeypatch.setattr(drafter, "distributions", lambda *_: lambda flat_M: sharp[flat_M])
    if hasattr(drafter, "feature_weight"):
        drafter.feature_weight = 0.0


@pytest.mark.parametrize(
    "name",
    [
        "medusa",
        "chimera",
        "clover",
        "clover_mlp_fusion",
        "clover2",
        "hydra",
        "eagle",
        "eagle3",
        "mtp",
        "fspad",
    ],
)
def test_drafts_continue_a_cycle_they_learnt(name: str, monkeypatch) -> None:
    """Trained on x_t = t mod m, every step must draft the token that decoding needs from it: no
    step is off by one.
    """
    period, ids = 7, list(range(50, 57)) * 4
    batch = documents([ids])
    drafter = built(name, TARGET)
    drafter.set_vocabulary(range(30, 70)) if drafter.vocabulary_D is not None else None
    drafter.initialise(TARGET)
    filled(batch, drafter, TARGET)
    if drafter.soft_labels:
        teach(drafter, batch, monkeypatch)
    train(drafter, batch, 80)
    for prompt in (7, 10, 12):
        reader = Reader(drafter, TARGET, batch, [prompt])
        tree = StaticTree.chain(3).build(drafter, reader.state, 3)
        assert tree.tokens_BN[0].tolist() == [50 + (prompt + i) % period for i in range(4)]


def triples() -> list[list[int]]:
    """All (a, b, a + b mod 4): the third token follows from the first two together, and from
    neither alone.
    """
    return [[20 + a, 20 + b, 20 + (a + b) % 4] for a in range(4) for b in range(4)]


@pytest.mark.parametrize(
    "build, learns",
    [
        (lambda shape: Medusa(shape, 1), False),
        (lambda shape: Clover(shape, 1, token_input=False), False),
        (lambda shape: Clover(shape, 1), True),
        (lambda shape: Clover(shape, 1, gate="cosine"), True),
        (lambda shape: Clover(shape, 1, fusion="mlp"), True),
        (lambda shape: Hydra(shape, 1, 2, dropout=0.0), True),
    ],
)
def test_order_two_chain(build, learns: bool) -> None:
    torch.manual_seed(0)
    drafter = build(TARGET.shape).double()
    drafter.initialise(TARGET)
    batch = filled(documents(triples(), labels_from=2), drafter, TARGET)
    if drafter.soft_labels:
        batch.states["final"] = 40 * TARGET.lm_head_rows(batch.input_ids.roll(-1, 1))
    train(drafter, batch, 250)
    hits = drafter.loss(batch, TARGET, 0.0).metrics["top1_0"]
    assert int(hits.count) == 16
    assert int(hits.total) == 16 if learns else int(hits.total) <= 8


@pytest.mark.parametrize("name", FAMILIES)
@torch.no_grad()
def test_drafted_tokens_matter_unless_withheld(name: str) -> None:
    batch = documents([[9, 20, 31, 42, 53, 64, 75, 86]])
    reader = Reader(built(name, TARGET, shake=0.05), TARGET, batch, [4])
    before = reader.logits()
    reader.ids[0, 5] = 99
    changed = (reader.logits() - before).abs().amax(-1)[0]
    assert float(changed[0]) == 0
    assert bool((changed[1:] > 1e-6).all()) == (name in SEES_TOKENS)
    assert bool((changed[1:] == 0).all()) == (name not in SEES_TOKENS)


def test_saved_weights_carry_the_draft_vocabulary() -> None:
    first, second = built("clover", TARGET, shake=0.05), built("clover", TARGET)
    second.set_vocabulary(range(40))
    second.load_state_dict(first.state_dict())
    assert torch.equal(first.vocabulary_D, second.vocabulary_D)
    assert not any("rotary" in key for key in first.state_dict())


def test_mistakes_are_one_line() -> None:
    shape = TARGET.shape
    with pytest.raises(ValueError, match="draft_vocabulary is 40 but 3 different ids"):
        built("clover", TARGET).set_vocabulary([1, 2, 3])
    for build, words in (
        (lambda: Medusa(shape, 0), "heads must"),
        (lambda: Medusa(shape, lm_head="x"), "lm_head"),
        (lambda: Clover(shape, fusion="x"), "fusion"),
        (lambda: Clover(shape, gate="x"), "gate"),
        (
            lambda: Medusa(shape, 2, tree=[[0], [0, 0], [0, 0, 0]]),
            "deeper than the drafter's 2 heads",
        ),
        (lambda: Medusa(shape, tree="oak"), "tree 'oak'"),
        (lambda: Hydra(shape, lm_head="x"), "lm_head"),
        (lambda: Hydra(shape, prefix_start="x"), "prefix_start"),
        (lambda: Hydra(shape, dropout_at="x"), "dropout_at"),
        (lambda: Medusa(shape, draft_vocabulary=0), "draft_vocabulary"),
    ):
        with pytest.raises(ValueError, match=words):
            build()
