"""EAGLE-3 drafters under the names of vLLM and SGLang: what `speculators.py` and `sglang.py` share.

Both engines concatenate the fused states in the order of the layers, whatever the order in the
config, so an exported fusion layer has its columns in that order.

Shape legend: H hidden size, S fused states, D draft vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from torch import Tensor

from checkpoints.folders import Ledger
from checkpoints.formats.llama import (
    embeddings,
    layer_tensors,
    offsets,
    refuse_activation,
    sliding_window,
    take_embeddings,
    take_layer,
    take_vocabulary,
)
from modules.contracts.shapes import TargetShape
from modules.drafters.feature.eagle3 import Eagle3, check_options, fused_states

if TYPE_CHECKING:
    from modules.contracts.target import Target

_SAME = ("norm.weight", "lm_head.weight")
_INSIDE = ("input_layernorm.weight", "hidden_norm.weight")
"""Norms that belong to the layer in the engines' naming."""


def eagle3_tensors(drafter: Eagle3, target: Target, prefix: str, mapped: bool) -> dict[str, Tensor]:
    """All tensors, the decoder layer's under `prefix`; with `d2t` and `t2d` if `mapped`."""
    refuse_activation(drafter.shape)
    state = drafter.state_dict()
    # Columns of the fusion layer and its norms, in the order of the layers.
    order = sorted(range(len(drafter.fused_layers)), key=lambda i: drafter.fused_layers[i])
    tensors = {name: state[name] for name in _SAME} | {
        f"{prefix}.{name}": state[name] for name in _INSIDE
    }
    tensors |= layer_tensors(state, prefix)
    tensors["fc.weight"] = state["fc.weight"].unflatten(1, (len(order), -1))[:, order].flatten(1)
    if drafter.fc_norm is not None:
        tensors |= {
            f"fc_norm.{place}.weight": state[f"fc_norm.{i}.weight"] for place, i in enumerate(order)
        }
    if drafter.input_norm is not None:
        gains = state["input_norm.weight"].unflatten(0, (len(order), -1))
        tensors["input_norm.weight"] = gains[order].flatten()
    tensors["embed_tokens.weight"] = embeddings(target, drafter.precision)
    return tensors | (offsets(drafter.vocabulary_D, drafter.shape.vocab_size) if mapped else {})


def layer_ids(drafter: Eagle3) -> list[int]:
    """Fused states as `k` = input of layer k, ascending.

    Raises:
        ValueError: a repeated state, which engines would pass only once; attention sinks.
    """
    if drafter.sinks:
        raise ValueError(f"sinks is {drafter.sinks}: engines have a window without them, set 0")
    ids = sorted(drafter.fused_layers)
    if len(set(ids)) < len(ids):
        raise ValueError(
            f"fused_layers {drafter.fused_layers} name a state twice: engines would pass it once"
        )
    return ids


def eagle3_arguments(
    config: Mapping[str, Any], ids: Sequence[int] | None, norm_before_residual: bool, source: str
) -> dict[str, Any]:
    """Constructor arguments of the drafter that a config describes; `ids` as `layer_ids`, None for
    the default three.

    Raises:
        ValueError: an option that this project's EAGLE-3 does not have.
    """
    if config.get("parallel_drafting"):
        raise ValueError(f"{source}: parallel_drafting is set, which is not supported here")
    size, trimmed = config["vocab_size"], config.get("draft_vocab_size")
    each, together = bool(config.get("fc_norm")), bool(config.get("norm_before_fc"))
    check_options(each, together, sliding_window(config))
    return {
        "draft_vocabulary": trimmed if trimmed and trimmed < size else None,
        "fused_layers": None if not ids else list(ids),
        "norm_before_residual": norm_before_residual,
        "fc_norm": each,
        "norm_output": bool(config.get("norm_output")),
        "norm_before_fc": together,
        "qk_norm": config.get("model_type") == "qwen3",
        "window": sliding_window(config),
    }


def take_eagle3(
    ledger: Ledger, shape: TargetShape, arguments: Mapping[str, Any], target: Target | None
) -> dict[str, Tensor]:
    """The tensors under this project's names; the layer's may be under `midlayer` or `layers.0`."""
    prefix = (
        "midlayer" if any(name.startswith("midlayer.") for name in ledger.tensors) else "layers.0"
    )
    # 1. Layer, norms and fusion.
    size, draft_size = shape.hidden_size, arguments["draft_vocabulary"] or shape.vocab_size
    fused = len(fused_states(shape.num_layers, arguments["fused_layers"]))
    tensors = take_layer(ledger, prefix, shape, 2)
    tensors |= {name: ledger.take(f"{prefix}.{name}", size) for name in _INSIDE}
    tensors["norm.weight"] = ledger.take("norm.weight", size)
    tensors["fc.weight"] = ledger.take("fc.weight", size, fused * size)
    if arguments["fc_norm"]:
        tensors |= {
            f"fc_norm.{i}.weight": ledger.take(f"fc_norm.{i}.weight", size) for i in range(fused)
        }
    if arguments["norm_before_fc"]:
        tensors["input_norm.weight"] = ledger.take("input_norm.weight", fused * size)
    # 2. The LM head with its draft ids in ascending order, and the embeddings.
    head = ledger.take("lm_head.weight", draft_size, size)
    if "d2t" in ledger or arguments["draft_vocabulary"]:
        ids, order = take_vocabulary(ledger, draft_size, shape.vocab_size)
        head = head[order]
        tensors |= {"vocabulary": ids} if arguments["draft_vocabulary"] else {}
    take_embeddings(ledger, shape, target)
    return tensors | {"lm_head.weight": head}
