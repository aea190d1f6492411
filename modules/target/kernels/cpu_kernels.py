"""Calls of few rows: kernels for the layers of a stock model, suited to one to a few dozen rows,
mostly on a CPU.

Verifying a tree is a call of 2 to 64 rows, plain decoding one of a single row. Stock layers are
optimised for more: `x @ W.T` of a few rows goes through a poor kernel of the default library,
attention copies the keys and values of every query head, and the norm takes six passes. Here linear
layers use weights that oneDNN has laid out beforehand, attention treats the query heads of a group
as further rows of their key/value head, and the norm is one call. The modules stay the stock ones,
with their weights; only what `forward` calls changes. Grouped attention is for every device: the
copies would grow with the context, and slow down drafting more than plain decoding.
`python -m eval.latency` measures the effect on your device.

Shape legend: B sequences, K key/value heads, G query heads per key/value head, N rows of one call,
S attended slots, D head size, E head size of values, I inputs, O outputs.
"""

from __future__ import annotations

import functools
import inspect
import logging
import time
from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.weak import WeakIdKeyDictionary
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from modules.runtime.host_memory import available_memory
from modules.target.kernels.attention_hook import LayerAttention, current_hook

logger = logging.getLogger(__name__)

MOST_ROWS = 64
"""For more rows the stock kernels are as fast."""
SMALLEST_WEIGHT = 1 << 16
"""Weights with fewer elements stay in the processor's cache, so that packing gains nothing."""
PACKED_DTYPES = (torch.float32, torch.bfloat16)
"""Precisions whose weights oneDNN can lay out beforehand."""
MEASURED_BYTES = 1 << 25
"""Bytes of weights that a measurement reads in turn."""
NORM_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
"""Precisions of fused norms."""
GROUPED = "grouped_sdpa"
"""The name under which Hugging Face finds `grouped_attention`."""

_PACKED: WeakIdKeyDictionary = WeakIdKeyDictionary()
"""Weight -> (its version, place and precision when packed, the packed copy)."""
_JOINT: WeakIdKeyDictionary = WeakIdKeyDictionary()
"""First weight -> (versions and places of all, the packed copy of all, their biases)."""


# -- linear layers ---------------------------------------------------------------------------------


def narrow_linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`F.linear` by the kernel that is faster for few rows. x [..., I], weight [O, I], bias [O] ->
    [..., O].

    A packed copy of the weight is kept as long as the weight lives, and replaced when it has
    changed. Inputs of another precision than the weight's go to `F.linear`, where autocast may
    convert them.
    """
    rows = x.numel() // x.shape[-1]
    if (
        torch.compiler.is_compiling()
        or torch.is_grad_enabled()
        or rows > MOST_ROWS
        or not _packable(weight)
        or x.dtype != weight.dtype
        or not packing_pays(rows, weight.shape[0], weight.shape[1], weight.dtype)
    ):
        return F.linear(x, weight, bias)
    return packed_linear(x, weight, bias)


def packed_linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`F.linear` on the packed copy of a float32 or bfloat16 weight on the CPU."""
    entry, state = _PACKED.get(weight), (weight._version, weight.data_ptr(), weight.dtype)
    if entry is None or entry[0] != state:
        packed = torch.ops.mkldnn._reorder_linear_weight(weight.detach().contiguous(), 4)
        entry = _PACKED[weight] = (state, packed)
    return torch.ops.mkldnn._linear_pointwise(x, entry[1], bias, "none", [], "")


def _packable(weight: Tensor, size: int | None = None) -> bool:
    return (
        weight.device.type == "cpu"
        and weight.dtype in PACKED_DTYPES
        and (size or weight.numel()) >= SMALLEST_WEIGHT
    )


def packing_pays(rows: int, outputs: int, inputs: int, dtype: torch.dtype) -> bool:
    """Whether the packed copy of a weight [O, I] is faster here for so many rows, by a short
    measurement.
    """
    faster = packed_widths(outputs, inputs, dtype, torch.get_num_threads())
    return 1 << (rows - 1).bit_length() in faster


@functools.cache
def packed_widths(outputs: int, inputs: int, dtype: torch.dtype, threads: int) -> frozenset[int]:
    """For which row counts (powers of two, up to `MOST_ROWS`) packed weights of this shape are
    faster.

    Measured once for each shape, at all row counts, so that nothing is measured during decoding.
    The faster kernel depends on shape and processor. Calls read more weights than a core's cache
    holds; the minimum of several passes is taken, which other programs disturb least.
    """
    if not (
        torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")
    ):
        return frozenset()
    if dtype == torch.bfloat16 and not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        return frozenset()
    # 1. More weights than a core's cache holds, at most of this size.
    row = inputs * dtype.itemsize
    outputs = max(1, min(outputs, MEASURED_BYTES // row))
    count = max(1, MEASURED_BYTES // (row * outputs))
    weights = [torch.full((outputs, inputs), 0.01, dtype=dtype) for _ in range(count)]
    # 2. Both kernels at every row count.
    faster = set()
    with torch.no_grad():
        for rows in (1 << power for power in range(MOST_ROWS.bit_length())):
            stock, packed = _alternating_minima(
                weights, torch.full((rows, inputs), 0.01, dtype=dtype)
            )
            logger.info(
                "%d x %d, %d rows, %s: stock %.0f us, packed %.0f us",
                outputs,
                inputs,
                rows,
                dtype,
                stock * 1e6,
                packed * 1e6,
            )
            faster |= {rows} if packed < stock else set()
    return frozenset(faster)


def _alternating_minima(weights: list[Tensor], x: Tensor, passes: int = 6) -> tuple[float, float]:
    taken: dict[Any, list[float]] = {F.linear: [], packed_linear: []}
    for _ in range(passes):
        for function, samples in taken.items():
            began = time.perf_counter()
            for weight in weights:
                function(x, weight)
            samples.append((time.perf_counter() - began) / len(weights))
    return min(taken[F.linear][1:]), min(taken[packed_linear][1:])


def joint_linear(x: Tensor, linears: Sequence[nn.Linear]) -> Sequence[Tensor]:
    """Outputs [..., O] of linear layers that read the same x [..., I]; for few rows they are parts
    of one product with a packed copy of all weights.

    A call of a small layer takes longer than reading its weights does.
    """
    if torch.is_grad_enabled() or torch.compiler.is_compiling() or not all(map(_joinable, linears)):
        return [linear(x) for linear in linears]
    # 1. One product, where its size is faster packed.
    first, sizes = linears[0].weight, [linear.out_features for linear in linears]
    rows, inputs = x.numel() // x.shape[-1], linears[0].in_features
    if (
        rows <= MOST_ROWS
        and x.dtype == first.dtype
        and _packable(first, sum(sizes) * inputs)
        and packing_pays(rows, sum(sizes), inputs, first.dtype)
    ):
        return packed_joint(x, linears).split(sizes, -1)
    # 2. Weights are packed together or one by one, not twice.
    if first in _JOINT:
        return [F.linear(x, linear.weight, linear.bias) for linear in linears]
    return [linear(x) for linear in linears]


def _joinable(linear: nn.Linear) -> bool:
    """Whether a layer's weight may be read outside its `forward`.

    At ZeRO-3 reading makes DeepSpeed gather it for the module around it from then on, and the next
    step stops at another order of gathering than it has recorded. DeepSpeed numbers such modules.
    """
    attributes = vars(linear)
    return "forward" in attributes and "ds_id" not in attributes


def packed_joint(x: Tensor, linears: Sequence[nn.Linear]) -> Tensor:
    """The outputs side by side [..., O + … + O], by a packed copy of all weights."""
    weights, biases = zip(*((linear.weight, linear.bias) for linear in linears), strict=True)
    tensors = [part for part in (*weights, *biases) if part is not None]
    state = [(part._version, part.data_ptr(), part.dtype) for part in tensors]
    entry = _JOINT.get(weights[0])
    if entry is None or entry[0] != state:
        whole, bias = torch.cat([weight.detach() for weight in weights]), None
        if len(tensors) > len(weights):
            bias = [
                whole.new_zeros(linear.out_features) if part is None else part.detach()
                for linear, part in zip(linears, biases, strict=True)
            ]
            bias = torch.cat(bias)
        packed = torch.ops.mkldnn._reorder_linear_weight(whole, 4)
        entry = _JOINT[weights[0]] = (state, packed, bias)
    return torch.ops.mkldnn._linear_pointwise(x, entry[1], entry[2], "none", [], "")


class NarrowLinear(nn.Linear):
    """A stock linear layer that computes through `narrow_linear`."""

    def forward(self, input: Tensor) -> Tensor:
        """[..., I] -> [..., O]."""
        return narrow_linear(input, self.weight, self.bias)


def use_narrow_linears(model: nn.Module) -> None:
    """Make every plain `nn.Linear` of a model compute through `narrow_linear` (weights untouched).

    Packed copies take as much memory as the linear layers; without so much free memory there are
    none.
    """
    # 1. Memory of the packed copies.
    linears = _plain_linears(model)
    needed = sum(module.weight.nbytes for module in linears if _packable(module.weight))
    if needed > available_memory():
        logger.warning(
            "packed copies of the linear layers would take %.1f GiB more memory than is free: "
            "verification of few rows stays slow",
            needed / 2**30,
        )
        return
    for module in linears:
        # In place, since others hold references to these modules.
        module.forward = functools.partial(_narrow_forward, module)


def _narrow_forward(module: nn.Linear, input: Tensor) -> Tensor:
    return narrow_linear(input, module.weight, module.bias)


def _plain_linears(model: nn.Module) -> list[nn.Linear]:
    """Stock linear layers that still compute as their class says."""
    modules = (module for module in model.modules() if type(module) is nn.Linear)
    return [module for module in modules if "forward" not in vars(module)]


# -- norms -----------------------------------------------------------------------------------------


def use_fused_norms(model: nn.Module) -> None:
    """Make every RMS norm that `_rms_norm` computes equally on random rows call it."""
    for module in model.modules():
        if (forward := _fused_norm(module)) is not None:
            module.forward = forward


def _rms_norm(module: Any, epsilon: float, rounded: bool, hidden: Tensor) -> Tensor:
    """The norm of `hidden`; at 16 bits rounded before the weight, if `rounded`, and after it."""
    if (
        torch.is_grad_enabled()
        or torch.compiler.is_compiling()
        or hidden.dtype not in NORM_DTYPES
        or hidden.dtype != module.weight.dtype
        or hidden.device.type != "cpu"
    ):
        return type(module).forward(module, hidden)
    # torch's own norm is a dozen operators on a CPU. The squares are summed in the stock norm's
    # order: another changes values that are rounded to 16 bits.
    weight, wide = module.weight, hidden.float()
    scale = (wide * wide).mean(-1, keepdim=True).add_(epsilon).rsqrt_()
    if rounded:
        return weight * (wide * scale).to(hidden.dtype)
    return (wide * scale * weight).to(hidden.dtype)


@torch.no_grad()
def _fused_norm(module: Any) -> Any:
    """The fused forward of a norm; None for what is no RMS norm, or computes otherwise."""
    weight = getattr(module, "weight", None)
    epsilon = module.eps if isinstance(module, nn.RMSNorm) else None
    epsilon = getattr(module, "variance_epsilon", epsilon)
    if "forward" in vars(module) or epsilon is None:
        return None
    if weight is None or weight.dim() != 1 or weight.dtype not in NORM_DTYPES:
        return None
    # Gated norms of recurrent layers read a second tensor.
    if len(inspect.signature(type(module).forward).parameters) != 2:
        return None
    rows = torch.randn(4, len(weight), generator=torch.Generator().manual_seed(0)).to(weight)
    theirs = type(module).forward(module, rows)
    for rounded in (True, False):
        forward = functools.partial(_rms_norm, module, float(epsilon), rounded)
        ours = forward(rows)
        if weight.dtype == torch.float32:
            equal = torch.allclose(theirs, ours, rtol=1e-5, atol=1e-6)
        else:
            # Sums in another order rarely change a rounded value.
            equal = float((theirs == ours).float().mean()) > 0.99
        if equal:
            return forward
    return None


# -- attention -------------------------------------------------------------------------------------


def grouped_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    **options: Any,
) -> tuple[Tensor, None]:
    """Scaled dot-product attention without copies of keys and values for every query head.

    query [B,K*G,N,D], key [B,K,S,D], value [B,K,S,E], additive attention_mask [B,1,N,S] ->
    [B,N,K*G,E].
    The G query heads of a key/value head become G·N rows of it. Calls of many rows, or without a
    mask, use the stock kernel. A hook that a session has set takes the call over.
    """
    hook = current_hook()
    if hook is None or attention_mask is None:
        return _grouped(module, query, key, value, attention_mask, scaling, options), None
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling

    def stock() -> Tensor:
        return _grouped(module, query, key, value, attention_mask, scaling, options)

    layer: int = cast(Any, module).layer_idx
    window: int | None = options.get("sliding_window")
    inputs = LayerAttention(layer, query, key, value, attention_mask, scale, window, stock)
    return hook(inputs), None


def _grouped(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None,
    options: dict[str, Any],
) -> Tensor:
    # 1. Calls that the stock kernel does well.
    batch, heads, rows, size = query.shape
    groups = heads // key.shape[1]
    if attention_mask is None or rows > MOST_ROWS or options.get("position_bias") is not None:
        out, _ = sdpa_attention_forward(
            module, query, key, value, attention_mask, scaling=scaling, **options
        )
        return out
    # 2. Query heads of a group as rows of their key/value head, under the same mask.
    slots = key.shape[2]
    mask = attention_mask.expand(-1, groups, -1, -1).reshape(-1, 1, groups * rows, slots)
    wide = query.reshape(batch, -1, groups * rows, size)
    out = F.scaled_dot_product_attention(wide, key, value, attn_mask=mask, scale=scaling)
    return out.reshape(batch, heads, rows, -1).transpose(1, 2).contiguous()


AttentionInterface.register(GROUPED, grouped_attention)
AttentionMaskInterface.register(GROUPED, sdpa_mask)


def use_grouped_attention(model: Any) -> None:
    """Switch a model from Hugging Face's `sdpa` to `grouped_attention`, and no other one."""
    config = model.config.get_text_config()
    if getattr(config, "_attn_implementation", None) == "sdpa":
        config._attn_implementation = GROUPED


def uses_grouped_attention(model: Any) -> bool:
    """Whether a model's attention is `grouped_attention`: some models (Falcon, GPT-J) call kernels
    of their own whatever their config says.
    """
    config = model.config.get_text_config()
    if getattr(config, "_attn_implementation", None) != GROUPED:
        return False
    forwards = (inspect.unwrap(type(module).forward) for module in model.modules())
    codes = (getattr(forward, "__code__", None) for forward in forwards)
    return any(code is not None and "get_interface" in code.co_names for code in codes)


def use_narrow_kernels(model: nn.Module) -> None:
    """Use the CPU kernels for linear layers and norms of a frozen model."""
    use_narrow_linears(model)
    use_fused_norms(model)
