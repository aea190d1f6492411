"""Vocabularies of tokenizers: whether two are equal, and which ids two different ones share.

Shape legend: E ids of the draft tokenizer, V target vocabulary.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from modules.contracts.target import Target


def vocabulary_hash(tokenizer: Any) -> str:
    """A digest of a tokenizer's pieces and their ids, 16 hexadecimal digits."""
    pieces = json.dumps(sorted(tokenizer.get_vocab().items()))
    return hashlib.sha256(pieces.encode()).hexdigest()[:16]


def first_difference(tokenizer: Any, target: Target) -> str | None:
    """A description of the first piece whose id differs from the target's; None if all pieces have
    the same ids.
    """
    there, here = tokenizer.get_vocab(), target.tokenizer.get_vocab()
    if there == here:
        return None
    piece = min(key for key in {*here, *there} if here.get(key) != there.get(key))
    return f"{piece!r} is {there.get(piece)} there and {here.get(piece)} here"


def check_tokenizer(tokenizer: Any, name: str, target: Target) -> None:
    """ValueError unless all pieces have the same ids as in the target's tokenizer. `name`: the
    model that it belongs to."""
    difference = first_difference(tokenizer, target)
    if difference is not None:
        raise ValueError(
            f"{name} has another tokenizer than the target {target.name} ({difference}): give a "
            "model of the same tokenizer"
        )


@dataclass(frozen=True)
class VocabularyMap:
    """Ids of two tokenizers for the same piece, spelled the same way in both.

    draft_to_target_E, target_to_draft_V: int64, -1 where the other tokenizer has no such piece. No
    two ids are mapped to the same id.
    unknown: draft id that replaces a target id without counterpart in a text.
    """

    draft_to_target_E: Tensor
    target_to_draft_V: Tensor
    unknown: int = 0

    @staticmethod
    def between(tokenizer: Any, target: Target) -> VocabularyMap:
        """The map between a drafter's tokenizer and the target's, on the target's device.

        Raises:
            ValueError: the two have no piece in common.
        """
        # 1. No id has a counterpart yet.
        drafted, size = tokenizer.get_vocab(), target.shape.vocab_size
        to_target = torch.full((max(drafted.values()) + 1,), -1)
        to_draft = torch.full((size,), -1)
        # 2. Map the ids of equal pieces.
        for piece, target_id in sorted(target.tokenizer.get_vocab().items()):
            draft_id = drafted.get(piece)
            # A tokenizer may give two pieces one id: the first of them is mapped.
            if draft_id is None or target_id >= size:
                continue
            if to_target[draft_id] < 0 and to_draft[target_id] < 0:
                to_target[draft_id], to_draft[target_id] = target_id, draft_id
        if not bool((to_draft >= 0).any()):
            raise ValueError(
                f"the drafter's tokenizer has no token of the target {target.name}: it cannot "
                "draft for it"
            )
        unknown = tokenizer.unk_token_id
        device = target.device
        return VocabularyMap(to_target.to(device), to_draft.to(device), unknown or 0)

    def to_draft(self, ids: Tensor) -> Tensor:
        """Draft ids of target ids of any shape; `unknown` where there is no counterpart."""
        draft_ids = self.target_to_draft_V[ids]
        return torch.where(draft_ids < 0, self.unknown, draft_ids)

    def columns(self, vocabulary_D: Tensor | None) -> tuple[Tensor, Tensor]:
        """Columns of draft logits that have a counterpart, and their target ids, ascending.

        vocabulary_D: draft ids of the columns; None: column d is draft id d.
        """
        targets_D = self.draft_to_target_E
        if vocabulary_D is not None:
            targets_D = targets_D[vocabulary_D]
        order_D = targets_D.argsort()
        shared = order_D[targets_D[order_D] >= 0]
        return shared, targets_D[shared]
