"""DSpark for vLLM, in the format of its `speculators` library (`wrapped.py`)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from torch import Tensor

from checkpoints.folders import Ledger
from checkpoints.formats.block_diffusion.dspark import usage
from checkpoints.formats.block_diffusion.tensors import take_block_drafter
from checkpoints.formats.block_diffusion.wrapped import unwrapped, wrapped
from checkpoints.formats.exported import Exported
from modules.contracts.shapes import TargetShape
from modules.drafters.block_diffusion.dspark import DSpark

if TYPE_CHECKING:
    from modules.contracts.target import Target

DRAFTER = DSpark
ENGINES = ("vLLM",)


def exported(drafter: DSpark, target: Target) -> Exported:
    """The drafter as vLLM loads it.

    Raises:
        ValueError: a Markov head that engines do not run.
    """
    return wrapped(drafter, target, "dspark", usage(drafter, target.name))


def recognises(config: Mapping[str, Any]) -> bool:
    """Whether a config.json is of this format."""
    return config.get("speculators_model_type") == "dspark"


def component(config: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments, known dimensions and target of the drafter that a config describes."""
    return unwrapped(config, missing_shift=True, dspark=True)


def weights(
    ledger: Ledger,
    shape: TargetShape,
    arguments: Mapping[str, Any],
    config: Mapping[str, Any],
    target: Target | None,
) -> dict[str, Tensor]:
    """The file's tensors under this project's names."""
    return take_block_drafter(ledger, shape, arguments, target)
