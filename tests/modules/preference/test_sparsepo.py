"""SparsePO on tiny targets: its masks, its penalty and what it is without them."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from modules.contracts.batches import PreferenceBatch, TextBatch
from modules.preference.activations import mean_activations
from modules.preference.dpo import DPO
from modules.preference.policy import counted
from modules.preference.sparsepo import SparsePO, TokenMasks
from modules.target.target import Target
from tests.fakes import tiny_batch, tiny_target
from tests.modules.preference.test_recipes import made, same_loss_and_gradient, total


@pytest.fixture(scope="module")
def target() -> Target:
    return tiny_target()


@pytest.fixture(scope="module")
def batch(target) -> PreferenceBatch:
    """Two pairs, whose second has shorter responses."""
    sides = []
    for seed in (0, 1):
        text = tiny_batch(target, seed=seed)
        mask = text.loss_mask.clone()
        mask[1, : 8 + 2 * seed] = False
        sides.append(replace(text, loss_mask=mask))
    return PreferenceBatch(*sides)


def masks_of(sparse: SparsePO, text: TextBatch, target: Target) -> TokenMasks:
    return sparse.token_masks(text, counted(text), sparse.reference_states(text, target), target)


def uneven(target: Target, **arguments: Any) -> SparsePO:
    """A component whose learned masks differ from token to token, some of them 0."""
    sparse = made(SparsePO, target, **arguments)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in sparse.mask_heads.parameters():
            parameter += 0.3 * torch.randn(parameter.shape, generator=generator)
    return sparse


def values(mask_BT: Tensor, text: TextBatch) -> list[list[float]]:
    """The mask's values at the counted tokens, row by row."""
    return [mask_BT[b, row].tolist() for b, row in enumerate(counted(text))]


def test_sparsepo_masks_make_it_dpo_or_tdpo(target, batch, monkeypatch):
    plain = made(DPO, target, beta=0.3)
    sparse = made(SparsePO, target, beta=0.3, masks="ones")
    whole = sparse.token_masks

    def without_divergence(*arguments: Any) -> Any:
        masks = whole(*arguments)
        return masks._replace(divergence_BT=torch.zeros_like(masks.divergence_BT))

    tdpo = float(total(sparse, batch, target).total.detach())
    monkeypatch.setattr(sparse, "token_masks", without_divergence)
    same_loss_and_gradient(sparse, plain, batch, target)
    assert tdpo != pytest.approx(float(total(plain, batch, target).total.detach()), abs=1e-4)


def test_tdpo_from_whole_distributions(target, batch):
    """SparsePO with masks of 1 against distributions computed in full, row by row."""
    sparse = made(SparsePO, target, beta=0.3, masks="ones")
    twin, parts = sparse.policy.twin(target), []
    for text in (batch.chosen, batch.rejected):
        with torch.no_grad():
            distributions = [
                model.logits(model.features(text, ("final",))["final"]).log_softmax(-1)
                for model in (twin, target)
            ]
        ratio, divergence = torch.zeros(2, dtype=torch.float64), torch.zeros(2, dtype=torch.float64)
        for b, t in counted(text).nonzero().tolist():
            policy, reference = (part[b, t - 1] for part in distributions)
            ratio[b] += policy[text.input_ids[b, t]] - reference[text.input_ids[b, t]]
            divergence[b] += (reference.exp() * (reference - policy)).sum()
        assert bool((divergence > 0).all())
        parts.append((ratio, divergence))
    (chosen, chosen_kl), (rejected, rejected_kl) = parts
    margin = 0.3 * (chosen - rejected) - 0.3 * (rejected_kl - chosen_kl)
    expected = -torch.nn.functional.logsigmoid(margin).mean()
    torch.testing.assert_close(total(sparse, batch, target).total.detach(), expected)


def test_the_divergence_grows_with_the_distance_from_the_reference(target, batch):
    found = []
    for shake in (0.0, 0.05, 0.2):
        metrics = total(made(SparsePO, target, shake=shake, masks="ones"), batch, target).metrics
        found.append(float(metrics["chosen_divergence"].total))
    assert found[0] == pytest.approx(0, abs=1e-9) and 0 < found[1] < found[2]


def test_learned_masks_start_near_1_and_grow_sparser_with_the_penalty(target, batch):
    shares = {}
    for sparsity in (0.0, 0.3):
        sparse = made(SparsePO, target, sparsity=sparsity)
        states = [parameter for parameter in target.parameters()]
        first = masks_of(sparse, batch.chosen, target)
        start = first.reward_BT[counted(batch.chosen)]
        assert bool(((start - 1).abs() < 0.2).all())
        assert not first.reward_BT[~counted(batch.chosen)].any()
        optimizer = torch.optim.Adam(sparse.mask_heads.parameters(), 0.05)
        for _ in range(10):
            optimizer.zero_grad()
            total(sparse, batch, target).total.backward()
            optimizer.step()
        assert all(
            parameter.grad is not None and bool(parameter.grad.any())
            for parameter in sparse.mask_heads.parameters()
        )
        assert all(state.grad is None for state in states)
        share = total(sparse, batch, target).metrics["chosen_reward_sparsity"]
        shares[sparsity] = float(share.total / share.count)
    assert shares[0.3] > shares[0.0]


@pytest.mark.parametrize("masks", ["learned", "activations"])
def test_a_tokens_mask_comes_from_the_row_that_predicts_it(masks, target, batch):
    """Another last token leaves its own mask as it is; what stands before it does not."""
    text = batch.chosen
    row, place = counted(text).nonzero()[-1].tolist()
    assert bool(counted(text)[row, place - 1])

    def mask_with(changed: int) -> torch.Tensor:
        ids = text.input_ids.clone()
        ids[row, changed] = 5 + (ids[row, changed] + 1) % 20
        sparse = made(SparsePO, target, masks=masks)
        return masks_of(sparse, replace(text, input_ids=ids), target).reward_BT[row].detach()

    before = masks_of(made(SparsePO, target, masks=masks), text, target).reward_BT[row].detach()
    torch.testing.assert_close(mask_with(place), before)
    assert abs(float(mask_with(place - 1)[place] - before[place])) > 1e-6


def test_dropout_is_not_counted_as_sparsity(target, batch):
    sparse = made(SparsePO, target)
    assert not any("sparsity" in name for name in total(sparse.train(), batch, target).metrics)
    assert float(total(sparse.eval(), batch, target).metrics["chosen_reward_sparsity"].total) == 0


def test_masks_are_common_or_not_and_decay_by_themselves(target, batch):
    for common, heads in ((True, 1), (False, 2)):
        sparse = made(SparsePO, target, common_mask=common, sparsity=1.0)
        assert len(sparse.mask_heads) == heads
        masks = masks_of(sparse, batch.chosen, target)
        assert (masks.reward_BT is masks.divergence_BT) == common
        groups = sparse.parameter_groups()
        assert groups[1]["weight_decay"] == 0.01 and len(groups[1]["params"]) == 3 * heads


@pytest.mark.parametrize("common", [True, False])
def test_the_penalty_is_summed_over_the_tokens_of_each_pair(common, target, batch):
    """Token by token from the masks' values: the mean over pairs of λ Σ_t (|m^u| + |m^d|), half of
    it if common."""
    weight = 0.01
    losses = [
        total(uneven(target, common_mask=common, sparsity=sparsity), batch, target).total
        for sparsity in (weight, 0.0)
    ]
    sparse, pairs = uneven(target, common_mask=common), [0.0, 0.0]
    for text in (batch.chosen, batch.rejected):
        for mask_BT in masks_of(sparse, text, target):
            for b, row in enumerate(values(mask_BT, text)):
                pairs[b] += weight * sum(abs(value) for value in row) * (0.5 if common else 1.0)
    assert pairs[0] > 1.5 * pairs[1], "pairs of one length could not tell a sum from a mean"
    assert float((losses[0] - losses[1]).detach()) == pytest.approx(sum(pairs) / 2, rel=1e-9)


@pytest.mark.parametrize("common", [True, False])
def test_binary_masks_are_the_sign_of_learned_ones_and_learn(common, target, batch):
    learned, binary = (
        uneven(target, masks=masks, common_mask=common) for masks in ("learned", "binarised")
    )
    assert len(list(binary.mask_heads.parameters())) == (3 if common else 6)
    seen = set[float]()
    for text in (batch.chosen, batch.rejected):
        both = masks_of(learned, text, target), masks_of(binary, text, target)
        pairs = list(zip(*both, strict=True))
        for own_BT, sign_BT in pairs:
            found = [value for row in values(sign_BT, text) for value in row]
            assert found == [float(value > 0) for row in values(own_BT, text) for value in row]
            assert not sign_BT[~counted(text)].any()
            seen |= set(found)
        slopes = [
            torch.autograd.grad(
                masks.reward_BT.sum() + 2 * masks.divergence_BT.sum(),
                list(sparse.mask_heads.parameters()),
            )
            for masks, sparse in zip(both, (learned, binary))
        ]
        for one, other in zip(*slopes):
            torch.testing.assert_close(one, other)
            assert bool(one.any())
    assert seen == {0.0, 1.0}


@pytest.mark.parametrize("common", [True, False])
def test_random_masks_are_drawn_anew_at_every_call(common, target, batch):
    sparse, text = made(SparsePO, target, masks="random", common_mask=common), batch.chosen
    assert not list(sparse.mask_heads.parameters())
    first, second = (masks_of(sparse, text, target) for _ in range(2))
    assert (first.reward_BT is first.divergence_BT) == common
    masks = {id(mask): mask for mask in (*first, *second)}
    everything = torch.cat([mask[counted(text)] for mask in masks.values()])
    assert len(everything.unique()) == len(everything), "no value comes twice"
    assert 0 <= float(everything.min()) < 0.2 and 0.8 < float(everything.max()) < 1
    assert not first.reward_BT[~counted(text)].any() and not first.reward_BT.requires_grad


def test_masks_of_activations_are_computed_once_for_a_row(target, batch, monkeypatch):
    sparse = made(SparsePO, target, masks="activations")
    first = masks_of(sparse, batch.chosen, target)
    monkeypatch.setattr("modules.preference.sparsepo.mean_activations", None)
    second = masks_of(sparse, batch.chosen, target)
    assert torch.equal(first.reward_BT, second.reward_BT)
    assert not list(sparse.mask_heads.parameters())
    assert first.reward_BT is first.divergence_BT and not first.reward_BT.requires_grad


def released_mask(target: Target, text: TextBatch, b: int) -> list[float]:
    """The released code's mask of one row, from the model's modules called one after the other: of
    every activation the mean over its dimension, standardised and scaled to [0, 1] over the
    response, then means within and over groups."""
    model: Any = target.model.model
    real = text.document_ids[b] >= 0
    passed: dict[str, list[Tensor]] = {"attention": [], "mlp": [], "residual": [], "logits": []}
    hidden = model.embed_tokens(text.input_ids[b : b + 1])
    passed["residual"].append(hidden)
    for layer, after in zip(model.layers, (1, "final")):
        normed = layer.input_layernorm(hidden)
        heads, outputs = layer.self_attn, []
        watch = heads.o_proj.register_forward_hook(
            lambda _, inputs, output, kept=outputs: kept.extend((inputs[0], output))
        )
        behind = target.features(text, (after,))[after][b : b + 1]
        watch.remove()
        entering, attended = (part[b : b + 1] for part in outputs)
        passed["attention"] += [
            heads.q_proj(normed),
            heads.k_proj(normed),
            heads.v_proj(normed),
            entering,
        ]
        middle = hidden + attended
        second = layer.post_attention_layernorm(middle)
        inner = layer.mlp.act_fn(layer.mlp.gate_proj(second)) * layer.mlp.up_proj(second)
        passed["mlp"].append(inner)
        outer = layer.mlp.down_proj(inner)
        passed["residual"] += [hidden, normed, attended, middle, second, outer, middle + outer]
        hidden = middle + outer
        final = model.norm(hidden)
        own = final if after == "final" else hidden
        torch.testing.assert_close(own[:, real], behind[:, real])
    passed["residual"].append(final)
    passed["logits"].append(target.model.lm_head(final))
    # A token's mask comes from the row before it.
    rows = counted(text)[b].nonzero()[:, 0] - 1
    groups = []
    for activations in passed.values():
        scaled = []
        for activation in activations:
            mean = activation[0, rows].mean(-1)
            mean = (mean - mean.mean()) / mean.std()
            scaled.append((mean - mean.min()) / (mean.max() - mean.min()))
        groups.append(torch.stack(scaled).mean(0))
    return torch.stack(groups).mean(0).tolist()


@torch.no_grad()
def test_mapo_reads_all_groups_of_activations_as_the_released_code(target, batch):
    sparse = made(SparsePO, target, masks="activations")
    for text in (batch.chosen, batch.rejected):
        found = values(masks_of(sparse, text, target).reward_BT, text)
        for b, row in enumerate(found):
            assert row == pytest.approx(released_mask(target, text, b), abs=1e-9)
    residual = made(SparsePO, target, masks="activations", activations=["residual"])
    other = values(masks_of(residual, batch.rejected, target).reward_BT, batch.rejected)
    assert other[0] != pytest.approx(found[0])


def test_activations_leave_no_hooks_and_name_a_target_without_such_parts(target, batch):
    found = mean_activations(target, batch.chosen)
    assert [len(group) for group in found] == [16, 8, 2, 1]
    inner = [
        module
        for layer in target.architecture.layers
        for module in layer.modules()
        if module is not layer
    ]
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in inner)
    other = tiny_target("gpt2")
    with pytest.raises(ValueError, match="activations 'residual'.*'tiny-gpt2' is not a Llama-type"):
        mean_activations(other, tiny_batch(other), ["residual"])
    gemma = tiny_target("gemma2")
    assert [len(group) for group in mean_activations(gemma, tiny_batch(gemma))] == [16, 8, 2, 1]
