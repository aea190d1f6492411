"""Updates of one drafter from the requests that it served.

The weights that learn and those that draft are two copies, so that requests are answered during an
update; the second takes over the first between two requests. Everything random in an update follows
from the seed and the update's number.
"""

from __future__ import annotations

import copy
import json
import logging
import threading
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import safe_open
from torch import Tensor, nn
from torch.autograd.graph import increment_version
from torch.optim import AdamW

from checkpoints.folders import write_tensors
from checkpoints.pretrained import assign_weights
from modules.contracts.drafter import Drafter
from modules.contracts.shapes import StateName
from modules.runtime.files import whole_file
from modules.target.target import Target
from train.lightning.optimizers import adamw, decay_groups
from train.online.buffer import Buffer, Item, batch_of
from train.online.settings import LearningSettings
from train.settings import OptimizerSettings

logger = logging.getLogger(__name__)

STATE, ITEMS = "state.safetensors", "items"
_WEIGHT, _MOMENT = "weights.", "optimizer."
_SEEDS = 1_000_003


class Update(NamedTuple):
    """The result of one update: its number from 1, the loss, and the gradient's norm."""

    number: int
    loss: float
    norm: float


class Learner:
    """A drafter that learns while it serves.

    Args:
        drafter: with its first weights, on the target's device.
        target: the frozen target.
        settings: when and how it learns.
        folder: of its state and its items.
        seed: of dropout and of replay.
        mixed: whether matrices are multiplied in bfloat16 in updates.
    """

    def __init__(
        self,
        drafter: Drafter,
        target: Target,
        settings: LearningSettings,
        folder: Path,
        seed: int = 0,
        mixed: bool = False,
    ) -> None:
        self.target, self.settings, self.folder = target, settings, folder
        self.seed, self.mixed = seed, mixed
        self.student, self.serving = drafter, copy.deepcopy(drafter).to(target.dtype).eval()
        self.buffer = Buffer(folder / ITEMS, settings.capacity if settings.replay else 0)
        self.optimizer = self._optimizer()
        self.updates = self.served_updates = self._saved_updates = 0
        self._writing = threading.Lock()
        """Held while the student's weights change."""

    @property
    def states(self) -> tuple[StateName, ...]:
        """Target states that are recorded for the loss. A language model reads only tokens, and
        some losses run the target themselves.
        """
        student = self.student
        return () if student.own_model or student.online else student.training_states

    @property
    def due(self) -> bool:
        """Whether enough requests wait for an update."""
        return 0 < self.settings.interval <= len(self.buffer.waiting)

    def refresh(self) -> None:
        """Draft with the newest weights, between two requests. Never waits: while the weights are
        being changed, the earlier ones draft once more.
        """
        if self.served_updates == self.updates or not self._writing.acquire(blocking=False):
            return
        try:
            self.serving.load_state_dict(self.student.state_dict())
            self.served_updates = self.updates
        finally:
            self._writing.release()

    def store(self, item: Item) -> None:
        """Write an item's file, unless there are no updates."""
        if self.settings.interval:
            self.buffer.store(item)

    def add(self, item: Item) -> None:
        """Let a stored item wait for an update, unless there are none."""
        if self.settings.interval:
            self.buffer.waiting.append(item)

    # -- updates -----------------------------------------------------------------------------------

    def update(self) -> Update:
        """One optimiser step on the requests that have waited longest; saved when that is due."""
        settings, seed = self.settings, self.seed + _SEEDS * self.updates
        items = self.buffer.take(settings.interval, settings.replay, seed)
        loss, norm = self._step(items, seed) if any(len(i.positions_P) for i in items) else (0, 0)
        self.updates += 1
        if self.updates % settings.save_every == 0:
            self.save()
        return Update(self.updates, loss, norm)

    def _step(self, items: list[Item], seed: int) -> tuple[float, float]:
        parameters = list(self.student.declared_parameters())
        device, size = self.target.device, self.target.shape.vocab_size
        batch = batch_of(items, size, parameters[0].dtype, device)
        # 1. The drafter's own loss, with random numbers of this update alone.
        self.student.train()
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            torch.manual_seed(seed)
            with torch.autocast(device.type, torch.bfloat16, enabled=self.mixed):
                loss = self.student.loss(batch, self.target, 1.0).total
            loss.backward()
        # 2. One step, unless its gradient is not finite.
        limit = self.settings.gradient_clip_val or float("inf")
        norm = nn.utils.clip_grad_norm_(parameters, limit)
        if torch.isfinite(norm):
            with self._writing:
                self.optimizer.step()
                increment_version(parameters)
        else:
            logger.warning(
                "update %d: the gradient is not finite, so it is skipped: lower learning.lr",
                self.updates + 1,
            )
        self.optimizer.zero_grad()
        return float(loss.detach()), float(norm)

    def _optimizer(self) -> AdamW:
        settings = OptimizerSettings(
            self.settings.lr, betas=(0.9, 0.999), weight_decay=self.settings.weight_decay
        )
        groups = self.student.parameter_groups()
        return adamw([part for group in groups for part in decay_groups(group, settings)], settings)

    # -- resuming ----------------------------------------------------------------------------------

    def save(self) -> None:
        """Write weights, optimiser and the buffer's place atomically, then delete items that no
        state needs.
        """
        if self._saved_updates == self.updates:
            return
        moments: dict[str, Tensor] = {
            f"{_MOMENT}{index}.{name}": value
            for index, state in self.optimizer.state_dict()["state"].items()
            for name, value in state.items()
        }
        weights = {f"{_WEIGHT}{name}": t for name, t in self.student.state_dict().items()}
        place = {
            "updates": self.updates,
            "consumed": self.buffer.consumed,
            "earlier": [item.number for item in self.buffer.earlier],
        }
        with whole_file(self.folder / STATE) as partial:
            write_tensors(partial, {**weights, **moments}, {"place": json.dumps(place)})
        self._saved_updates = self.updates
        self.buffer.prune()

    def load(self, answered: int) -> None:
        """Go on where a killed run was: its saved state, then the updates since.

        Args:
            answered: requests whose answers were recorded.
        """
        place = {"updates": 0, "consumed": -1, "earlier": []}
        if (self.folder / STATE).exists():
            place = self._read_state()
        self.updates = self._saved_updates = place["updates"]
        self.buffer.load(answered, place["consumed"], place["earlier"])
        while self.due:
            self.update()

    def _read_state(self) -> dict:
        file = self.folder / STATE
        with safe_open(file, framework="pt") as opened:
            place = json.loads((opened.metadata() or {})["place"])
            tensors: dict[str, Tensor] = {
                name: opened.get_tensor(name)
                for name in opened.keys()  # noqa: SIM118
            }
        weights, state = {}, {}
        for name, tensor in tensors.items():
            if name.startswith(_WEIGHT):
                weights[name.removeprefix(_WEIGHT)] = tensor
            else:
                index, _, key = name.removeprefix(_MOMENT).partition(".")
                state.setdefault(int(index), {})[key] = tensor
        assign_weights(self.student, weights, str(file))
        groups = self.optimizer.state_dict()["param_groups"]
        self.optimizer.load_state_dict({"state": state, "param_groups": groups})
        return place
