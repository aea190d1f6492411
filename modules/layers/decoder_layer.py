"""Layers that drafters are built from, and the KV cache of a drafter's own layers.

Shape legend: B sequences, N rows of one call, S attended slots, C cache capacity, H hidden size, X
= H times an input width, Y = H times an output width, Q query heads, G key/value heads, D head
size.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.activations import ACT2FN

from modules.contracts.rows import DocumentRows, Rows
from modules.contracts.shapes import TargetShape
from modules.layers.activation_checkpointing import recomputed
from modules.layers.document_attention import document_attention, in_parts
from modules.layers.rotary import Rotary
from modules.target.kernels.cpu_kernels import MOST_ROWS, joint_linear

if TYPE_CHECKING:
    from modules.contracts.target import Target

logger = logging.getLogger(__name__)

_LEAST_GAIN = 1e-2
"""Share of the mean gain below which a channel of the final norm counts as silenced."""


class ResBlock(nn.Module):
    """x + SiLU(W x + b) with W = 0 at the start (Medusa, Cai et al. 2024)."""

    compiles = True

    def __init__(self, hidden_size: int) -> None:
        super().__init__()
        self.linear = nn.Linear(hidden_size, hidden_size)
        nn.init.zeros_(self.linear.weight)

    def forward(self, hidden_NH: Tensor) -> Tensor:
        """[..., H] -> [..., H]."""
        return hidden_NH + F.silu(self.linear(hidden_NH))


@dataclass
class LayerCache:
    """Keys and values of one drafter layer; each sequence has its own length.

    `write` puts rows after the lengths without counting them. `keep` then counts the first rows of
    each sequence, and the next `write` overwrites the others.

    keys_BGCD, values_BGCD: [B,G,C,D]; lengths_B: int64 [B].
    """

    keys_BGCD: Tensor
    values_BGCD: Tensor
    lengths_B: Tensor
    _host_lengths: list[int] | None = field(default=None, init=False, repr=False)
    """The lengths on the host; None after a `keep` without them, until they are read from the
    device."""

    @staticmethod
    def empty(shape: TargetShape, lengths_B: Tensor, dtype: torch.dtype) -> LayerCache:
        """A cache without rows for as many sequences as `lengths_B` has."""
        size = (lengths_B.shape[0], shape.num_kv_heads, 0, shape.head_dim)
        blank = torch.empty(size, dtype=dtype, device=lengths_B.device)
        cache = LayerCache(blank, blank, torch.zeros_like(lengths_B))
        cache._host_lengths = [0] * len(lengths_B)
        return cache

    def select(self, sequences_S: Tensor) -> LayerCache:
        """The cache of these sequences alone (int64 [S])."""
        return LayerCache(
            self.keys_BGCD[sequences_S], self.values_BGCD[sequences_S], self.lengths_B[sequences_S]
        )

    @property
    def positions_B(self) -> Tensor:
        """int64 [B]: positions that are counted, of which each has a slot here."""
        return self.lengths_B

    @property
    def host_lengths(self) -> list[int]:
        """The lengths on the host."""
        if self._host_lengths is None:
            self._host_lengths = self.lengths_B.tolist()
        return self._host_lengths

    @property
    def longest(self) -> int:
        """The greatest length, on the host."""
        return max(self.host_lengths)

    @property
    def uniform(self) -> bool:
        """Whether all sequences have one length."""
        return len(set(self.host_lengths)) == 1

    def first(self, count: int) -> tuple[Tensor, Tensor]:
        """Keys and values [B,S,G,D] of the first slots."""
        keys, values = self.keys_BGCD[:, :, :count], self.values_BGCD[:, :, :count]
        return keys.transpose(1, 2), values.transpose(1, 2)

    def counted(self) -> tuple[Tensor, Tensor, Tensor | None]:
        """Keys and values [B,S,G,D] of all that is counted, and where lengths differ a mask
        [B,1,S] of it.
        """
        keys, values = self.first(self.longest)
        if self.uniform:
            return keys, values, None
        slots = torch.arange(self.longest, device=self.lengths_B.device)
        return keys, values, (slots < self.lengths_B[:, None])[:, None]

    def write(
        self, keys_BNGD: Tensor, values_BNGD: Tensor, ahead: int = 0
    ) -> tuple[Tensor, Tensor]:
        """Write N rows after each sequence's length and `ahead` rows that were written before and
        not kept.

        Returns the slots [B,S,G,D] that rows may attend to.
        """
        batch, count = keys_BNGD.shape[:2]
        # 1. Room for the longest sequence.
        used = self.longest + ahead + count
        self._grow(used)
        # 2. Write at each sequence's own slots.
        if self.uniform:
            self.keys_BGCD[:, :, used - count : used] = keys_BNGD.transpose(1, 2)
            self.values_BGCD[:, :, used - count : used] = values_BNGD.transpose(1, 2)
        else:
            sequences = torch.arange(batch, device=self.lengths_B.device)[:, None]
            rows = torch.arange(count, device=self.lengths_B.device)
            slots_BN = self.lengths_B[:, None] + ahead + rows
            self.keys_BGCD[sequences, :, slots_BN] = keys_BNGD
            self.values_BGCD[sequences, :, slots_BN] = values_BNGD
        return self.first(used)

    def keep(self, counts_B: Tensor, counts: list[int] | None = None) -> None:
        """Count the first `counts_B` of the rows written last. `counts` are the same on the host,
        if known; they avoid a wait for the device."""
        self.lengths_B = self.lengths_B + counts_B
        if counts is None or self._host_lengths is None:
            self._host_lengths = None
        else:
            pairs = zip(self._host_lengths, counts, strict=True)
            self._host_lengths = [length + more for length, more in pairs]

    def visible(self, rows: Rows, slots: int) -> Tensor:
        """bool [B,N,S]: committed slots, and those of later rows that `rows` makes visible.

        The last N columns of its `visible_BNJ` are the rows of this call, columns before them rows
        written earlier.
        """
        new_rows, count = rows.visible_BNJ.shape[1:]
        if rows.committed_BS is None and self.uniform and slots == self.longest + count:
            return F.pad(rows.visible_BNJ, (slots - count, 0), value=True)
        # 1. Which column of `visible_BNJ` each slot is, if it is a recent row.
        offset_BS = torch.arange(slots, device=self.lengths_B.device) - self.lengths_B[:, None]
        inside_BS = (offset_BS >= 0) & (offset_BS < count)
        index = offset_BS.clamp(0, count - 1)[:, None].expand(-1, new_rows, -1)
        recent = (
            rows.visible_BNJ.expand(len(offset_BS), -1, -1).gather(2, index) & inside_BS[:, None]
        )
        # 2. And the counted slots before them.
        return recent | self._readable(rows, offset_BS < 0)[:, None]

    def chosen(
        self, rows: Rows, keys_BSGD: Tensor, values_BSGD: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """What rows read of the slots: keys and values [B,X,G,D], and which of them each row sees
        [B,N,X]. Of chosen slots (`Rows.committed_BS`) the others are not read.
        """
        if rows.committed_BS is None:
            return keys_BSGD, values_BSGD, self.visible(rows, keys_BSGD.shape[1])
        # 1. The chosen slots, then the rows since the last count.
        batch, (count, recent) = len(self.lengths_B), rows.visible_BNJ.shape[1:]
        order = torch.arange(recent, device=self.lengths_B.device)
        slots_BX = torch.cat(
            [rows.committed_BS.clamp(min=0).expand(batch, -1), self.lengths_B[:, None] + order], 1
        )
        index = slots_BX[..., None, None].expand(-1, -1, *keys_BSGD.shape[2:])
        # 2. Which of them are there, and seen.
        there_BS = (rows.committed_BS >= 0).expand(batch, -1)[:, None].expand(-1, count, -1)
        visible = torch.cat([there_BS, rows.visible_BNJ.expand(batch, -1, -1)], 2)
        return keys_BSGD.gather(1, index), values_BSGD.gather(1, index), visible

    def _readable(self, rows: Rows, counted_BS: Tensor) -> Tensor:
        """bool [B,S]: those of the counted slots that the rows may attend to."""
        if rows.committed_BS is None:
            return counted_BS
        # -1 is scattered to a slot after the last one, which is cut off.
        slots = counted_BS.shape[1]
        index = torch.where(rows.committed_BS < 0, slots, rows.committed_BS)
        chosen = F.pad(torch.zeros_like(counted_BS), (0, 1)).scatter(1, index, True)
        return counted_BS & chosen[:, :slots]

    def _capacity(self, needed: int, capacity: int) -> int:
        """Slots to allocate where more than the present ones are needed."""
        return max(needed, 2 * capacity, 64)

    def _grow(self, needed: int) -> None:
        capacity = self.keys_BGCD.shape[2]
        if needed > capacity:
            extra = (0, 0, 0, self._capacity(needed, capacity) - capacity)
            self.keys_BGCD = F.pad(self.keys_BGCD, extra)
            self.values_BGCD = F.pad(self.values_BGCD, extra)


class Attention(nn.Module):
    """Grouped-query attention with rotary positions, in the target's dimensions.

    Args:
        shape: the target's dimensions.
        input_width: inputs are [.., input_width * H] (EAGLE-3 feeds embedding and feature side by
            side).
    """

    def __init__(self, shape: TargetShape, input_width: int = 1) -> None:
        super().__init__()
        self.head_dim, self.heads, self.kv_heads = (
            shape.head_dim,
            shape.num_heads,
            shape.num_kv_heads,
        )
        inputs, queries, keys = input_width * shape.hidden_size, shape.num_heads, shape.num_kv_heads
        self.q_proj = nn.Linear(inputs, queries * shape.head_dim, bias=shape.attention_bias)
        self.k_proj = nn.Linear(inputs, keys * shape.head_dim, bias=shape.attention_bias)
        self.v_proj = nn.Linear(inputs, keys * shape.head_dim, bias=shape.attention_bias)
        self.o_proj = nn.Linear(queries * shape.head_dim, shape.hidden_size, bias=False)
        self.q_norm = nn.RMSNorm(shape.head_dim, shape.norm_eps) if shape.qk_norm else nn.Identity()
        self.k_norm = nn.RMSNorm(shape.head_dim, shape.norm_eps) if shape.qk_norm else nn.Identity()
        self.rotary = Rotary(shape)

    def forward(
        self,
        hidden_BNX: Tensor,
        rows: Rows,
        cache: LayerCache | None = None,
        asking_BNX: Tensor | None = None,
    ) -> Tensor:
        """[B,N,X] -> [B,N,H]; with a cache the rows also see its slots, and are written after them.

        `asking_BNX` are the inputs of the queries, `hidden_BNX` by default.
        """
        # 1. Project, and append to the cache.
        queries, keys, values = self.project(hidden_BNX, rows.position_ids_BN, asking_BNX)
        if cache is None:
            return self.among(queries, keys, values, rows)
        visible = rows.visible_BNJ
        keys, values = cache.write(keys, values, visible.shape[2] - visible.shape[1])
        # 2. Attend.
        return self.mix(queries, *cache.chosen(rows, keys, values))

    def among(
        self, queries_BNQD: Tensor, keys_BNGD: Tensor, values_BNGD: Tensor, rows: Rows
    ) -> Tensor:
        """Attention of rows to each other, projected [B,N,H]; of long texts in parts."""
        if not (isinstance(rows, DocumentRows) and in_parts(rows)):
            return self.mix(queries_BNQD, keys_BNGD, values_BNGD, rows.visible_BNJ)
        queries, keys = queries_BNQD.transpose(1, 2), keys_BNGD.transpose(1, 2)
        mixed_BQND = document_attention(queries, keys, values_BNGD.transpose(1, 2), rows)
        return self.o_proj(mixed_BQND.transpose(1, 2).flatten(2))

    def mix(
        self,
        queries_BNQD: Tensor,
        keys_BSGD: Tensor,
        values_BSGD: Tensor,
        visible_BNS: Tensor | None,
    ) -> Tensor:
        """Values mixed by attention, projected [B,N,H]."""
        return self.o_proj(self.attend(queries_BNQD, keys_BSGD, values_BSGD, visible_BNS))

    def attend(
        self,
        queries_BNQD: Tensor,
        keys_BSGD: Tensor,
        values_BSGD: Tensor,
        visible_BNS: Tensor | None,
    ) -> Tensor:
        """Values mixed by attention, the heads side by side [B,N,Q*D]. Queries and keys may be
        wider than values, whose size scales the scores. Without `visible_BNS` all slots are seen.
        """
        keys, values = keys_BSGD.transpose(1, 2), values_BSGD.transpose(1, 2)
        count, heads, wide = queries_BNQD.shape[1:]
        groups, size = keys.shape[1], values.shape[-1]
        scale = None if wide == size else size**-0.5
        if groups == heads or count > MOST_ROWS or torch.is_grad_enabled():
            mixed = F.scaled_dot_product_attention(
                queries_BNQD.transpose(1, 2),
                keys,
                values,
                attn_mask=None if visible_BNS is None else visible_BNS[:, None],
                scale=scale,
                enable_gqa=groups != heads,
            )
            return mixed.transpose(1, 2).flatten(2)
        # Few rows: the query heads of a group are further rows of their key/value head.
        each = heads // groups
        queries = queries_BNQD.unflatten(2, (groups, each)).transpose(1, 2).flatten(2, 3)
        if visible_BNS is not None:
            visible_BNS = visible_BNS[:, :, None].expand(-1, -1, each, -1).flatten(1, 2)[:, None]
        mixed = F.scaled_dot_product_attention(
            queries, keys, values, attn_mask=visible_BNS, scale=scale
        )
        return mixed.unflatten(2, (count, each)).transpose(1, 2).flatten(2)

    def project(
        self, hidden_BNX: Tensor, position_ids_BN: Tensor, asking_BNX: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Queries [B,N,Q,D] (of `asking_BNX`, if given), keys and values [B,N,G,D]; queries and
        keys rotated to their positions.
        """
        asking_BNX = hidden_BNX if asking_BNX is None else asking_BNX
        if asking_BNX is hidden_BNX:
            parts = joint_linear(hidden_BNX, (self.q_proj, self.k_proj, self.v_proj))
        else:
            parts = self.q_proj(asking_BNX), self.k_proj(hidden_BNX), self.v_proj(hidden_BNX)
        queries, keys, values = (part.unflatten(-1, (-1, self.head_dim)) for part in parts)
        queries, keys = self.rotary.turned(self.q_norm(queries), self.k_norm(keys), position_ids_BN)
        return queries, keys, values

    def keys_values(self, hidden_BNX: Tensor, position_ids_BN: Tensor) -> tuple[Tensor, Tensor]:
        """The same keys and values [B,N,G,D], of rows without a query."""
        parts = joint_linear(hidden_BNX, (self.k_proj, self.v_proj))
        keys, values = (part.unflatten(-1, (-1, self.head_dim)) for part in parts)
        keys = self.k_norm(keys)
        return self.rotary.turned(keys[:, :, :0], keys, position_ids_BN)[1], values


class FeedForward(nn.Module):
    """Gated feed-forward network [.., H] -> [.., output_width * H]."""

    compiles = True

    def __init__(self, shape: TargetShape, output_width: int = 1) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(shape.hidden_size, shape.intermediate_size, bias=False)
        self.up_proj = nn.Linear(shape.hidden_size, shape.intermediate_size, bias=False)
        self.down_proj = nn.Linear(
            shape.intermediate_size, output_width * shape.hidden_size, bias=False
        )
        self.activation = ACT2FN[shape.activation]

    def forward(self, hidden_NH: Tensor) -> Tensor:
        """[..., H] -> [..., Y]."""
        gate, up = joint_linear(hidden_NH, (self.gate_proj, self.up_proj))
        return self.down_proj(self.activation(gate) * up)


class DecoderLayer(nn.Module):
    """One pre-norm decoder layer of the Llama and Qwen type, named as Hugging Face names it.

    Args:
        shape: the target's dimensions.
        input_norm: whether attention reads normalised inputs (EAGLE's layer does not).
        input_width: width of the attention inputs in multiples of H; above 1 the residual is a
            separate argument.
        output_width: width of the output in multiples of H; the residual is repeated (FSPAD's split
            output).
        attention, feed_forward: leave out one of the two halves (Clover's ablations).
    """

    recompute = False
    """Whether its activations are recomputed in the backward pass."""

    def __init__(
        self,
        shape: TargetShape,
        *,
        input_norm: bool = True,
        input_width: int = 1,
        output_width: int = 1,
        attention: bool = True,
        feed_forward: bool = True,
    ) -> None:
        super().__init__()
        self.output_width, self.shape = output_width, shape
        self.input_layernorm = self.self_attn = self.post_attention_layernorm = self.mlp = None
        if attention:
            if input_norm:
                self.input_layernorm = nn.RMSNorm(input_width * shape.hidden_size, shape.norm_eps)
            self.self_attn = Attention(shape, input_width)
        if feed_forward:
            self.post_attention_layernorm = nn.RMSNorm(shape.hidden_size, shape.norm_eps)
            self.mlp = FeedForward(shape, output_width)

    def forward(
        self,
        hidden_BNX: Tensor,
        rows: Rows,
        cache: LayerCache | None = None,
        residual_BNH: Tensor | None = None,
        asking_BNX: Tensor | None = None,
    ) -> Tensor:
        """[B,N,X] -> [B,N,Y]. The outputs are added to `residual_BNH`, the queries are of
        `asking_BNX`: by default the inputs."""
        return recomputed(
            self.recompute and cache is None,
            self._forward,
            hidden_BNX,
            rows,
            cache,
            residual_BNH,
            asking_BNX,
        )

    def _forward(
        self,
        hidden_BNX: Tensor,
        rows: Rows,
        cache: LayerCache | None,
        residual_BNH: Tensor | None,
        asking_BNX: Tensor | None,
    ) -> Tensor:
        hidden = hidden_BNX if residual_BNH is None else residual_BNH
        if self.self_attn is not None:
            asking = None if asking_BNX is None else self.attention_inputs(asking_BNX)
            mixed = self.self_attn(self.attention_inputs(hidden_BNX), rows, cache, asking)
            hidden = self.with_attention(hidden, mixed)
        return self.after_attention(hidden)

    def attention_inputs(self, hidden_BNX: Tensor) -> Tensor:
        """What attention reads [..., X]: normalised where the layer has an input norm."""
        return hidden_BNX if self.input_layernorm is None else self.input_layernorm(hidden_BNX)

    def with_attention(self, hidden_BNH: Tensor, mixed_BNH: Tensor) -> Tensor:
        """The residual [..., H] with the outputs of attention added."""
        return hidden_BNH + mixed_BNH

    def after_attention(self, hidden: Tensor) -> Tensor:
        """The feed-forward half, [..., H] -> [..., Y]."""
        if self.mlp is not None and self.post_attention_layernorm is not None:
            residual = hidden
            if self.output_width > 1:
                residual = hidden.repeat(*[1] * (hidden.dim() - 1), self.output_width)
            hidden = residual + self.mlp(self.post_attention_layernorm(hidden))
        return hidden

    def copy_from(self, target: Target, layer: int = -1) -> bool:
        """Start from a layer of the target (the last by default); False, no change and a warning,
        when they differ.

        They differ when the target's layer lacks one of this layer's weights, has it in another
        shape, or has weights without a counterpart here (Gemma 2 and 3 also normalise the outputs
        of attention and feed-forward network). A half that this layer does not have is not copied.
        A layer without an input norm is assumed to read final states of the target: its queries,
        keys and values of such a state equal those of the target's layer after its own norm, for a
        hidden state of the same direction (`_fold_input_norm`).
        """
        index, parameters = layer % self.shape.num_layers, dict(self.named_parameters())
        # 1. Names and shapes must agree.
        theirs = set(target.layer_weights(index))
        odd = sorted(
            (set(parameters) - theirs)
            | {name for name in theirs - set(parameters) if self._should_have(name)}
        )
        weights = {
            name: target.copy_weight(f"layers.{index}.{name}")
            for name in parameters
            if name in theirs
        }
        odd += [name for name, weight in weights.items() if weight.shape != parameters[name].shape]
        if odd:
            logger.warning(
                "a drafter's layer starts at random, not from layer %d of %s: they differ in %s",
                index,
                target.name,
                ", ".join(odd),
            )
            return False
        # 2. Copy.
        for name, weight in weights.items():
            parameters[name].data.copy_(weight)
        if self.self_attn is not None and self.input_layernorm is None:
            self._fold_input_norm(target, index)
        return True

    def _fold_input_norm(self, target: Target, layer: int) -> None:
        """Multiply the columns of q, k and v by g_in / g_out, the gains of the target's norm before
        that layer and of its final norm: projections of h / rms(h) * g_in come out of h / rms(h) *
        g_out too."""
        assert self.self_attn is not None
        # 1. Gains of both norms.
        gain_in_H = target_weight(target, f"layers.{layer}.input_layernorm.weight")
        gain_out_H = target_weight(target, "norm")
        if gain_in_H is None or gain_out_H is None:
            return
        # A channel that the final norm nearly removes carries no information: do not amplify it.
        least = _LEAST_GAIN * gain_out_H.abs().mean()
        ratio_H = gain_in_H / torch.where(gain_out_H.abs() < least, torch.inf, gain_out_H)
        # 2. Scale the columns.
        for projection in (self.self_attn.q_proj, self.self_attn.k_proj, self.self_attn.v_proj):
            projection.weight.data.mul_(ratio_H.to(projection.weight))

    def _should_have(self, name: str) -> bool:
        """Whether a weight of the target's layer belongs to a part that this layer has, or to an
        unknown part.
        """
        part = name.partition(".")[0]
        return not hasattr(self, part) or getattr(self, part) is not None


def target_weight(target: Target, name: str) -> Tensor | None:
    """A copy of one of the target's weights, or None when it has no such weight."""
    try:
        return target.copy_weight(name)
    except KeyError:
        return None


def run_layers(
    layers: Sequence[DecoderLayer] | nn.ModuleList,
    hidden_BNH: Tensor,
    rows: Rows,
    caches: Sequence[LayerCache] | None = None,
) -> Tensor:
    """Run layers one after the other [B,N,H] -> [B,N,H], each with its own cache if there are
    any."""
    for index, layer in enumerate(layers):
        hidden_BNH = layer(hidden_BNH, rows, None if caches is None else caches[index])
    return hidden_BNH
