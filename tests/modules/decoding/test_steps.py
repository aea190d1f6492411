"""What a step costs the host: one read of the device, when the acceptance is known; and how phases
are timed.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from torch.overrides import TorchFunctionMode

from modules.contracts.sampling import Sampling
from modules.contracts.token_tree import TokenTree, Topology
from modules.contracts.verification import Accepted
from modules.decoding import timing as clock
from modules.decoding.decoder import SpeculativeDecoder
from modules.decoding.loop import read_to_host
from modules.decoding.timing import Clock
from modules.drafters.heads.medusa import Medusa
from modules.trees.static import StaticTree
from tests.fakes import tiny_target
from tests.modules.families import built

READS = {
    "tolist",
    "item",
    "__int__",
    "__float__",
    "__bool__",
    "__index__",
    "numpy",
    "nonzero",
    "unique",
    "masked_select",
    "argwhere",
    "cpu",
}


class Watch(TorchFunctionMode):
    """Counts what makes the host wait for a device: values read from it, and values copied to it
    from lists.
    """

    def __init__(self) -> None:
        super().__init__()
        self.seen: Counter[str] = Counter()

    def __torch_function__(self, func, types, args=(), kwargs=None):
        name = getattr(func, "__name__", "")
        masks = (
            [
                part
                for part in (args[1] if isinstance(args[1:2] and args[1], tuple) else args[1:2])
                if isinstance(part, torch.Tensor) and part.dtype == torch.bool
            ]
            if name in ("__getitem__", "__setitem__")
            else []
        )
        if name in READS or masks or func is torch.tensor:
            self.seen["mask" if masks else name] += 1
        return func(*args, **(kwargs or {}))


def watched(decoder: SpeculativeDecoder, limit: int = 12) -> list[Counter[str]]:
    """What each step did in which no sequence ended; the first one, which derives the tree's shape,
    left out.
    """
    run = decoder.begin([[7, 9, 11], [12, 8, 13]], Sampling(), limit)
    steps, counts, running = iter(run), [], 2
    next(steps)
    while run._alive:
        with Watch() as watch:
            next(steps)
        counts += [watch.seen] if len(run._alive) == running else []
        running = len(run._alive)
    return counts[1:]


def test_plain_decoding_reads_the_device_once_a_step() -> None:
    steps = watched(SpeculativeDecoder(tiny_target(), stop_ids=frozenset({-1})))
    assert len(steps) > 5 and [step for step in steps if step != {"tolist": 1}] == []


def test_heads_on_a_fixed_tree_read_the_device_once_a_step_too() -> None:
    target = tiny_target()
    drafter = Medusa(target.shape, heads=3).double().eval()
    drafter.initialise(target)
    steps = watched(SpeculativeDecoder(target, drafter, stop_ids=frozenset({-1})), 24)
    assert len(steps) > 5 and [step for step in steps if step != {"tolist": 1}] == []


@pytest.mark.parametrize("family", ["clover", "eagle", "eagle3"])
def test_a_layer_of_the_drafters_own_reads_nothing_more(family: str) -> None:
    target = tiny_target()
    decoder = SpeculativeDecoder(
        target, built(family, target), builder=StaticTree([(0,), (1,), (0, 0)])
    )
    steps = watched(replace(decoder, stop_ids=frozenset({-1})), 24)
    assert len(steps) > 5 and [step for step in steps if step != {"tolist": 1}] == []


def test_what_is_told_is_the_acceptance() -> None:
    tree = TokenTree(
        torch.tensor([[5, 6, 7, 8], [5, 6, 7, 0]]),
        Topology(torch.tensor([[-1, 0, 1, 0], [-1, 0, 0, 3]])),
    )
    wide = Accepted(
        torch.tensor([[0, 1, 2, 0], [0, 0, 0, 0]]), torch.tensor([3, 1]), torch.tensor([9, 4])
    )
    accepted, told = read_to_host(tree, wide)
    assert accepted.path_BA.tolist() == [[0, 1, 2], [0, 0, 0]] and accepted.paths == [
        [0, 1, 2],
        [0],
    ]
    assert [tuple(call) for call in told] == [([6, 7, 9], 2, 3), ([4], 1, 2)]
    assert Accepted(wide.path_BA, wide.lengths_B, wide.next_B).paths == accepted.paths


class Event:
    """A CUDA event whose time is when it was recorded on a made-up clock, in milliseconds."""

    now = 0.0

    def __init__(self, enable_timing: bool) -> None:
        assert enable_timing

    def record(self, stream: str) -> None:
        assert stream == "stream of cuda:1"
        self.at = Event.now

    def elapsed_time(self, other: Event) -> float:
        return other.at - self.at


def test_phases_on_a_gpu_are_events_and_nothing_waits_before_the_figures_are_asked_for(
    monkeypatch,
) -> None:
    waits, seconds = [], iter([0.0, 1.0, 2.0])
    monkeypatch.setattr(
        clock.torch,
        "cuda",
        SimpleNamespace(
            synchronize=waits.append,
            Event=Event,
            current_stream=lambda device: f"stream of {device}",
        ),
    )
    monkeypatch.setattr(clock.time, "perf_counter", lambda: next(seconds))
    timed = Clock(torch.device("cuda:1"))
    assert len(waits) == 1
    for name, taken in (("draft", 100.0), ("verify", 300.0), ("draft", 50.0)):
        with timed.phase(name):
            Event.now += taken
    assert len(waits) == 1
    found = timed.snapshot()
    assert waits == [torch.device("cuda:1")] * 2
    assert found["draft"] == pytest.approx(0.15) and found["verify"] == pytest.approx(0.3)
    assert found["other"] == pytest.approx(1 - 0.45) and timed.snapshot()["draft"] == pytest.approx(
        0.15
    )
