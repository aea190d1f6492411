"""Muon beside AdamW: which weights it trains, and that both together are what each is alone."""

from __future__ import annotations

import io
import math

import pytest
import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR

from modules.contracts.trainable import Trainable
from modules.drafters.feature.eagle3 import Eagle3
from modules.drafters.heads.clover2 import Clover2
from modules.drafters.same_pass.ppd import PPD
from modules.drafters.small_models.independent import Independent
from tests.fakes import tiny_target
from train.lightning.optimizers import decay_groups, hidden_matrices, split_hidden, with_muon
from train.settings import OptimizerSettings

TARGET = tiny_target(dtype=torch.float32)
SETTINGS = OptimizerSettings(lr=1e-2, muon_lr=3e-2, weight_decay=0.1)


def eagle3() -> Eagle3:
    torch.manual_seed(0)
    return Eagle3(TARGET.shape, draft_vocabulary=40, norm_before_fc=True)


def optimizer(drafter: Trainable, settings: OptimizerSettings = SETTINGS) -> torch.optim.Optimizer:
    rest, hidden = split_hidden(drafter.parameter_groups(), drafter)
    groups = [group for each in rest for group in decay_groups(each, settings)]
    return with_muon(hidden, groups, settings)


def gradients(drafter: nn.Module, seed: int) -> None:
    """Random gradients in place of a loss's."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in drafter.parameters():
        parameter.grad = torch.randn(parameter.shape, generator=generator)


def test_muon_takes_the_matrices_between_hidden_states() -> None:
    drafter = eagle3()
    found = {id(weight) for weight in hidden_matrices(drafter)}
    names = {name for name, weight in drafter.named_parameters() if id(weight) in found}
    assert names == {
        "fc.weight",
        *(f"layer.self_attn.{x}_proj.weight" for x in "qkvo"),
        *(f"layer.mlp.{x}_proj.weight" for x in ("gate", "up", "down")),
    }
    small = Independent(TARGET.shape, layers=1)
    small.initialise(TARGET)
    weights = {id(weight) for weight in hidden_matrices(small)}
    outside = {name for name, weight in small.named_parameters() if id(weight) not in weights}
    assert all("norm" in name or "embed" in name or "lm_head" in name for name in outside)
    assert sum(weight.numel() for weight in hidden_matrices(small)) > 0


def orthogonal(matrix: Tensor) -> Tensor:
    """Five steps of the quintic Newton-Schulz iteration in bfloat16 (Jordan 2024)."""
    x = matrix.T if matrix.shape[0] > matrix.shape[1] else matrix
    x = x.bfloat16() / x.bfloat16().norm()
    for _ in range(5):
        gram = x @ x.T
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
    return (x.T if matrix.shape[0] > matrix.shape[1] else x).float()


def test_its_first_step_is_orthogonal_and_as_large_as_adamws() -> None:
    drafter = eagle3()
    before = drafter.fc.weight.detach().clone()
    gradients(drafter, 0)
    assert drafter.fc.weight.grad is not None
    momentum = (1 - 0.95) * drafter.fc.weight.grad
    expected = orthogonal((1 - 0.95) * drafter.fc.weight.grad + 0.95 * momentum)
    optimizer(drafter).step()
    step = before * (1 - 3e-2 * 0.1) - drafter.fc.weight.detach()
    scale = 3e-2 * 0.2 * math.sqrt(max(before.shape))
    torch.testing.assert_close(step, scale * expected, atol=3e-2 * scale, rtol=0)
    assert float(step.square().mean().sqrt()) == pytest.approx(0.2 * 3e-2, rel=0.3)


def test_both_together_step_as_each_alone() -> None:
    one, other = eagle3(), eagle3()
    together = optimizer(one)
    found = {id(weight) for weight in hidden_matrices(other)}
    matrices = [p for p in other.parameters() if id(p) in found]
    rest = [p for p in other.parameters() if id(p) not in found]
    muon = torch.optim.Muon(matrices, 3e-2, 0.1, adjust_lr_fn="match_rms_adamw")
    adamw = torch.optim.AdamW(
        [
            {"params": [p for p in rest if p.dim() > 1], "weight_decay": 0.1},
            {"params": [p for p in rest if p.dim() == 1], "weight_decay": 0.0},
        ],
        1e-2,
        SETTINGS.betas,
    )
    for step in range(3):
        gradients(one, step), gradients(other, step)
        assert together.step(lambda: 2.5) == 2.5
        muon.step(), adamw.step()
    for (name, mine), theirs in zip(one.named_parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(mine, theirs, msg=name)


def test_a_saved_state_goes_on_exactly() -> None:
    """Through the file of a checkpoint, with a schedule that has changed the rates."""

    def begun(drafter: Eagle3) -> tuple[torch.optim.Optimizer, LambdaLR]:
        both = optimizer(drafter)
        return both, LambdaLR(both, lambda step: 1 / (step + 1))

    def steps(drafter: Eagle3, parts: tuple[torch.optim.Optimizer, LambdaLR], numbers: range):
        for number in numbers:
            gradients(drafter, number)
            parts[0].step(), parts[1].step()

    whole, broken = eagle3(), eagle3()
    steps(whole, begun(whole), range(6))
    parts = begun(broken)
    steps(broken, parts, range(3))
    file = io.BytesIO()
    torch.save([parts[0].state_dict(), parts[1].state_dict(), broken.state_dict()], file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    resumed = eagle3()
    resumed.load_state_dict(saved[2])
    parts = begun(resumed)
    parts[0].load_state_dict(saved[0]), parts[1].load_state_dict(saved[1])
    steps(resumed, parts, range(3, 6))
    for (name, mine), theirs in zip(whole.named_parameters(), resumed.parameters(), strict=True):
        assert torch.equal(mine, theirs), name


def test_declared_scales_reach_muon() -> None:
    drafter = Clover2(TARGET.shape, 2, map_lr_scale=0.1)
    both = optimizer(drafter)
    rates = {id(p): group["lr"] for group in both.param_groups for p in group["params"]}
    assert rates[id(drafter.first.weight)] == pytest.approx(3e-3)
    assert rates[id(drafter.layers[0].mlp.up_proj.weight)] == pytest.approx(3e-2)
    assert rates[id(drafter.head_norm.weight)] == pytest.approx(1e-2)
    assert len(rates) == len(list(drafter.parameters()))


def test_mistakes_are_one_line() -> None:
    with pytest.raises(ValueError, match="muon_lr is set, but PPD has no matrices between hidden"):
        split_hidden(PPD(TARGET.shape).parameter_groups(), PPD(TARGET.shape))
    with pytest.raises(ValueError, match="optimizer.muon_lr must be above 0 and at most 10"):
        OptimizerSettings(muon_lr=0.0)
