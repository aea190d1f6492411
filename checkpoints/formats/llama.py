"""What the EAGLE formats share: a Llama config for the one decoder layer, draft vocabularies as
offsets, embeddings.

Shape legend: B layers' states, H hidden size, V target vocabulary, D draft vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from checkpoints.folders import Ledger
from modules.contracts.shapes import TargetShape

if TYPE_CHECKING:
    from modules.contracts.target import Target

PROJECTIONS = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj")
_ROUNDING = 1e-2
"""Largest difference of embeddings, by their largest value, that is rounding between 16-bit
types.
"""


# -- configs ---------------------------------------------------------------------------------------


def refuse_activation(shape: TargetShape) -> None:
    """Raise ValueError for activations that the engines' Llama layers do not have."""
    if shape.activation != "silu":
        raise ValueError(
            f"activation {shape.activation!r}: engines run drafter layers with 'silu' only; use "
            "this project's decoder for drafters of this target"
        )


def refuse_attention_options(shape: TargetShape, engine: str) -> None:
    """Raise ValueError for attention biases and query norms, which a plain Llama layer would
    silently ignore.
    """
    for name, used in (("attention_bias", shape.attention_bias), ("qk_norm", shape.qk_norm)):
        if used:
            raise ValueError(
                f"{name}: {engine} runs EAGLE layers without it and would drop the tensors "
                "silently; use --format speculators, or this project's decoder"
            )


def layer_config(shape: TargetShape, dtype: torch.dtype) -> dict[str, Any]:
    """A one-layer Llama (with query norms: Qwen3) config, rotary settings in the new spelling."""
    return {
        "model_type": "qwen3" if shape.qk_norm else "llama",
        "hidden_size": shape.hidden_size,
        "intermediate_size": shape.intermediate_size,
        "num_hidden_layers": 1,
        "num_attention_heads": shape.num_heads,
        "num_key_value_heads": shape.num_kv_heads,
        "head_dim": shape.head_dim,
        "hidden_act": shape.activation,
        "rms_norm_eps": shape.norm_eps,
        "max_position_embeddings": shape.max_positions,
        "attention_bias": shape.attention_bias,
        "mlp_bias": False,
        "vocab_size": shape.vocab_size,
        "tie_word_embeddings": False,
        "rope_parameters": dict(shape.rope),
        "dtype": str(dtype)[6:],
    }


def sliding(window: int | None) -> dict[str, Any]:
    """The keys of a one-layer config whose attention reaches so many positions back."""
    if window is None:
        return {}
    return {
        "layer_types": ["sliding_attention"],
        "use_sliding_window": True,
        "sliding_window": window,
    }


def sliding_window(config: Mapping[str, Any]) -> int | None:
    """How many positions the layer's attention reaches back; None: all of them.

    Raises:
        ValueError: fewer than one.
    """
    kinds, window = config.get("layer_types"), config.get("sliding_window")
    slides = "sliding_attention" in kinds if kinds else config.get("use_sliding_window")
    if slides and window is not None and window < 1:
        raise ValueError(f"sliding_window is {window}: it must be at least 1")
    return window if slides else None


def old_rope(config: Mapping[str, Any]) -> dict[str, Any]:
    """The config with rotary settings as `rope_theta` and `rope_scaling`, which every release
    reads.
    """
    renamed = {key: value for key, value in config.items() if key != "rope_parameters"}
    rope = dict(config["rope_parameters"])
    renamed["rope_theta"] = rope.pop("rope_theta")
    plain = rope.get("rope_type", "default") == "default"
    return {**renamed, "rope_scaling": None if plain else rope, "torch_dtype": config["dtype"]}


def layer_shape(config: Mapping[str, Any]) -> dict[str, Any]:
    """The dimensions of a drafter's layer that a Llama or Qwen3 config states, as fields of
    `TargetShape`.
    """
    # Rotary settings have an old and a new spelling; missing keys have Llama's defaults.
    heads = config["num_attention_heads"]
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    rope = {
        "rope_type": rope.get("type", "default"),
        "rope_theta": config.get("rope_theta", 10000.0),
        **rope,
    }
    return {
        "hidden_size": config["hidden_size"],
        "vocab_size": config["vocab_size"],
        "num_heads": heads,
        "num_kv_heads": config.get("num_key_value_heads") or heads,
        "head_dim": config.get("head_dim") or config["hidden_size"] // heads,
        "intermediate_size": config["intermediate_size"],
        "norm_eps": config.get("rms_norm_eps", 1e-6),
        "max_positions": config.get("max_position_embeddings", 2048),
        "activation": config.get("hidden_act", "silu"),
        "attention_bias": bool(config.get("attention_bias", config.get("qkv_bias", False))),
        "qk_norm": config.get("model_type") == "qwen3",
        "rope": {k: v for k, v in rope.items() if k != "type"},
    }


def single_layer(config: Mapping[str, Any], source: str) -> None:
    """Raise ValueError for drafters of several layers."""
    if config.get("num_hidden_layers", 1) != 1:
        raise ValueError(
            f"{source}: num_hidden_layers is {config['num_hidden_layers']}: EAGLE drafters have "
            "one layer here"
        )


# -- tensors ---------------------------------------------------------------------------------------


def layer_tensors(state: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The decoder layer's tensors under `prefix`. Engines have a bias of o if q, k and v have one:
    zeros.
    """
    tensors = {
        f"{prefix}.{name.removeprefix('layer.')}": tensor
        for name, tensor in state.items()
        if name.startswith("layer.")
    }
    if f"{prefix}.self_attn.q_proj.bias" in tensors:
        output = tensors[f"{prefix}.self_attn.o_proj.weight"]
        tensors[f"{prefix}.self_attn.o_proj.bias"] = output.new_zeros(len(output))
    return tensors


def take_layer(
    ledger: Ledger, prefix: str, shape: TargetShape, input_width: int
) -> dict[str, Tensor]:
    """The decoder layer's tensors under this project's names."""
    size, inner, tensors = shape.hidden_size, shape.intermediate_size, {}
    queries, keys = shape.num_heads * shape.head_dim, shape.num_kv_heads * shape.head_dim
    # 1. Names and shapes; the first projections read `input_width` vectors.
    wanted: dict[str, tuple[int, ...]] = {
        **{
            f"{name}.weight": (rows, input_width * size)
            for name, rows in zip(PROJECTIONS, (queries, keys, keys))
        },
        "self_attn.o_proj.weight": (size, queries),
        "mlp.gate_proj.weight": (inner, size),
        "mlp.up_proj.weight": (inner, size),
        "mlp.down_proj.weight": (size, inner),
        "post_attention_layernorm.weight": (size,),
    }
    if shape.attention_bias:
        wanted |= {
            f"{name}.bias": (rows,) for name, rows in zip(PROJECTIONS, (queries, keys, keys))
        }
    if shape.qk_norm:
        wanted |= {f"self_attn.{name}_norm.weight": (shape.head_dim,) for name in "qk"}
    # 2. Take each of them, and check that the output has no bias.
    for name, dimensions in wanted.items():
        tensors[f"layer.{name}"] = ledger.take(f"{prefix}.{name}", *dimensions)
    _refuse_output_bias(ledger, f"{prefix}.self_attn.o_proj.bias", size)
    return tensors


def _refuse_output_bias(ledger: Ledger, name: str, size: int) -> None:
    if name in ledger and bool(ledger.take(name, size).any()):
        raise ValueError(
            f"{ledger.source}: {name} is not zero: this project's layers have no such bias"
        )


def offsets(vocabulary_D: Tensor | None, size: int) -> dict[str, Tensor]:
    """`d2t` int64 [D], offsets from draft ids to target ids, and `t2d` bool [V]."""
    ids = torch.arange(size) if vocabulary_D is None else vocabulary_D
    chosen = torch.zeros(size, dtype=torch.bool)
    chosen[ids] = True
    return {"d2t": ids - torch.arange(len(ids)), "t2d": chosen}


def take_vocabulary(ledger: Ledger, draft_size: int, size: int) -> tuple[Tensor, Tensor]:
    """Target ids [D], ascending, and the permutation [D] from the file's draft ids to them.

    Raises:
        ValueError: ids outside the vocabulary, repeated ids, or a contradicting `t2d`.
    """
    ids = ledger.take("d2t", draft_size).long() + torch.arange(draft_size)
    ascending, order = ids.sort()
    if len(ids.unique()) < draft_size or int(ascending[0]) < 0 or int(ascending[-1]) >= size:
        raise ValueError(
            f"{ledger.source}: d2t does not lead to {draft_size} different ids below {size}: it "
            "must hold offsets, target id minus draft id"
        )
    if "t2d" in ledger and not torch.equal(
        ledger.take("t2d", size).bool().nonzero()[:, 0], ascending
    ):
        raise ValueError(f"{ledger.source}: t2d marks other ids than d2t leads to")
    return ascending, order


def embeddings(target: Target, dtype: torch.dtype) -> Tensor:
    """The drafter's input of every token [V,H]: the target's embeddings, with its scale if any."""
    every = torch.arange(target.shape.vocab_size, device=target.device)
    return target.embed(every).to(dtype)


def take_embeddings(ledger: Ledger, shape: TargetShape, target: Target | None) -> None:
    """Take the drafter's embeddings, which must be the target's up to rounding.

    Raises:
        ValueError: they differ, so the drafter was trained on other inputs.
    """
    if "embed_tokens.weight" not in ledger:
        return
    stored = ledger.take("embed_tokens.weight", shape.vocab_size, shape.hidden_size)
    if target is None:
        return
    theirs = embeddings(target, torch.float32).to(stored.device)
    if float((stored.float() - theirs).abs().max()) > _ROUNDING * float(theirs.abs().max()):
        raise ValueError(
            f"{ledger.source}: embed_tokens.weight differs from the embeddings of {target.name}: "
            "this is another target's drafter, or one with embeddings of its own, which is not "
            "supported"
        )
