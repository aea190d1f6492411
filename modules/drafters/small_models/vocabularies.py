"""What drafters that read only tokens share: they serve every target with their tokenizer, also
when the two models pad the vocabulary to different sizes (Qwen2.5 has 151,936 rows at 0.5B and
152,064 at 7B).

Only ids below both sizes are drafted. Where the target has more, the draft vocabulary is those ids;
where it has fewer, the drafter's logits are cut. Verification counts the target's probability of
all ids, so decoding stays lossless.

Shape legend: D draft vocabulary.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from modules.contracts.shapes import TargetShape
from modules.drafters.trained import TrainedDrafter
from modules.target.tokenizers.vocabulary import vocabulary_hash

if TYPE_CHECKING:
    from modules.contracts.target import Target


class TokenDrafter(TrainedDrafter):
    """A trained drafter of one step that reads only tokens.

    Args:
        shape: dimensions of the target it is made for.
        rows: number of token ids that it can read and draft.
        draft_vocabulary: how many token ids can be drafted; None for all that both models have.
    """

    arguments: dict[str, Any]

    def __init__(self, shape: TargetShape, rows: int, draft_vocabulary: int | None) -> None:
        if draft_vocabulary is not None and rows < min(draft_vocabulary, shape.vocab_size):
            raise ValueError(
                f"draft_vocabulary is {draft_vocabulary}, but the drafter has {rows} tokens only: "
                "lower it, or give null"
            )
        super().__init__(shape, 1, draft_vocabulary, decay=1.0)
        self.readable = rows
        self.served = shape.vocab_size
        self.register_buffer("shared", None, persistent=False)
        self._serve(shape.vocab_size)

    @property
    def vocabulary_D(self) -> Tensor | None:
        """Ids [D] that can be drafted for the current target, ascending; None: all it has."""
        return self.vocabulary if self.shared is None else self.shared

    @property
    def draft_size(self) -> int:
        """D: how many tokens can be drafted for the current target."""
        return self.served if self.vocabulary_D is None else len(self.vocabulary_D)

    @property
    def tokens_D(self) -> Tensor | None:
        """Ids of the drafter's own vocabulary that can be drafted [D]; None: all of them."""
        cut = self.vocabulary_D is None and self.served < self.readable
        return (
            torch.arange(self.served, device=next(self.parameters()).device)
            if cut
            else self.vocabulary_D
        )

    def set_vocabulary(self, ids: Any) -> None:
        """As `TrainedDrafter.set_vocabulary`; ValueError also for an id that it cannot read."""
        super().set_vocabulary(ids)
        if self.vocabulary is not None and int(self.vocabulary[-1]) >= self.readable:
            raise ValueError(
                f"draft_vocabulary holds token {int(self.vocabulary[-1])}, but the drafter has "
                f"{self.readable} tokens only: lower it, or give null"
            )

    def _serve(self, size: int) -> None:
        """Draft for a target of `size` ids."""
        self.served, trained_ids = size, min(self.readable, self.shape.vocab_size)
        if self.vocabulary is not None:
            beyond = not self.vocabulary.is_meta and int(self.vocabulary[-1]) >= size
            self.shared = self.vocabulary[self.vocabulary < size] if beyond else None
        else:
            place = next((parameter.device for parameter in self.parameters()), "cpu")
            self.shared = torch.arange(trained_ids, device=place) if trained_ids < size else None

    def read_ids(self, tokens: Tensor) -> Tensor:
        """Token ids that it can read: ids of the target's padding, which have no meaning, become
        its last id.
        """
        return tokens.clamp(max=self.readable - 1) if self.readable < self.served else tokens

    def compatibility(self, target: Target) -> str | None:
        """Why it may not serve a target: its tokenizer differs, or is unknown at another size."""
        recorded, actual = self.arguments.get("tokenizer"), vocabulary_hash(target.tokenizer)
        if recorded is not None and recorded != actual:
            return (
                f"reads a tokenizer of vocabulary {recorded}, the target {target.name} has "
                f"{actual}: give a drafter of the same tokenizer"
            )
        if recorded is None and target.shape.vocab_size != self.shape.vocab_size:
            return (
                f"was made for a vocabulary of {self.shape.vocab_size} tokens, the target "
                f"{target.name} has {target.shape.vocab_size}, and its tokenizer is not recorded: "
                "give a drafter of the same size, or train it anew"
            )
        return None

    def serve(self, target: Target) -> None:
        """Draft from now on the ids that this target and the drafter share."""
        self._serve(target.shape.vocab_size)

    def adapt(self, target: Target) -> Target:
        """The target itself, unchanged; the drafter serves it from now on.

        Raises:
            ValueError: the target's tokenizer is not the drafter's.
        """
        reason = self.compatibility(target)
        if reason is not None:
            raise ValueError(f"drafter {reason}")
        self.serve(target)
        return target
