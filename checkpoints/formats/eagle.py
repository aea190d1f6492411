"""EAGLE-1 and EAGLE-2 in the layout of the official implementation, which vLLM and SGLang read.

A one-layer Llama without input norm, final norm or LM head: drafts come from the target's LM head
over its whole vocabulary. The fusion layer has no bias where the config says `bias: false`, which
vLLM needs; SGLang always has one, initialises it at random and needs explicit zeros
(`eagle_sglang.py`). `bias: true` must not be written: both engines would add attention biases too,
and the official code takes a missing key for true.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from checkpoints.folders import Ledger
from checkpoints.formats.exported import Exported, served_name, trimmed_note
from checkpoints.formats.llama import (
    embeddings,
    layer_config,
    layer_shape,
    layer_tensors,
    old_rope,
    refuse_activation,
    refuse_attention_options,
    single_layer,
    take_embeddings,
    take_layer,
)
from modules.contracts.shapes import TargetShape
from modules.drafters.feature.eagle import Eagle

if TYPE_CHECKING:
    from modules.contracts.target import Target

DRAFTER = Eagle
ENGINES = ("vLLM", "the official implementation")
_USAGE = (
    "vllm serve {target} --speculative-config "
    '\'{{"method": "eagle", "model": "FOLDER", "num_speculative_tokens": {tokens}}}\''
)


def exported(drafter: Eagle, target: Target) -> Exported:
    """The drafter as the official implementation and, without a bias, vLLM load it."""
    biased = drafter.fc.bias is not None
    files = layout(drafter, target, biased)
    bias = (
        ("the fusion layer has a bias, which vLLM refuses: train with bias: false for it",)
        if biased
        else ()
    )
    return Exported(
        *files, usage=usage(drafter, target.name), notes=(*bias, *trimmed_note(drafter))
    )


def usage(drafter: Eagle, name: str) -> str:
    """The command that starts an engine with it; `name` is the target's."""
    return _USAGE.format(target=served_name(name), tokens=drafter.arguments["depth"])


def layout(
    drafter: Eagle, target: Target, biased: bool
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Config and tensors, with a bias of the fusion layer (zeros if there is none) or without."""
    shape = drafter.shape
    refuse_activation(shape)
    refuse_attention_options(shape, "the engine")
    state = drafter.state_dict()
    config = {
        **old_rope(layer_config(shape, drafter.precision)),
        "architectures": ["LlamaForCausalLM"],
        "base_model_name_or_path": served_name(target.name),
    }
    # Engines read unscaled embeddings: the scale is folded into the fusion weights, exactly, since
    # it is a power of two.
    fusion = state["fc.weight"].clone()
    fusion[:, : shape.hidden_size] *= state["token_scale"]
    tensors = {
        "fc.weight": fusion,
        "embed_tokens.weight": embeddings(target, drafter.precision),
        **layer_tensors(state, "layers.0"),
    }
    if not biased:
        return {**config, "bias": False}, tensors
    return config, {
        **tensors,
        "fc.bias": state.get("fc.bias", state["fc.weight"].new_zeros(shape.hidden_size)),
    }


def recognises(config: Mapping[str, Any]) -> bool:
    """Whether a config.json is of this format."""
    return (
        config.get("model_type", "llama") == "llama"
        and config.get("num_hidden_layers") == 1
        and "draft_vocab_size" not in config
        and "hidden_size" in config
    )


def component(config: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments, known dimensions and target of the drafter that a config describes."""
    single_layer(config, "config.json")
    return {
        "arguments": {"bias": bool(config.get("bias", True))},
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
    size = shape.hidden_size
    tensors = {
        "fc.weight": ledger.take("fc.weight", size, 2 * size),
        **take_layer(ledger, "layers.0", shape, 1),
    }
    take_embeddings(ledger, shape, target)
    tensors["token_scale"] = torch.ones(())
    return tensors | ({"fc.bias": ledger.take("fc.bias", size)} if arguments["bias"] else {})
