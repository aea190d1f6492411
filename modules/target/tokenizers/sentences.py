"""Where sentences end: tokens of punctuation, in any spelling that a tokenizer has.

Shape legend: V vocabulary.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

MARKS = ".?!。？！"
"""Characters that end a sentence."""
CLOSERS = "\"'”’)]}»」\n"
"""Characters that may follow within the same token."""


@lru_cache(maxsize=4)
def ending_ids(tokenizer: Any, marks: str = MARKS) -> frozenset[int]:
    """Ids of tokens that are nothing but an end of a sentence: `.`, `. `, `.\\n`, `?"`, `。`, ….

    Args:
        tokenizer: a Hugging Face tokenizer.
        marks: the characters that end a sentence; with a line break among them, lines are
            sentences.
    """
    ids = sorted(set(tokenizer.get_vocab().values()))
    texts = tokenizer.batch_decode([[i] for i in ids], clean_up_tokenization_spaces=False)
    return frozenset(i for i, text in zip(ids, texts) if _ends(text, marks))


def _ends(text: str, marks: str) -> bool:
    inner = text.strip(" \t")
    return any(c in marks for c in inner) and all(c in marks or c in CLOSERS for c in inner)


class Endings:
    """A table of the tokens that end a sentence.

    Args:
        ids: of these tokens.
        size: V.
        device: where ids are looked up.
    """

    def __init__(self, ids: frozenset[int], size: int, device: torch.device) -> None:
        self.table_V = torch.zeros(size, dtype=torch.bool, device=device)
        self.table_V[[i for i in ids if i < size]] = True

    def of(self, ids: Tensor) -> Tensor:
        """bool [...]: whether each token ends a sentence."""
        return self.table_V[ids]
