"""Medusa-1 and Medusa-2."""

from __future__ import annotations

from math import pi, sin
from typing import Any

import pytest
import torch

from modules.contracts.sampling import Sampling
from modules.decoding.decoder import SpeculativeDecoder
from modules.drafters.heads.medusa import Medusa
from modules.drafters.heads.medusa2 import Medusa2
from modules.drafters.trained import measured_accuracies
from modules.losses.chunked import training_rows
from modules.trees.expected_length import optimised_tree
from tests.fakes import tiny_batch, tiny_target
from tests.modules.families import Reader, built, documents, filled
from train.lightning.callbacks import AcceptanceProbe
from train.lightning.module import TrainableModule
from train.settings import OptimizerSettings, ProbeSettings


@torch.no_grad()
@pytest.mark.parametrize("size", [1, 2, 3])
def test_a_tree_by_name_has_no_ranks_that_a_small_draft_vocabulary_lacks(size: int) -> None:
    """It drafts with what there is, losslessly; a tree in full is refused."""
    target = tiny_target()
    drafter = Medusa(target.shape, heads=3, draft_vocabulary=size).double()
    drafter.set_vocabulary(range(20, 20 + size))
    drafter.initialise(target)
    assert max(max(path) for path in drafter._builder.paths) == size - 1
    plain, drafted = (
        SpeculativeDecoder(target, each).decode([[5, 6, 7]], Sampling(), 12)[0].ids
        for each in (None, drafter.eval())
    )
    assert drafted == plain
    with pytest.raises(ValueError, match=f"a rank of 3, but the draft vocabulary has {size} token"):
        Medusa(target.shape, heads=3, draft_vocabulary=size, tree=[[0], [3]])


@torch.no_grad()
@pytest.mark.parametrize("arch", ["llama", "gpt2"])
@pytest.mark.parametrize("name", ["medusa", "medusa_shared"])
def test_fresh_heads_repeat_the_targets_prediction(arch: str, name: str) -> None:
    target = tiny_target(arch)
    drafter = built(name, target)
    for key, parameter in drafter.named_parameters():
        if key.endswith("linear.bias"):
            parameter.zero_()
    batch = documents([[9, 20, 31, 42, 53, 64, 75]])
    reader = Reader(drafter, target, batch, [5])
    final = target.features(batch, ("final",))["final"][0, 4]
    expected = target.logits(final, drafter.vocabulary_D)
    for logits in reader.logits()[0]:
        torch.testing.assert_close(logits, expected, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_loss_is_the_papers() -> None:
    target = tiny_target("llama")
    drafter = built("medusa", target, shake=0.1)
    batch = filled(tiny_batch(target), drafter, target)
    losses = drafter.loss(batch, target, 0.0)
    vocabulary, final = drafter.vocabulary_D.tolist(), batch.states["final"]
    total = 0.0
    for k in range(3):
        terms, ranks = [], []
        for b in range(2):
            for t in range(batch.input_ids.shape[1] - 2 - k):
                label = int(batch.input_ids[b, t + 2 + k])
                near, counts = batch.document_ids[b, t : t + 3 + k], batch.loss_mask[b]
                if (
                    not counts[t + 2]
                    or near[2] != near[0]
                    or not counts[t + 2 + k]
                    or near[-1] != near[0]
                ):
                    continue
                hidden = drafter.blocks[k](final[b, t])
                probs = torch.softmax(drafter.lm_heads[k].weight @ hidden, 0)
                ranks.append(vocabulary.index(label) if label in vocabulary else None)
                if label in vocabulary:
                    terms.append(-probs[vocabulary.index(label)].log())
                    ranks[-1] = int((probs > probs[vocabulary.index(label)]).sum())
        total += 0.8 ** (k + 1) * float(torch.stack(terms).mean())
        top5 = losses.metrics[f"top5_{k}"]
        assert (int(top5.total), int(top5.count)) == (
            sum(r is not None and r < 5 for r in ranks),
            len(ranks),
        )
    assert float(losses.total) == pytest.approx(total, rel=1e-6)


@torch.no_grad()
def test_the_accuracy_table_counts_the_targets_greedy_tokens() -> None:
    target = tiny_target("llama")
    drafter = built("medusa_shared", target, shake=0.05).train()
    batch = filled(tiny_batch(target), drafter, target)
    table = measured_accuracies(drafter, [batch, batch], target, ranks=128)
    assert table.shape == (3, 128) and drafter.training
    torch.testing.assert_close(table.sum(1), torch.ones(3))
    rows = training_rows(batch, 3)
    final_PH = batch.states["final"].flatten(0, 1)
    for k, feature_MH in enumerate(drafter.teacher_forced(batch, target, rows)):
        probs_MV = target.logits(feature_MH)[rows.valid_MK[:, k]]
        greedy_M = target.logits(final_PH[rows.flat_MK1[:, k + 1]]).argmax(-1)[rows.valid_MK[:, k]]
        best = (probs_MV.topk(5).indices == greedy_M[:, None]).double().mean(0)
        torch.testing.assert_close(table[k, :5].double(), best, atol=1e-6, rtol=0)


def test_an_optimised_tree_is_found_after_training_and_saved() -> None:
    target = tiny_target("llama")
    drafter = Medusa(target.shape, 3, lm_head="shared", tree="optimised_9").double()
    batch = filled(tiny_batch(target), drafter, target)
    with torch.no_grad():
        outcome = drafter.finish([batch], target)
    paths = drafter.config()["tree"]
    assert (
        len(paths) == 9 == drafter.default_budget
        and 1 <= outcome.figures["tree/expected_tokens"] <= 10
    )
    table = measured_accuracies(drafter, [batch], target).tolist()
    assert paths == optimised_tree(table, 9)
    again: Any = Medusa(**drafter.arguments).builder
    assert again.paths == drafter.builder.paths
    assert not Medusa(target.shape, 3).finish([batch], target).figures
    with pytest.raises(ValueError, match="optimised_N"):
        Medusa(target.shape, 3, tree="optimised_0")


def joint(target, **changes) -> Medusa2:
    torch.manual_seed(1)
    drafter = Medusa2(target.shape, **{"heads": 2, "dropout": 0.0, "rank": 4, **changes}).double()
    drafter.initialise(target)
    return drafter


def shaken(drafter: Medusa2) -> Medusa2:
    with torch.no_grad():
        for parameter in (*drafter.adapters.parameters(), *drafter.lm_head_adapter.parameters()):
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    return drafter


@pytest.mark.parametrize("arch", ["llama", "qwen3"])
def test_medusa2_trains_itself_and_leaves_the_target_alone(arch: str) -> None:
    target = tiny_target(arch)
    before, batch = target.fingerprint(), tiny_batch(target)
    drafter = joint(target)
    optimizer = torch.optim.Adam(drafter.parameter_groups(), 1e-2)
    first, last = None, None
    for _ in range(8):
        losses = drafter.loss(batch, target, 1.0)
        optimizer.zero_grad()
        losses.total.backward()
        optimizer.step()
        last = losses.metrics["language_loss"]
        first = first or last
    assert all(bool(parameter.grad.any()) for parameter in drafter.declared_parameters())
    assert all(parameter.grad is None for parameter in target.parameters())
    assert float(last.total) < float(first.total)
    target._fingerprint = None
    assert target.fingerprint() == before


def test_medusa2_adapts_to_another_target_and_is_lossless_for_that_one() -> None:
    target = tiny_target("llama")
    drafter, batch = shaken(joint(target)).eval(), tiny_batch(target)
    adapted, twin = drafter.adapt(target), drafter.adapted_twin(target)
    with torch.no_grad():
        own, through = (
            model.logits(model.features(batch, ("final",))["final"]) for model in (adapted, twin)
        )
        torch.testing.assert_close(own, through, atol=1e-5, rtol=1e-5)
        assert (
            float((own - target.logits(target.features(batch, ("final",))["final"])).abs().max())
            > 0.1
        )
    assert adapted.fingerprint() != target.fingerprint() and adapted.name == "tiny-llama+medusa2"
    assert torch.equal(adapted.embed(batch.input_ids), target.embed(batch.input_ids))
    prompts = [[7, 8, 9, 10], [20, 30]]
    plain = SpeculativeDecoder(adapted).decode(prompts, Sampling(), 12)
    drafted = SpeculativeDecoder(adapted, drafter).decode(prompts, Sampling(), 12)
    assert [trace.ids for trace in drafted] == [trace.ids for trace in plain]


def test_medusa2_is_looked_at_in_training_without_a_copy_of_the_target() -> None:
    target = tiny_target("llama")
    drafter, batch = shaken(joint(target, dropout=0.3)).train(), tiny_batch(target)
    shared = drafter.adapt_sharing(target)
    known = {
        tensor.data_ptr() for module in (target, drafter) for tensor in module.state_dict().values()
    }
    assert {tensor.data_ptr() for tensor in shared.state_dict().values()} <= known
    with torch.no_grad():
        own, through = (
            model.logits(model.features(batch, ("final",))["final"])
            for model in (drafter.eval().adapt(target), shared)
        )
    torch.testing.assert_close(own, through, atol=1e-5, rtol=1e-5)
    assert drafter.adapt_sharing(target) is shared, "made once"


def test_the_probe_of_medusa2_decodes_with_what_is_there(monkeypatch) -> None:
    target = tiny_target("llama")
    drafter = shaken(joint(target)).eval()
    expected = (
        SpeculativeDecoder(drafter.adapt(target), drafter)
        .decode([[7, 8, 9]], Sampling(), 12)[0]
        .accepted
    )
    monkeypatch.setattr(drafter.adapters, "merged", lambda *_: pytest.fail("the target was copied"))
    probe = AcceptanceProbe([[7, 8, 9]], ProbeSettings(max_new_tokens=12))
    assert probe.measure(TrainableModule(drafter, target, OptimizerSettings())) == sum(
        expected
    ) / len(expected)


@torch.no_grad()
def test_medusa2s_optimised_tree_goes_by_the_adapted_target() -> None:
    target = tiny_target("llama")
    drafter, batch = shaken(joint(target, heads=3, tree="optimised_9")).eval(), tiny_batch(target)
    adapted = drafter.adapt(target)
    outcome = drafter.finish([batch], target)
    batch.states = adapted.features(batch, ("final",))
    table = measured_accuracies(drafter, [batch], adapted).tolist()
    assert (
        drafter.config()["tree"] == optimised_tree(table, 9)
        and "tree/expected_tokens" in outcome.figures
    )


@torch.no_grad()
def test_an_adapted_targets_stock_model_is_adapted_too() -> None:
    """Rows of other libraries run it; the target it was made of stays as it was."""
    target, ids = tiny_target("llama"), torch.tensor([[7, 8, 9]])
    before = target.stock(ids).logits
    adapted = shaken(joint(target)).eval().adapt(target)
    torch.testing.assert_close(adapted.stock(ids).logits, adapted.model(ids).logits)
    assert float((adapted.stock(ids).logits - before).abs().max()) > 1e-3
    assert torch.equal(target.stock(ids).logits, before)


def test_self_distillation_is_zero_before_and_positive_after_a_change() -> None:
    target = tiny_target("llama")
    drafter, batch = joint(target, self_distillation=True), tiny_batch(target)
    divergence = drafter.loss(batch, target, 0.0).metrics["language_loss"]
    assert float(divergence.total) == pytest.approx(0, abs=1e-4)
    assert float(shaken(drafter).loss(batch, target, 0.0).metrics["language_loss"].total) > 0.01


def test_medusa2_balance() -> None:
    target = tiny_target("llama")
    batch, heads = tiny_batch(target), {}
    totals = {
        progress: joint(target, schedule="sine", ramp=0.5, coefficient=0.3).loss(
            batch, target, progress
        )
        for progress in (0.0, 0.25, 0.5, 1.0)
    }
    language = totals[0.0].metrics["language_loss"]
    for progress, losses in totals.items():
        heads[progress] = float(losses.total.detach()) - float(language.total / language.count)
    assert heads[0.0] == pytest.approx(0)
    assert heads[0.5] == pytest.approx(heads[1.0])
    assert heads[0.25] == pytest.approx(heads[1.0] * sin(pi / 4))
    scales = [
        (group["lr_scale"], len(group["params"])) for group in joint(target).parameter_groups()
    ]
    assert scales == [(1.0, 2 * 7 * 2 + 2), (4.0, 2 * 3)]


def test_medusa2_refuses_what_it_cannot_adapt() -> None:
    target = tiny_target("gpt2")
    with pytest.raises(ValueError, match="needs a Llama-type target"):
        Medusa2(target.shape).adapt(target)
    with pytest.raises(ValueError, match="schedule"):
        Medusa2(target.shape, schedule="linear")
    with pytest.raises(ValueError, match="ramp"):
        Medusa2(target.shape, ramp=0.0)


def test_heads_are_modules_of_their_own() -> None:
    drafter = Medusa(tiny_target("llama").shape, heads=3, blocks=2)
    assert len({id(parameter) for parameter in drafter.parameters()}) == 3 * (2 * 2 + 1)
