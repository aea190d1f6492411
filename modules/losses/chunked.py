"""Training losses of drafters: pure functions of tensors, computed only on the rows with labels.

Index contract: at position t the target's state f_t is its distribution of x_{t+1}; step d of a
drafter, given the tokens up to x_{t+1+d}, drafts x_{t+2+d}.

Shape legend: B sequences, T tokens of a packed row, M training rows (positions that count), K draft
steps, H hidden size, D draft vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from modules.contracts.batches import PADDING_DOCUMENT, TextBatch
from modules.contracts.losses import Mean
from modules.contracts.sampling import likeliest
from modules.losses.averages import divisor
from modules.runtime.phase_timer import phase
from modules.target.kernels.cpu_kernels import NarrowLinear, narrow_linear

IGNORED = -1
"""Label of a row without a loss."""
MAX_LOGITS = 2**24
"""Logits [M,D] above this many are computed in chunks of rows, on a CPU (see `most_logits`)."""
LOGITS_ON_A_DEVICE = 8
"""How many times as many an accelerator computes at once: 2 GiB for four float32 copies, so that
launches do not grow with the rows.
"""
MAX_PROBS = 2**25
"""Probabilities of the target's distributions up to this many are shared by all draft steps of a
batch.
"""

Head = Callable[[Tensor], Tensor]
"""Features [M,H] -> logits [M,D]."""
Distributions = Callable[[Tensor], Tensor]
"""Flat positions [M] -> the target's probabilities [M,D] there, over the draft vocabulary."""
Divergence = Callable[[Tensor, Tensor], Tensor]
"""Draft logits [M,D] and the target's probabilities [M,D] -> a loss per row [M]."""
Score = Callable[[slice, Tensor], tuple[Tensor, Tensor]]
"""Rows and their features -> losses and ranks."""


def most_logits(device: torch.device) -> int:
    """Logits that are computed at once on a device."""
    return MAX_LOGITS * (1 if device.type == "cpu" else LOGITS_ON_A_DEVICE)


class LearntHead(NarrowLinear):
    """A trained LM head of a drafter, parts of which are computed inside one call.

    ZeRO stage 3 gathers a module's weights from all processes at each call of the module, so all
    processes must call it equally often. The number of chunks of rows differs between them.
    """

    def forward(self, input: Tensor, parts: Callable[[Head, Tensor], Any] | None = None) -> Any:
        """[..., H] -> logits [..., D], or what `parts` makes of these logits and the features."""

        def logits(hidden: Tensor) -> Tensor:
            return narrow_linear(hidden, self.weight, self.bias)

        return logits(input) if parts is None else parts(logits, input)


def in_one_call(head: Head, features: Tensor, parts: Callable[[Head, Tensor], Any]) -> Any:
    """`parts(head, features)`; for a head that learns, inside one call of it."""
    return head(features, parts=parts) if isinstance(head, LearntHead) else parts(head, features)


@dataclass(frozen=True)
class TrainingRows:
    """The positions t that are trained on, and the tokens that follow them.

    flat_MK1: int64 [M,K+1], t … t + K as indices into the batch's flattened [B*T] (held inside it
    where not valid).
    tokens_MK1: int64 [M,K+1], x_{t+1} … x_{t+1+K}: step d reads columns up to d and predicts column
    d + 1.
    valid_MK: bool [M,K], whether step d's label counts.
    """

    flat_MK1: Tensor
    tokens_MK1: Tensor
    valid_MK: Tensor

    def take(self, rows_BTX: Tensor) -> Tensor:
        """Rows [B,T,...] at the training positions [M,...]."""
        return rows_BTX.flatten(0, 1)[self.flat_MK1[:, 0]]

    def only(self, rows_R: Tensor) -> TrainingRows:
        """These rows alone (indices, or bool [M])."""
        if rows_R.dtype == torch.bool:
            # The device is waited for once, not for each of the three.
            rows_R = rows_R.nonzero()[:, 0]
        return TrainingRows(self.flat_MK1[rows_R], self.tokens_MK1[rows_R], self.valid_MK[rows_R])


def training_rows(batch: TextBatch, steps: int, among_BT: Tensor | None = None) -> TrainingRows:
    """The positions whose first draft is an assistant token, or those `among_BT` with any such
    draft.

    Step d of position t counts when x_{t+2+d} is in the loss mask and in t's own document.
    """
    # 1. The tokens after every position, and which of them are labels.
    tokens, valid = _following(batch, steps + 1)
    chosen = valid[:, 1] if among_BT is None else among_BT.flatten() & valid[:, 1:].any(1)
    # 2. The chosen positions and those of their steps.
    flat_M = chosen.nonzero()[:, 0]
    ahead = torch.arange(steps + 1, device=flat_M.device)
    flat_MK1 = (flat_M[:, None] + ahead).clamp(max=len(tokens) - 1)
    return TrainingRows(flat_MK1, tokens[flat_M], valid[flat_M, 1:])


def next_token_rows(batch: TextBatch) -> tuple[Tensor, Tensor]:
    """Flat positions t [M] whose next token is an assistant token, and those tokens [M]: a language
    model's rows.
    """
    tokens, valid = _following(batch, 1)
    flat_M = valid[:, 0].nonzero()[:, 0]
    return flat_M, tokens[flat_M, 0]


def _following(batch: TextBatch, count: int) -> tuple[Tensor, Tensor]:
    """x_{t+1} … x_{t+count} of every position [B*T,count], and whether each is a label in t's own
    document.
    """
    length, documents = batch.input_ids.shape[1], batch.document_ids
    # 1. Indices of the following tokens, inside the row.
    here = torch.arange(length, device=documents.device)[:, None]
    index = here + torch.arange(1, count + 1, device=documents.device)
    inside, index = index < length, index.clamp(max=length - 1)
    # 2. Labels are assistant tokens of the same document.
    same = (documents[:, index] == documents[..., None]) & (documents != PADDING_DOCUMENT)[
        ..., None
    ]
    valid = inside & same & batch.loss_mask[:, index]
    return batch.input_ids[:, index].flatten(0, 1), valid.flatten(0, 1)


def draft_labels(tokens: Tensor, vocabulary_D: Tensor | None) -> Tensor:
    """Indices of target token ids in a draft vocabulary (sorted ids), `IGNORED` for those outside
    it.
    """
    if vocabulary_D is None:
        return tokens
    index = torch.searchsorted(vocabulary_D, tokens).clamp(max=len(vocabulary_D) - 1)
    return torch.where(vocabulary_D[index] == tokens, index, IGNORED)


def soft_cross_entropy(logits_MD: Tensor, probs_MD: Tensor) -> Tensor:
    """−Σ_v p(v) log q(v) per row [M]."""
    return F.cross_entropy(logits_MD, probs_MD, reduction="none")


def cross_entropy(
    features_MH: Tensor,
    head: Head,
    labels_M: Tensor,
    width: int,
    distributions: Distributions | None = None,
    flat_M: Tensor | None = None,
    divergence: Divergence = soft_cross_entropy,
    text_weight: float = 0.0,
    counted_M: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Cross-entropy of `head`'s logits per row: to the labels, or to the target's distributions at
    `flat_M` (or another divergence from those).

    Returns the losses [M], 0 where they do not count, and int64 ranks [M]: how many draft tokens
    score above the label (0: it is the best), D where the label is ignored. At most `most_logits`
    logits exist at a time: more rows are cut into chunks. With a frozen head nothing is computed
    twice and no logits are stored: a row's loss depends on its own features alone, so that dL/dh_m
    = dL/dl_m · dl_m/dh_m, and the last factor [M,H] is computed chunk by chunk in the forward pass
    (as in Liger Kernel, Hsu et al. 2024, arXiv 2410.10989). Where the head learns too, its weights
    need a sum over rows by dL/dl_m, which the forward pass does not have: the chunks are recomputed
    in the backward pass.

    Args:
        features_MH: inputs of the head.
        head: features to logits over the draft vocabulary.
        labels_M: draft vocabulary indices; `IGNORED` rows get no loss.
        width: D.
        distributions: the target's probabilities for soft labels, as `divergence` takes them.
        flat_M: flat positions of those distributions.
        divergence: what is computed of logits and distributions.
        text_weight: weight of the cross-entropy to the labels that is added to the divergence.
        counted_M: bool, rows that count where there are distributions; None: those with a label.
    """

    def scored(logits: Head, features: Tensor) -> tuple[Tensor, Tensor]:
        def score(part: slice, rows: Tensor) -> tuple[Tensor, Tensor]:
            return _score(
                rows,
                logits,
                labels_M[part],
                distributions,
                None if flat_M is None else flat_M[part],
                divergence,
                text_weight,
                None if counted_M is None else counted_M[part],
            )

        return _in_parts(score, logits, features, width)

    with phase("loss"):
        return in_one_call(head, features_MH, scored)


def _in_parts(score: Score, head: Head, features_MH: Tensor, width: int) -> tuple[Tensor, Tensor]:
    """Losses and ranks [M] of all rows, never of more than `most_logits` at once."""
    # 1. Parts of at most so many logits, at least one.
    parts = list(_slices(len(features_MH), max(1, most_logits(features_MH.device) // width))) or [
        slice(0, 0)
    ]
    # 2. A head that learns: recompute the parts in the backward pass.
    if torch.is_grad_enabled() and _learns(head, features_MH):
        if len(parts) == 1:
            return score(parts[0], features_MH)
        scored = [checkpoint(score, part, features_MH[part], use_reentrant=False) for part in parts]
    elif torch.is_grad_enabled() and features_MH.requires_grad:
        return _with_slopes(score, parts, features_MH)
    else:
        scored = [score(part, features_MH[part]) for part in parts]
    losses, ranks = zip(*scored, strict=True)
    return torch.cat(losses), torch.cat(ranks)


def _learns(head: Head, features_MH: Tensor) -> bool:
    """Whether gradients reach parameters of the head, tested without rows, at no cost."""
    return head(features_MH[:0].detach()).requires_grad


def _with_slopes(score: Score, parts: list[slice], features_MH: Tensor) -> tuple[Tensor, Tensor]:
    """Losses and ranks [M]; gradients in the features are computed with them, part by part, so that
    the logits of each part are freed.
    """
    slopes_MH, scored = torch.empty_like(features_MH, requires_grad=False), []
    for part in parts:
        rows = features_MH[part].detach().requires_grad_()
        losses, ranks = score(part, rows)
        (slopes_MH[part],) = torch.autograd.grad(losses.sum(), rows)
        scored.append((losses.detach(), ranks))
    losses, ranks = zip(*scored, strict=True)
    return cast(Tensor, _KnownSlopes.apply(features_MH, torch.cat(losses), slopes_MH)), torch.cat(
        ranks
    )


class _KnownSlopes(Function):
    """Losses per row [M] of features [M,H], given dl_m/dh_m [M,H]."""

    @staticmethod
    def forward(ctx: Any, features_MH: Tensor, losses_M: Tensor, slopes_MH: Tensor) -> Tensor:
        ctx.save_for_backward(slopes_MH)
        return losses_M.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_M: Tensor) -> tuple[Tensor, None, None]:
        (slopes_MH,) = ctx.saved_tensors
        return (slopes_MH * grad_M[:, None]).to(slopes_MH.dtype), None, None


def _score(
    features_MH: Tensor,
    head: Head,
    labels_M: Tensor,
    distributions: Distributions | None,
    flat_M: Tensor | None,
    divergence: Divergence,
    text_weight: float,
    counted_M: Tensor | None,
) -> tuple[Tensor, Tensor]:
    # 1. Ranks need no gradient.
    logits = full_precision(head(features_MH))
    ranks = label_ranks(logits.detach(), labels_M)
    # 2. Hard labels, a divergence from the target's distributions, or both.
    if distributions is None:
        return F.cross_entropy(logits, labels_M, ignore_index=IGNORED, reduction="none"), ranks
    assert flat_M is not None
    counted_M = labels_M != IGNORED if counted_M is None else counted_M
    losses = divergence(logits, distributions(flat_M)).where(counted_M, 0.0)
    if text_weight:
        hard = F.cross_entropy(logits, labels_M, ignore_index=IGNORED, reduction="none")
        losses = losses + text_weight * hard
    return losses, ranks


def label_ranks(logits_MD: Tensor, labels_M: Tensor) -> Tensor:
    """int64 [M]: how many logits exceed the label's (0: it is the best); D for labels that are
    ignored or have no probability.
    """
    label_logits = logits_MD.gather(1, labels_M.clamp(min=0)[:, None])
    # A sum of int64 would take twice the logits' memory.
    above = (logits_MD > label_logits).sum(1, dtype=torch.int32).long()
    ranked_M = (labels_M != IGNORED) & (label_logits[:, 0] > -torch.inf)
    return above.where(ranked_M, logits_MD.shape[1])


def full_precision(tensor: Tensor) -> Tensor:
    """The tensor in float32, or unchanged if it is wider."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def target_distributions(
    head: Head, final_BTH: Tensor, positions: Tensor, width: int
) -> Distributions:
    """The target's probabilities over the draft vocabulary, by flat position.

    Steps share most positions, so the distributions are computed once for all of `positions` where
    they fit in memory (`MAX_PROBS`), and again for each step where they do not.
    """
    # P positions: all tokens of the batch.
    final_PH = final_BTH.flatten(0, 1)

    @torch.no_grad()
    def distributions(flat_M: Tensor) -> Tensor:
        return torch.softmax(full_precision(head(final_PH[flat_M])), dim=-1)

    return _shared(distributions, positions, width)


def _shared(distributions: Distributions, positions: Tensor, width: int) -> Distributions:
    """The same distributions of these positions, each computed once, if they fit in memory."""
    unique = positions.unique()
    if len(unique) * width > MAX_PROBS:
        return distributions
    with phase("loss"):
        table = distributions(unique)
    return lambda flat_M: table[torch.searchsorted(unique, flat_M)]


def covered_distributions(
    head: Head, final_BTH: Tensor, positions: Tensor, vocabulary_D: Tensor, size: int
) -> Distributions:
    """The target's probabilities of the draft tokens in its whole distribution, by flat position:
    their sum is the mass that the draft vocabulary covers. Shared as in `target_distributions`.

    Args:
        head: the target's, over its whole vocabulary.
        final_BTH: states that it reads.
        positions: flat, all that are asked for.
        vocabulary_D: draft tokens.
        size: of the target's vocabulary; more logits than `most_logits` are computed in chunks.
    """
    final_PH = final_BTH.flatten(0, 1)

    @torch.no_grad()
    def distributions(flat_M: Tensor) -> Tensor:
        chunks = [
            flat_M[part]
            for part in _slices(len(flat_M), max(1, most_logits(flat_M.device) // size))
        ]
        logits = (full_precision(head(final_PH[chunk])) for chunk in chunks or [flat_M])
        return torch.cat([each.softmax(-1)[:, vocabulary_D] for each in logits])

    return _shared(distributions, positions, len(vocabulary_D))


def likely_tokens(
    distributions: Distributions,
    flat_M: Tensor,
    tokens_M: Tensor,
    width: int,
    top_k: int,
    top_p: float,
) -> Tensor:
    """bool [M]: whether a token is among the distribution's `top_k` (0: any) and the mass above it
    is at most `top_p`.
    """
    parts = []
    for part in _slices(len(tokens_M), max(1, most_logits(tokens_M.device) // width)):
        probs = distributions(flat_M[part])
        better = probs > probs.gather(1, tokens_M[part, None])
        parts.append((better.sum(1) < (top_k or width)) & ((probs * better).sum(1) <= top_p))
    return torch.cat(parts) if parts else torch.zeros_like(tokens_M, dtype=torch.bool)


def greedy_tokens(head: Head, final_MH: Tensor, width: int) -> Tensor:
    """int64 [M]: the likeliest token after each `final` state, in chunks of rows."""

    def search(logits: Head, features: Tensor) -> Tensor:
        parts = [
            likeliest(logits(features[part]))
            for part in _slices(len(features), max(1, most_logits(features.device) // width))
        ]
        return (
            torch.cat(parts) if parts else torch.zeros(0, dtype=torch.long, device=features.device)
        )

    return in_one_call(head, final_MH, search)


def entropies(distributions: Distributions, flat_M: Tensor, width: int) -> Tensor:
    """Entropy of the distributions at flat positions [M], natural logarithm."""
    chunks = _slices(len(flat_M), max(1, most_logits(flat_M.device) // width))
    parts = [torch.special.entr(distributions(flat_M[part])).sum(1) for part in chunks]
    return torch.cat(parts) if parts else torch.zeros(0, device=flat_M.device)


def smooth_l1(features_MH: Tensor, states_MH: Tensor) -> Tensor:
    """Smooth L1 distance per row [M], mean over H, in full precision."""
    distance = F.smooth_l1_loss(
        full_precision(features_MH), full_precision(states_MH), reduction="none"
    )
    return distance.mean(-1)


def masked_mean(values_M: Tensor, counted_M: Tensor) -> Tensor:
    """Mean over the counted rows (of all processes, see `divisor`); 0 (with a gradient of 0)
    without any.
    """
    return (values_M * counted_M).sum() / divisor(counted_M.sum())


def depth_weights(steps: int, decay: float, first: float = 1.0) -> list[float]:
    """Loss weights first * decay**d of the draft steps."""
    return [first * decay**step for step in range(steps)]


def accuracy(ranks_M: Tensor, valid_M: Tensor, best: int) -> Mean:
    """Share of labels among the `best` drafts. Labels outside the draft vocabulary are misses."""
    return Mean(((ranks_M < best) & valid_M).sum(), valid_M.sum())


def _slices(length: int, size: int) -> Iterator[slice]:
    return (slice(start, start + size) for start in range(0, length, size))
