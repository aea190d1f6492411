"""The contract of everything that is trained: a loss, declared parameters, arguments that are the
config.
"""

from __future__ import annotations

import inspect
from abc import abstractmethod
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

from torch import nn
from typing_extensions import Self

from modules.contracts.float32_buffers import SteadyBuffers
from modules.contracts.losses import Losses
from modules.contracts.shapes import StateName, TargetShape

if TYPE_CHECKING:
    from modules.contracts.target import Target


MOST = {
    "heads": 64,
    "steps": 64,
    "block": 64,
    "blocks": 64,
    "layers": 1024,
    "depth": 256,
    "draft_length": 256,
    "width": 1024,
}
"""The largest counts that a component takes: each is made one by one, and a tree's paths grow with
its square. Far above any that was published."""


@dataclass(frozen=True)
class Stage:
    """A part of a component that is trained before the whole, by its own loss and on what the data
    give for stages.

    name: of the part. part: what is trained; frozen otherwise. epochs: passes over the data. lr:
    peak learning rate.
    """

    name: str
    part: Trainable
    epochs: int
    lr: float


@dataclass(frozen=True)
class Outcome:
    """What `Trainable.finish` found out: figures by name, and texts to leave in the run's folder by
    file name.
    """

    figures: dict[str, float] = field(default_factory=dict)
    pages: dict[str, str] = field(default_factory=dict)


class Trainable(SteadyBuffers):
    """A module that Slipstream trains.

    A subclass's constructor takes `shape: TargetShape` first and JSON-able keyword arguments after
    it; they are remembered in `arguments` and *are* the saved config. Weights that start from the
    target are copied in `initialise`, so that loading a saved module never needs the target.
    """

    arguments: dict[str, Any]
    trained_length: int | None = None
    """Tokens of the longest row it was trained on, where its folder says so."""
    batch_kind: ClassVar[str] = "text"
    """`"text"`, `"preference"` or `"labelled"`: the batch type that `loss` wants."""

    def __new__(cls, *args: Any, **kwargs: Any) -> Self:
        """Remember the constructor's arguments, defaults filled in. ValueError: a count beyond
        `MOST`.
        """
        module = super().__new__(cls)
        bound = inspect.signature(cls.__init__).bind_partial(None, *args, **kwargs)
        bound.apply_defaults()
        for name in MOST.keys() & bound.arguments.keys():
            value = bound.arguments[name]
            if isinstance(value, int) and value > MOST[name]:
                raise ValueError(f"{name} must be at most {MOST[name]}, got {value}")
        module.__dict__["arguments"] = dict(list(bound.arguments.items())[1:])
        return module

    @property
    def training_states(self) -> tuple[StateName, ...]:
        """Names of the target states that `loss` reads from `batch.states`."""
        return ()

    @property
    def online(self) -> bool:
        """Whether `loss` runs the target itself (then cached states are of no use)."""
        return False

    def initialise(self, target: Target) -> None:
        """Copy whatever starts from the target's weights. Called once, before training from
        scratch.
        """

    def declared_parameters(self) -> Iterator[nn.Parameter]:
        """The parameters that training changes, and the only ones that gradients may reach."""
        return (parameter for parameter in self.parameters() if parameter.requires_grad)

    @property
    def trained_size(self) -> int:
        """How many numbers those are; a frozen copy of a part of the target, such as its embedding,
        does not count.
        """
        return sum(parameter.numel() for parameter in self.declared_parameters())

    def parameter_groups(self) -> list[dict[str, Any]]:
        """Optimiser groups; `lr_scale` multiplies the recipe's learning rate."""
        return [{"params": list(self.declared_parameters()), "lr_scale": 1.0}]

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

    def finish(self, batches: Iterable[Any], target: Target) -> Outcome:
        """Last touches on trained weights before they are saved, with the held-out batches (a
        threshold, a page).
        """
        return Outcome()

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
