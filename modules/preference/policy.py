"""What preference recipes share: a policy of adapters on the target, log-ratios to the target
itself, metrics.

The reference model is the target without adapters, so it needs no copy. Its log-probabilities of a
pair are computed once.

Shape legend: B pairs, T tokens of a row, M tokens that count, H hidden size, V vocabulary.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

from modules.contracts.batches import PADDING_DOCUMENT, PreferenceBatch, TextBatch
from modules.contracts.losses import Losses, Mean
from modules.contracts.shapes import TargetShape
from modules.contracts.trainable import Footprint, GradientLayers, Trainable
from modules.losses.averages import divisor
from modules.losses.chunked import Head, cross_entropy, next_token_rows
from modules.target.adapters import Adapters

if TYPE_CHECKING:
    from modules.contracts.target import Target


@dataclass(frozen=True)
class Response:
    """The responses on one side of a batch of pairs.

    log_probability_BT: log π_θ of each token, 0 where none counts.
    reference_BT: the same for the reference.
    counted_BT: bool, tokens that count.
    final_BTH: the policy's `final` states.
    """

    log_probability_BT: Tensor
    reference_BT: Tensor
    counted_BT: Tensor
    final_BTH: Tensor

    @property
    def ratio_BT(self) -> Tensor:
        """Log-ratios r_t of each token [B,T]."""
        return self.log_probability_BT - self.reference_BT


def counted(batch: TextBatch) -> Tensor:
    """bool [B,T]: the predicted tokens, which are in the loss mask and not the first of their
    document.
    """
    return at_tokens(batch, torch.ones_like(next_token_rows(batch)[0])).bool()


def at_tokens(batch: TextBatch, values_M: Tensor) -> Tensor:
    """Values [M] of the rows of `next_token_rows`, written to the positions of the predicted tokens
    [B,T]; 0 elsewhere.
    """
    flat_M = next_token_rows(batch)[0]
    values_P = values_M.new_zeros(batch.input_ids.numel()).index_put((flat_M + 1,), values_M)
    return values_P.view(batch.input_ids.shape)


def log_probabilities(batch: TextBatch, final_BTH: Tensor, head: Head, width: int) -> Tensor:
    """log p of each counted token [B,T], 0 elsewhere, from `final` states and the LM head over
    `width` tokens.
    """
    flat_M, labels_M = next_token_rows(batch)
    return at_tokens(
        batch, -cross_entropy(final_BTH.flatten(0, 1)[flat_M], head, labels_M, width)[0]
    )


class RowCache:
    """A cache of values [B,T] that depend only on the target and on a row's tokens and mask."""

    def __init__(self) -> None:
        self._rows: dict[bytes, Tensor] = {}
        self._target: Target | None = None

    def __call__(
        self, batch: TextBatch, target: Target, compute: Callable[[TextBatch, Target], Tensor]
    ) -> Tensor:
        """The batch's values; if any row is new, the whole batch is computed without gradient."""
        if self._target is not target:
            self._rows, self._target = {}, target
        keys = [_key(batch, row) for row in range(batch.input_ids.shape[0])]
        if any(key not in self._rows for key in keys):
            with torch.no_grad():
                fresh_BT = compute(batch, target)
            self._rows |= {
                key: values.to("cpu", copy=True) for key, values in zip(keys, fresh_BT, strict=True)
            }
        width, device = batch.input_ids.shape[1], batch.input_ids.device
        return torch.stack([_fitted(self._rows[key], width) for key in keys]).to(device)


def _key(batch: TextBatch, row: int) -> bytes:
    real = batch.document_ids[row] != PADDING_DOCUMENT
    parts = (
        batch.input_ids[row][real],
        batch.loss_mask[row][real].long(),
        batch.document_ids[row][real],
    )
    return torch.cat(parts).cpu().numpy().tobytes()


def _fitted(values_T: Tensor, width: int) -> Tensor:
    """A row's values cut or padded with 0 to another width."""
    cut_T = values_T[:width]
    return torch.nn.functional.pad(cut_T, (0, width - len(cut_T)))


def reference_log_probabilities(batch: TextBatch, target: Target) -> Tensor:
    """log p of each counted token [B,T] under the target."""
    final_BTH = target.features(batch, ("final",))["final"]
    return log_probabilities(batch, final_BTH, target.unrounded_logits, target.shape.vocab_size)


class PreferenceTrainable(Trainable):
    """A policy trained on preference pairs: low-rank adapters on the target, which is the
    reference.

    Subclasses define `pair_losses`.

    Args:
        shape: the target's dimensions (Llama-type layers only).
        rank, alpha, dropout: of the adapters, on every linear layer.
        beta: factor that turns a log-ratio into a reward.
    """

    batch_type: ClassVar[type] = PreferenceBatch
    method: ClassVar[str] = "preference"
    """Suffix of an adapted target's name."""

    def __init__(
        self, shape: TargetShape, rank: int, alpha: float, dropout: float, beta: float
    ) -> None:
        super().__init__()
        if beta <= 0:
            raise ValueError(f"beta (cDPO: gamma) must be above 0, got {beta}")
        self.shape, self.beta = shape, beta
        self.policy = Adapters(shape, rank, alpha, dropout, name=self.method)
        self._references = RowCache()

    def footprint(self, rows: int, length: int) -> Footprint:
        """Both sides of the pairs, through the adapted target's layers."""
        return pair_footprint(super().footprint(rows, length), self.policy, self.shape)

    @property
    def online(self) -> bool:
        """True: its policy changes while it trains."""
        return True

    def adapt(self, target: Target) -> Target:
        """The trained model: a copy of the target with the adapters added to its weights."""
        return self.policy.merged(target)

    def response(self, text: TextBatch, reference_BT: Tensor | None, target: Target) -> Response:
        """One side under the policy (with gradient) and the reference (from the batch, or
        cached).
        """
        twin = self.policy.twin(target)
        final_BTH = twin.features(text, ("final",), gradient=True)["final"]
        policy_BT = log_probabilities(text, final_BTH, twin.unrounded_logits, self.shape.vocab_size)
        if reference_BT is None:
            reference_BT = self._references(text, target, reference_log_probabilities)
        return Response(policy_BT, reference_BT.to(policy_BT.dtype), counted(text), final_BTH)

    @abstractmethod
    def pair_losses(
        self, batch: PreferenceBatch, chosen: Response, rejected: Response, target: Target
    ) -> tuple[Tensor, dict[str, Mean]]:
        """The loss of each pair [B], and the method's metrics."""

    def loss(self, batch: PreferenceBatch, target: Target, progress: float) -> Losses:
        """Mean over the pairs that have a counted token; metrics include preference accuracy (the
        chosen response has the higher reward) and reward margin.
        """
        chosen = self.response(batch.chosen, batch.chosen_reference, target)
        rejected = self.response(batch.rejected, batch.rejected_reference, target)
        losses_B, metrics = self.pair_losses(batch, chosen, rejected, target)
        # Pairs without a counted token (padding) have no weight.
        real_B = chosen.counted_BT.any(1) | rejected.counted_BT.any(1)
        losses_B = losses_B * real_B
        shown = {
            **preference_metrics(losses_B, chosen.ratio_BT, rejected.ratio_BT, self.beta, real_B),
            **metrics,
        }
        return Losses(losses_B.sum() / divisor(shown["loss"].count), shown)


def pair_footprint(one_side: Footprint, adapters: Adapters, shape: TargetShape) -> Footprint:
    """Footprint of both sides of pairs through adapters, from that of one side."""
    layers = GradientLayers(shape, adapted=True, dropout=adapters.dropout > 0)
    return replace(one_side, tokens=2 * one_side.tokens, sides=2, layers=layers)


def preference_metrics(
    losses_B: Tensor, chosen_BT: Tensor, rejected_BT: Tensor, beta: float, real_B: Tensor
) -> dict[str, Mean]:
    """Means over real pairs: the loss, how often β Σ r_w > β Σ r_l, their difference, and each
    reward.
    """
    losses_B = losses_B.detach()
    chosen_B, rejected_B = (
        beta * ratio_BT.detach().sum(1) for ratio_BT in (chosen_BT, rejected_BT)
    )
    pairs = real_B.sum()
    return {
        "loss": Mean(losses_B.sum(), pairs),
        "preference_accuracy": Mean((chosen_B > rejected_B).sum(), pairs),
        "reward_margin": Mean((chosen_B - rejected_B).sum(), pairs),
        "chosen_reward": Mean(chosen_B.sum(), pairs),
        "rejected_reward": Mean(rejected_B.sum(), pairs),
    }
