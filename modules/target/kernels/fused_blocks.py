"""Attention and feed-forward network of stock decoder layers, in fewer operators.

A call of one row has thousands of operators of a few microseconds each. For calls of few rows on a
CPU the blocks below do what the library's do, rounded at the same places: layers that read the same
input are one product, queries and keys are rotated together, and masks and sines are prepared once
a pass instead of once a layer. Every other call is the library's own. A block is changed only if it
computes on random rows what the library's does.

Shape legend: B sequences, N rows of one call, S attended slots, K key/value heads, G query heads
per key/value head, Q query heads, D head size, H hidden size, I intermediate size.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from modules.target.kernels.attention_hook import current_hook
from modules.target.kernels.cpu_kernels import GROUPED, MOST_ROWS, joint_linear

ATTENTIONS = ("llama", "mistral", "mixtral", "qwen2", "qwen3")
"""Models whose attention is scaled, masked and rotated by halves, with nothing between."""


class Pass:
    """What all layers of one pass share, made by the first of them."""

    def __init__(self) -> None:
        nothing = torch.empty(0)
        self._masks, self._sines = (nothing, nothing), (nothing, nothing)

    def wide(self, mask_B1NS: Tensor, groups: int) -> Tensor:
        """The mask [B,1,N*G,S] of query heads as rows of their key/value head."""
        masks = self._masks
        if masks[0] is not mask_B1NS:
            wide = mask_B1NS[:, :, :, None].expand(-1, -1, -1, groups, -1).flatten(2, 3)
            masks = self._masks = mask_B1NS, wide
        return masks[1]

    def signed(self, sine_BND: Tensor) -> Tensor:
        """Sines [B,N,1,D] with the sign that each half of a head has."""
        sines = self._sines
        if sines[0] is not sine_BND:
            half = sine_BND.shape[-1] // 2
            signed = torch.cat([-sine_BND[..., :half], sine_BND[..., half:]], -1)[:, :, None]
            sines = self._sines = sine_BND, signed
        return sines[1]


def use_fused_blocks(model: Any) -> None:
    """Make blocks of a frozen model compute in fewer operators, where they stay equal."""
    shared, equal = Pass(), {}
    for module in model.modules():
        fused: Any = None
        if _is_feed_forward(module):
            fused = functools.partial(feed_forward, module)
        elif model.config.model_type in ATTENTIONS and _is_attention(module):
            fused = functools.partial(attention, module, shared)
        if fused is None or "forward" in vars(module):
            continue
        # One block of a class stands for all.
        if type(module) not in equal:
            equal[type(module)] = _computes_equally(module, fused)
        if equal[type(module)]:
            module.forward = fused


def feed_forward(module: Any, hidden_BNH: Tensor, *more: Any, **options: Any) -> Tensor:
    """down(act(gate(x)) * up(x)) [B,N,H]; with gradients or more arguments, the library's."""
    if more or options or torch.is_grad_enabled():
        return type(module).forward(module, hidden_BNH, *more, **options)
    gate, up = joint_linear(hidden_BNH, (module.gate_proj, module.up_proj))
    return module.down_proj(module.act_fn(gate) * up)


def attention(
    module: Any,
    shared: Pass,
    hidden_states: Tensor,
    position_embeddings: tuple[Tensor, Tensor],
    attention_mask: Tensor | None = None,
    past_key_values: Any = None,
    **options: Any,
) -> tuple[Tensor, Tensor | None]:
    """Self-attention [B,N,H]; the arguments are the library's.

    Args:
        module: the library's attention.
        shared: of all layers.
        hidden_states: [B,N,H].
        position_embeddings: cosines and sines [B,N,D].
        attention_mask: additive, [B,1,N,S].
        past_key_values: the KV cache.
        options: that only the library's own forward reads.
    """
    # 1. Calls that the library's own forward does.
    count = hidden_states.shape[1]
    if (
        torch.compiler.is_compiling()
        or torch.is_grad_enabled()
        or attention_mask is None
        or count > MOST_ROWS
        or current_hook() is not None
        or getattr(module.config, "_attn_implementation", None) != GROUPED
    ):
        return type(module).forward(
            module, hidden_states, position_embeddings, attention_mask, past_key_values, **options
        )
    # 2. Queries and keys are rotated together, values pass.
    parts = joint_linear(hidden_states, (module.q_proj, module.k_proj, module.v_proj))
    queries, keys, values = (part.unflatten(-1, (-1, module.head_dim)) for part in parts)
    if hasattr(module, "q_norm"):
        queries, keys = module.q_norm(queries), module.k_norm(keys)
    groups, kv_heads = module.num_key_value_groups, keys.shape[2]
    turning, (cosine, sine) = torch.cat([queries, keys], 2), position_embeddings
    crossed = turning.roll(module.head_dim // 2, -1)
    turned = turning * cosine[:, :, None] + crossed * shared.signed(sine)
    # 3. Attend; query heads are rows of their key/value head.
    keys, values = turned[:, :, -kv_heads:].transpose(1, 2), values.transpose(1, 2)
    if past_key_values is not None:
        keys, values = past_key_values.update(keys, values, module.layer_idx)
    queries = turned[:, :, :-kv_heads].unflatten(2, (kv_heads, groups))
    mixed = F.scaled_dot_product_attention(
        queries.transpose(1, 2).flatten(2, 3),
        keys,
        values,
        attn_mask=shared.wide(attention_mask, groups),
        scale=module.scaling,
    )
    mixed = mixed.unflatten(2, (count, groups)).transpose(1, 2).flatten(2)
    return module.o_proj(mixed), None


def _has_linears(module: nn.Module, names: tuple[str, ...]) -> bool:
    return all(type(getattr(module, name, None)) is nn.Linear for name in names)


def _is_feed_forward(module: nn.Module) -> bool:
    named = _has_linears(module, ("gate_proj", "up_proj", "down_proj"))
    return named and hasattr(module, "act_fn")


def _is_attention(module: nn.Module) -> bool:
    named = _has_linears(module, ("q_proj", "k_proj", "v_proj", "o_proj"))
    return named and hasattr(module, "num_key_value_groups") and hasattr(module, "scaling")


@torch.no_grad()
def _computes_equally(module: Any, fused: Any) -> bool:
    """Whether a block and its fused form agree on a few random rows."""
    generator, count = torch.Generator().manual_seed(0), 4
    weight = module.down_proj.weight if _is_feed_forward(module) else module.q_proj.weight
    width = len(weight) if _is_feed_forward(module) else weight.shape[1]
    rows = torch.randn(1, count, width, generator=generator).to(weight)
    arguments: tuple[Any, ...] = (rows,)
    if not _is_feed_forward(module):
        angles = 9 * torch.rand(1, count, module.head_dim // 2, generator=generator).repeat(1, 1, 2)
        unseen = rows.new_full((1, 1, count, count), torch.finfo(rows.dtype).min)
        arguments = rows, (angles.cos().to(rows), angles.sin().to(rows)), unseen.triu(1)
    try:
        theirs, ours = type(module).forward(module, *arguments), fused(*arguments)
    except TypeError:
        return False
    theirs, ours = (part[0] if isinstance(part, tuple) else part for part in (theirs, ours))
    # As exact as products that are summed in another order and rounded alike.
    error = (ours.double() - theirs.double()).norm() / theirs.double().norm()
    return float(error) < max(1e-5, torch.finfo(rows.dtype).eps / 2)
