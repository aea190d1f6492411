"""Judge decoding: a linear head on the target's states that classifies drafted tokens as right or
wrong.

Bachmann et al. 2025, arXiv 2501.19309: the target's last hidden state at a wrong token reveals the
error. The head reads the row of the judged token itself; the row before has not read the token.

Shape legend: B sequences, T tokens of a packed row, N nodes, M labelled tokens, H hidden size.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable
from typing import TYPE_CHECKING, ClassVar, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from modules.acceptance.relaxed import RelaxedRule
from modules.acceptance.rules import Draws
from modules.contracts.batches import LabelledBatch
from modules.contracts.losses import Losses, Mean
from modules.contracts.shapes import StateName, TargetShape
from modules.contracts.token_tree import TokenTree
from modules.contracts.trainable import Trainable, TrainingResult
from modules.contracts.verification import Verified
from modules.losses.averages import SharedCount
from modules.losses.metrics import area_under_curve

if TYPE_CHECKING:
    from modules.contracts.target import Target

logger = logging.getLogger(__name__)

NOTHING = 2.0
"""A threshold that no score reaches."""


class Judge(Trainable):
    """s = σ(w · (h − mean) / deviation + b): the probability that the token whose state is h is
    right.

    The loss is binary cross-entropy with wrong tokens, which are rarer, weighted by n_right /
    n_wrong of the batch, at most `largest_weight`. Mean and deviation of the states are running
    statistics of training, and fold into one dot product.

    A token is accepted if its score is at least `threshold`. At the paper's 0.5 the weighted loss
    considers right and wrong equally likely, and no held-out tokens are needed. With few wrong
    tokens, or a capped weight, scores are not calibrated: None sets the threshold after training,
    on answers to half of the held-out questions.

    Args:
        shape: the target's dimensions.
        state: the target state it reads; in the paper the last one, before the final norm, is best.
        threshold: lowest score of an accepted token; null: the lowest that reaches `precision`.
        precision: share of right tokens among the accepted ones on held-out answers, with both
            classes weighted equally.
        largest_weight: cap on the weight of a wrong token.
        focus: γ of the focal loss (1 − p)^γ CE; 0 is plain cross-entropy.
    """

    batch_type: ClassVar[type] = LabelledBatch
    threshold: Tensor
    mean_H: Tensor
    deviation_H: Tensor
    seen: Tensor

    def __init__(
        self,
        shape: TargetShape,
        state: int | str = "pre_norm",
        precision: float = 0.9,
        largest_weight: float = 20.0,
        focus: float = 0.0,
        threshold: float | None = 0.5,
    ) -> None:
        super().__init__()
        if threshold is not None and threshold < 0:
            raise ValueError(f"threshold must be 0 or above, or null, got {threshold}")
        if not 0.5 <= precision <= 1:
            raise ValueError(f"precision must lie in [0.5, 1], got {precision}")
        if largest_weight < 1:
            raise ValueError(f"largest_weight must be at least 1, got {largest_weight}")
        if focus < 0:
            raise ValueError(f"focus must be 0 or above, got {focus}")
        self.state, self.precision = state, precision
        self.largest_weight, self.focus = largest_weight, focus
        self.calibrates = threshold is None
        # At zero weights every token has a score of 0.5; buffers hold running statistics.
        self.linear = nn.Linear(shape.hidden_size, 1)
        nn.init.zeros_(self.linear.weight)
        nn.init.zeros_(self.linear.bias)
        self.register_buffer("mean_H", torch.zeros(shape.hidden_size))
        self.register_buffer("deviation_H", torch.ones(shape.hidden_size))
        self.register_buffer("seen", torch.zeros(()))
        self.register_buffer("threshold", torch.tensor(0.5 if threshold is None else threshold))

    @property
    def training_states(self) -> tuple[StateName, ...]:
        """The single state that it reads."""
        return (self.state,)

    def logits(self, states_NH: Tensor) -> Tensor:
        """States [..., H] -> logits [...], by one dot product."""
        weight_H = self.linear.weight[0] / self.deviation_H
        bias = self.linear.bias[0] - weight_H @ self.mean_H
        return states_NH.to(weight_H.dtype) @ weight_H + bias

    def scores(self, states_NH: Tensor) -> Tensor:
        """Probability [...] that the token of each state is right."""
        return self.logits(states_NH).sigmoid()

    # -- training ----------------------------------------------------------------------------------

    def loss(self, batch: LabelledBatch, target: Target, progress: float) -> Losses:
        """Weighted cross-entropy over the labelled tokens; metrics are the area under the ROC curve
        within batches and the mean scores of both classes.
        """
        states_MH, labels_M = self._labelled(batch)
        # Moments and class counts of all processes, by one collective.
        moments = SharedCount(moment_sums(states_MH)) if self.training else None
        weights_M, weight = class_weights(labels_M, self.largest_weight)
        if moments is not None:
            self._observe(moments.mean())
        # Focal loss: (1 - p)^γ with p = exp(-loss), the probability of the label.
        logits_M = self.logits(states_MH)
        losses_M = F.binary_cross_entropy_with_logits(logits_M, labels_M, reduction="none")
        losses_M = losses_M * (1 - (-losses_M).exp()).pow(self.focus) if self.focus else losses_M
        return Losses(
            (weights_M * losses_M).sum() / weight,
            _metrics(
                losses_M.detach() * weights_M, weights_M, logits_M.detach().sigmoid(), labels_M
            ),
        )

    def _labelled(self, batch: LabelledBatch) -> tuple[Tensor, Tensor]:
        counted_BT = batch.text.loss_mask
        states_MH = batch.text.states[self.state][counted_BT].to(self.linear.weight.dtype)
        return states_MH, batch.labels[counted_BT].to(states_MH.dtype)

    @torch.no_grad()
    def _observe(self, moments_4H: Tensor) -> None:
        """Update mean and deviation by the states of all processes (Chan et al. 1979), of which
        `moment_sums` are given.
        """
        counts_H, sums_H, between_H, within_H = moments_4H
        count = counts_H[0].to(self.seen.dtype)
        if count < 2:
            return
        # 1. The batch's mean, and its squares about that mean: inside of processes, between them.
        mean_H = (sums_H / counts_H).to(self.mean_H.dtype)
        batch_H = within_H + (between_H - sums_H.square() / counts_H).clamp(min=0)
        # 2. Sums of squares of both parts, corrected by the distance of their means.
        total, shift_H = self.seen + count, mean_H - self.mean_H
        squares_H = self.deviation_H.square() * self.seen + batch_H.to(self.mean_H.dtype)
        variance_H = (squares_H + shift_H.square() * self.seen * count / total) / total
        self.mean_H += shift_H * count / total
        self.deviation_H.copy_(variance_H.sqrt().clamp(min=1e-6))
        self.seen.copy_(total)

    @torch.no_grad()
    def finish(self, batches: Iterable[LabelledBatch], target: Target) -> TrainingResult:
        """Acceptance rates at the threshold on held-out answers, and the area under the ROC curve
        over all tokens.

        `calibrated_threshold` is the lowest that reaches `precision`. If it becomes the threshold,
        it is set on the answers to half of the questions and evaluated on the others; if a half
        lacks right or wrong tokens, all answers serve for both. `auc_numbers` counts only tokens
        with a digit: where all errors are numbers, recognising numbers would be enough for a large
        area over all tokens.
        """
        # 1. Scores and labels of all held-out tokens.
        parts_of_batches = [
            (*self._labelled(batch), batch.text.input_ids[batch.text.loss_mask], _first_half(batch))
            for batch in batches
        ]
        states_MH, labels_M, ids_M, first_M = (
            torch.cat(parts) for parts in zip(*parts_of_batches, strict=True)
        )
        scores_M, right_M = self.scores(states_MH).double(), labels_M > 0.5
        numbers_M = torch.isin(ids_M, tokens_with_digits(ids_M, target))
        # 2. Calibrate on one half and evaluate on the other, if both halves have both classes.
        halves = self.calibrates and all(
            bool((half_M & kind_M).any())
            for half_M in (first_M, ~first_M)
            for kind_M in (right_M, ~right_M)
        )
        if self.calibrates and not halves:
            logger.warning(
                "too few held-out answers to judge the threshold on others than those it is set "
                "on: give more data, or a larger data.validation_fraction"
            )
        everything_M = torch.ones_like(right_M)
        calibration_M, evaluated_M = (first_M, ~first_M) if halves else (everything_M, everything_M)
        calibrated = calibrated_threshold(
            scores_M[calibration_M], right_M[calibration_M], self.precision
        )
        if self.calibrates:
            self.threshold.fill_(calibrated)
        # 3. Figures at the threshold in use.
        accepted_M = scores_M >= self.threshold.double()
        return TrainingResult(
            {
                "held_out/auc": area_under_curve(scores_M, right_M),
                "held_out/auc_numbers": area_under_curve(scores_M[numbers_M], right_M[numbers_M]),
                "held_out/threshold": float(self.threshold),
                "held_out/calibrated_threshold": calibrated,
                "held_out/accepted_right": _share(accepted_M[right_M & evaluated_M]),
                "held_out/accepted_wrong": _share(accepted_M[~right_M & evaluated_M]),
            }
        )

    # -- decoding ----------------------------------------------------------------------------------

    def acceptance_rule(
        self,
        target: Target,
        threshold: float | None = None,
        guard: bool = True,
        repetition: int = 0,
    ) -> JudgeRule:
        """The acceptance rule that uses this head's scores.

        Args:
            target: the target whose drafts are judged.
            threshold: instead of its own; 0 accepts every token, above 1 none.
            guard: leave end-of-sequence and other special tokens to the standard rule.
            repetition: also leave tokens to the standard rule that would repeat the last 1 …
                `repetition` tokens; 0: off.

        Raises:
            ValueError: a negative `repetition`.
        """
        special = (
            target.eos_ids | set(getattr(target.tokenizer, "all_special_ids", ()))
            if guard
            else set()
        )
        threshold = float(self.threshold) if threshold is None else threshold
        return JudgeRule(self, threshold, special, repetition)


class JudgeRule(RelaxedRule):
    """Accepts a token if its score is at least the threshold. (The paper requires more than the
    threshold; scores are rounded, and a threshold of 0 shall accept a score of 0.)

    Args:
        judge: the trained head.
        threshold: see `Judge.acceptance_rule`.
        special: token ids that the judge may not accept by itself.
        repetition: longest repetition that it may not accept by itself, see `repeats`; 0: off.
    """

    def __init__(
        self, judge: Judge, threshold: float, special: Iterable[int] = (), repetition: int = 0
    ) -> None:
        if repetition < 0:
            raise ValueError(f"rule judge: repetition must be 0 (off) or above, got {repetition}")
        self.name = f"judge {threshold:g}"
        self.judge, self.threshold, self.special = judge, threshold, sorted(special)
        self.repetition = repetition
        self.states: tuple[StateName, ...] = (judge.state,)

    def good(self, tree: TokenTree, verified: Verified, draws: Draws) -> Tensor:
        """bool [B,N]: nodes whose own row, which has read their token, scores high enough."""
        scores_BN = self.judge.scores(verified.states[self.judge.state])
        special = torch.tensor(self.special, dtype=torch.long, device=scores_BN.device)
        guarded_BN = torch.isin(tree.tokens_BN, special) | repeats(tree, self.repetition)
        return (scores_BN >= self.threshold) & ~guarded_BN


# -- pure functions --------------------------------------------------------------------------------


def repeats(tree: TokenTree, longest: int) -> Tensor:
    """bool [B,N]: nodes at which the last 1 … `longest` tokens of the path repeat the tokens
    before.

    The path begins with node 0. Earlier text is not compared, so a loop longer than half of a path
    is not detected.
    """
    parents_BN, tokens_BN = tree.parents_BN.clamp(min=0), tree.tokens_BN
    repeated_BN = torch.zeros_like(tree.acceptable_BN)
    above_BN = torch.arange(tree.size, device=tokens_BN.device).expand_as(parents_BN)
    for period in range(1, longest + 1):
        # Compare each node with the node `period` steps above, then combine the last `period`
        # nodes.
        above_BN = parents_BN.gather(1, above_BN)
        same_BN = (tokens_BN == tokens_BN.gather(1, above_BN)) & (tree.topology.depth >= period)
        run_BN = same_BN
        for _ in range(period - 1):
            same_BN = same_BN.gather(1, parents_BN)
            run_BN = run_BN & same_BN
        repeated_BN |= run_BN
    return repeated_BN


def _first_half(batch: LabelledBatch) -> Tensor:
    """bool [M]: labelled tokens whose question has an even number; without question numbers each
    row is a question.
    """
    counted_BT = batch.text.loss_mask
    rows = torch.arange(len(counted_BT), device=counted_BT.device)[:, None].expand(counted_BT.shape)
    return (rows if batch.questions is None else batch.questions)[counted_BT] % 2 == 0


def tokens_with_digits(ids_M: Tensor, target: Target) -> Tensor:
    """Unique ids whose text contains a digit."""
    digits = [
        token
        for token in ids_M.unique().tolist()
        if any(map(str.isdigit, target.tokenizer.decode([token])))
    ]
    return ids_M.new_tensor(digits)


def moment_sums(states_MH: Tensor) -> Tensor:
    """float64 [4,H] of a process's states: their number n, their sum S, S²/n, and the sum of
    squares about their mean. Averages over processes determine mean and deviation of all states.
    """
    count = max(1, len(states_MH))
    sums_H = states_MH.sum(0)
    within_H = (states_MH - sums_H / count).square().sum(0).double()
    sums_H = sums_H.double()
    counts_H = torch.full_like(sums_H, len(states_MH))
    return torch.stack([counts_H, sums_H, sums_H.square() / count, within_H])


def class_weights(labels_M: Tensor, largest: float) -> tuple[Tensor, Tensor]:
    """Weights [M]: 1 for right tokens (label 1), and n_right / n_wrong of all processes, within
    [1, largest], for wrong ones; and the divisor of a weighted sum, their mean sum over processes.
    """
    right = labels_M.sum()
    classes = SharedCount(torch.stack([right, len(labels_M) - right]))
    rights, wrongs = classes.divisor()
    ratio = (rights / wrongs).clamp(1, largest)
    rights, wrongs = classes.mean()
    whole = rights + ratio * wrongs
    weights_M = torch.where(labels_M > 0.5, torch.ones_like(labels_M), ratio)
    return weights_M, torch.where(whole > 0, whole, torch.ones_like(whole))


def calibrated_threshold(scores_M: Tensor, right_M: Tensor, precision: float) -> float:
    """The lowest score at or above which a share `precision` of the tokens is right, with both
    classes weighted equally.

    `NOTHING` if no score reaches it, or if one class has no tokens.
    """
    if not bool(right_M.any()) or bool(right_M.all()):
        return NOTHING
    levels, place_M = scores_M.unique(return_inverse=True)
    rates = []
    # Share of each class that scores at least so much, for every score.
    for class_M in (right_M, ~right_M):
        counts = place_M[class_M].bincount(minlength=len(levels))
        rates.append(counts.flip(0).cumsum(0).flip(0) / class_M.sum())
    reached = rates[0] >= precision * (rates[0] + rates[1])
    return float(levels[reached][0]) if bool(reached.any()) else NOTHING


def _share(accepted_M: Tensor) -> float:
    return float(accepted_M.double().mean()) if len(accepted_M) else 0.0


def _metrics(
    losses_M: Tensor, weights_M: Tensor, scores_M: Tensor, labels_M: Tensor
) -> dict[str, Mean]:
    right_M = labels_M > 0.5
    pairs = cast(Tensor, right_M.sum() * (~right_M).sum())
    return {
        "loss": Mean(losses_M.sum(), weights_M.sum()),
        "auc": Mean(pairs * area_under_curve(scores_M, right_M), pairs),
        "right_score": Mean(scores_M[right_M].sum(), right_M.sum()),
        "wrong_score": Mean(scores_M[~right_M].sum(), (~right_M).sum()),
    }
