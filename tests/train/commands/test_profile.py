"""Every moment of a step belongs to one phase, and slow phases are seen where they are."""

from __future__ import annotations

import time

import pytest
import torch
from torch.optim import AdamW

from data.datamodule import Batches
from modules.losses import chunked as losses
from modules.runtime.phase_timer import PhaseClock, phase, watched
from modules.target.target import Target
from train.cli import command
from train.profile import MEASURED, PHASES, WARM_UP


def test_time_is_charged_to_the_innermost_phase_and_only_while_running(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    moments = iter([10.0, 11.0, 13.0, 16.0, 20.0])
    clock = PhaseClock(torch.device("cpu"))
    monkeypatch.setattr("modules.runtime.phase_timer.time.perf_counter", lambda: next(moments))
    clock.enter("data")
    clock.start()
    clock.enter("forward")
    with watched(clock):
        with phase("loss"):
            pass
        clock.stop()
        with phase("loss"):
            pass
    assert clock.seconds == {"data": 1.0, "forward": 2.0 + 4.0, "loss": 3.0}
    with phase("loss"):
        assert clock.seconds["loss"] == 3.0


def slowed(function, seconds: float):
    """The function, and some sleep before it."""

    def slow(*arguments, **options):
        time.sleep(seconds)
        return function(*arguments, **options)

    return slow


@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_recipe_is_profiled_and_nothing_is_left(
    tiny, recipe, tmp_path, capsys, monkeypatch, accumulate
) -> None:
    for owner, name, seconds in (
        (Target, "forward_rows", 0.05),
        (Batches, "_collate", 0.03),
        (losses, "_score", 0.01),
        (AdamW, "_init_group", 0.02),
    ):
        monkeypatch.setattr(owner, name, slowed(getattr(owner, name), seconds))
    monkeypatch.setattr("train.cli.load_target", lambda *_: tiny)
    monkeypatch.chdir(tmp_path)
    before = set(tmp_path.iterdir())
    assert (
        command(
            [
                "--config",
                str(recipe),
                "--profile",
                "--trainer.accumulate_grad_batches",
                str(accumulate),
            ]
        )
        == 0
    )
    assert set(tmp_path.iterdir()) == before
    rows = {line[:14].strip(): line[14:].split() for line in capsys.readouterr().out.splitlines()}
    found = {name: float(rows[name][0]) for name in (*PHASES, "step")}
    assert found.pop("step") == pytest.approx(sum(found.values()), abs=1)
    heads, sleeps = 2, {"target states": 50, "data": 30}
    for name, sleep in sleeps.items():
        assert found[name] >= sleep * accumulate
    assert found["loss"] >= 10 * heads * accumulate and found["optimiser"] >= 20
    assert all(value > 0 for value in found.values())
    assert rows["step"][2:] == [
        "mean",
        "of",
        str(MEASURED),
        "optimiser",
        "steps",
        "after",
        str(WARM_UP),
    ]
