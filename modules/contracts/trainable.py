"""The contract of everything that is trained: a loss, declared parameters, arguments that are the
config.
"""

from __future__ import annotations

import inspect
import logging
import math
from abc import abstractmethod
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import nn
from typing_extensions import Self

from modules.contracts.batches import TextBatch
from modules.contracts.float32_buffers import SteadyBuffers
from modules.contracts.losses import Losses
from modules.contracts.shapes import StateName, TargetShape

if TYPE_CHECKING:
    from modules.contracts.target import Target

logger = logging.getLogger(__name__)

MOST = {
    "heads": 64,
    "steps": 64,
    "block": 64,
    "blocks": 64,
    "layers": 1024,
    "depth": 256,
    "draft_length": 256,
    "width": 1024,
    "window": 1 << 24,
}
"""The largest counts that a constructor accepts. Parts are made one by one, and a tree's paths grow
with its square; published values are far below."""


@dataclass(frozen=True)
class Stage:
    """A part of a component that is trained before the whole, with its own loss, on the data
    meant for stages.

    name: of the part. part: what is trained; frozen otherwise. epochs: passes over the data. lr:
    peak learning rate.
    """

    name: str
    part: Trainable
    epochs: int
    lr: float


@dataclass(frozen=True)
class TrainingResult:
    """The result of `Trainable.finish`: figures by name, and texts for the run's folder by file
    name.
    """

    figures: dict[str, float] = field(default_factory=dict)
    pages: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class GradientLayers:
    """Decoder layers that a training step runs with a gradient: a language model's own, or the
    target's under adapters.

    shape: their dimensions and how many there are. adapted: they are the target's, which are never
    recomputed. dropout: the adapters drop some of their inputs.
    """

    shape: TargetShape
    adapted: bool = False
    dropout: bool = False


@dataclass(frozen=True)
class Footprint:
    """What a training step computes, as far as its memory depends on it (`train.plan`).

    tokens: of a batch on one process, padding included. row: tokens of a row. steps: draft steps
    that are trained. width: logits per row. own_head: an LM head that learns. soft: the target's
    distributions are learnt. sides: rows that belong together (2 of a pair). score_heads: heads of
    an attention whose scores are kept for every pair of tokens of a row, `most_scores` of them at a
    time; 0 without one. layers: decoder layers with a gradient.
    step_bytes: that a draft step stores per token for its backward pass, as a multiple of the
    hidden size: in float32, and in mixed precision of 16 bits. input_bytes: likewise of a step that
    is recomputed.
    """

    tokens: int
    row: int
    steps: int
    width: int
    own_head: bool = False
    soft: bool = False
    sides: int = 1
    score_heads: int = 0
    most_scores: int = 0
    layers: GradientLayers | None = None
    step_bytes: tuple[float, float] = (64.0, 64.0)
    input_bytes: float = 8.0


@dataclass(frozen=True)
class TrainedFor:
    """The target that a component was trained for.

    fingerprint: of its weights; None where the component's format does not state it. dtype: their
    precision then, such as `bfloat16`; None where the folder is older.
    """

    name: str
    shape: TargetShape
    fingerprint: str | None
    dtype: str | None = None

    def difference(self, target: Target) -> str | None:
        """Why `target` is a different model, or None. Of the same name, a quantised target, and a
        16-bit one beside an exact one, count as the same with rounded weights (see `rounded`).
        """
        # 1. Dimensions must agree, whatever the weights are.
        there, here = self.shape, target.shape
        if there.vocab_size != here.vocab_size:
            return (
                f"was trained for {self.name} with a vocabulary of {there.vocab_size} tokens, the "
                f"target {target.name} has {here.vocab_size}"
            )
        if (there.hidden_size, there.num_layers) != (here.hidden_size, here.num_layers):
            return (
                f"was trained for {self.name} with hidden size {there.hidden_size} and "
                f"{there.num_layers} layers, the target {target.name} has hidden size "
                f"{here.hidden_size} and {here.num_layers} layers"
            )
        # 2. Then the weights.
        if self._same_weights(target) or self.rounded(target):
            return None
        return (
            f"was trained for {self.name} with weights {self.fingerprint}, the target "
            f"{target.name} has weights {target.fingerprint()}: train it for this target"
        )

    def rounded(self, target: Target) -> bool:
        """Whether `target` has its name and other weights, of which these or those are rounded to
        16 bits: taken for the same ones.
        """
        named = self.name == target.name
        trained_at = getattr(torch, self.dtype or "float32")
        coarse = min(target.dtype.itemsize, trained_at.itemsize) < torch.float32.itemsize
        return named and coarse and not self._same_weights(target)

    def _same_weights(self, target: Target) -> bool:
        packed = self.name == target.name and target.quantisation
        return bool(packed) or self.fingerprint in (None, target.fingerprint())


class Trainable(SteadyBuffers):
    """A module that Slipstream trains.

    A subclass's constructor takes `shape: TargetShape` first and JSON-able keyword arguments after
    it; they are remembered in `arguments` and *are* the saved config. Weights that start from the
    target are copied in `initialise`, so that loading a saved module never needs the target.
    """

    arguments: dict[str, Any]
    trained_length: int | None = None
    """Tokens of the longest row it was trained on, where its folder says so."""
    trained_for: TrainedFor | None = None
    """The target it was trained for, where it was loaded from a folder."""
    loaded_from: str | None = None
    """The run, folder or Hub id that it was loaded from."""
    batch_type: ClassVar[type] = TextBatch
    """The batch type that `loss` wants: text, pairs or labelled text."""
    names_places: ClassVar[tuple[str, ...]] = ()
    """Arguments that may name a file or a model on the training machine. A saved component has
    none: a downloaded folder must not decide what is read or downloaded here."""

    def __new__(cls, *args: Any, **kwargs: Any) -> Self:
        """Remember the constructor's arguments, defaults filled in.

        Raises:
            ValueError: a count beyond `MOST`, a negative whole number, or a number that is not
                finite.
        """
        module = super().__new__(cls)
        # 1. All arguments by name, without `self`.
        bound = inspect.signature(cls.__init__).bind_partial(None, *args, **kwargs)
        bound.apply_defaults()
        # 2. Refuse numbers that no component can be built from.
        for name, value in bound.arguments.items():
            if isinstance(value, int) and value > MOST.get(name, value):
                raise ValueError(f"{name} must be at most {MOST[name]}, got {value}")
            if isinstance(value, int) and value < 0:
                raise ValueError(f"{name} must not be negative, got {value}")
            if isinstance(value, float) and not math.isfinite(value):
                raise ValueError(f"{name} must be finite, got {value}")
        module.arguments = dict(list(bound.arguments.items())[1:])
        return module

    @property
    def training_states(self) -> tuple[StateName, ...]:
        """Names of the target states that `loss` reads from `batch.states`."""
        return ()

    @property
    def online(self) -> bool:
        """Whether `loss` runs the target itself (then cached states are of no use)."""
        return False

    # Which targets it may serve.

    def compatibility(self, target: Target) -> str | None:
        """Why it may not serve this target, worded to follow the component's name in a message;
        None if it may. It serves the target that it was trained for unless a subclass overrides
        this.
        """
        return None if self.trained_for is None else self.trained_for.difference(target)

    def serve(self, target: Target) -> None:
        """Prepare for a target that it may serve; called where it is loaded for one. Warns where
        the target's weights are taken for rounded ones. (A lossy rule, a judge, is better
        calibrated on the very target that it serves.)
        """
        if self.trained_for is not None and self.trained_for.rounded(target):
            logger.warning(
                "%s was trained for %s with other weights than it has at %s: taken for the same "
                "ones, rounded",
                type(self).__name__,
                target.name,
                str(target.dtype).removeprefix("torch."),
            )

    # Training.

    def initialise(self, target: Target) -> None:
        """Copy whatever starts from the target's weights. Called once, before training from
        scratch.
        """

    def refusal_to_start(self, arguments: Mapping[str, Any]) -> str | None:
        """Why weights of an earlier component with these arguments must not be its beginning,
        although their shapes fit; None if they may.
        """
        return None

    def declared_parameters(self) -> Iterator[nn.Parameter]:
        """The parameters that training changes, and the only ones that gradients may reach."""
        return (parameter for parameter in self.parameters() if parameter.requires_grad)

    @property
    def trained_size(self) -> int:
        """How many numbers they hold. A frozen copy of a part of the target, such as its embedding,
        does not count.
        """
        return sum(parameter.numel() for parameter in self.declared_parameters())

    def parameter_groups(self) -> list[dict[str, Any]]:
        """Optimiser groups; `lr_scale` multiplies the recipe's learning rate."""
        return [{"params": list(self.declared_parameters()), "lr_scale": 1.0}]

    def footprint(self, rows: int, length: int) -> Footprint:
        """What a training step on so many rows of `length` tokens computes."""
        shape = self.arguments["shape"]
        width = int(self.arguments.get("draft_vocabulary") or shape.vocab_size)
        own_head = any(
            tuple(parameter.shape) == (width, shape.hidden_size)
            for parameter in self.declared_parameters()
        )
        return Footprint(rows * length, length, 1, width, own_head)

    @property
    def uneven_calls(self) -> str:
        """Why processes call its modules unequally often in a step; empty: they do not
        (`LearntHead`).
        """
        return ""

    @property
    def stages(self) -> tuple[Stage, ...]:
        """Parts that are trained first, in this order."""
        return ()

    def finish(self, batches: Iterable[Any], target: Target) -> TrainingResult:
        """Post-processing of trained weights before they are saved, with the held-out batches (a
        threshold, a page).
        """
        return TrainingResult()

    @abstractmethod
    def loss(self, batch: Any, target: Target, progress: float) -> Losses:
        """The loss of one batch. `progress` is for schedules: it runs from 0 to 1 over training,
        and validation passes 1, so that the validation losses of one run can be compared with each
        other."""

    def config(self) -> dict[str, Any]:
        """The constructor's arguments as JSON-able values."""
        return {
            key: asdict(value) if isinstance(value, TargetShape) else value
            for key, value in self.arguments.items()
        }


class Objective(nn.Module):
    """A loss that replaces a component's own in continued training (`objective` of a recipe)."""

    @abstractmethod
    def begin(self, drafter: Trainable) -> None:
        """Called once before training, with the component as it is then. ValueError: one that the
        objective cannot train."""

    @abstractmethod
    def loss(self, drafter: Trainable, batch: Any, target: Target, progress: float) -> Losses:
        """The loss of one batch; see `Trainable.loss`."""
