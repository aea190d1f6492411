"""The likeliest tokens of every slot, and scores of pairs of them: what LiLiCorr and DFlash2 share.

Shape legend: B sequences, M blocks, K tokens of a block, C candidates of a slot, P candidates of
the slot before, W frontier nodes, H hidden size, X = H + 2C, D draft vocabulary.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from modules.contracts.batches import TextBatch
from modules.contracts.drafter import Context, Frontier
from modules.contracts.losses import Losses
from modules.drafters.block_diffusion.dflash import DFlash, DFlashState
from modules.drafters.blocks.base import BlockState
from modules.losses.chunked import IGNORED, Head, TrainingRows, most_logits
from modules.losses.divergences import total_variation
from modules.trees.candidates import log_probs

if TYPE_CHECKING:
    from modules.contracts.target import Target


@dataclass(frozen=True)
class Lattice:
    """Candidates of all slots of some blocks, the likeliest first.

    outputs_MKH: outputs of the slots. ids_MKC: int64, draft vocabulary indices. tokens_MKC: their
    target ids. logs_MKC: log-probabilities by DFlash, without gradient.
    pairs_MKPC: scores of the candidates after each candidate of the slot before (of slot 0: after
    the anchor, repeated), where these are computed in advance.
    """

    outputs_MKH: Tensor
    ids_MKC: Tensor
    tokens_MKC: Tensor
    logs_MKC: Tensor
    pairs_MKPC: Tensor | None = None

    def select(self, blocks_S: Tensor) -> Lattice:
        """The lattice of these blocks alone (int64 [S])."""
        pairs = None if self.pairs_MKPC is None else self.pairs_MKPC[blocks_S]
        return Lattice(
            self.outputs_MKH[blocks_S],
            self.ids_MKC[blocks_S],
            self.tokens_MKC[blocks_S],
            self.logs_MKC[blocks_S],
            pairs,
        )


@dataclass
class LatticeState(DFlashState):
    """State of a drafter with candidates.

    lattice: of the current proposal; None between two proposals.
    """

    lattice: Lattice | None = None


class CandidateDFlash(DFlash):
    """Base of DFlash's extensions by pair scores: slot d is drawn from softmax(U_d(b) +
    score(a, b)) over the C likeliest tokens b of U_d, given the token a before it.

    Subclasses define `pair_scores`, and `scored_lattice` where scores are computed in advance.

    Loss: DFlash's of U, + pair_weight · the same of the conditional logits, given the text's
    tokens, + with soft labels variation_weight · total variation of these (which also learns slots
    whose text token is no candidate).
    """

    candidates: int
    pair_weight: float
    variation_weight: float
    injects: bool
    """Whether a hard label that is no candidate takes the place of the weakest in training."""

    def use_candidates(self, count: int, pair_weight: float, variation_weight: float) -> None:
        """Settings of all such drafters; the draft vocabulary may be smaller than `count`.

        Raises:
            ValueError: no candidate, or a total variation of hard labels.
        """
        if count < 1:
            raise ValueError(f"candidates must be at least 1, got {count}")
        if variation_weight and not self.soft_labels:
            raise ValueError(
                f"variation_weight is {variation_weight}, which needs the target's distributions: "
                "set labels to 'soft'"
            )
        self.candidates = min(count, self.draft_size)
        self.pair_weight, self.variation_weight = pair_weight, variation_weight

    @abstractmethod
    def pair_scores(self, lattice: Lattice, slot: int, tokens_MW: Tensor) -> Tensor:
        """Scores [M,W,C] of a slot's candidates after the tokens before it (target ids)."""

    def scored_lattice(self, lattice: Lattice, anchors_M: Tensor, target: Target) -> Lattice:
        """The lattice with the scores that are computed in advance."""
        return lattice

    def head(self, depth: int, target: Target) -> Head:
        """[..., X] of outputs, candidates and their pair scores -> logits [..., D], -inf for other
        tokens.
        """
        base, size, count = self.base_head(target), self.shape.hidden_size, self.candidates

        def logits(wide: Tensor) -> Tensor:
            scores_ND = base(wide[..., :size])
            ids_NC = wide[..., size : size + count].long()
            return among(scores_ND, ids_NC, wide[..., size + count :])

        return logits

    # -- training ----------------------------------------------------------------------------------

    @torch.no_grad()
    def likeliest(self, outputs_MKH: Tensor, target: Target) -> tuple[Tensor, Tensor]:
        """Draft indices and log-probabilities [M,K,C] of the likeliest tokens, in chunks."""
        chunks = outputs_MKH.split(
            max(1, most_logits(outputs_MKH.device) // (self.block * self.draft_size))
        )
        best = [
            log_probs(self.base_head(target)(chunk)).topk(self.candidates, -1) for chunk in chunks
        ]
        return torch.cat([top.indices for top in best]), torch.cat([top.values for top in best])

    def lattice(
        self,
        outputs_MKH: Tensor,
        anchors_M: Tensor,
        best: tuple[Tensor, Tensor],
        target: Target,
    ) -> Lattice:
        """The lattice of blocks, from the indices and log-probabilities of candidates."""
        ids_MKC, logs_MKC = best
        tokens = ids_MKC if self.vocabulary_D is None else self.vocabulary_D[ids_MKC]
        lattice = Lattice(outputs_MKH, ids_MKC, tokens, logs_MKC)
        return self.scored_lattice(lattice, anchors_M, target)

    def unrolled(
        self, batch: TextBatch, target: Target, rows: TrainingRows
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Outputs, candidates and pair scores [M,X] of each slot, given the data's tokens."""
        outputs_MKH = self.block_outputs(batch, target, rows)
        best = self.likeliest(outputs_MKH, target)
        lattice = self.lattice(outputs_MKH, rows.tokens_MK1[:, 0], best, target)
        return self.conditional(rows, lattice)

    def conditional(self, rows: TrainingRows, lattice: Lattice) -> Iterator[tuple[Tensor, Tensor]]:
        """The same from the lattice of the blocks. Candidates are whole numbers, exact in
        float32.
        """
        for slot in range(self.block):
            scores_MC = self.pair_scores(lattice, slot, rows.tokens_MK1[:, slot, None])[:, 0]
            ids_MC = lattice.ids_MKC[:, slot].to(torch.promote_types(scores_MC.dtype, torch.float))
            wide_MX = torch.cat([lattice.outputs_MKH[:, slot], ids_MC, scores_MC], -1)
            yield wide_MX, wide_MX

    def divergence(self, logits_MD: Tensor, probs_MD: Tensor) -> Tensor:
        """Cross-entropy to the distribution over the tokens that have a logit, and
        `variation_weight` · total variation to all of it.
        """
        has_MD = logits_MD.isfinite()
        inside_MD = probs_MD * has_MD
        inside_MD = inside_MD / inside_MD.sum(-1, keepdim=True).clamp(min=1e-30)
        logs_MD = logits_MD.log_softmax(-1).masked_fill(~has_MD, 0.0)
        losses_M = -(inside_MD * logs_MD).sum(-1)
        if not self.variation_weight:
            return losses_M
        return losses_M + self.variation_weight * total_variation(logits_MD, probs_MD)

    def loss(self, batch: TextBatch, target: Target, progress: float) -> Losses:
        """Both losses; metrics are of the conditional logits."""
        rows = self.blocks(batch, target)
        outputs_MKH = self.block_outputs(batch, target, rows)
        distributions = self.distributions(batch, target, rows)
        base = self.base_loss(batch, target, rows, distributions, outputs_MKH)
        # Hard labels that are no candidates are injected or left out.
        ids_MKC, logs_MKC = self.likeliest(outputs_MKH, target)
        labels_MK = self.labels(batch, target, rows)
        if self.injects and self.training and not self.soft_labels:
            ids_MKC = injected(ids_MKC, labels_MK)
        lattice = self.lattice(outputs_MKH, rows.tokens_MK1[:, 0], (ids_MKC, logs_MKC), target)
        labels_MK = labels_MK.masked_fill(~self.learnt(lattice, labels_MK, rows), IGNORED)
        steps = self.compared(
            rows,
            labels_MK,
            distributions,
            self.conditional(rows, lattice),
            lambda depth: self.head(depth, target),
            self.divergence,
        )
        pairs = self.slot_losses(steps)
        return Losses(base.mean() + self.pair_weight * pairs.mean(), pairs.metrics)

    def learnt(self, lattice: Lattice, labels_MK: Tensor, rows: TrainingRows) -> Tensor:
        """bool [M,K]: slots whose label is a candidate; with soft labels all that have one, since
        the distribution over the candidates is learnt.
        """
        if self.soft_labels:
            return labels_MK != IGNORED
        return (lattice.ids_MKC == labels_MK[..., None]).any(-1)

    # -- decoding ----------------------------------------------------------------------------------

    def blank_state(self, context: Context) -> LatticeState:
        """State with empty caches and no lattice."""
        return LatticeState(**vars(super().blank_state(context)))

    def block_logits(self, state: BlockState) -> Tensor:
        """DFlash's logits [B,K,D], of which the likeliest become candidates."""
        logits_BKD = super().block_logits(state)
        assert isinstance(state, LatticeState) and state.outputs_BKH is not None
        best = log_probs(logits_BKD).topk(self.candidates, -1)
        state.lattice = self.lattice(
            state.outputs_BKH, state.newest_B, (best.indices, best.values), state.context.target
        )
        return logits_BKD

    def conditioned(self, state: BlockState, frontier: Frontier, logits_BWD: Tensor) -> Tensor:
        """Logits [B,W,D] after the frontier's tokens, -inf for tokens that are no candidates."""
        assert isinstance(state, LatticeState) and state.lattice is not None
        scores_BWC = self.pair_scores(state.lattice, frontier.depth, frontier.tokens_BW)
        ids_B1C = state.lattice.ids_MKC[:, frontier.depth, None]
        return among(logits_BWD, ids_B1C.expand_as(scores_BWC), scores_BWC)


def among(logits_ND: Tensor, ids_NC: Tensor, scores_NC: Tensor) -> Tensor:
    """Logits [...,D] of the candidates with their scores added, -inf for all other tokens."""
    chosen_NC = logits_ND.gather(-1, ids_NC) + scores_NC.to(logits_ND.dtype)
    return torch.full_like(logits_ND, -torch.inf).scatter(-1, ids_NC, chosen_NC)


def injected(ids_MKC: Tensor, labels_MK: Tensor) -> Tensor:
    """Candidates with the label in the place of the last one, where it is none of them and can be
    drafted.
    """
    absent_MK = (labels_MK != IGNORED) & ~(ids_MKC == labels_MK[..., None]).any(-1)
    last_MK = torch.where(absent_MK, labels_MK, ids_MKC[..., -1])
    return torch.cat([ids_MKC[..., :-1], last_MK[..., None]], -1)
