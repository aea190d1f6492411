"""What the formats of DFlash and DSpark share: layer ids, tensors, arguments.

Engines concatenate the fused states in the order of the layers, so an exported fusion layer has its
columns in that order. A drafter over a trimmed vocabulary carries the target's LM head rows of it.

Shape legend: H hidden size, V target vocabulary, D draft vocabulary, R rank.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from checkpoints.folders import Ledger
from checkpoints.formats.llama import (
    layer_config,
    offsets,
    refuse_activation,
    take_embeddings,
    take_layer,
    take_vocabulary,
)
from modules.contracts.shapes import TargetShape
from modules.drafters.block_diffusion.dflash import DFlash, layer_shape
from modules.drafters.block_diffusion.dspark import DSpark

if TYPE_CHECKING:
    from modules.contracts.target import Target

_ROUNDING = 1e-2
"""Largest difference of LM head rows, by their largest value, that is rounding between 16-bit
types."""


def layer_ids(drafter: DFlash) -> list[int]:
    """Fused states as `k` = input of layer k, ascending.

    Raises:
        ValueError: a repeated state, or the embeddings, which engines do not pass.
    """
    ids = sorted(drafter.fused_layers)
    if len(set(ids)) < len(ids) or ids[0] == 0:
        raise ValueError(
            f"fused_layers {drafter.fused_layers}: engines pass each state once, and none before "
            "the first layer (0)"
        )
    return ids


def backbone_config(drafter: DFlash) -> dict[str, Any]:
    """A Qwen3 config of the drafter's layers."""
    refuse_activation(drafter.shape)
    config = layer_config(layer_shape(drafter.shape), drafter.precision)
    return {**config, "num_hidden_layers": len(drafter.layers)}


def head_config(drafter: DFlash) -> dict[str, Any]:
    """The keys that DSpark adds to a config; none for DFlash.

    Raises:
        ValueError: a Markov head that engines do not run.
    """
    if not isinstance(drafter, DSpark):
        return {}
    if drafter.markov_head.kind != "vanilla":
        raise ValueError(
            f"markov is {drafter.markov_head.kind!r}: engines run 'vanilla' only; use this "
            "project's decoder"
        )
    return {
        "markov_rank": drafter.rank,
        "markov_head_type": "vanilla",
        "enable_confidence_head": True,
        "confidence_head_with_markov": True,
    }


def block_tensors(drafter: DFlash, target: Target) -> dict[str, Tensor]:
    """All tensors under the engines' names, which are this project's."""
    state = {name: tensor for name, tensor in drafter.state_dict().items() if name != "vocabulary"}
    order = sorted(range(len(drafter.fused_layers)), key=lambda i: drafter.fused_layers[i])
    state["fc.weight"] = state["fc.weight"].unflatten(1, (len(order), -1))[:, order].flatten(1)
    if drafter.vocabulary_D is not None:
        rows = target.lm_head_rows(drafter.vocabulary_D.to(target.device))
        state["lm_head.weight"] = rows.to(drafter.precision)
        state |= offsets(drafter.vocabulary_D, drafter.shape.vocab_size)
    return state


def block_arguments(
    config: Mapping[str, Any], ids: Sequence[int], mask_token: int, shift: bool, dspark: bool
) -> dict[str, Any]:
    """Constructor arguments of the drafter that a config describes; `config` is flat, `ids` as
    `layer_ids`.

    Raises:
        ValueError: an option that is not supported here.
    """
    if any(kind != "full_attention" for kind in config.get("layer_types") or ()):
        raise ValueError(
            f"config.json: layer_types {config['layer_types']}: only full_attention is supported"
        )
    size, trimmed = config["vocab_size"], config.get("draft_vocab_size")
    arguments = {
        "block": config["block_size"] - (0 if shift else 1),
        "layers": config["num_hidden_layers"],
        "draft_vocabulary": trimmed if trimmed and trimmed < size else None,
        "fused_layers": sorted(ids),
        "layout": "shift" if shift else "fill_in",
        "mask_token": mask_token,
    }
    if not dspark:
        return arguments
    for key, value in (
        ("markov_head_type", "vanilla"),
        ("enable_confidence_head", True),
        ("confidence_head_with_markov", True),
    ):
        if config.get(key, value) != value:
            raise ValueError(
                f"config.json: {key} is {config[key]!r}, only {value!r} is supported here"
            )
    return {**arguments, "rank": config["markov_rank"]}


def take_block_drafter(
    ledger: Ledger, shape: TargetShape, arguments: Mapping[str, Any], target: Target | None
) -> dict[str, Tensor]:
    """The tensors under this project's names, draft ids in ascending order."""
    size, tensors = shape.hidden_size, {}
    # 1. Fusion, norms and layers.
    fused = len(arguments["fused_layers"])
    tensors["fc.weight"] = ledger.take("fc.weight", size, fused * size)
    tensors |= {name: ledger.take(name, size) for name in ("hidden_norm.weight", "norm.weight")}
    for index in range(arguments["layers"]):
        layer = take_layer(ledger, f"layers.{index}", layer_shape(shape), 1)
        name = f"layers.{index}.input_layernorm.weight"
        tensors[name] = ledger.take(name, size)
        tensors |= {
            f"layers.{index}.{key.removeprefix('layer.')}": tensor for key, tensor in layer.items()
        }
    # 2. The heads of DSpark, then the draft vocabulary.
    draft_size, rank = arguments["draft_vocabulary"] or shape.vocab_size, arguments.get("rank")
    if rank:
        name = "markov_head.markov_w1.weight"
        tensors[name] = ledger.take(name, shape.vocab_size, rank)
        name = "markov_head.markov_w2.weight"
        tensors[name] = ledger.take(name, draft_size, rank)
        tensors["confidence_head.proj.weight"] = ledger.take(
            "confidence_head.proj.weight", 1, size + rank
        )
        tensors["confidence_head.proj.bias"] = ledger.take("confidence_head.proj.bias", 1)
    take_embeddings(ledger, shape, target)
    return tensors | _take_vocabulary(ledger, shape, arguments, target, tensors)


def _take_vocabulary(
    ledger: Ledger,
    shape: TargetShape,
    arguments: Mapping[str, Any],
    target: Target | None,
    tensors: Mapping[str, Tensor],
) -> dict[str, Tensor]:
    """The draft vocabulary and what is ordered by it.

    Raises:
        ValueError: LM head rows that are not the target's, which the drafter would not read.
    """
    draft_size, size = arguments["draft_vocabulary"], shape.hidden_size
    ids, order = None, None
    if draft_size:
        ids, order = take_vocabulary(ledger, draft_size, shape.vocab_size)
    if "lm_head.weight" in ledger:
        stored = ledger.take("lm_head.weight", draft_size or shape.vocab_size, size)
        if target is not None:
            stored = stored if order is None else stored[order]
            every = ids if ids is not None else target.shape.vocab_size
            _check_head(stored, every, target, ledger.source)
    if ids is None or order is None:
        return {}
    name = "markov_head.markov_w2.weight"
    moved = {name: tensors[name][order]} if name in tensors else {}
    return {"vocabulary": ids, **moved}


def _check_head(stored: Tensor, ids: Tensor | int, target: Target, source: str) -> None:
    listed = torch.arange(ids) if isinstance(ids, int) else ids
    theirs = target.lm_head_rows(listed.to(target.device)).float().to(stored.device)
    if float((stored.float() - theirs).abs().max()) > _ROUNDING * float(theirs.abs().max()):
        raise ValueError(
            f"{source}: lm_head.weight differs from the LM head of {target.name}: a drafter with "
            "an LM head of its own is not supported"
        )
