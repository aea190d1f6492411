"""What drafters that search the text share: the tokens of every sequence so far.

Shape legend: B sequences, T prompt tokens, L capacity, A accepted rows, K drafted tokens.
"""

from __future__ import annotations

from collections.abc import Mapping
from copy import deepcopy
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor
from torch.nn import functional as F

from modules.contracts.drafter import Context, Drafter, DraftState, Part
from modules.contracts.losses import Losses
from modules.contracts.shapes import StateName, TargetShape
from modules.contracts.target import Target
from modules.contracts.token_tree import SiblingDraw, TokenTree, Topology
from modules.contracts.verification import Accepted, Verified

Item = TypeVar("Item")


class PerSequence(list[Item]):
    """A list with one object per sequence, selected together with the sequences of a batch."""

    def select(self, sequences_S: Tensor) -> PerSequence[Item]:
        """The objects of these sequences alone; of one that is repeated copies, so that each text
        goes on by itself."""
        chosen = sequences_S.tolist()
        return PerSequence(
            deepcopy(self[i]) if i in chosen[:place] else self[i] for place, i in enumerate(chosen)
        )


@dataclass
class TextState(DraftState):
    """State of a text drafter.

    text_BL: int64 [B,L], prompt and answer of each sequence up to the newest token; undefined after
    it.
    """

    text_BL: Tensor

    def texts(self) -> list[list[int]]:
        """The tokens of each sequence, the newest included."""
        return [
            text[:count]
            for text, count in zip(self.text_BL.tolist(), self.counts_B.tolist(), strict=True)
        ]

    @property
    def counts_B(self) -> Tensor:
        """int64 [B]: tokens of each text, the newest included."""
        return self.lengths_B + 1


class TextDrafter(Drafter):
    """Base of the drafters without parameters that read the text. Their tokens are chosen by value,
    as point masses.

    Args:
        shape: the target's dimensions (most text drafters read nothing of it).
    """

    names_places = ("datastore",)

    def __init__(self, shape: TargetShape) -> None:
        super().__init__()
        self.shape = shape

    def compatibility(self, target: Target) -> str | None:
        """None: it serves every target."""
        return None

    def parts(self) -> Mapping[str, Part]:
        """Its datastore, if it has one."""
        folder = self.arguments.get("datastore")
        return {} if folder is None else {"datastore": Path(folder)}

    @property
    def sibling_draw(self) -> SiblingDraw:
        """Siblings are chosen by value, never drawn."""
        return SiblingDraw.BY_VALUE

    def loss(self, batch: object, target: Target, progress: float) -> Losses:
        """Raises ValueError: there is nothing to train."""
        raise ValueError(
            f"{type(self).__name__} has no parameters to train: name it in an evaluation's methods"
        )

    @property
    def decoding_states(self) -> tuple[StateName, ...]:
        """No states: it reads tokens only."""
        return ()

    def start(self, context: Context) -> TextState:
        """State with the prompt and the first token."""
        text = F.pad(context.input_ids_BT, (0, 64))
        text = text.scatter(1, context.lengths_B[:, None], context.newest_B[:, None])
        return TextState(context, context.newest_B, context.lengths_B, text)

    def absorb(self, state: DraftState, verified: Verified, accepted: Accepted) -> TextState:
        """State with the emitted tokens appended to the text."""
        assert isinstance(state, TextState)
        emitted = accepted.emitted(verified.tree)
        return replace(
            state,
            newest_B=accepted.next_B,
            lengths_B=state.lengths_B + accepted.lengths_B,
            text_BL=appended(state.text_BL, state.counts_B, emitted),
        )


def appended(text_BL: Tensor, counts_B: Tensor, emitted_BA: Tensor) -> Tensor:
    """The texts with emitted tokens after the first `counts_B` of each. Reads the device."""
    width = emitted_BA.shape[1]
    needed = int(counts_B.max()) + width
    # Capacity grows by half, so that appending is amortised.
    if needed > text_BL.shape[1]:
        text_BL = F.pad(text_BL, (0, needed + text_BL.shape[1] // 2 - text_BL.shape[1]))
    place_BA = counts_B[:, None] + torch.arange(width, device=text_BL.device)
    return text_BL.scatter(1, place_BA, emitted_BA)


def chains(newest_B: Tensor, drafts: list[Tensor]) -> TokenTree:
    """A chain after each newest token: drafts int64 [K_b] per sequence, padded to the longest."""
    longest = max(len(draft) for draft in drafts)
    tokens = torch.stack([F.pad(draft, (0, longest - len(draft))) for draft in drafts])
    tokens = torch.cat([newest_B[:, None], tokens], dim=1)
    places = torch.arange(longest + 1, device=tokens.device)
    counts = torch.tensor([len(draft) for draft in drafts], device=tokens.device)
    return TokenTree(tokens, Topology(torch.where(places <= counts[:, None], places - 1, places)))
