"""Rounding of states for a cache, reading them back, and the rounding error.

Shape legend: S tokens of a shard, T tokens of a document, H hidden size.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32, "int8": torch.int8}
ORDINARY = 0.98
"""Share of channels, those of least magnitude, whose error is reported."""
_SCALES, _CHANNELS = ".scales", ".channels"
"""Suffixes of the names of an int8 state's scales."""


def state_bytes(hidden_size: int, dtype: str) -> int:
    """Bytes of one state of one token in a cache."""
    return hidden_size * DTYPES[dtype].itemsize + (4 if dtype == "int8" else 0)


def quantised(states_SH: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """int8 [S,H], a float32 scale per token [S,1] and one per channel [1,H]; their product
    approximates the states.

    A channel's scale is its mean magnitude over the shard. A token's scale is its largest magnitude
    ÷ 127 after division by the channels' scales. A few channels are a hundred times as large as the
    others (massive activations, Sun et al. 2024, arXiv 2402.17762); with only a scale per token the
    others would be rounded to zero.
    """
    values_SH = states_SH.float()
    channels_1H = values_SH.abs().mean(0, keepdim=True).clamp(min=1e-30)
    values_SH = values_SH / channels_1H
    scales_S1 = values_SH.abs().amax(-1, keepdim=True).clamp(min=1e-30) / 127
    return (values_SH / scales_S1).round().to(torch.int8), scales_S1, channels_1H


def stored(name: str, states_SH: Tensor, dtype: str) -> tuple[dict[str, Tensor], float]:
    """The tensors of one state in a shard, by name, and their RMS error."""
    if dtype != "int8":
        rounded_SH = states_SH.to(DTYPES[dtype])
        return {name: rounded_SH}, rms_error(states_SH, rounded_SH)
    whole_SH, scales_S1, channels_1H = quantised(states_SH)
    tensors = {name: whole_SH, f"{name}{_SCALES}": scales_S1, f"{name}{_CHANNELS}": channels_1H}
    return tensors, rms_error(states_SH, whole_SH.float() * scales_S1 * channels_1H)


def restored(opened: Any, name: str, start: int, stop: int, dtype: str, by_channel: bool) -> Tensor:
    """Tokens `start … stop-1` of a state in an open shard [T,H], as float32 from int8. Shards of
    earlier versions have no scales of channels (`by_channel` False)."""
    states_TH = opened.get_slice(name)[start:stop]
    if dtype != "int8":
        return states_TH
    states_TH = states_TH.float() * opened.get_slice(f"{name}{_SCALES}")[start:stop]
    return states_TH * opened.get_tensor(f"{name}{_CHANNELS}") if by_channel else states_TH


def rms_error(exact_SH: Tensor, found_SH: Tensor) -> float:
    """RMS of the difference ÷ RMS of the states, over the ORDINARY channels: the few much larger
    channels would hide the others' error."""
    exact_SH = exact_SH.float()
    ordinary = exact_SH.abs().mean(0).argsort()[: max(1, int(ORDINARY * exact_SH.shape[1]))]
    exact_SC, found_SC = exact_SH[:, ordinary], found_SH[:, ordinary].float()
    return float((found_SC - exact_SC).norm() / exact_SC.norm().clamp(min=1e-30))
