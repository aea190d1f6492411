"""Matrix products of few rows on a CPU, where the library's default path is up to 3.5 times too slow.

`x @ W.T` of 2 to 64 rows goes through a poor kernel choice in MKL; `(W @ x.T).T` computes the same numbers. Which
is faster depends on the shape: measured on 2 cores for widths 192 to 49,152 (docs/benchmarks/narrow_matmul.md).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

WIDE_OUTPUT = 4096
MOST_ROWS = 64


def transposed_is_faster(rows: int, outputs: int) -> bool:
    """Whether `(W @ x.T).T` beats `x @ W.T` for this many rows and outputs."""
    return 2 <= rows <= MOST_ROWS and (outputs >= WIDE_OUTPUT or rows in (2, 4) or rows >= 16)


def narrow_linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`F.linear`, by whichever of the two products is faster here. x [..., I], weight [O, I] -> [..., O]."""
    rows = x.numel() // x.shape[-1]
    if x.device.type != "cpu" or torch.is_grad_enabled() or not transposed_is_faster(rows, weight.shape[0]):
        return F.linear(x, weight, bias)
    product = (weight @ x.reshape(rows, -1).contiguous().t()).t()
    if bias is not None:
        product = product + bias
    return product.reshape(*x.shape[:-1], weight.shape[0])


class NarrowLinear(nn.Linear):
    """A stock linear layer that computes through `narrow_linear`."""

    def forward(self, input: Tensor) -> Tensor:
        """[..., I] -> [..., O]."""
        return narrow_linear(input, self.weight, self.bias)


def use_narrow_linears(model: nn.Module) -> None:
    """Let every plain `nn.Linear` of a frozen model compute through `narrow_linear` (weights untouched)."""
    for module in model.modules():
        if type(module) is nn.Linear:
            module.__class__ = NarrowLinear
