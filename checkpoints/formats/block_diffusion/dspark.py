"""DSpark as DeepSpec, SGLang and vLLM read it: a flat Qwen3 config with DSpark's keys at the top.

`target_layer_ids` name layer outputs, one less than this project's ids of inputs.
`sample_from_anchor` is always written: readers disagree on what its absence means.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from torch import Tensor

from checkpoints.folders import Ledger
from checkpoints.formats.block_diffusion.tensors import (
    backbone_config,
    block_arguments,
    block_tensors,
    head_config,
    layer_ids,
    take_block_drafter,
)
from checkpoints.formats.exported import Exported, served_name
from checkpoints.formats.llama import layer_shape, old_rope
from modules.contracts.shapes import TargetShape
from modules.drafters.block_diffusion.dspark import DSpark

if TYPE_CHECKING:
    from modules.contracts.target import Target

DRAFTER = DSpark
ENGINES = ("vLLM", "SGLang")
_ARCHITECTURES = ("Qwen3DSparkModel", "DSparkDraftModel")
_USAGE = (
    "vllm serve {target} --speculative-config "
    '\'{{"method": "dspark", "model": "FOLDER", "num_speculative_tokens": {tokens}}}\''
)


def exported(drafter: DSpark, target: Target) -> Exported:
    """The drafter as the engines load it.

    Raises:
        ValueError: a Markov head that engines do not run.
    """
    config = {
        **old_rope(backbone_config(drafter)),
        "architectures": [_ARCHITECTURES[0]],
        "block_size": drafter.pass_rows,
        "num_target_layers": target.shape.num_layers,
        "layer_types": ["full_attention"] * len(drafter.layers),
        "mask_token_id": drafter.mask(target),
        "target_layer_ids": [k - 1 for k in layer_ids(drafter)],
        "sample_from_anchor": drafter.layout == "shift",
        "draft_vocab_size": drafter.draft_size,
        "base_model_name_or_path": served_name(target.name),
        **head_config(drafter),
    }
    tensors = block_tensors(drafter, target)
    notes = ("the confidences' temperatures stay here: engines read them uncalibrated",)
    return Exported(config, tensors, usage=usage(drafter, target.name), notes=notes)


def usage(drafter: DSpark, name: str) -> str:
    """The command that starts an engine with it; `name` is the target's."""
    return _USAGE.format(target=served_name(name), tokens=drafter.block)


def recognises(config: Mapping[str, Any]) -> bool:
    """Whether a config.json is of this format."""
    return any(name in _ARCHITECTURES for name in config.get("architectures") or ()) and (
        "markov_rank" in config and "speculators_model_type" not in config
    )


def component(config: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments, known dimensions and target of the drafter that a config describes.

    Raises:
        ValueError: an option that is not supported.
    """
    ids = [v + 1 for v in config["target_layer_ids"]]
    shift = bool(config.get("sample_from_anchor", True))
    return {
        "arguments": block_arguments(config, ids, config["mask_token_id"], shift, True),
        "shape": layer_shape(config),
        "target": config.get("base_model_name_or_path"),
    }


def weights(
    ledger: Ledger,
    shape: TargetShape,
    arguments: Mapping[str, Any],
    config: Mapping[str, Any],
    target: Target | None,
) -> dict[str, Tensor]:
    """The file's tensors under this project's names."""
    return take_block_drafter(ledger, shape, arguments, target)
