"""Clover and Clover-2: where they start, their gates, their losses."""

from __future__ import annotations

import json

import pytest
import torch
from torch.nn import functional as F

from checkpoints.pretrained import Provenance, load_pretrained, save_pretrained
from modules.contracts.rows import causal_rows
from modules.drafters.heads.clover import AttentionDecoder
from modules.drafters.heads.clover2 import Clover2
from modules.losses.chunked import training_rows
from tests.fakes import tiny_batch, tiny_target
from tests.modules.families import Reader, built, documents, filled

TARGET = tiny_target("llama")


@pytest.mark.parametrize(
    "name", ["clover", "clover_cosine", "clover_mlp_fusion", "clover_no_block", "clover_no_token"]
)
@torch.no_grad()
def test_clover_starts_as_the_augmenting_blocks_prediction(name: str) -> None:
    drafter, batch = built(name, TARGET), documents([[9, 20, 31, 42, 53, 64, 75]])
    for block in drafter.blocks:
        block.linear.bias.zero_()
    before = TARGET.features(batch, ("pre_norm",))["pre_norm"]
    hidden = before if name == "clover_no_block" else drafter.layers[0](before, batch.rows())
    expected = TARGET.logits(TARGET.final_norm(hidden)[0, 4], drafter.vocabulary_D)
    for logits in Reader(drafter, TARGET, batch, [5]).logits()[0]:
        torch.testing.assert_close(logits, expected, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_augmenting_block_starts_as_the_targets_last_layer() -> None:
    drafter = built("clover", TARGET)
    for name, parameter in drafter.layers[0].named_parameters():
        assert torch.equal(parameter, TARGET.copy_weight(f"layers.1.{name}"))


@torch.no_grad()
def test_token_vectors_are_normalised_rows_of_the_lm_head() -> None:
    drafter, seen = built("clover_no_block", TARGET, shake=0.1), []
    drafter.fusion.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[1]))
    tokens = torch.tensor([[7, 90]])
    drafter.step(0, torch.randn(1, 2, 32).double(), tokens, TARGET)
    rows = TARGET.copy_weight("lm_head")[tokens]
    torch.testing.assert_close(seen[0], rows / rows.norm(dim=-1, keepdim=True))


@pytest.mark.parametrize("gate", ["silu", "cosine"])
@torch.no_grad()
def test_attention_decoder_slowly(gate: str) -> None:
    torch.manual_seed(0)
    cell = AttentionDecoder(TARGET.shape, gate, bias=True)
    for parameter in cell.parameters():
        parameter.add_(torch.randn_like(parameter), alpha=0.2)
    hidden, token = torch.randn(5, 32), torch.randn(5, 32)
    found = cell(hidden, token)
    for row in range(5):
        query, key, value = (
            cell.query(cell.norm(hidden[row])),
            cell.key(token[row]),
            cell.value(token[row]),
        )
        for head in range(4):
            part = slice(8 * head, 8 * head + 8)
            product = float(query[part] @ key[part])
            weight = (
                F.silu(torch.tensor(product / 8**0.5))
                if gate == "silu"
                else product / float(query[part].norm() * key[part].norm())
            )
            torch.testing.assert_close(found[row, part], hidden[row, part] + weight * value[part])
        if gate == "cosine":
            assert (found[row] - hidden[row]).norm() <= value.norm() + 1e-6


def given_by_the_target(state: torch.Tensor, token: int, top_k: int, top_p: float) -> bool:
    """Whether a token is among the `top_k` likeliest, and begins inside their mass of `top_p`:
    sorted and added up.
    """
    probs, order = torch.softmax(TARGET.logits(state), 0).sort(descending=True)
    rank = order.tolist().index(token)
    return rank < top_k and float(probs[:rank].sum()) <= top_p


@torch.no_grad()
@pytest.mark.parametrize(
    ("mask", "training"), [(None, True), ((70, 0.97), True), ((70, 0.97), False)]
)
def test_clover2_loss_slowly(mask: tuple[int, float] | None, training: bool) -> None:
    torch.manual_seed(0)
    top_k, top_p = mask or (0, 1.0)
    drafter = Clover2(
        TARGET.shape, 3, draft_vocabulary=40, label_top_k=top_k, label_top_p=top_p
    ).double()
    drafter.initialise(TARGET)
    drafter.train(training)
    batch = filled(tiny_batch(TARGET, rows=4), drafter, TARGET)
    batch.input_ids.remainder_(60)
    rows, total, length, left_out = training_rows(batch, 3), 0.0, batch.input_ids.shape[1], 0
    for i, feature in enumerate(drafter.teacher_forced(batch, TARGET, rows)):
        distances, entropies = [], []
        for m, flat in enumerate(rows.flat_MK1[:, 0].tolist()):
            b, t = divmod(flat, length)
            if not rows.valid_MK[m, i]:
                continue
            ids, states = batch.input_ids[b].tolist(), batch.states["final"][b]
            if (
                training
                and mask
                and not all(
                    given_by_the_target(states[t + j], ids[t + 1 + j], top_k, top_p)
                    for j in range(i + 1)
                )
            ):
                left_out += 1
                continue
            distances.append(10 * F.smooth_l1_loss(feature[m], states[t + 1 + i]))
            if ids[t + 2 + i] < 40:
                probs = torch.softmax(TARGET.logits(states[t + 1 + i])[:40], 0)
                entropies.append(
                    -(probs * torch.log_softmax(TARGET.logits(feature[m])[:40], 0)).sum()
                )
        total += 0.7**i * float(torch.stack(distances).mean() + torch.stack(entropies).mean())
    assert bool(left_out) == (training and mask is not None)
    assert float(drafter.loss(batch, TARGET, 0.0).total) == pytest.approx(total, rel=1e-5)


@torch.no_grad()
def test_clover2_starts_from_the_targets_parts() -> None:
    drafter = built("clover2", TARGET)
    for layer in drafter.layers:
        assert torch.equal(
            layer.mlp.gate_proj.weight, TARGET.copy_weight("layers.1.mlp.gate_proj.weight")
        )
    assert torch.equal(drafter.head_norm.weight, TARGET.copy_weight("norm"))
    assert torch.equal(drafter.first.weight, torch.eye(32).double())
    assert torch.equal(drafter.later.weight[:, :32], torch.eye(32).double())
    assert (
        float(drafter.later.weight[:, 32:].min()) >= 0
        and float(drafter.later.weight[:, 32:].max()) <= 0.01
    )


@torch.no_grad()
def test_clover2_starts_its_first_norm_at_1_or_as_released_at_the_final_norms_gain() -> None:
    gain = TARGET.copy_weight("norm")
    for name, expected in (("ones", torch.ones_like(gain)), ("final", gain)):
        drafter = Clover2(TARGET.shape, 2, start_norm=name).double()
        drafter.initialise(TARGET)
        assert torch.equal(drafter.start_norm.weight, expected) and torch.equal(
            drafter.head_norm.weight, gain
        )


@torch.no_grad()
def test_clover2_loads_a_folder_that_was_saved_before_its_maps_had_biases(tmp_path) -> None:
    drafter = built("clover2", TARGET, shake=0.05)
    assert "first.bias" not in drafter.state_dict()
    save_pretrained(drafter, tmp_path, Provenance.of(TARGET))
    config = json.loads((tmp_path / "config.json").read_text())
    for key in ("map_bias", "start_norm"):
        config["arguments"].pop(key)
    (tmp_path / "config.json").write_text(json.dumps(config))
    loaded = load_pretrained(tmp_path, TARGET)
    assert all(
        torch.equal(tensor, loaded.state_dict()[name])
        for name, tensor in drafter.state_dict().items()
    )


@torch.no_grad()
def test_clover2_without_layers_and_values_starts_as_the_targets_own_norm() -> None:
    drafter = Clover2(TARGET.shape, 2, layers=0).double()
    drafter.initialise(TARGET)
    torch.nn.init.zeros_(drafter.start_attention.value.weight)
    states, tokens = torch.randn(3, 4, 32, dtype=torch.float64) * 20, torch.randint(60, (3, 4))
    memory = drafter.begin(
        states, tokens, TARGET, causal_rows(torch.zeros(3, dtype=torch.long), 4), None
    )
    feature = drafter.feature(0, memory, tokens, TARGET)
    torch.testing.assert_close(feature, TARGET.final_norm(states), rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_clover2_scales_token_vectors_to_the_states_they_meet() -> None:
    states, tokens = torch.randn(5, 32, dtype=torch.float64) * 20, torch.randint(60, (5,))
    rows = TARGET.lm_head_rows(tokens)
    scaled = Clover2(TARGET.shape, 2).vectors(tokens, states, TARGET)
    torch.testing.assert_close(scaled.norm(dim=-1), states.norm(dim=-1))
    torch.testing.assert_close(
        F.cosine_similarity(scaled, rows), torch.ones(5, dtype=torch.float64)
    )
    assert torch.equal(
        Clover2(TARGET.shape, 2, token_scale="head").vectors(tokens, states, TARGET), rows
    )


def test_clover2_trains_the_maps_before_the_lm_head_more_slowly() -> None:
    drafter = Clover2(TARGET.shape, 2, map_lr_scale=0.25)
    rest, maps = drafter.parameter_groups()
    assert (rest["lr_scale"], maps["lr_scale"]) == (1.0, 0.25)
    assert [id(one) for one in maps["params"]] == [
        id(drafter.first.weight),
        id(drafter.later.weight),
    ]
    biased = Clover2(TARGET.shape, 2, map_bias=True)
    assert len(biased.parameter_groups()[1]["params"]) == 4 and not (
        biased.first.bias.any() or biased.later.bias.any()
    )
    together = [id(one) for one in (*rest["params"], *maps["params"])]
    assert sorted(together) == sorted(id(one) for one in drafter.declared_parameters())
