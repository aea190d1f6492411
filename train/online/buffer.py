"""Answered requests on their way into an update, each in a file until no saved state needs it.

Shape legend: B requests, T tokens of a text, P positions to learn, K probabilities of each, H
hidden size.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from checkpoints.folders import write_tensors
from modules.contracts.batches import PADDING_DOCUMENT, TeacherProbs, TextBatch
from modules.contracts.shapes import StateName
from modules.runtime.files import whole_file

_STATE = "state."


@dataclass(frozen=True)
class Item:
    """One answered request.

    number: of the request. ids_T: int64 [T], prompt and answer. positions_P: int64 [P], indices of
    the tokens to learn, ascending. tokens_PK, probs_PK: the target's distribution of each
    (`TeacherProbs`). states: `{name: [T-1,H]}` of the target, without the last token, which it has
    not read.
    """

    number: int
    ids_T: Tensor
    positions_P: Tensor
    tokens_PK: Tensor
    probs_PK: Tensor
    states: dict[StateName, Tensor]

    def write(self, file: Path) -> None:
        """Write it to a file, atomically."""
        tensors = {
            "ids": self.ids_T,
            "positions": self.positions_P,
            "tokens": self.tokens_PK,
            "probs": self.probs_PK,
            **{f"{_STATE}{name}": state for name, state in self.states.items()},
        }
        with whole_file(file) as partial:
            write_tensors(partial, tensors)

    @staticmethod
    def read(file: Path) -> Item:
        """The item of a file that `write` has written; its name is the request's number."""
        tensors = load_file(file)
        names = [name.removeprefix(_STATE) for name in tensors if name.startswith(_STATE)]
        states: dict[StateName, Tensor] = {
            int(name) if name.isdecimal() else name: tensors[f"{_STATE}{name}"] for name in names
        }
        return Item(
            int(file.stem),
            tensors["ids"],
            tensors["positions"],
            tensors["tokens"],
            tensors["probs"],
            states,
        )


def batch_of(
    items: Sequence[Item], vocabulary: int, dtype: torch.dtype, device: torch.device
) -> TextBatch:
    """Items as right-padded rows, whose labels are their positions to learn.

    Args:
        items: at least one of them with a position.
        vocabulary: the target's size.
        dtype: of states and probabilities.
        device: of all of them.
    """
    # 1. Texts, one document each.
    ids_BT = pad_sequence([item.ids_T for item in items], batch_first=True)
    width = ids_BT.shape[1]
    lengths_B = torch.tensor([len(item.ids_T) for item in items])
    order_BT = torch.arange(width).expand(len(items), -1)
    documents = torch.where(order_BT < lengths_B[:, None], 0, PADDING_DOCUMENT)
    # 2. Token j is a label; row j - 1 produces it.
    labels = torch.cat([index * width + item.positions_P for index, item in enumerate(items)])
    mask = torch.zeros(ids_BT.numel(), dtype=torch.bool).index_fill(0, labels, True)
    learnt = [item for item in items if len(item.positions_P)]
    teacher = TeacherProbs(
        (labels - 1).to(device),
        torch.cat([item.tokens_PK for item in learnt]).to(device),
        torch.cat([item.probs_PK for item in learnt]).to(device, dtype),
        vocabulary,
    )
    # 3. States; the last token's, which no label needs, and those of padding are 0.
    states = {}
    for name in items[0].states:
        rows = [item.states[name].to(device, dtype) for item in items]
        padded = pad_sequence(rows, batch_first=True)
        states[name] = torch.cat([padded, torch.zeros_like(padded[:, :1])], dim=1)
    return TextBatch(
        ids_BT.to(device),
        mask.view_as(ids_BT).to(device),
        order_BT.to(device),
        documents.to(device),
        states,
        teacher,
    )


class Buffer:
    """Items that wait for an update, and earlier ones that updates may draw again.

    One thread adds, and one takes. Items are in the order of their numbers.

    Args:
        folder: of their files.
        capacity: of the earlier ones, the newest; 0 for none.
    """

    def __init__(self, folder: Path, capacity: int) -> None:
        self.folder, self.capacity = folder, capacity
        self.waiting: list[Item] = []
        self.earlier: list[Item] = []
        self.consumed = -1
        """Number of the last item that an update took."""

    def store(self, item: Item) -> None:
        """Write an item's file; it waits for an update once it is in `waiting`."""
        self.folder.mkdir(parents=True, exist_ok=True)
        item.write(self._file(item.number))

    def take(self, count: int, replay: int, seed: int) -> list[Item]:
        """The first `count` that wait, and `replay` earlier ones drawn with `seed`."""
        taken = self.waiting[:count]
        drawn = random.Random(seed).sample(self.earlier, min(replay, len(self.earlier)))
        # They are earlier ones from now on.
        del self.waiting[:count]
        self.consumed = taken[-1].number
        self.earlier = [*self.earlier, *taken][-self.capacity :] if self.capacity else []
        return [*taken, *drawn]

    def prune(self) -> None:
        """Delete the files of items that were taken and are not drawn again."""
        needed = {item.number for item in self.earlier}
        for file in self.folder.glob("*.safetensors"):
            if int(file.stem) <= self.consumed and int(file.stem) not in needed:
                file.unlink()

    def load(self, answered: int, consumed: int, earlier: Sequence[int]) -> None:
        """Read the items of a killed run.

        Args:
            answered: requests whose answers were recorded; items of later ones are deleted.
            consumed: number of the last item of the updates that are in the saved state.
            earlier: numbers of the earlier items in that state.
        """
        self.consumed = consumed
        for file in self.folder.glob("*.safetensors"):
            if int(file.stem) >= answered:
                file.unlink()
        files = sorted(self.folder.glob("*.safetensors"), key=lambda file: int(file.stem))
        self.waiting = [Item.read(file) for file in files if int(file.stem) > consumed]
        self.earlier = [Item.read(self._file(number)) for number in earlier]

    def _file(self, number: int) -> Path:
        return self.folder / f"{number:08d}.safetensors"
