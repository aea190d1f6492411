"""cDPO: DPO in which critical tokens of the rejected response have the largest weight (Lin et al.
2024, arXiv 2411.19943).

Shape legend: B pairs, T tokens of a row, M tokens that count, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from modules.contracts.batches import PreferenceBatch, TextBatch
from modules.contracts.losses import Losses, Mean
from modules.contracts.shapes import TargetShape
from modules.contracts.trainable import Footprint, Stage, Trainable, TrainingResult
from modules.losses.averages import SharedCount
from modules.losses.chunked import cross_entropy, full_precision, most_logits, next_token_rows
from modules.losses.metrics import area_under_curve
from modules.preference.highlight import TokenScores, highlight_page
from modules.preference.losses import contrastive_probs, critical_dpo_loss, positionwise_dpo_loss
from modules.preference.policy import (
    PreferenceTrainable,
    Response,
    RowCache,
    at_tokens,
    counted,
    pair_footprint,
    reference_log_probabilities,
)
from modules.target.adapters import FEED_FORWARD, Adapters

if TYPE_CHECKING:
    from modules.contracts.target import Target

PAGE = "critical_tokens.html"


class ContrastiveEstimator(Trainable):
    """Two adapted copies of the target: P_p, fine-tuned on right trajectories, and P_n, on wrong
    ones.

    A token is critical where their contrast makes it unlikely (section 3.2). Chosen responses are
    right trajectories, rejected ones wrong; either side of a row may be absent, with an empty loss
    mask. As in the released code, P_p reads one right trajectory per question and P_n one per
    frequent wrong answer (`PreferenceData.for_stages`).

    Args:
        shape: the target's dimensions (Llama-type layers only).
        rank, alpha, dropout: of the adapters, on the feed-forward layers.
        contrast: β of the contrast; 0 uses P_p only.
    """

    batch_type: ClassVar[type] = PreferenceBatch

    def __init__(
        self,
        shape: TargetShape,
        rank: int = 8,
        alpha: float = 16.0,
        dropout: float = 0.1,
        contrast: float = 1.0,
    ) -> None:
        super().__init__()
        if contrast < 0:
            raise ValueError(f"contrast must be 0 or above, got {contrast}")
        self.shape, self.contrast = shape, contrast
        self.positive = Adapters(shape, rank, alpha, dropout, FEED_FORWARD, "positive")
        self.negative = Adapters(shape, rank, alpha, dropout, FEED_FORWARD, "negative")

    def footprint(self, rows: int, length: int) -> Footprint:
        """Both sides of the pairs, each through an adapted target's layers."""
        return pair_footprint(super().footprint(rows, length), self.positive, self.shape)

    @property
    def online(self) -> bool:
        """True: its two models change while it trains."""
        return True

    def loss(self, batch: PreferenceBatch, target: Target, progress: float) -> Losses:
        """Cross-entropy of P_p on the chosen responses plus that of P_n on the rejected ones."""
        positive_M = _language_losses(batch.chosen, self.positive.twin(target))
        negative_M = _language_losses(batch.rejected, self.negative.twin(target))
        # Both counts are shared by one collective.
        metrics, total = {}, torch.zeros((), device=positive_M.device)
        both = {"positive": positive_M, "negative": negative_M}
        counts = [
            SharedCount(torch.as_tensor(len(each_M), device=each_M.device))
            for each_M in both.values()
        ]
        for (name, each_M), count in zip(both.items(), counts, strict=True):
            total = total + each_M.sum() / count.divisor()
            metrics[f"{name}_cross_entropy"] = Mean(each_M.detach().sum(), count.local)
        return Losses(total, metrics)

    @torch.no_grad()
    def scores(self, text: TextBatch, target: Target) -> Tensor:
        """s_t of every counted token [B,T], 0 elsewhere: small where the token is critical."""
        flat_M, labels_M = next_token_rows(text)
        twins = [
            adapters.twin(target, training=False) for adapters in (self.positive, self.negative)
        ]
        states = [twin.features(text, ("final",))["final"].flatten(0, 1)[flat_M] for twin in twins]
        # Both models' logits, in chunks of at most `most_logits` values.
        rows, scores = max(1, most_logits(target.device) // target.shape.vocab_size), []
        for start in range(0, len(labels_M), rows):
            part = slice(start, start + rows)
            positive, negative = (
                full_precision(twin.unrounded_logits(state[part]))
                for twin, state in zip(twins, states)
            )
            probs = contrastive_probs(positive, negative, self.contrast)
            scores.append(probs.gather(1, labels_M[part, None])[:, 0])
        return at_tokens(text, torch.cat(scores) if scores else states[0].new_zeros(0))


def _language_losses(text: TextBatch, twin: Target) -> Tensor:
    flat_M, labels_M = next_token_rows(text)
    final_BTH = twin.features(text, ("final",), gradient=True)["final"]
    return cross_entropy(
        final_BTH.flatten(0, 1)[flat_M], twin.unrounded_logits, labels_M, twin.shape.vocab_size
    )[0]


class CDPO(PreferenceTrainable):
    """−log σ(γ (Σ r_w − Σ (1 − s_t) r_l)): tokens of the rejected response are weighted by how
    critical they are.

    First the contrastive estimator is trained on right and wrong trajectories of the same
    questions. Then its scores of the rejected tokens are computed once, and the policy is trained
    with them. The paper uses γ = 1, its code 0.1.

    Args:
        shape: the target's dimensions (Llama-type layers only).
        rank, alpha, dropout: of the policy's adapters, on every linear layer.
        gamma: factor of the log-ratios.
        positionwise: compare token by token and average, as the released code does, instead of
            whole responses.
        contrast: β of the contrast between the two models.
        estimator_rank, estimator_alpha, estimator_dropout: of the estimator's adapters.
        estimator_epochs, estimator_lr: epochs and peak learning rate of the estimator's training.
    """

    method: ClassVar[str] = "cdpo"

    def __init__(
        self,
        shape: TargetShape,
        rank: int = 16,
        alpha: float = 32.0,
        dropout: float = 0.0,
        gamma: float = 1.0,
        positionwise: bool = False,
        contrast: float = 1.0,
        estimator_rank: int = 8,
        estimator_alpha: float = 16.0,
        estimator_dropout: float = 0.1,
        estimator_epochs: int = 1,
        estimator_lr: float = 3e-4,
    ) -> None:
        super().__init__(shape, rank, alpha, dropout, gamma)
        if estimator_epochs < 1:
            raise ValueError(f"estimator_epochs must be at least 1, got {estimator_epochs}")
        if estimator_lr <= 0:
            raise ValueError(f"estimator_lr must be above 0, got {estimator_lr}")
        self.positionwise, self.epochs, self.lr = positionwise, estimator_epochs, estimator_lr
        self.estimator = ContrastiveEstimator(
            shape, estimator_rank, estimator_alpha, estimator_dropout, contrast
        )
        self.estimator.requires_grad_(False)
        self._scores = RowCache()

    @property
    def stages(self) -> tuple[Stage, ...]:
        """The estimator is trained before the policy."""
        return (Stage("estimator", self.estimator, self.epochs, self.lr),)

    def scores(self, text: TextBatch, target: Target) -> Tensor:
        """The estimator's s_t of every counted token [B,T], computed once per row."""
        return self._scores(text, target, self.estimator.scores)

    def pair_losses(
        self, batch: PreferenceBatch, chosen: Response, rejected: Response, target: Target
    ) -> tuple[Tensor, dict[str, Mean]]:
        """The sequence form, or the released code's positionwise form [B]; the mean score of the
        rejected tokens as a metric.
        """
        scores_BT = self.scores(batch.rejected, target)
        shown = {"rejected_score": Mean(scores_BT.sum(), rejected.counted_BT.sum())}
        if self.positionwise:
            return positionwise_dpo_loss(
                chosen.ratio_BT,
                chosen.counted_BT,
                rejected.ratio_BT,
                rejected.counted_BT,
                scores_BT,
                self.beta,
            ), shown
        return critical_dpo_loss(chosen.ratio_BT, rejected.ratio_BT, scores_BT, self.beta), shown

    def finish(self, batches: Iterable[Any], target: Target) -> TrainingResult:
        """A page of the critical tokens in held-out wrong trajectories. Where the errors are known,
        also figures of how well the scores rank them, compared with the target's surprise −log p.
        """
        shown: list[TokenScores] = []
        places: dict[bool, list[tuple[Tensor, Tensor, Tensor]]] = {False: [], True: []}
        for batch in batches:
            # 1. Scores, labelled errors (exact or inferred) and the target's surprise.
            scores_BT = self.scores(batch.rejected, target)
            errors_BT = (
                torch.zeros_like(batch.rejected.loss_mask) if batch.errors is None else batch.errors
            )
            inferred = (
                [False] * len(errors_BT) if batch.inferred is None else batch.inferred.tolist()
            )
            surprise_BT = -self._references(batch.rejected, target, reference_log_probabilities)
            # 2. All responses for the page; those with known errors for the figures.
            shown += token_scores(batch.rejected, scores_BT, errors_BT, target)
            for b, row in enumerate(counted(batch.rejected)):
                if bool(errors_BT[b, row].any()):
                    places[inferred[b]].append(
                        (1 - scores_BT[b, row], surprise_BT[b, row], errors_BT[b, row])
                    )
        figures = error_figures(places[False]) | error_figures(places[True], "inferred_")
        return TrainingResult(
            figures, {PAGE: highlight_page(f"Critical tokens for {target.name}", shown)}
        )


def error_figures(
    responses: Sequence[tuple[Tensor, Tensor, Tensor]], prefix: str = ""
) -> dict[str, float]:
    """How well two rankings of the tokens of wrong responses find the errors; empty without
    responses.

    criticality_auc: how often a token of an error is more critical than another token of any
    response.
    surprise_auc: the same for −log p of the target, which needs no estimator.
    most_critical_is_error: share of the responses whose most critical token belongs to an error.
    known_errors: number of responses. With `prefix` the errors are steps that are only inferred to
    contain the mistake.

    Args:
        responses: criticality 1 − s [T], −log p [T] and which tokens are errors (bool [T]) of each.
        prefix: prefix of the figures' names.
    """
    if not responses:
        return {}
    critical_M, surprise_M, errors_M = (torch.cat(parts) for parts in zip(*responses, strict=True))
    first = [float(errors_T[critical_T.argmax()]) for critical_T, _, errors_T in responses]
    figures = {
        "criticality_auc": area_under_curve(critical_M, errors_M),
        "surprise_auc": area_under_curve(surprise_M, errors_M),
        "most_critical_is_error": sum(first) / len(first),
        "known_errors": float(len(first)),
    }
    return {f"held_out/{prefix}{name}": value for name, value in figures.items()}


def token_scores(
    text: TextBatch, scores_BT: Tensor, errors_BT: Tensor, target: Target
) -> list[TokenScores]:
    """Each row's prompt, and its response token by token with scores and known errors."""
    responses = []
    # The prompt is everything before the first scored token.
    for ids, scored, scores, errors in zip(text.input_ids, counted(text), scores_BT, errors_BT):
        if scored.any():
            prompt = target.tokenizer.decode(
                ids[: int(scored.int().argmax())].tolist(), skip_special_tokens=True
            )
            pieces = [target.tokenizer.decode([token]) for token in ids[scored].tolist()]
            responses.append(
                TokenScores(prompt, pieces, scores[scored].tolist(), errors[scored].tolist())
            )
    return responses
