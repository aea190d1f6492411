"""Buffers that every cast of a module leaves as they are."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from typing_extensions import Self


class SteadyBuffers(nn.Module):
    """A module whose float32 buffers that no state dict holds keep their precision.

    These are rotary frequencies, of stock Hugging Face models inside it too. A frequency in
    bfloat16 is up to 0.4 % off, so the angle at position 1,000 up to 4 radians (Hugging Face loads
    them in float32 for this reason). `to`, `half`, `bfloat16` and a cast of a module around this
    one (by Lightning or DeepSpeed) move them to the device and do no more.
    """

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> Self:
        # 1. Remember the float32 buffers that no state dict holds.
        buffers = [
            (module, name, buffer)
            for module in self.modules()
            for name, buffer in module.named_buffers(recurse=False)
            if name in module._non_persistent_buffers_set and buffer.dtype == torch.float32
        ]
        super()._apply(fn, recurse)
        # 2. Undo a change of their precision, not of their device.
        for module, name, original in buffers:
            cast = module._buffers[name]
            if cast is not None and cast.dtype != original.dtype:
                module._buffers[name] = original.to(cast.device)
        return self
