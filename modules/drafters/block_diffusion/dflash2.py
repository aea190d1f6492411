"""DFlash2: DFlash with short convolutions inside of the block and a selector among candidates (Inco
AI and z-lab, 2026).

Shape legend: M blocks, R rows of a block, N other dimensions, C candidates of a slot, W tokens
before a slot, S sides of a sublayer (before, after), J taps, G groups of channels, Z rank, H hidden
size, D draft vocabulary.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from modules.contracts.shapes import TargetShape
from modules.drafters.block_diffusion.candidates import CandidateDFlash, Lattice
from modules.drafters.block_diffusion.dflash import layer_shape
from modules.layers.decoder_layer import DecoderLayer
from modules.trees.named_trees import Path

TAPS = 2
"""Rows that a convolution reads: its own and the one before."""


class BlockConvolution(nn.Module):
    """Causal convolutions over the rows of a block, before and after a sublayer: y[k] = Σ_j
    (base[j] + δ[k, j, group]) x[k - j], with δ a linear map of the sublayer's input and x = 0
    before the block. The identity at first. Named as in the release.

    Args:
        size: H.
        group: channels that share δ.
    """

    def __init__(self, size: int, group: int) -> None:
        super().__init__()
        self.groups = size // group
        self.base_kernel = nn.Parameter(torch.zeros(2, TAPS, size))
        nn.init.ones_(self.base_kernel[:, 0])
        self.kernel_projection = nn.Linear(size, 2 * TAPS * self.groups, bias=False)
        nn.init.zeros_(self.kernel_projection.weight)

    def kernels(self, input_NRH: Tensor) -> Tensor:
        """Kernels [...,R,S,J,H] of both sides from the sublayer's input."""
        delta = self.kernel_projection(input_NRH).unflatten(-1, (2, TAPS, self.groups))
        per_group = self.base_kernel.shape[-1] // self.groups
        return self.base_kernel + delta.repeat_interleave(per_group, -1)

    def forward(self, rows_NRH: Tensor, kernels_NRSJH: Tensor, side: int) -> Tensor:
        """The rows [...,R,H] convolved: side 0 before the sublayer, 1 after it."""
        before_NRH = F.pad(rows_NRH, (0, 0, 1, 0))[..., :-1, :]
        taps = kernels_NRSJH[..., side, :, :]
        return taps[..., 0, :] * rows_NRH + taps[..., 1, :] * before_NRH


class ConvolvedLayer(DecoderLayer):
    """A decoder layer with convolutions around attention and feed-forward network. Context rows
    pass through none.
    """

    def __init__(self, shape: TargetShape, group: int) -> None:
        super().__init__(shape)
        self.attention_conv = BlockConvolution(shape.hidden_size, group)
        self.mlp_conv = BlockConvolution(shape.hidden_size, group)

    def attention_inputs(self, hidden_BNX: Tensor) -> Tensor:
        """The normalised rows, convolved."""
        inputs = super().attention_inputs(hidden_BNX)
        return self.attention_conv(inputs, self.attention_conv.kernels(inputs), 0)

    def with_attention(self, hidden_BNH: Tensor, mixed_BNH: Tensor) -> Tensor:
        """Adds the convolved outputs of attention."""
        kernels = self.attention_conv.kernels(super().attention_inputs(hidden_BNH))
        return super().with_attention(hidden_BNH, self.attention_conv(mixed_BNH, kernels, 1))

    def after_attention(self, hidden: Tensor) -> Tensor:
        """The feed-forward half, between its convolutions."""
        assert self.mlp is not None and self.post_attention_layernorm is not None
        inputs = self.post_attention_layernorm(hidden)
        kernels = self.mlp_conv.kernels(inputs)
        outputs = self.mlp(self.mlp_conv(inputs, kernels, 0))
        return hidden + self.mlp_conv(outputs, kernels, 1)


class CandidateSelector(nn.Module):
    """Scores of a token after another one, given the slot's outputs; 0 at first. Named as in the
    release.

    Args:
        shape: the target's dimensions.
        draft_size: D.
        rank: Z.
    """

    def __init__(self, shape: TargetShape, draft_size: int, rank: int) -> None:
        super().__init__()
        self.predecessor_codebook = nn.Embedding(shape.vocab_size, rank)
        self.successor_codebook = nn.Embedding(draft_size, rank)
        self.hidden_projection = nn.Linear(shape.hidden_size, rank, bias=False)
        nn.init.zeros_(self.successor_codebook.weight)

    def forward(self, hidden_MH: Tensor, tokens_MW: Tensor, ids_MC: Tensor) -> Tensor:
        """⟨A[a] ⊙ (P h), B[b]⟩ [M,W,C] for tokens a (target ids) and candidates b (draft
        indices).
        """
        before_MWZ = (
            self.predecessor_codebook(tokens_MW) * self.hidden_projection(hidden_MH)[:, None]
        )
        return before_MWZ @ self.successor_codebook(ids_MC).transpose(1, 2)


class DFlash2(CandidateDFlash):
    """DFlash whose layers convolve the rows of a block, and whose slot d is drawn from its C
    likeliest tokens b by softmax(U_d(b) + ⟨A[a] ⊙ (P h_d), B[b]⟩), a the token before it.

    Loss: DFlash's of U, + pair_weight · the same of the conditional logits, in training with a
    hard label in the place of the weakest candidate where it is none. With soft labels
    variation_weight adds total variation; a replication found the ratio 1 : 1 : 9 (variation_weight
    9) better.

    Args:
        shape: the target's dimensions.
        block: K, tokens drafted per pass.
        layers: decoder layers.
        draft_vocabulary: how many token ids can be drafted; null for all.
        fused_layers: see `DFlash`.
        layout: see `DFlash`.
        mask_token: see `DFlash`.
        anchors: see `DFlash`.
        labels: see `DFlash`.
        gamma: γ, in slots.
        group: channels of a convolution that share what depends on the row.
        candidates: C; at most the draft vocabulary.
        rank: Z of the selector.
        pair_weight: weight of the conditional logits' loss.
        variation_weight: weight of total variation in it, for soft labels.
        tree: see `DFlash`; paths get the likeliest tokens after the tokens on them.
    """

    injects = True

    def __init__(
        self,
        shape: TargetShape,
        block: int = 8,
        layers: int = 2,
        draft_vocabulary: int | None = None,
        fused_layers: list[int] | None = None,
        layout: Literal["fill_in", "shift"] = "fill_in",
        mask_token: int | None = None,
        anchors: int = 32,
        labels: Literal["hard", "soft"] = "hard",
        gamma: float = 4.0,
        group: int = 16,
        candidates: int = 16,
        rank: int = 64,
        pair_weight: float = 1.0,
        variation_weight: float = 0.0,
        tree: list[Path] | str | None = None,
    ) -> None:
        if group < 1 or shape.hidden_size % group:
            raise ValueError(
                f"group must divide the hidden size of the target, {shape.hidden_size}, got {group}"
            )
        super().__init__(
            shape,
            block,
            layers,
            draft_vocabulary,
            fused_layers,
            layout,
            mask_token,
            anchors,
            labels,
            "decay",
            gamma,
            tree=tree,
        )
        self.use_candidates(candidates, pair_weight, variation_weight)
        self.layers = nn.ModuleList(
            ConvolvedLayer(layer_shape(shape), group) for _ in range(layers)
        )
        self.candidate_selector = CandidateSelector(shape, self.draft_size, rank)

    def pair_scores(self, lattice: Lattice, slot: int, tokens_MW: Tensor) -> Tensor:
        """The selector's scores [M,W,C]."""
        hidden_MH, ids_MC = lattice.outputs_MKH[:, slot], lattice.ids_MKC[:, slot]
        return self.candidate_selector(hidden_MH, tokens_MW, ids_MC)
