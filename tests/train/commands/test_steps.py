"""Trainings of a number of steps: their end, and what they show on the way."""

from __future__ import annotations

import time

import pytest
import torch
from lightning.pytorch import LightningModule
from rich.console import Console
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from train.lightning import steps
from train.lightning.steps import fit_steps


class Line(LightningModule):
    """One weight; its loss is the weight's distance from a point far away."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(()))
        self.trained = 0

    def training_step(self, batch: list[Tensor], index: int) -> Tensor:
        """The distance, whose gradient is 1,000 times the weight's."""
        self.trained += 1
        loss = 1000 * (self.weight - 5).abs()
        self.log("loss", loss, prog_bar=True)
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Plain steps of the gradient."""
        return torch.optim.SGD(self.parameters(), lr=1.0)


def rows(count: int) -> DataLoader:
    """So many batches."""
    return DataLoader(TensorDataset(torch.zeros(count, 1)))


@pytest.mark.parametrize("clip", [0.5, 1.0])
def test_data_are_read_again_and_gradients_clipped(clip: float) -> None:
    line = Line()
    fit_steps(line, rows(2), 3, clip)
    assert line.trained == 3
    assert float(line.weight) == pytest.approx(3 * clip, rel=1e-4)


def test_without_a_terminal_a_line_comes_in_time_and_at_the_end(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    fit_steps(Line(), rows(4), 4)
    assert [line for line in capsys.readouterr().out.splitlines() if line.startswith("step")] == [
        "step 4 of 4  loss 2000.000"
    ]
    # Every step takes as long as a line may wait.
    clock = iter(range(0, 1000, 30))
    monkeypatch.setattr(time, "monotonic", lambda: float(next(clock)))
    monkeypatch.setattr(steps, "EVERY", 30.0)
    fit_steps(Line(), rows(4), 2)
    out = capsys.readouterr().out.splitlines()
    assert [line.split("  ")[0] for line in out if line.startswith("step")] == [
        "step 1 of 2",
        "step 2 of 2",
    ]


def test_on_a_terminal_there_is_a_bar_without_an_end_of_epochs(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Console, "is_terminal", property(lambda self: True))
    fit_steps(Line(), rows(2), 2)
    shown = capsys.readouterr().out
    assert "epoch 1" in shown and "-2" not in shown and "step 2 of 2" not in shown
