"""DFlash and DSpark in the format of vLLM's `speculators` library.

`aux_hidden_state_layer_ids` count as this project does (id k = input of layer k).
`sliding_window_non_causal` is true: vLLM takes false for blocks whose rows see earlier rows only,
although all layers here see the whole block.
"""

from __future__ import annotations

from collections.abc import Mapping
from importlib import metadata
from typing import TYPE_CHECKING, Any

from checkpoints.formats.block_diffusion.tensors import (
    backbone_config,
    block_arguments,
    block_tensors,
    head_config,
    layer_ids,
)
from checkpoints.formats.exported import Exported, served_name
from checkpoints.formats.llama import layer_shape
from modules.drafters.block_diffusion.dflash import DFlash

if TYPE_CHECKING:
    from modules.contracts.target import Target

_VERSION = "0.9.0"
"""Version of the format: the release of its library that these keys are of."""


def wrapped(drafter: DFlash, target: Target, kind: str, usage: str) -> Exported:
    """The drafter as vLLM loads it; `kind` is the library's name of the method."""
    layer = {
        **backbone_config(drafter),
        "architectures": ["Qwen3ForCausalLM"],
        "layer_types": ["full_attention"] * len(drafter.layers),
    }
    method = {
        "proposal_type": "greedy",
        "speculative_tokens": drafter.block,
        "verifier_accept_k": 1,
        "accept_tolerance": 0.0,
    }
    verifier = {
        "name_or_path": served_name(target.name),
        "architectures": list(target.architecture.config.architectures or []),
    }
    config = {
        "architectures": ["DFlashDraftModel" if kind == "dflash" else "DSparkDraftModel"],
        "speculators_model_type": kind,
        "speculators_version": _VERSION,
        "draft_vocab_size": drafter.draft_size,
        "block_size": drafter.pass_rows,
        "aux_hidden_state_layer_ids": layer_ids(drafter),
        "mask_token_id": drafter.mask(target),
        "sample_from_anchor": drafter.layout == "shift",
        "sliding_window_non_causal": True,
        "tie_word_embeddings": False,
        "dtype": layer["dtype"],
        "transformers_version": metadata.version("transformers"),
        "transformer_layer_config": layer,
        "speculators_config": {
            "algorithm": kind,
            "default_proposal_method": "greedy",
            "proposal_methods": [method],
            "verifier": verifier,
        },
        **head_config(drafter),
    }
    return Exported(config, block_tensors(drafter, target), usage=usage)


def unwrapped(config: Mapping[str, Any], missing_shift: bool, dspark: bool) -> dict[str, Any]:
    """Arguments, known dimensions and target of the drafter that a config describes.

    Args:
        config: of the library.
        missing_shift: what a missing `sample_from_anchor` means.
        dspark: whether it is a DSpark drafter.
    """
    layer = config["transformer_layer_config"]
    shift = bool(config.get("sample_from_anchor", missing_shift))
    if not config.get("sliding_window_non_causal", True):
        raise ValueError(
            "config.json: sliding_window_non_causal is false: drafters of causal blocks are not "
            "supported here"
        )
    verifier = config.get("speculators_config", {}).get("verifier", {})
    ids, mask = config["aux_hidden_state_layer_ids"], config["mask_token_id"]
    return {
        "arguments": block_arguments({**layer, **config}, ids, mask, shift, dspark),
        "shape": layer_shape(layer),
        "target": verifier.get("name_or_path"),
    }
