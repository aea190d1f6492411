"""LiLiCorr: DFlash with scores of pairs of candidates, by a small transformer over all of them
(2026, arXiv 2608.20530).

Shape legend: M blocks, K tokens of a block, C candidates of a slot, P candidates of the slot
before, W tokens before a slot, N = 1 + K·C nodes, E size of a node, R size of a score's vectors, H
hidden size.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from modules.contracts.rows import Rows
from modules.contracts.shapes import TargetShape
from modules.drafters.block_diffusion.candidates import CandidateDFlash, Lattice
from modules.drafters.block_diffusion.dflash import layer_shape
from modules.layers.decoder_layer import DecoderLayer, run_layers
from modules.losses.chunked import TrainingRows
from modules.trees.named_trees import Path

if TYPE_CHECKING:
    from modules.contracts.target import Target


class LatticeTransformer(nn.Module):
    """Out- and in-vectors of the anchor and of all candidates, which see each other.

    A node reads the output of its slot (zeros for the anchor), its token's embedding at a root mean
    square of 1, and its log-probability. Candidates of slot d have position d + 1. In-vectors are
    0 at first, and with them all scores.

    Args:
        shape: the target's dimensions.
        size: E. layers: of the type of DFlash's. heads: of attention. rank: R.
    """

    def __init__(self, shape: TargetShape, size: int, layers: int, heads: int, rank: int) -> None:
        super().__init__()
        self.input = nn.Linear(2 * shape.hidden_size + 1, size)
        narrow = replace(
            layer_shape(shape),
            hidden_size=size,
            num_heads=heads,
            num_kv_heads=heads,
            head_dim=size // heads,
            intermediate_size=3 * size,
        )
        self.layers = nn.ModuleList(DecoderLayer(narrow) for _ in range(layers))
        self.norm = nn.RMSNorm(size, shape.norm_eps)
        self.out_vectors = nn.Linear(size, rank, bias=False)
        self.in_vectors = nn.Linear(size, rank, bias=False)
        nn.init.zeros_(self.in_vectors.weight)

    def forward(self, lattice: Lattice, anchor_MH: Tensor, vectors_MKCH: Tensor) -> Tensor:
        """Scores [M,K,P,C] of each candidate after each one of the slot before; of slot 0 after the
        anchor, repeated.

        Args:
            lattice: of the candidates.
            anchor_MH: the anchor's embedding.
            vectors_MKCH: those of the candidates.
        """
        blocks, slots, count = lattice.ids_MKC.shape
        outputs = lattice.outputs_MKH
        # 1. Nodes: the anchor, then the candidates slot by slot.
        tokens_MNH = torch.cat([anchor_MH[:, None], vectors_MKCH.flatten(1, 2)], 1)
        hidden_MNH = F.pad(outputs.repeat_interleave(count, 1), (0, 0, 1, 0))
        logs_MN1 = F.pad(lattice.logs_MKC.flatten(1), (1, 0))[..., None].to(outputs.dtype)
        tokens_MNH = F.rms_norm(tokens_MNH, tokens_MNH.shape[-1:], eps=1e-12)
        nodes_MNE = self.input(torch.cat([hidden_MNH, tokens_MNH, logs_MN1], -1))
        # 2. All of them see each other.
        positions_N = (torch.arange(1 + slots * count, device=outputs.device) + count - 1) // count
        every_NN = torch.ones(2 * positions_N.shape, dtype=torch.bool, device=outputs.device)
        rows = Rows(positions_N.expand(blocks, -1), every_NN.expand(blocks, -1, -1))
        nodes_MNE = self.norm(run_layers(self.layers, nodes_MNE, rows))
        # 3. Scores of neighbouring slots.
        out_MNR = self.out_vectors(nodes_MNE)
        anchor_M1CR = out_MNR[:, None, :1].expand(-1, 1, count, -1)
        candidates_MKCR = out_MNR[:, 1:].unflatten(1, (slots, count))
        before_MKPR = torch.cat([anchor_M1CR, candidates_MKCR[:, :-1]], 1)
        after_MKCR = self.in_vectors(nodes_MNE[:, 1:]).unflatten(1, (slots, count))
        return before_MKPR @ after_MKCR.transpose(2, 3)


class LiLiCorr(CandidateDFlash):
    """Slot d is drawn from the C likeliest tokens b of DFlash's U_d, by softmax(U_d(b) + ⟨out(a),
    in(b)⟩) with a the token before it; the vectors come from a transformer over all candidates of
    the block (`LatticeTransformer`). A token that was no candidate adds no score.

    Loss: DFlash's of U, + pair_weight · the same of the conditional logits, over slots after a
    candidate. With hard labels the slot's token must be one as well: injecting it would show the
    transformer which candidate is the label. With soft labels the distribution over the candidates
    is learnt, and variation_weight adds total variation.

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
        weights: see `DFlash`; a label that is no candidate has probability 0.
        gamma: γ, in slots.
        smoothing: β of D-PACE.
        candidates: C; at most the draft vocabulary.
        lattice_size: E, size of the transformer's nodes.
        lattice_layers: layers of the transformer.
        lattice_heads: its attention heads.
        rank: R, size of out- and in-vectors.
        pair_weight: weight of the conditional logits' loss.
        variation_weight: weight of total variation in it, for soft labels.
        tree: see `DFlash`; paths get the likeliest tokens after the tokens on them.
    """

    injects = False

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
        weights: Literal["decay", "expected_length"] = "decay",
        gamma: float = 4.0,
        smoothing: float = 0.5,
        candidates: int = 16,
        lattice_size: int = 128,
        lattice_layers: int = 2,
        lattice_heads: int = 4,
        rank: int = 64,
        pair_weight: float = 1.0,
        variation_weight: float = 0.0,
        tree: list[Path] | str | None = None,
    ) -> None:
        if lattice_heads < 1 or lattice_size % (2 * lattice_heads):
            raise ValueError(
                f"lattice_size must be an even multiple of lattice_heads, got {lattice_size} and "
                f"{lattice_heads}"
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
            weights,
            gamma,
            smoothing,
            tree,
        )
        self.use_candidates(candidates, pair_weight, variation_weight)
        self.transformer = LatticeTransformer(
            shape, lattice_size, lattice_layers, lattice_heads, rank
        )

    def scored_lattice(self, lattice: Lattice, anchors_M: Tensor, target: Target) -> Lattice:
        """The lattice with the scores of all pairs."""
        anchor_MH, vectors_MKCH = (
            target.embed(ids).to(self.precision) for ids in (anchors_M, lattice.tokens_MKC)
        )
        return replace(lattice, pairs_MKPC=self.transformer(lattice, anchor_MH, vectors_MKCH))

    def pair_scores(self, lattice: Lattice, slot: int, tokens_MW: Tensor) -> Tensor:
        """Scores [M,W,C] after candidates of the slot before, 0 after other tokens."""
        assert lattice.pairs_MKPC is not None
        pairs_MPC = lattice.pairs_MKPC[:, slot]
        if slot == 0:
            return pairs_MPC[:, :1].expand(-1, tokens_MW.shape[1], -1)
        same_MWP = tokens_MW[..., None] == lattice.tokens_MKC[:, slot - 1, None]
        return same_MWP.to(pairs_MPC.dtype) @ pairs_MPC

    def learnt(self, lattice: Lattice, labels_MK: Tensor, rows: TrainingRows) -> Tensor:
        """Of these the slots whose token before them is a candidate, or the anchor [M,K]."""
        own_MK = super().learnt(lattice, labels_MK, rows)
        tokens_MK = rows.tokens_MK1[:, 1:-1]
        before_MK = (lattice.tokens_MKC[:, :-1] == tokens_MK[..., None]).any(-1)
        return own_MK & F.pad(before_MK, (1, 0), value=True)
