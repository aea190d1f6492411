"""The trimmed draft vocabulary: an assistant's most frequent tokens (FR-Spec 2025, EAGLE-3 2025).

Shape legend: D draft vocabulary.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from data.conversations import Tokens

logger = logging.getLogger(__name__)


def frequent_tokens(
    documents: Sequence[Tokens], size: int, vocab_size: int, always: Iterable[int] = ()
) -> Tensor:
    """The `size` most frequent assistant tokens, ascending int64 ids [D]; ties go to the lower id.

    The ids `always` (end of turn) are included first. If the data have fewer distinct tokens, the
    lowest missing ids are added: in a byte-pair vocabulary those are the most common.

    Raises:
        ValueError: `size` is not between 1 and `vocab_size`.
    """
    if not 1 <= size <= vocab_size:
        raise ValueError(
            f"draft_vocabulary must lie between 1 and the target's {vocab_size} tokens, got {size}"
        )
    # A count above all others puts these ids first; the stable sort gives ties to lower ids.
    counts = _counts(documents, vocab_size)
    counts[torch.tensor(list(always), dtype=torch.long)] = counts.sum() + 1
    chosen = counts.argsort(descending=True, stable=True)[:size].sort().values
    logger.info(
        "draft vocabulary of %d tokens covers %.2f%% of the assistant's",
        size,
        100 * coverage(documents, chosen, vocab_size),
    )
    return chosen


def coverage(documents: Sequence[Tokens], vocabulary_D: Tensor, vocab_size: int) -> float:
    """Share of the assistant's tokens that are in the vocabulary."""
    counts = _counts(documents, vocab_size)
    return float(counts[vocabulary_D].sum() / counts.sum())


def _counts(documents: Sequence[Tokens], vocab_size: int) -> Tensor:
    said = torch.cat([document.input_ids[document.loss_mask] for document in documents])
    return torch.bincount(said, minlength=vocab_size)
