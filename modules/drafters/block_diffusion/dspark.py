"""DSpark: DFlash with a low-rank Markov head for the token before each slot, and a confidence head
that decides how many tokens are verified (2026, arXiv 2607.05147).

Shape legend: B sequences, M blocks of a batch, K tokens of a block, N nodes, W frontier nodes, R
rank, H hidden size, X = H + R, D draft vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from modules.contracts.batches import TextBatch
from modules.contracts.drafter import DraftState
from modules.contracts.losses import Losses, Mean
from modules.contracts.shapes import TargetShape
from modules.contracts.token_tree import TokenTree
from modules.contracts.trainable import TrainingResult
from modules.drafters.block_diffusion.confidence import (
    calibration_error,
    sequential_temperatures,
    worth_verifying,
)
from modules.drafters.block_diffusion.low_rank import LowRankDFlash, PathState
from modules.drafters.heads.base import refuse_unknown
from modules.losses.averages import SharedCount
from modules.losses.chunked import (
    IGNORED,
    Distributions,
    TrainingRows,
    cross_entropy,
)
from modules.losses.divergences import total_variation
from modules.trees.named_trees import Path

if TYPE_CHECKING:
    from modules.contracts.target import Target

FIRST_SCALE = 0.01
"""Standard deviation of the token vectors at first."""


class MarkovHead(nn.Module):
    """A bias of low rank by the token before a slot, named as in the release.

    Args:
        shape: the target's dimensions.
        rank: R.
        draft_size: D.
        kind: `vanilla`: the token's vector; `gated`: scaled by a gate that also reads the slot's
            output; `rnn`: a state that is carried along the path.
    """

    def __init__(self, shape: TargetShape, rank: int, draft_size: int, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.markov_w1 = nn.Embedding(shape.vocab_size, rank)
        nn.init.normal_(self.markov_w1.weight, std=FIRST_SCALE)
        self.markov_w2 = nn.Linear(rank, draft_size, bias=False)
        if kind == "gated":
            self.gate_proj = nn.Linear(shape.hidden_size + rank, rank)
        if kind == "rnn":
            self.joint_proj = nn.Linear(shape.hidden_size + 2 * rank, 3 * rank)

    def forward(
        self, vectors_NR: Tensor, hidden_NH: Tensor, before_NR: Tensor
    ) -> tuple[Tensor, Tensor]:
        """What `markov_w2` reads [...,R], and the state after the token [...,R].

        Args:
            vectors_NR: of the tokens (`markov_w1`).
            hidden_NH: the slot's outputs.
            before_NR: the state before the tokens.
        """
        if self.kind == "gated":
            gate = self.gate_proj(torch.cat([hidden_NH, vectors_NR], -1)).sigmoid()
            return gate * vectors_NR, before_NR
        if self.kind == "rnn":
            joint = self.joint_proj(torch.cat([before_NR, vectors_NR, hidden_NH], -1))
            keep, new, out = joint.chunk(3, -1)
            keep = keep.sigmoid()
            return out.tanh(), keep * before_NR + (1 - keep) * new.tanh()
        return vectors_NR, before_NR


class ConfidenceHead(nn.Module):
    """The logit of the probability that a drafted token is accepted, named as in the release."""

    def __init__(self, inputs: int) -> None:
        super().__init__()
        self.proj = nn.Linear(inputs, 1)

    def forward(self, hidden_NH: Tensor, vectors_NR: Tensor) -> Tensor:
        """Logits [...] from a slot's outputs and the vector of the token before it."""
        return self.proj(torch.cat([hidden_NH, vectors_NR], -1))[..., 0]


class DSpark(LowRankDFlash):
    """Slot d is drawn from softmax(U_d + W2 m), with U_d DFlash's logits and m the vector of the
    token before it, x_{a+d}; its confidence is σ(w [h_d ; W1 x_{a+d}] + b).

    Loss, in the means of DFlash's weights exp(-d/γ): text_weight · CE(x_{a+d+1}) + distance_weight
    · Σ|p − q| + confidence_weight · BCE(confidence, c*), with c* = 1 − ½ Σ|p − q| without gradient.
    Σ|p − q| is twice the total variation. The last term counts all labels. The first two leave out
    labels that cannot be drafted.

    A block is verified up to the slot where the expected throughput of the call falls, judged by
    the confidences of the tokens before it (`worth_verifying`). After training each slot's
    confidence gets a temperature on the held-out batches (sequential temperature scaling).

    Args:
        shape: the target's dimensions.
        block: K, tokens drafted per pass.
        layers: decoder layers.
        draft_vocabulary: how many token ids can be drafted; null for all.
        fused_layers: see `DFlash`.
        layout: see `DFlash`; published: `shift`.
        mask_token: see `DFlash`.
        anchors: see `DFlash`.
        gamma: γ, in slots.
        rank: R of the Markov head.
        markov: `vanilla`, `gated` or `rnn` (`MarkovHead`).
        text_weight: weight of the cross-entropy to the text's tokens.
        distance_weight: weight of Σ|p − q|.
        confidence_weight: weight of the confidences' cross-entropy.
        whole_law: p is the target's distribution over its whole vocabulary, whose mass outside of
            the draft vocabulary is rejected; this takes the whole LM head. False: p is renormalised
            over the draft vocabulary, and c* is 0 where the text's token cannot be drafted, which
            has nearly the same mean.
        row_cost: what a further verified row costs, in calls of one row (`python -m eval.latency`);
            0 verifies all drafted tokens.
        temperatures: of the slots' confidences; null is 1 until `finish` has found them.
        tree: see `DFlash`; paths get the likeliest tokens after the tokens on them.
    """

    def __init__(
        self,
        shape: TargetShape,
        block: int = 8,
        layers: int = 2,
        draft_vocabulary: int | None = None,
        fused_layers: list[int] | None = None,
        layout: Literal["fill_in", "shift"] = "shift",
        mask_token: int | None = None,
        anchors: int = 32,
        gamma: float = 4.0,
        rank: int = 64,
        markov: Literal["vanilla", "gated", "rnn"] = "vanilla",
        text_weight: float = 0.1,
        distance_weight: float = 0.9,
        confidence_weight: float = 1.0,
        whole_law: bool = True,
        row_cost: float = 0.0,
        temperatures: list[float] | None = None,
        tree: list[Path] | str | None = None,
    ) -> None:
        refuse_unknown("markov", markov, ("vanilla", "gated", "rnn"))
        if rank < 1:
            raise ValueError(f"rank must be at least 1, got {rank}")
        if row_cost < 0:
            raise ValueError(f"row_cost must not be negative, got {row_cost}")
        if temperatures is not None and (len(temperatures) != block or min(temperatures) <= 0):
            raise ValueError(
                f"temperatures must be {block} numbers above 0, one per slot, got {temperatures}"
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
            "soft",
            "decay",
            gamma,
            tree=tree,
        )
        self.rank, self.row_cost, self.whole_law = rank, row_cost, whole_law
        self.text_weight, self.distance_weight = text_weight, distance_weight
        self.confidence_weight = confidence_weight
        self.temperatures = temperatures if temperatures is not None else [1.0] * block
        self.markov_head = MarkovHead(shape, rank, self.draft_size, markov)
        self.confidence_head = ConfidenceHead(shape.hidden_size + rank)

    @property
    def bias_weight(self) -> Tensor:
        """W2 [D,R] of the Markov head."""
        return self.markov_head.markov_w2.weight

    @property
    def path_size(self) -> int:
        """The size of the state of `rnn`."""
        return self.rank

    def step(
        self, depth: int, tokens_N: Tensor, hidden_NH: Tensor, before_NS: Tensor, target: Target
    ) -> tuple[Tensor, Tensor]:
        """What W2 reads, and the state after the tokens."""
        return self.markov_head(self.markov_head.markov_w1(tokens_N), hidden_NH, before_NS)

    # -- training ----------------------------------------------------------------------------------

    def divergence(self, logits_MD: Tensor, probs_MD: Tensor) -> Tensor:
        """`distance_weight` · Σ|p − q| per row [M]."""
        return 2 * self.distance_weight * total_variation(logits_MD, probs_MD)

    def distributions(
        self, batch: TextBatch, target: Target, rows: TrainingRows
    ) -> Distributions | None:
        """The target's distributions, with `whole_law` not renormalised."""
        if self.vocabulary_D is None or not self.whole_law:
            return super().distributions(batch, target, rows)
        return self.covered(batch, target, rows.flat_MK1[:, 1:])

    def loss(self, batch: TextBatch, target: Target, progress: float) -> Losses:
        """The weighted sum of the drafts' and the confidences' losses."""
        rows = self.blocks(batch, target)
        outputs_MKH = self.block_outputs(batch, target, rows)
        wide = list(self.conditional(rows, outputs_MKH, target))
        distributions = self.distributions(batch, target, rows)
        drafts = self.slot_losses(self.scored(batch, target, rows, distributions, wide))
        # Confidences learn how often their slots are accepted.
        logits_MK = self.confidence_logits(rows, outputs_MKH)
        rates_MK = self.acceptance_rates(batch, target, rows, distributions, wide)
        entropies_MK = F.binary_cross_entropy_with_logits(
            logits_MK.to(rates_MK.dtype), rates_MK, reduction="none"
        )
        slots = torch.arange(self.block, device=logits_MK.device)
        weights_MK = self.decay**slots * rows.valid_MK
        weight = SharedCount(weights_MK.sum())
        confidence = (weights_MK * entropies_MK).sum() / weight.divisor()
        counted_M = rows.valid_MK[:, 0]
        metrics = {
            "confidence": Mean((entropies_MK * rows.valid_MK).sum().detach(), rows.valid_MK.sum()),
            "acceptance_0": Mean((rates_MK[:, 0] * counted_M).sum(), counted_M.sum()),
        }
        total = drafts.mean() + self.confidence_weight * confidence
        return Losses(total, drafts.metrics | metrics)

    def confidence_logits(self, rows: TrainingRows, outputs_MKH: Tensor) -> Tensor:
        """Logits [M,K] of the confidences, given the data's tokens."""
        vectors_MKR = self.markov_head.markov_w1(rows.tokens_MK1[:, :-1])
        return self.confidence_head(outputs_MKH, vectors_MKR)

    @torch.no_grad()
    def acceptance_rates(
        self,
        batch: TextBatch,
        target: Target,
        rows: TrainingRows,
        distributions: Distributions | None,
        wide: Iterable[tuple[Tensor, Tensor]],
    ) -> Tensor:
        """c* = 1 − ½ Σ|p − q| [M,K]: how often each slot's draw is accepted."""
        labels_MK, rates = self.labels(batch, target, rows), []
        for slot, (wide_MX, _) in enumerate(wide):
            # Where p is renormalised, rows whose token cannot be drafted stand for the rest of it.
            counted_M = rows.valid_MK[:, slot] if self.whole_law else labels_MK[:, slot] != IGNORED
            rejected_M, _ = cross_entropy(
                wide_MX,
                self.head(slot, target),
                torch.where(counted_M, 0, IGNORED),
                self.draft_size,
                distributions,
                rows.flat_MK1[:, slot + 1].contiguous(),
                total_variation,
            )
            rates.append((1 - rejected_M) * counted_M)
        return torch.stack(rates, 1)

    @torch.no_grad()
    def finish(self, batches: Iterable[TextBatch], target: Target) -> TrainingResult:
        """Calibrate the confidences, slot by slot, beside what DFlash measures."""
        batches = list(batches)
        result = super().finish(batches, target)
        parts = [self._confidences(batch, target) for batch in batches]
        logits_MK, rates_MK, valid_MK = (torch.cat(each) for each in zip(*parts, strict=True))
        self.temperatures = sequential_temperatures(logits_MK, rates_MK, valid_MK)
        self.arguments["temperatures"] = self.temperatures
        # Mean over the slots of the calibration error, before and after.
        figures = {}
        for name, heats in (("before", [1.0] * self.block), ("after", self.temperatures)):
            reached_MK = (logits_MK / logits_MK.new_tensor(heats)).sigmoid().cumprod(1)
            errors = [
                calibration_error(reached_MK[counted, d], rates_MK.cumprod(1)[counted, d])
                for d, counted in enumerate(valid_MK.unbind(1))
            ]
            figures[f"confidence/error_{name}"] = sum(errors) / self.block
        return replace(result, figures=result.figures | figures)

    def _confidences(self, batch: TextBatch, target: Target) -> tuple[Tensor, Tensor, Tensor]:
        """Logits, acceptance rates and validity [M,K] in the blocks of a batch, on the host."""
        rows = self.blocks(batch, target)
        outputs_MKH = self.block_outputs(batch, target, rows)
        wide, distributions = (
            self.conditional(rows, outputs_MKH, target),
            self.distributions(batch, target, rows),
        )
        logits_MK = self.confidence_logits(rows, outputs_MKH)
        rates_MK = self.acceptance_rates(batch, target, rows, distributions, wide)
        return logits_MK.double().cpu(), rates_MK.double().cpu(), rows.valid_MK.cpu()

    # -- decoding ----------------------------------------------------------------------------------

    def prepare(self, state: DraftState, tree: TokenTree) -> TokenTree:
        """The tree up to where verifying pays, with `row_cost`."""
        assert isinstance(state, PathState)
        if not self.row_cost or state.outputs_BKH is None or tree.size == 1:
            return tree
        # Confidences of what is drafted under each node, from its token and depth.
        depth_BN = tree.topology.depth.expand_as(tree.tokens_BN).clamp(max=self.block - 1)
        hidden_BNH = state.outputs_BKH.gather(
            1, depth_BN[..., None].expand(-1, -1, self.shape.hidden_size)
        )
        vectors_BNR = self.markov_head.markov_w1(tree.tokens_BN)
        logits_BN = self.confidence_head(hidden_BNH, vectors_BNR).double()
        heats_BN = logits_BN.new_tensor(self.temperatures)[depth_BN]
        return tree.only(worth_verifying((logits_BN / heats_BN).sigmoid(), tree, self.row_cost))
