"""DFlash as its authors, SGLang and vLLM read it: a flat Qwen3 config, no embedding and no LM head.

`target_layer_ids` name layer outputs, one less than this project's ids of inputs.
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
    layer_ids,
    take_block_drafter,
)
from checkpoints.formats.exported import Exported, served_name
from checkpoints.formats.llama import layer_shape, old_rope
from modules.contracts.shapes import TargetShape
from modules.drafters.block_diffusion.dflash import DFlash

if TYPE_CHECKING:
    from modules.contracts.target import Target

DRAFTER = DFlash
ENGINES = ("vLLM", "SGLang")
_USAGE = (
    "vllm serve {target} --speculative-config "
    '\'{{"method": "dflash", "model": "FOLDER", "num_speculative_tokens": {tokens}}}\''
)


def exported(drafter: DFlash, target: Target) -> Exported:
    """The drafter as the engines load it.

    Raises:
        ValueError: another layout or a trimmed vocabulary, for which the format has no place.
    """
    refuse_shift(drafter)
    if drafter.vocabulary_D is not None:
        raise ValueError(
            f"draft_vocabulary is {drafter.draft_size}: this format has no place for it; use "
            "--format dflash_speculators"
        )
    layers = len(drafter.layers)
    config = {
        **old_rope(backbone_config(drafter)),
        "architectures": ["DFlashDraftModel"],
        "block_size": drafter.pass_rows,
        "num_target_layers": target.shape.num_layers,
        "layer_types": ["full_attention"] * layers,
        "dflash_config": {
            "mask_token_id": drafter.mask(target),
            "target_layer_ids": [k - 1 for k in layer_ids(drafter)],
        },
        "base_model_name_or_path": served_name(target.name),
    }
    tensors = block_tensors(drafter, target)
    return Exported(config, tensors, usage=usage(drafter, target.name))


def refuse_shift(drafter: DFlash) -> None:
    """Raise ValueError for the layout that engines do not run."""
    if drafter.layout != "fill_in":
        raise ValueError(
            f"layout is {drafter.layout!r}: engines run DFlash as 'fill_in' only; use this "
            "project's decoder"
        )


def usage(drafter: DFlash, name: str) -> str:
    """The command that starts an engine with it; `name` is the target's."""
    return _USAGE.format(target=served_name(name), tokens=drafter.block)


def recognises(config: Mapping[str, Any]) -> bool:
    """Whether a config.json is of this format."""
    return "DFlashDraftModel" in (config.get("architectures") or ()) and "dflash_config" in config


def component(config: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments, known dimensions and target of the drafter that a config describes.

    Raises:
        ValueError: an option that is not supported.
    """
    inner = config["dflash_config"]
    if inner.get("projector_type"):
        raise ValueError(
            f"config.json: projector_type is {inner['projector_type']!r}: only plain DFlash is "
            "read here"
        )
    ids = [v + 1 for v in inner["target_layer_ids"]]
    return {
        "arguments": block_arguments(config, ids, inner["mask_token_id"], False, False),
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
