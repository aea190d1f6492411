"""EAGLE-1 and EAGLE-2 for SGLang: the official layout with a bias of the fusion layer, zeros where
there is none.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from checkpoints.formats import eagle
from checkpoints.formats.exported import Exported, served_name, trimmed_note
from modules.drafters.feature.eagle import Eagle

if TYPE_CHECKING:
    from modules.contracts.target import Target

DRAFTER = Eagle
ENGINES = ("SGLang", "the official implementation")
_USAGE = (
    "python -m sglang.launch_server --model-path {target} --speculative-algorithm EAGLE "
    "--speculative-draft-model-path FOLDER --speculative-num-steps {steps} "
    "--speculative-eagle-topk 4 --speculative-num-draft-tokens 16"
)


def exported(drafter: Eagle, target: Target) -> Exported:
    """The drafter as SGLang loads it."""
    config, tensors = eagle.layout(drafter, target, biased=True)
    return Exported(config, tensors, usage=usage(drafter, target.name), notes=trimmed_note(drafter))


def usage(drafter: Eagle, name: str) -> str:
    """The command that starts an engine with it; `name` is the target's."""
    return _USAGE.format(target=served_name(name), steps=drafter.arguments["depth"])


recognises, component, weights = eagle.recognises, eagle.component, eagle.weights
