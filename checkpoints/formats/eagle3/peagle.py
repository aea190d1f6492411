"""P-EAGLE as vLLM's own loader reads it: a flat EAGLE-3 config of several layers with the mask
token's id, served with `parallel_drafting`.

The architecture has EAGLE-3's name: vLLM writes `Eagle3` before any other, and knows no such class.
Layers behind the first have plain names; `mask_hidden` has its parts in the order of the layers, as
the fusion's columns.
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
    embeddings,
    layer_config,
    layer_shape,
    layer_tensors,
    old_rope,
    take_layer,
)
from modules.contracts.shapes import TargetShape
from modules.drafters.feature.eagle3 import fused_states
from modules.drafters.feature.peagle import PEagle

if TYPE_CHECKING:
    from modules.contracts.target import Target

DRAFTER = PEagle
ENGINES = ("vLLM",)
_USAGE = (
    "vllm serve {target} --speculative-config "
    '\'{{"method": "eagle3", "parallel_drafting": true, "model": "FOLDER", '
    '"num_speculative_tokens": {tokens}}}\''
)


def exported(drafter: PEagle, target: Target) -> Exported:
    """The drafter as vLLM loads it."""
    ids, shape = layer_ids(drafter), drafter.layer.shape
    mask = drafter.mask(target)
    config = {
        **old_rope(layer_config(shape, drafter.precision)),
        "architectures": ["Eagle3Qwen3ForCausalLM" if shape.qk_norm else "LlamaForCausalLMEagle3"],
        "num_hidden_layers": len(drafter.stack),
        "draft_vocab_size": drafter.draft_size,
        "norm_before_residual": drafter.norm_before_residual,
        "norm_before_fc": drafter.input_norm is not None,
        "num_aux_hidden_states": len(ids),
        "eagle_aux_hidden_state_layer_ids": ids,
        "pard_token": mask,
        "mask_token_id": mask,
        "block_size": drafter.draft_steps,
        "embed_requires_grad": drafter.embed_tokens is not None,
        "base_model_name_or_path": served_name(target.name),
    }
    return Exported(config, peagle_tensors(drafter, target), usage=usage(drafter, target.name))


def usage(drafter: PEagle, name: str) -> str:
    """The command that starts an engine with it; `name` is the target's."""
    return _USAGE.format(target=served_name(name), tokens=drafter.draft_steps)


def peagle_tensors(drafter: PEagle, target: Target) -> dict[str, Tensor]:
    """All tensors under vLLM's names."""
    tensors = eagle3_tensors(drafter, target, "layers.0", drafter.vocabulary_D is not None)
    for i, layer in enumerate(drafter.stack[1:], 1):
        state = {f"layer.{name}": tensor for name, tensor in layer.state_dict().items()}
        tensors |= layer_tensors(state, f"layers.{i}")
    if drafter.embed_tokens is not None:
        tensors["embed_tokens.weight"] = drafter.embed_tokens.weight
    count = len(drafter.fused_layers)
    order = sorted(range(count), key=lambda i: drafter.fused_layers[i])
    parts = drafter.mask_hidden.unflatten(-1, (count, -1))
    return tensors | {"mask_hidden": parts[..., order, :].flatten(-2)}


def recognises(config: Mapping[str, Any]) -> bool:
    """Whether a config.json is of this format."""
    masked = any(config.get(key) is not None for key in _MASKS)
    return (
        "speculators_model_type" not in config
        and masked
        and any(
            name.startswith(("Eagle3", "PEagle")) or name.endswith("Eagle3")
            for name in config.get("architectures") or ()
        )
    )


_MASKS = ("pard_token", "ptd_token_id", "mask_token_id")
"""Names of the mask token's id."""


def component(config: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments, known dimensions and target of the drafter that a config describes.

    Raises:
        ValueError: an option that is not supported.
    """
    mask = next(config[key] for key in _MASKS if config.get(key) is not None)
    ids = config.get("eagle_aux_hidden_state_layer_ids")
    return {
        "arguments": peagle_arguments(config, ids, config.get("block_size"), mask),
        "shape": layer_shape(config),
        "target": config.get("base_model_name_or_path"),
    }


def peagle_arguments(
    config: Mapping[str, Any], ids: list[int] | None, tokens: int | None, mask: int
) -> dict[str, Any]:
    """Constructor arguments of the drafter that a config describes; `config` is flat, `tokens` of
    a block, None where it does not say.

    Raises:
        ValueError: an option that is not supported here.
    """
    residual = bool(config.get("norm_before_residual"))
    whole = {**config, "parallel_drafting": False}
    arguments = eagle3_arguments(whole, sorted(ids or []), residual, "config.json")
    for name in ("fc_norm", "window"):
        if arguments.pop(name):
            raise ValueError(f"config.json: {name} is set, which P-EAGLE does not have here")
    # Without a next step there is nothing that would read a normalised output.
    del arguments["norm_output"]
    trained = bool(config.get("embed_requires_grad", True))
    return {
        **arguments,
        **({} if tokens is None else {"block": tokens}),
        "layers": config.get("num_hidden_layers", 1),
        "mask_token": mask,
        "embeddings": "own" if trained else "target",
    }


def weights(
    ledger: Ledger,
    shape: TargetShape,
    arguments: Mapping[str, Any],
    config: Mapping[str, Any],
    target: Target | None,
) -> dict[str, Tensor]:
    """The file's tensors under this project's names."""
    size, tensors = shape.hidden_size, {}
    # 1. What EAGLE-3 does not have.
    fused = len(fused_states(shape.num_layers, arguments["fused_layers"]))
    tensors["mask_hidden"] = ledger.take("mask_hidden", 1, 1, fused * size)
    for i in range(1, arguments["layers"]):
        layer = take_layer(ledger, f"layers.{i}", shape, 1)
        layer["layer.input_layernorm.weight"] = ledger.take(
            f"layers.{i}.input_layernorm.weight", size
        )
        # vLLM's later layers have this norm as well, and do not use it.
        ledger.drop(f"layers.{i}.hidden_norm.weight")
        tensors |= {f"layers.{i - 1}.{name[6:]}": tensor for name, tensor in layer.items()}
    if arguments["embeddings"] == "own":
        # A file without embeddings is of the target's.
        tensors["embed_tokens.weight"] = (
            embeddings(target, tensors["mask_hidden"].dtype)
            if "embed_tokens.weight" not in ledger and target is not None
            else ledger.take("embed_tokens.weight", shape.vocab_size, size)
        )
    # 2. The rest is EAGLE-3's.
    options = {**arguments, "fc_norm": False}
    return tensors | take_eagle3(ledger, shape, options, target)
