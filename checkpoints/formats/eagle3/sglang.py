"""EAGLE-3 for SGLang (the layout of its trainer, SpecForge), which vLLM reads too.

A flat Llama config. The engines count layers differently: SGLang's id v is the output of layer v,
vLLM's id k the input of layer k. Both are written: `eagle_config` for SGLang, with ids one less
than in the top-level key for vLLM. SGLang silently skips unknown tensors, so parts that it does not
have are refused here.
"""

from __future__ import annotations

from collections.abc import Mapping
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
from checkpoints.formats.llama import (
    layer_config,
    layer_shape,
    old_rope,
    refuse_attention_options,
    single_layer,
)
from modules.contracts.shapes import TargetShape
from modules.drafters.feature.eagle3 import Eagle3

if TYPE_CHECKING:
    from modules.contracts.target import Target

DRAFTER = Eagle3
ENGINES = ("SGLang", "vLLM")
_KEY = "eagle_aux_hidden_state_layer_ids"
_USAGE = (
    "python -m sglang.launch_server --model-path {target} --speculative-algorithm EAGLE3 "
    "--speculative-draft-model-path FOLDER --speculative-num-steps {steps} "
    "--speculative-eagle-topk 4 --speculative-num-draft-tokens 16"
)


def exported(drafter: Eagle3, target: Target) -> Exported:
    """The drafter as SGLang loads it.

    Raises:
        ValueError: an option that SGLang would ignore silently.
    """
    # 1. Options that SGLang does not have.
    ids = layer_ids(drafter)
    refuse_attention_options(drafter.layer.shape, "SGLang")
    if drafter.window is not None:
        raise ValueError(
            f"window is {drafter.window}: SGLang runs drafter layers over all of the text; use "
            "--format speculators"
        )
    if drafter.norm_before_residual:
        raise ValueError(
            "norm_before_residual is true: SGLang adds attention to the feature as it came; use "
            "--format speculators"
        )
    if len(ids) < 2 or ids[0] == 0:
        raise ValueError(
            f"fused_layers {drafter.fused_layers}: SGLang fuses two states or more, and none "
            "before the first layer (0); use --format speculators"
        )
    # 2. One config for both engines.
    layer = old_rope(layer_config(drafter.layer.shape, drafter.precision))
    config = {
        **layer,
        "architectures": ["LlamaForCausalLMEagle3"],
        "draft_vocab_size": drafter.draft_size,
        "fc_norm": drafter.fc_norm is not None,
        "norm_output": drafter.norm_output,
        "norm_before_fc": drafter.input_norm is not None,
        "norm_before_residual": False,
        "num_aux_hidden_states": len(ids),
        _KEY: ids,
        "eagle_config": {"use_aux_hidden_state": True, _KEY: [k - 1 for k in ids]},
        "base_model_name_or_path": served_name(target.name),
    }
    tensors = eagle3_tensors(drafter, target, "midlayer", mapped=True)
    notes = (
        ()
        if drafter.vocabulary_D is not None
        else (
            "a drafter over the whole vocabulary carries d2t, which SGLang asks for and vLLM "
            "refuses: for vLLM use --format speculators",
        )
    )
    return Exported(config, tensors, usage=usage(drafter, target.name), notes=notes)


def usage(drafter: Eagle3, name: str) -> str:
    """The command that starts an engine with it; `name` is the target's."""
    return _USAGE.format(target=served_name(name), steps=drafter.draft_steps)


def recognises(config: Mapping[str, Any]) -> bool:
    """Whether a config.json is of this format."""
    return any(name.endswith("Eagle3") for name in config.get("architectures") or ()) or (
        "draft_vocab_size" in config and "speculators_model_type" not in config
    )


def component(config: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments, known dimensions and target of the drafter that a config describes."""
    single_layer(config, "config.json")
    # SGLang's ids count outputs, the top-level ones inputs; if both exist, they must agree.
    theirs = (config.get("eagle_config") or {}).get(_KEY)
    top: list[int] | None = config.get(_KEY)
    ids = [v + 1 for v in theirs] if theirs else top
    if theirs and top and sorted(v + 1 for v in theirs) != sorted(top):
        raise ValueError(
            f"config.json: {_KEY} is {top} at the top but {theirs} in eagle_config, which counts "
            "one less: engines would read different layers"
        )
    arguments = eagle3_arguments(
        config,
        sorted(ids) if ids else None,
        bool(config.get("norm_before_residual")),
        "config.json",
    )
    return {
        "arguments": arguments,
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
    return take_eagle3(ledger, shape, arguments, target)
