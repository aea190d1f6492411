"""What makes the feature drafters: their losses, their attention, their ablations. The rest is in
`test_families`.
"""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from modules.drafters.feature.eagle import Eagle
from modules.drafters.feature.eagle3 import Eagle3
from modules.drafters.feature.fspad import Fspad
from modules.layers.hanging_attention import hanging_attention
from modules.losses.chunked import training_rows
from tests.fakes import tiny_batch, tiny_target
from tests.modules.families import built, filled

TARGET = tiny_target()


def test_hanging_attention_is_attention_over_prefix_and_own_rows() -> None:
    torch.manual_seed(0)
    rows, length, heads, groups, size, own = 5, 7, 4, 2, 8, 2
    sizes = ((rows, heads), (length, groups), (length, groups))
    queries, keys, values = (torch.randn(*pair, size).double() for pair in sizes)
    own_keys, own_values = torch.randn(2, own, rows, groups, size).double()
    visible = torch.rand(rows, length) > 0.4
    visible[:, 0] = True
    found = hanging_attention(queries, keys, values, visible, list(own_keys), list(own_values))
    for m in range(rows):
        every_key = torch.cat([keys[visible[m]], own_keys[:, m]]).repeat_interleave(
            heads // groups, 1
        )
        every_value = torch.cat([values[visible[m]], own_values[:, m]]).repeat_interleave(
            heads // groups, 1
        )
        for h in range(heads):
            weights = (every_key[:, h] @ queries[m, h] / size**0.5).softmax(0)
            torch.testing.assert_close(found[m, h], weights @ every_value[:, h])


@pytest.mark.parametrize("name", ["eagle", "fspad", "eagle3"])
def test_the_loss_is_what_its_equation_says(name: str) -> None:
    drafter, batch = built(name, TARGET, shake=0.05), tiny_batch(TARGET)
    filled(batch, drafter, TARGET)
    rows = training_rows(batch, 3)
    final, expected = batch.states["final"].flatten(0, 1), torch.zeros(())
    vocabulary = drafter.vocabulary_D
    for j, (feature, carried) in enumerate(drafter.unrolled(batch, TARGET, rows)):
        distances, entropies = [], []
        for m in range(len(feature)):
            if not rows.valid_MK[m, j]:
                continue
            truth = final[rows.flat_MK1[m, j + 1]]
            distances.append(F.smooth_l1_loss(carried[m], truth))
            if rows.tokens_MK1[m, j + 1] in vocabulary:
                probs = TARGET.logits(truth)[vocabulary].softmax(0)
                entropies.append(
                    -(probs * drafter.head(j, TARGET)(feature[m]).log_softmax(0)).sum()
                )
        mean = torch.stack(entropies).mean()
        loss = mean if name == "eagle3" else torch.stack(distances).mean() + 0.1 * mean
        expected = expected + 0.8**j * loss
    torch.testing.assert_close(drafter.loss(batch, TARGET, 0.0).total, expected)


def test_true_features_give_the_targets_logits_no_distance_and_the_distributions_entropy(
    monkeypatch,
) -> None:
    drafter, batch = Eagle(TARGET.shape).double(), tiny_batch(TARGET)
    filled(batch, drafter, TARGET)
    final = batch.states["final"].flatten(0, 1)

    def oracle(_, __, rows):
        truth = final[rows.flat_MK1[:, 1]]
        yield truth, truth

    monkeypatch.setattr(drafter, "unrolled", oracle)
    step = next(drafter.steps(batch, TARGET))
    distributions = TARGET.logits(final[step.flat_M]).softmax(-1)
    torch.testing.assert_close(step.losses_M, torch.special.entr(distributions).sum(-1))
    torch.testing.assert_close(drafter.step_loss(step, batch), 0.1 * step.losses_M.mean())


def test_a_tied_split_and_a_closed_gate_are_eagle() -> None:
    eagle = built("eagle", TARGET, shake=0.05)
    fspad = Fspad(TARGET.shape, draft_vocabulary=40, bias=False, steps=3).double()
    fspad.set_vocabulary(eagle.vocabulary_D)
    own = eagle.state_dict()
    own["layer.mlp.down_proj.weight"] = own["layer.mlp.down_proj.weight"].repeat(2, 1)
    missing, unexpected = fspad.load_state_dict(own, strict=False)
    assert not unexpected and set(missing) == {
        "norm.weight",
        "gate.weight",
        "up.weight",
        "down.weight",
    }
    batch = filled(tiny_batch(TARGET), eagle, TARGET)
    rows = training_rows(batch, 3)
    pairs = zip(
        eagle.unrolled(batch, TARGET, rows), fspad.eval().unrolled(batch, TARGET, rows), strict=True
    )
    for (expected, _), (logit_feature, carried) in pairs:
        torch.testing.assert_close(logit_feature, expected, rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(carried, expected, rtol=1e-6, atol=1e-6)


@torch.no_grad()
def test_a_split_output_starts_as_a_plain_one_without_a_warning(
    caplog: pytest.LogCaptureFixture,
) -> None:
    own, plain = Fspad(TARGET.shape).double(), Eagle(TARGET.shape).double()
    own.initialise(TARGET), plain.initialise(TARGET)
    assert not caplog.records
    theirs = plain.layer.state_dict()
    for name, weight in own.layer.state_dict().items():
        assert torch.equal(
            weight, theirs[name].repeat(2, 1) if "down_proj" in name else theirs[name]
        ), name
    gemma = tiny_target("gemma2")
    Fspad(gemma.shape).double().initialise(gemma)
    assert [record.levelname for record in caplog.records] == ["WARNING"], "once, where it is so"


def test_each_half_of_a_split_output_learns_its_own_part() -> None:
    size = TARGET.shape.hidden_size
    for token_weight, feature_weight, reached in (
        (0.0, 1.0, slice(size, None)),
        (1.0, 0.0, slice(0, size)),
    ):
        drafter = Fspad(
            TARGET.shape, token_weight=token_weight, feature_weight=feature_weight
        ).double()
        drafter.initialise(TARGET)
        drafter.loss(filled(tiny_batch(TARGET), drafter, TARGET), TARGET, 0.0).total.backward()
        gradient = drafter.layer.mlp.down_proj.weight.grad
        still = torch.ones(2 * size, dtype=torch.bool)
        still[reached] = False
        assert gradient[reached].abs().sum() > 0 and gradient[still].abs().sum() == 0


def test_noise_is_for_training_only_and_scaled_by_the_tokens_of_the_conversation() -> None:
    """Conversations of 12 and 9 tokens and 3 of padding in a row: each within its own width, and
    near it.
    """
    drafter, batch = Eagle(TARGET.shape).double(), tiny_batch(TARGET)
    features = torch.zeros(2, 24, TARGET.shape.hidden_size).double()
    torch.manual_seed(0)
    noise = drafter.train().noisy(features, batch).abs()
    assert (batch.document_ids == 0).sum(1).tolist() == [12, 12]
    for document, length in ((0, 12), (1, 9)):
        widest = noise[batch.document_ids == document].max()
        assert 0.95 * 0.1 * 512 / length < widest <= 0.1 * 512 / length
    assert drafter.eval().noisy(features, batch) is features
    assert Eagle(TARGET.shape, noise=0).train().noisy(features, batch) is features


def test_the_fused_layers_are_low_middle_and_high_by_default() -> None:
    shape = type(TARGET.shape)(32, 64, 30, 4, 2, 8, 64)
    assert Eagle3(shape).fused_layers == [2, 15, 27]
    assert Eagle3(shape, fused_layers=[27]).fc.in_features == 32
    with pytest.raises(ValueError, match="fused_layers must be layers of the target, 0 to 29"):
        Eagle3(shape, fused_layers=[30])
    with pytest.raises(ValueError, match="steps must be at least 1"):
        Eagle3(shape, steps=0)


def test_the_draft_head_starts_as_the_targets_rows() -> None:
    drafter = built("eagle3", TARGET)
    torch.testing.assert_close(drafter.lm_head.weight, TARGET.lm_head_rows(drafter.vocabulary_D))


@torch.no_grad()
def test_eagle3_starts_where_the_targets_last_layer_does() -> None:
    """Deaf to the token, it repeats the distribution that the target drew the token from."""
    drafter, batch = Eagle3(TARGET.shape, fused_layers=[0, 1], steps=1).double(), tiny_batch(TARGET)
    drafter.initialise(TARGET)
    for projection in (
        drafter.attention.q_proj,
        drafter.attention.k_proj,
        drafter.attention.v_proj,
    ):
        projection.weight[:, : TARGET.shape.hidden_size] = 0
    rows = training_rows(filled(batch, drafter, TARGET), 1)
    feature, _ = next(iter(drafter.unrolled(batch, TARGET, rows)))
    torch.testing.assert_close(feature, rows.take(batch.states["final"]), atol=1e-5, rtol=0)
