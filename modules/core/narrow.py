"""Calls of few rows on a CPU: the layers of a stock model with kernels that suit one to a few dozen rows.

Verifying a tree is a call of 2 to 64 rows, plain decoding one of a single row. Stock layers are made for more:
`x @ W.T` of a few rows goes through a poor kernel of the default library, attention copies the keys and values of
every query head, and the norm takes six passes. Here linear layers use weights that oneDNN has laid out beforehand,
attention treats the query heads of a group as further rows of their key/value head, and the norm is one call. The
modules stay the stock ones, with their weights; only what `forward` calls changes. `python -m eval.latency` shows what
it gives on yours.

Shape legend: B sequences, K key/value heads, G query heads per key/value head, N rows of one call, S attended slots,
D head size, I inputs, O outputs.
"""

from __future__ import annotations

import functools
import logging
import statistics
import time
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.weak import WeakIdKeyDictionary
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from modules.core.host import available_memory

logger = logging.getLogger(__name__)

MOST_ROWS = 64
"""Beyond these the stock kernels are as good."""
SMALLEST_WEIGHT = 1 << 16
"""Weights with fewer elements stay in the processor's cache, where nothing is to be gained."""
PACKED_DTYPES = (torch.float32, torch.bfloat16)
"""What oneDNN lays out beforehand."""
GROUPED = "grouped_sdpa"
"""The name under which Hugging Face finds `grouped_attention`."""

_PACKED: WeakIdKeyDictionary = WeakIdKeyDictionary()
"""Weight -> (its version when packed, the packed copy)."""


# -- linear layers ----------------------------------------------------------------------------------------------


def narrow_linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`F.linear` by the kernel that is faster for few rows. x [..., I], weight [O, I], bias [O] -> [..., O].

    A packed copy of the weight is kept as long as the weight lives, and made anew when it has changed. Inputs of
    another precision than the weight's are autocast's business.
    """
    rows = x.numel() // x.shape[-1]
    if torch.compiler.is_compiling() or torch.is_grad_enabled() or rows > MOST_ROWS or not _packable(weight) \
            or x.dtype != weight.dtype or not packing_pays(rows == 1, weight.dtype):
        return F.linear(x, weight, bias)
    return packed_linear(x, weight, bias)


def packed_linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`F.linear` on the packed copy of a float32 or bfloat16 weight on the CPU."""
    kept = _PACKED.get(weight)
    if kept is None or kept[0] != weight._version:
        packed = torch.ops.mkldnn._reorder_linear_weight(weight.detach().contiguous(), 4)
        kept = _PACKED[weight] = (weight._version, packed)
    return torch.ops.mkldnn._linear_pointwise(x, kept[1], bias, "none", [], "")


def _packable(weight: Tensor) -> bool:
    return weight.device.type == "cpu" and weight.dtype in PACKED_DTYPES and weight.numel() >= SMALLEST_WEIGHT


@functools.cache
def packing_pays(single: bool, dtype: torch.dtype = torch.float32) -> bool:
    """Whether packed weights are faster here for one row or for a few, by a short measurement, made once for each.

    One row is bound by memory, so the measurement reads more weights than a processor's cache holds.
    """
    if not (torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")):
        return False
    if dtype == torch.bfloat16 and not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        return False
    generator = torch.Generator().manual_seed(0)
    weights = [torch.randn(1536, 576, generator=generator).to(dtype) for _ in range(24)]
    x = torch.randn(1 if single else 4, 576, generator=generator).to(dtype)
    with torch.no_grad():
        stock, packed = _alternating_medians(weights, x)
    logger.info("linear layers of %d rows, %s: stock %.0f us, packed %.0f us", len(x), dtype, stock * 1e6, packed * 1e6)
    return packed < stock


def _alternating_medians(weights: list[Tensor], x: Tensor, passes: int = 7) -> tuple[float, float]:
    taken: dict[Any, list[float]] = {F.linear: [], packed_linear: []}
    for _ in range(passes):
        for function, samples in taken.items():
            began = time.perf_counter()
            for weight in weights:
                function(x, weight)
            samples.append((time.perf_counter() - began) / len(weights))
    return statistics.median(taken[F.linear][1:]), statistics.median(taken[packed_linear][1:])


class NarrowLinear(nn.Linear):
    """A stock linear layer that computes through `narrow_linear`."""

    def forward(self, input: Tensor) -> Tensor:
        """[..., I] -> [..., O]."""
        return narrow_linear(input, self.weight, self.bias)


def use_narrow_linears(model: nn.Module) -> None:
    """Let every plain `nn.Linear` of a model compute through `narrow_linear` (weights untouched).

    Packed copies take as much memory again as the linear layers; they are left out where that is not there.
    """
    linears = [module for module in model.modules() if type(module) is nn.Linear]
    needed = sum(module.weight.nbytes for module in linears if _packable(module.weight))
    if needed > available_memory():
        logger.warning("packed copies of the linear layers would take %.1f GiB more memory than is free: verification "
                       "of few rows stays slow", needed / 2**30)
        return
    for module in linears:
        module.__class__ = NarrowLinear


# -- norms ------------------------------------------------------------------------------------------------------


def use_fused_norms(model: nn.Module) -> None:
    """Let every float32 norm that *is* `F.rms_norm`, by its values on random rows, call it. (At other precisions stock
    norms compute in float32 on the way, and the values would differ.)"""
    for module in model.modules():
        if _is_rms_norm(module):
            module.forward = functools.partial(_rms_norm, module)


def _rms_norm(module: Any, hidden: Tensor) -> Tensor:
    if torch.is_grad_enabled():
        return type(module).forward(module, hidden)
    return F.rms_norm(hidden, module.weight.shape, module.weight, module.variance_epsilon)


@torch.no_grad()
def _is_rms_norm(module: nn.Module) -> bool:
    weight, epsilon = getattr(module, "weight", None), getattr(module, "variance_epsilon", None)
    if epsilon is None or weight is None or weight.dim() != 1 or weight.dtype != torch.float32:
        return False
    rows = torch.randn(4, len(weight), generator=torch.Generator().manual_seed(0)).to(weight)
    return torch.allclose(module(rows), F.rms_norm(rows, weight.shape, weight, epsilon), rtol=1e-5, atol=1e-6)


# -- attention --------------------------------------------------------------------------------------------------


def grouped_attention(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None,
                      scaling: float | None = None, **options: Any) -> tuple[Tensor, None]:
    """Scaled dot-product attention without copies of keys and values for every query head.

    query [B,K*G,N,D], key and value [B,K,S,D], additive attention_mask [B,1,N,S] -> [B,N,K*G,D]. The G query heads
    of a key/value head become G·N rows of it. Many rows, or no mask, go the stock way.
    """
    batch, heads, rows, size = query.shape
    groups = heads // key.shape[1]
    if attention_mask is None or rows > MOST_ROWS or options.get("position_bias") is not None:
        out, _ = sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **options)
        return out, None
    slots = key.shape[2]
    mask = attention_mask.expand(-1, groups, -1, -1).reshape(-1, 1, groups * rows, slots)
    wide = query.reshape(batch, -1, groups * rows, size)
    out = F.scaled_dot_product_attention(wide, key, value, attn_mask=mask, scale=scaling)
    return out.reshape(batch, heads, rows, size).transpose(1, 2).contiguous(), None


AttentionInterface.register(GROUPED, grouped_attention)
AttentionMaskInterface.register(GROUPED, sdpa_mask)


def use_grouped_attention(model: Any) -> None:
    """Switch a model from Hugging Face's `sdpa` to `grouped_attention`; others keep what they have."""
    if getattr(model.config, "_attn_implementation", None) == "sdpa":
        model.config._attn_implementation = GROUPED


def use_narrow_kernels(model: nn.Module) -> None:
    """All of the above, for a frozen model on a CPU."""
    use_narrow_linears(model)
    use_fused_norms(model)
    use_grouped_attention(model)
