"""A sorted drafter may be left anywhere, for targets of any depth: no token changes."""

from __future__ import annotations

import pytest
import torch

from modules.core.drafter import Sampling
from modules.decoding.decoder import SpeculativeDecoder
from modules.language_models.sorted import Sorted
from tests.fakes import tiny_target

TARGETS = [tiny_target(layers=4), tiny_target(layers=2, seed=1)]
PROMPTS = [[7, 8, 9, 10], [20, 30], [40, 41, 42, 43, 44]]


def drafter(thresholds: float, width: int) -> Sorted:
    torch.manual_seed(0)
    made = Sorted(TARGETS[0].shape, exits=[1, 2], thresholds=thresholds, width=width).double()
    made.initialise(TARGETS[0])
    return made.eval()


@pytest.mark.parametrize("thresholds", [0.0, 0.1, 2.0])
@pytest.mark.parametrize("width", [1, 2])
def test_every_exit_and_every_target_gives_the_targets_own_tokens(thresholds: float, width: int) -> None:
    for target in TARGETS:
        plain = SpeculativeDecoder(target).decode(PROMPTS, Sampling(), 16)
        drafted = SpeculativeDecoder(target, drafter(thresholds, width)).decode(PROMPTS, Sampling(), 16)
        assert [trace.ids for trace in drafted] == [trace.ids for trace in plain]


def test_wrong_sizes_are_refused() -> None:
    with pytest.raises(ValueError, match="at least 1"):
        Sorted(TARGETS[0].shape, exits=[1, 2], width=0)
