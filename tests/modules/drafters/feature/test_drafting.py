"""How feature drafters draft: steps fed on themselves, exact features, every architecture,
sampling, named trees.
"""

from __future__ import annotations

import pytest
import torch

from modules.contracts.sampling import Sampling
from modules.decoding.decoder import SpeculativeDecoder
from modules.drafters.feature.eagle import Eagle
from modules.drafters.feature.eagle3 import Eagle3
from modules.drafters.feature.fspad import Fspad
from modules.losses.chunked import IGNORED, draft_labels, training_rows
from modules.trees.named_trees import NAMED
from modules.trees.reranked import RerankedTree
from modules.trees.static import StaticTree
from tests.fakes import ARCHITECTURES, tiny_batch, tiny_target
from tests.modules.families import Reader, built, documents, filled
from tests.modules.sampling import first_two_tokens, homogeneous, small_target

TARGET = tiny_target()
KINDS = {"eagle": Eagle, "eagle3": Eagle3, "fspad": Fspad}


@pytest.mark.parametrize(
    "name",
    ["eagle", "eagle3", "eagle3_one_layer", "eagle31", "eagle31_window", "fspad", "mtp"],
)
@torch.no_grad()
def test_unrolled_training_is_drafting_from_every_prefix(name: str) -> None:
    """Twelve tokens: step j at t equals reading the prefix up to t and then j steps on the
    drafter's own outputs.
    """
    batch = documents(
        [torch.randint(5, 128, (12,), generator=torch.Generator().manual_seed(3)).tolist()]
    )
    drafter = built(name, TARGET, shake=0.05)
    filled(batch, drafter, TARGET)
    rows = training_rows(batch, drafter.draft_steps)
    unrolled = [
        drafter.head(j, TARGET)(feature)
        for j, (feature, _) in enumerate(drafter.unrolled(batch, TARGET, rows))
    ]
    compared = 0
    for m, t in enumerate(rows.flat_MK1[:, 0].tolist()):
        drafted = Reader(drafter, TARGET, batch, [t + 1]).logits()[0]
        for j in rows.valid_MK[m].nonzero()[:, 0].tolist():
            torch.testing.assert_close(drafted[j], unrolled[j][m], atol=1e-5, rtol=0)
            compared += 1
    assert compared == 10 + 9 + 8


@pytest.mark.parametrize("name", ["eagle", "fspad"])
@torch.no_grad()
def test_with_the_targets_features_accuracy_does_not_decay(name: str, monkeypatch) -> None:
    """Fed the true f_{t+j}, step j drafts from t exactly what the first step drafts from t + j."""
    drafter, batch = built(name, TARGET, shake=0.05), tiny_batch(TARGET)
    filled(batch, drafter, TARGET)
    rows, final = training_rows(batch, drafter.draft_steps), batch.states["final"].flatten(0, 1)
    outputs, steps = drafter.outputs, iter(range(1, 9))
    monkeypatch.setattr(
        drafter,
        "outputs",
        lambda hidden: (outputs(hidden)[0], final[rows.flat_MK1[:, next(steps)]]),
    )
    features = [feature for feature, _ in drafter.unrolled(batch, TARGET, rows)]
    row_of = {flat: m for m, flat in enumerate(rows.flat_MK1[:, 0].tolist())}
    for j in range(1, drafter.draft_steps):
        for m in rows.valid_MK[:, j].nonzero()[:, 0].tolist():
            torch.testing.assert_close(
                features[j][m], features[0][row_of[int(rows.flat_MK1[m, j])]]
            )


def test_what_is_carried_on_is_not_what_the_head_reads(monkeypatch) -> None:
    """Of a trained drafter: going on from the LM head's half of the output costs accuracy from the
    second step on.
    """
    torch.manual_seed(0)
    ids = torch.randint(5, 128, (6, 16), generator=torch.Generator().manual_seed(1)).tolist()
    batch, drafter = documents(ids), Fspad(TARGET.shape, noise=0.0).double().train()
    drafter.initialise(TARGET)
    filled(batch, drafter, TARGET)
    optimizer = torch.optim.Adam(drafter.parameters(), 5e-3)
    for _ in range(60):
        optimizer.zero_grad()
        drafter.loss(batch, TARGET, 0.0).total.backward()
        optimizer.step()
    drafter.eval().draft_steps = 4
    rows, outputs = training_rows(batch, 4), drafter.outputs
    likely = TARGET.logits(batch.states["final"].flatten(0, 1)[rows.flat_MK1[:, 1:]]).argmax(-1)

    @torch.no_grad()
    def accuracies() -> list[float]:
        found = [
            TARGET.logits(feature).argmax(-1)
            for feature, _ in drafter.unrolled(batch, TARGET, rows)
        ]
        return [
            float((own == likely[:, j])[rows.valid_MK[:, j]].double().mean())
            for j, own in enumerate(found)
        ]

    split = accuracies()
    monkeypatch.setattr(drafter, "outputs", lambda hidden: (outputs(hidden)[0], outputs(hidden)[0]))
    tied = accuracies()
    assert tied[0] == split[0] > 0.7
    assert all(low < high - 0.2 for low, high in zip(tied[1:], split[1:], strict=True)), (
        tied,
        split,
    )


@pytest.mark.parametrize("arch", [arch for arch in ARCHITECTURES if arch != "llama"])
@pytest.mark.parametrize("kind", KINDS)
def test_every_architecture_is_drafted_for(kind: str, arch: str) -> None:
    target = tiny_target(arch)
    drafter = KINDS[kind](target.shape).double()
    drafter.initialise(target)
    prompts = [[7, 8, 9, 10], [20, 30]]
    plain = SpeculativeDecoder(target).decode(prompts, Sampling(), 8)
    drafted = SpeculativeDecoder(target, drafter.eval()).decode(prompts, Sampling(), 8)
    assert [trace.ids for trace in drafted] == [trace.ids for trace in plain]


def test_sampling_keeps_the_distribution_under_reranked_trees() -> None:
    target = small_target()
    drafter = Eagle3(target.shape, draft_vocabulary=4).double()
    drafter.set_vocabulary([0, 2, 3, 5])
    drafter.initialise(target)
    plain = SpeculativeDecoder(target, stop_ids=frozenset({-1}))
    fast = SpeculativeDecoder(
        target, drafter.eval(), builder=RerankedTree(2, 2), budget=4, stop_ids=frozenset({-1})
    )
    assert homogeneous(first_two_tokens(plain, 2000), first_two_tokens(fast, 2000)) > 1e-4


@pytest.mark.parametrize("kind", KINDS)
def test_the_papers_tree_is_drafted_whole(kind: str) -> None:
    drafter = KINDS[kind](TARGET.shape, steps=1, tree="eagle_25").double().eval()
    assert drafter.default_budget == len(NAMED["eagle_25"]) == 25 and drafter.builder.depth == 5
    trace = SpeculativeDecoder(TARGET, drafter).decode([[7, 8, 9]], Sampling(), 6)[0]
    assert trace.nodes[0] == 25 and trace.offered[0] == 5


def test_an_optimised_tree_is_found_on_held_out_batches() -> None:
    drafter, batch = Eagle3(TARGET.shape, steps=2, tree="optimised_4").double(), tiny_batch(TARGET)
    filled(batch, drafter, TARGET)
    outcome = drafter.finish([batch], TARGET)
    assert isinstance(drafter.builder, StaticTree) and outcome.figures["tree/expected_tokens"] >= 1
    assert len(drafter.config()["tree"]) == 4 and drafter.builder.depth <= 2


@torch.no_grad()
def test_greedy_labels_count_what_the_target_would_say() -> None:
    drafter = Eagle3(TARGET.shape, draft_vocabulary=64, greedy_labels=True).double()
    drafter.set_vocabulary(range(0, 128, 2))
    batch = filled(tiny_batch(TARGET), drafter, TARGET)
    rows = training_rows(batch, 3)
    labels = drafter.labels(batch, TARGET, rows)
    greedy = TARGET.logits(batch.states["final"]).argmax(-1).flatten()[rows.flat_MK1[:, 1:]]
    expected = draft_labels(greedy, drafter.vocabulary_D)
    assert torch.equal(labels[rows.valid_MK], expected[rows.valid_MK])
    assert bool((labels[~rows.valid_MK] == IGNORED).all()) and bool((labels != IGNORED).any())
    assert not torch.equal(labels, super(Eagle3, drafter).labels(batch, TARGET, rows))
