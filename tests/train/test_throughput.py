"""The throughput command: the product's own loss is what is timed, and unequal work is refused."""

from __future__ import annotations

import pytest
import torch

from tests.fakes import tiny_target
from train import throughput
from train.throughput import Comparison, alternating_seconds, command, our_drafter, our_step, packed_row


def test_the_step_is_the_drafters_loss_forward_and_backward() -> None:
    asked, target = Comparison(tokens=24, vocabulary=40, assistant=0.5), tiny_target(dtype=torch.float32)
    drafter = our_drafter(asked, target).train()
    batch = packed_row(asked, target, drafter.training_states)
    assert batch.loss_mask.sum() == 12 and int(batch.input_ids.max()) < 40
    expected = drafter.loss(batch, target, 0.5).total
    torch.testing.assert_close(our_step(drafter, batch, target, "float32")(), expected.detach())
    assert all(parameter.grad is not None for parameter in drafter.declared_parameters())


def test_passes_alternate_and_the_first_of_each_is_not_counted() -> None:
    order: list[str] = []
    steps = {name: lambda name=name: order.append(name) or torch.zeros(()) for name in ("a", "b")}
    taken = alternating_seconds(steps, 2)
    assert order == ["a", "b"] * 3 and {name: len(seconds) for name, seconds in taken.items()} == {"a": 2, "b": 2}


def test_the_command_prints_a_line_each(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(throughput, "load_target", lambda name: tiny_target(dtype=torch.float32))
    monkeypatch.setattr(throughput.importlib.util, "find_spec", lambda name: None)
    assert command(["--tokens", "24", "--vocabulary", "40", "--repeats", "1", "--precision", "bfloat16"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("EAGLE-3, forward and backward, 3 steps, 24 tokens") and "bfloat16" in lines[0]
    assert len(lines) == 2 and lines[1].startswith("slipstream") and "tokens/s" in lines[1]
    assert throughput.run(command, ["--precision", "int3"]) == 2


def test_two_drafters_that_do_not_do_the_same_work_are_refused() -> None:
    throughput._same(8.0, 8.1)
    with pytest.raises(ValueError, match="do not do the same work"):
        throughput._same(8.0, 9.0)
