"""Clover: Medusa's heads, conditioned at each step on the token drafted before (Xiao et al. 2024,
arXiv 2405.00263).

Shape legend: B sequences, N rows of one call, H hidden size, Q heads of the attention decoder, E
head size (Q·E = H).
"""

from __future__ import annotations

from math import gcd, sqrt
from typing import TYPE_CHECKING, ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from modules.contracts.rows import Rows
from modules.contracts.shapes import StateName, TargetShape
from modules.drafters.heads.base import HeadDrafter, refuse_unknown
from modules.layers.decoder_layer import DecoderLayer, LayerCache, ResBlock
from modules.trees.threshold import ThresholdTree

if TYPE_CHECKING:
    from modules.contracts.target import Target

Gate = Literal["silu", "cosine"]


class AttentionDecoder(nn.Module):
    """h + concat_q(gate(q, k) · v): attention to a single key, so a gate per head instead of a
    softmax.

    q = W_Q RMSNorm(h), k = W_K e, v = W_V e. There are as many heads as in the target if that
    divides H, otherwise their greatest common divisor. With the cosine gate no head adds more than
    its value: |out - h| <= |v|.

    Args:
        shape: the target's dimensions.
        gate: `"silu"`, SiLU(q·k / √E) (Clover; the paper draws SiLU after the product and gives no
            formula, the scale is inferred), or `"cosine"`, cos(q, k) (Clover-2).
        bias: whether the three projections have biases.
    """

    compiles = True

    def __init__(self, shape: TargetShape, gate: Gate, bias: bool = False) -> None:
        super().__init__()
        size = shape.hidden_size
        self.gate, self.heads = gate, gcd(shape.num_heads, size)
        self.norm = nn.RMSNorm(size, shape.norm_eps)
        self.query, self.key, self.value = (nn.Linear(size, size, bias=bias) for _ in range(3))
        # Queries and keys start near the identity, values at 0, so the block adds nothing at first.
        for projection in (self.query, self.key):
            nn.init.eye_(projection.weight)
            projection.weight.data.add_(torch.randn_like(projection.weight), alpha=0.01)
        nn.init.zeros_(self.value.weight)
        if bias:
            for projection in (self.query, self.key, self.value):
                nn.init.zeros_(projection.bias)

    def forward(self, hidden_NH: Tensor, token_NH: Tensor) -> Tensor:
        """Hidden states and token vectors [..., H] -> hidden states [..., H]."""
        # One key per row: the softmax over it would be 1, so a gate takes its place.
        query, key, value = (
            projected.unflatten(-1, (self.heads, -1))
            for projected in (
                self.query(self.norm(hidden_NH)),
                self.key(token_NH),
                self.value(token_NH),
            )
        )
        if self.gate == "cosine":
            gate = F.cosine_similarity(query, key, dim=-1)
        else:
            gate = F.silu((query * key).sum(-1) / sqrt(query.shape[-1]))
        return hidden_NH + (gate[..., None] * value).flatten(-2)


class FeedForwardFusion(nn.Module):
    """h + SiLU(W [RMSNorm(h) ; e]) with W = 0 at initialisation: replaces the attention decoder
    in an ablation.
    """

    compiles = True

    def __init__(self, shape: TargetShape) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(shape.hidden_size, shape.norm_eps)
        self.linear = nn.Linear(2 * shape.hidden_size, shape.hidden_size)
        nn.init.zeros_(self.linear.weight)
        nn.init.zeros_(self.linear.bias)

    def forward(self, hidden_NH: Tensor, token_NH: Tensor) -> Tensor:
        """Hidden states and token vectors [..., H] -> hidden states [..., H]."""
        return hidden_NH + F.silu(self.linear(torch.cat([self.norm(hidden_NH), token_NH], dim=-1)))


class Clover(HeadDrafter):
    """Augmenting block once per target call, then per step: attention decoder, residual block,
    frozen LM head.

    h_0 = finalnorm(A(g)) with g the target's output before its final norm and A a decoder layer
    that starts as a copy of the target's last; h_i = decoder(h_{i-1}, e_{i-1}); distribution of
    x_{t+1+i} = W_LM (Medusa block_i)(h_i). Token vectors e are the LM head's rows, normalised. At
    initialisation every head predicts from h_0 and drafted tokens have no influence.

    Args:
        shape: the target's dimensions.
        heads: K.
        draft_vocabulary: how many token ids can be drafted; None for all.
        fusion: `"attention"`, or `"mlp"` (ablation).
        token_input: False withholds the drafted tokens, and with them the fusion (ablation: Medusa
            on h_0).
        augmenting: `"block"`, one of its halves `"attention"` or `"mlp"`, or `"none"` (ablations).
        gate: the attention decoder's gate.
        tree: paths or a name; None draws the paper's dynamic tree.
        top_p, ratio, width: thresholds and level width of the dynamic tree.
        decay: step i = 1 … K weighs decay^i.
        divergence: learn the target's distribution by it (`modules.losses.divergences`) instead of
            the tokens of the data; null: those.
    """

    reads: StateName = "pre_norm"
    stored_bytes: ClassVar[tuple[float, float, float]] = (58.0, 39.0, 11.0)

    def __init__(
        self,
        shape: TargetShape,
        heads: int = 3,
        draft_vocabulary: int | None = None,
        fusion: Literal["attention", "mlp"] = "attention",
        token_input: bool = True,
        augmenting: Literal["none", "block", "attention", "mlp"] = "block",
        gate: Gate = "silu",
        tree: list[list[int]] | str | None = None,
        top_p: float = 0.8,
        ratio: float = 0.25,
        width: int = 4,
        decay: float = 0.8,
        divergence: str | None = None,
    ) -> None:
        super().__init__(shape, heads, draft_vocabulary, decay)
        self.use_divergence(divergence, learns=True)
        refuse_unknown("fusion", fusion, ("attention", "mlp"))
        refuse_unknown("augmenting", augmenting, ("none", "block", "attention", "mlp"))
        refuse_unknown("gate", gate, ("silu", "cosine"))
        # 1. The augmenting block, or one of its halves.
        if augmenting != "none":
            self.layers.append(
                DecoderLayer(
                    shape,
                    attention=augmenting in ("block", "attention"),
                    feed_forward=augmenting in ("block", "mlp"),
                )
            )
        # 2. The module that fuses a drafted token into the hidden state.
        self.fusion = None
        if token_input:
            self.fusion = (
                AttentionDecoder(shape, gate) if fusion == "attention" else FeedForwardFusion(shape)
            )
        # 3. One residual block per head, and the tree.
        self.blocks = nn.ModuleList(ResBlock(shape.hidden_size) for _ in range(heads))
        if tree is None:
            self._builder = ThresholdTree(heads, width, top_p, ratio)
        else:
            self.use_static_tree(tree)

    def begin(
        self,
        hidden_BNH: Tensor,
        next_BN: Tensor,
        target: Target,
        rows: Rows,
        caches: list[LayerCache] | None,
    ) -> Tensor:
        """The augmenting block's output after the target's final norm."""
        return target.final_norm(self.run_own_layers(hidden_BNH, rows, caches))

    def step(self, depth: int, memory_NX: Tensor, tokens_N: Tensor, target: Target) -> Tensor:
        """Fuse the token into the hidden state."""
        if self.fusion is None:
            return memory_NX
        return self.fusion(
            memory_NX, F.normalize(target.lm_head_rows(tokens_N).to(memory_NX.dtype), dim=-1)
        )

    def feature(self, depth: int, memory_NX: Tensor, tokens_N: Tensor, target: Target) -> Tensor:
        """The step's residual block."""
        return self.blocks[depth](memory_NX)
