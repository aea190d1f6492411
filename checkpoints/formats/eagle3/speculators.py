"""EAGLE-3 for vLLM, in the format of its `speculators` library.

`eagle_aux_hidden_state_layer_ids` count as this project does (id k = input of layer k). Every norm
option is written out, because vLLM takes a missing `norm_before_residual` for true. A drafter over
the whole vocabulary has no `d2t`.
"""

from __future__ import annotations

from collections.abc import Mapping
from importlib import metadata
from typing import TYPE_CHECKING, Any

from torch import Tensor

from checkpoints.folders import Ledger
from checkpoints.formats.eagle3.tensors import (
    eagle3_arguments,
    eagle3_tensors,
    layer_ids,
    take_eagle3,
)
from checkpoints.formats.exported import Exported, served_name
from checkpoints.formats.llama import layer_config, layer_shape, single_layer, sliding
from modules.contracts.shapes import TargetShape
from modules.drafters.feature.eagle3 import Eagle3

if TYPE_CHECKING:
    from modules.contracts.target import Target

DRAFTER = Eagle3
ENGINES = ("vLLM",)
_VERSION = "0.3.0"
"""Version of the format: the first release of its library with these keys."""
_USAGE = (
    "vllm serve {target} --speculative-config "
    '\'{{"method": "eagle3", "model": "FOLDER", "num_speculative_tokens": {tokens}}}\''
)


def exported(drafter: Eagle3, target: Target) -> Exported:
    """The drafter as vLLM loads it."""
    config = wrapped(drafter, target, "eagle3", "Eagle3DraftModel", sliding(drafter.window))
    trimmed = drafter.vocabulary_D is not None
    tensors = eagle3_tensors(drafter, target, "layers.0", trimmed)
    return Exported(config, tensors, usage=usage(drafter, target.name))


def wrapped(
    drafter: Eagle3, target: Target, kind: str, architecture: str, more: Mapping[str, Any]
) -> dict[str, Any]:
    """The library's config of a drafter; `more` are further keys of its layers."""
    # The layers, how it drafts and whom it serves, as the library nests them.
    ids = layer_ids(drafter)
    layer = {
        **layer_config(drafter.layer.shape, drafter.precision),
        **more,
        "num_aux_hidden_states": len(ids),
        "architectures": ["LlamaForCausalLM"],
    }
    method = {
        "proposal_type": "greedy",
        "speculative_tokens": drafter.draft_steps,
        "verifier_accept_k": 1,
        "accept_tolerance": 0.0,
    }
    verifier = {
        "name_or_path": served_name(target.name),
        "architectures": list(target.architecture.config.architectures or []),
    }
    return {
        "architectures": [architecture],
        "speculators_model_type": kind,
        "speculators_version": _VERSION,
        "draft_vocab_size": drafter.draft_size,
        "eagle_aux_hidden_state_layer_ids": ids,
        "norm_before_residual": drafter.norm_before_residual,
        "norm_before_fc": drafter.input_norm is not None,
        "fc_norm": drafter.fc_norm is not None,
        "norm_output": drafter.norm_output,
        "embed_requires_grad": False,
        "target_hidden_size": None,
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
    }


def usage(drafter: Eagle3, name: str) -> str:
    """The command that starts an engine with it; `name` is the target's."""
    return _USAGE.format(target=served_name(name), tokens=drafter.draft_steps)


def recognises(config: Mapping[str, Any]) -> bool:
    """Whether a config.json is of this format."""
    return "speculators_model_type" in config


def component(config: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments, known dimensions and target of the drafter that a config describes.

    Raises:
        ValueError: another algorithm than EAGLE-3, or an option that is not supported.
    """
    kind = config["speculators_model_type"]
    if kind != "eagle3":
        raise ValueError(
            f"speculators_model_type is {kind!r}: only 'eagle3', 'peagle', 'dflash' and "
            "'dspark' can be imported"
        )
    layer = config["transformer_layer_config"]
    single_layer(layer, "transformer_layer_config")
    arguments = eagle3_arguments(
        {**layer, **config, "model_type": layer.get("model_type")},
        config.get("eagle_aux_hidden_state_layer_ids"),
        bool(config.get("norm_before_residual", True)),
        "config.json",
    )
    verifier = config.get("speculators_config", {}).get("verifier", {})
    return {
        "arguments": arguments,
        "shape": layer_shape(layer),
        "target": verifier.get("name_or_path"),
    }


def weights(
    ledger: Ledger,
    shape: TargetShape,
    arguments: Mapping[str, Any],
    config: Mapping[str, Any],
    target: Target | None,
) -> dict[str, Tensor]:
    """The file's tensors under this project's names."""
    return take_eagle3(ledger, shape, arguments, target)
