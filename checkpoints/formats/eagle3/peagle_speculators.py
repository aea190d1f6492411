"""P-EAGLE for vLLM, in the format of its `speculators` library: EAGLE-3's with `mask_token_id`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from torch import Tensor

from checkpoints.folders import Ledger
from checkpoints.formats.eagle3.peagle import peagle_arguments, peagle_tensors, usage
from checkpoints.formats.eagle3.peagle import weights as flat_weights
from checkpoints.formats.eagle3.speculators import wrapped
from checkpoints.formats.exported import Exported
from checkpoints.formats.llama import layer_shape
from modules.contracts.shapes import TargetShape
from modules.drafters.feature.peagle import PEagle

if TYPE_CHECKING:
    from modules.contracts.target import Target

DRAFTER = PEagle
ENGINES = ("vLLM",)


def exported(drafter: PEagle, target: Target) -> Exported:
    """The drafter as vLLM loads it."""
    layers = {"num_hidden_layers": len(drafter.stack)}
    config = wrapped(drafter, target, "peagle", "PEagleSpeculator", layers)
    config["mask_token_id"] = drafter.mask(target)
    config["embed_requires_grad"] = drafter.embed_tokens is not None
    return Exported(config, peagle_tensors(drafter, target), usage=usage(drafter, target.name))


def recognises(config: Mapping[str, Any]) -> bool:
    """Whether a config.json is of this format."""
    return config.get("speculators_model_type") == "peagle"


def component(config: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments, known dimensions and target of the drafter that a config describes.

    Raises:
        ValueError: an option that is not supported.
    """
    layer, library = config["transformer_layer_config"], config.get("speculators_config", {})
    ids = config.get("eagle_aux_hidden_state_layer_ids")
    methods = library.get("proposal_methods") or [{}]
    flat = {**layer, **config, "model_type": layer.get("model_type")}
    return {
        "arguments": peagle_arguments(
            flat, ids, methods[0].get("speculative_tokens"), config["mask_token_id"]
        ),
        "shape": layer_shape(layer),
        "target": library.get("verifier", {}).get("name_or_path"),
    }


def weights(
    ledger: Ledger,
    shape: TargetShape,
    arguments: Mapping[str, Any],
    config: Mapping[str, Any],
    target: Target | None,
) -> dict[str, Tensor]:
    """The file's tensors under this project's names."""
    return flat_weights(ledger, shape, arguments, config, target)
