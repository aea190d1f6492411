"""Hydra++: Medusa-like heads that see the drafted tokens' embeddings (Ankner et al. 2024, arXiv 2402.05109).

Shape legend: B sequences, N rows of one call, H hidden size, K heads, X = (K+1)·H, the longest concatenation.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from modules.core.batches import Rows, StateName
from modules.core.layers import DecoderLayer, LayerCache, ResBlock
from modules.core.trainable import TargetShape
from modules.heads.head_drafter import HeadDrafter, refuse_unknown, soft_labels

if TYPE_CHECKING:
    from modules.core.target import Target


class FirstBlock(nn.Module):
    """W_res c + SiLU(W c) with W = 0 at the start: [..., inputs] -> [..., H]."""

    def __init__(self, inputs: int, hidden_size: int) -> None:
        super().__init__()
        self.residual, self.linear = nn.Linear(inputs, hidden_size), nn.Linear(inputs, hidden_size)
        nn.init.zeros_(self.linear.weight)
        nn.init.zeros_(self.linear.bias)

    def forward(self, inputs_NX: Tensor) -> Tensor:
        """[..., inputs] -> [..., H]."""
        return self.residual(inputs_NX) + F.silu(self.linear(inputs_NX))


class Hydra(HeadDrafter):
    """Head i reads c_i = [f'_t ; e_{t+1} ; … ; e_{t+1+i}] and drafts x_{t+2+i}, taught by the target's law.

    f' is the target's state after one more decoder layer (the prefix layer, a copy of the target's last at the start),
    normalised as the target normalises its own; e are the target's input embeddings, frozen.

    Args:
        shape: the target's dimensions.
        heads: K.
        blocks: layers per head, the first one (concatenation to H) included.
        prefix: whether there is a prefix layer (Hydra++) or heads read f_t itself (Hydra).
        lm_head: `"own"` (a trainable copy with a bias per head) or `"shared"` (the target's, frozen).
        dropout: on each head's last hidden state.
        draft_vocabulary: how many token ids can be drafted; None for all.
        tree: paths, or a name of `modules.trees.paths` (the paper's: `mc_sim_7b_63`).
        decay: head i weighs decay^i (the release weighs all alike: 1).
        labels: `"soft"`, the target's law, or `"hard"`, the tokens of the data (Hydra without the teacher).
    """

    reads: ClassVar[StateName] = "pre_norm"
    first_exponent: ClassVar[int] = 0

    def __init__(self, shape: TargetShape, heads: int = 4, blocks: int = 4, prefix: bool = True,
                 lm_head: Literal["own", "shared"] = "own", dropout: float = 0.2, draft_vocabulary: int | None = None,
                 tree: list[list[int]] | str = "narrow", decay: float = 1.0,
                 labels: Literal["soft", "hard"] = "soft") -> None:
        super().__init__(shape, heads, draft_vocabulary, decay)
        refuse_unknown("lm_head", lm_head, ("own", "shared"))
        self.soft_labels = soft_labels(labels)
        size = shape.hidden_size
        self.layers = nn.ModuleList([DecoderLayer(shape)] if prefix else [])
        self.blocks = nn.ModuleList(
            nn.Sequential(FirstBlock((depth + 2) * size, size), *(ResBlock(size) for _ in range(blocks - 1)),
                          nn.Dropout(dropout)) for depth in range(heads))
        if lm_head == "own":
            self.use_own_lm_heads(bias=True)
        self.use_static_tree(tree)

    def begin(self, hidden_BNH: Tensor, next_BN: Tensor, target: Target, rows: Rows,
              caches: list[LayerCache] | None) -> Tensor:
        """f' [B,N,H], with room behind it for the embeddings of a whole path [B,N,X]."""
        hidden = target.final_norm(self.run_own_layers(hidden_BNH, rows, caches))
        return F.pad(hidden, (0, self.heads * self.shape.hidden_size))

    def step(self, depth: int, memory_NX: Tensor, tokens_N: Tensor, target: Target) -> Tensor:
        """Write the token's embedding behind those of its path."""
        used, size = (depth + 1) * self.shape.hidden_size, self.shape.hidden_size
        vectors = target.embed(tokens_N).to(memory_NX.dtype)
        return torch.cat([memory_NX[..., :used], vectors, memory_NX[..., used + size:]], dim=-1)

    def feature(self, depth: int, memory_NX: Tensor, tokens_N: Tensor, target: Target) -> Tensor:
        """The head's blocks on c_depth."""
        return self.blocks[depth](memory_NX[..., :(depth + 2) * self.shape.hidden_size])
