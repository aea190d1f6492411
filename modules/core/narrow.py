"""Matrix products of few rows on a CPU, where the library's default path is up to 3.5 times too slow.

`x @ W.T` of 2 to 64 rows goes through a poor kernel choice in MKL; `(W @ x.T).T` computes the same numbers, best of all
for 4 and for 16 rows or more, to which the neighbouring row counts are therefore filled up. The rule below was found by
timing widths 192 to 49,152 on 2 AVX2 cores; `python -m eval.latency` shows what it gives on yours.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

WIDE_OUTPUT = 4096
MOST_ROWS = 64


def transposed_rows(rows: int, outputs: int) -> int | None:
    """Rows to compute `(W @ x.T).T` with, at least `rows` (the rest are zeros); None: `x @ W.T` is faster."""
    if outputs >= WIDE_OUTPUT:
        return max(rows, 4) if rows <= MOST_ROWS else None
    if rows in (2, 3, 4):
        return 2 * ((rows + 1) // 2)
    return max(rows, 16) if 12 <= rows <= MOST_ROWS else None


def narrow_linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`F.linear`, by whichever of the two products is faster here. x [..., I], weight [O, I] -> [..., O]."""
    rows = x.numel() // x.shape[-1]
    if x.device.type != "cpu" or torch.is_grad_enabled():
        return F.linear(x, weight, bias)
    filled = transposed_rows(rows, weight.shape[0])
    if filled is None:
        return F.linear(x, weight, bias)
    flat = F.pad(x.reshape(rows, -1), (0, 0, 0, filled - rows))
    product = (weight @ flat.contiguous().t())[:, :rows].t()
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
