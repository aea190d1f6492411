"""Medusa heads for vLLM up to 0.32, and in the layout of the reference implementation.

vLLM: `blocks.{head}.layers.{block}.weight`, `lm_heads.{head}.weight` over the whole vocabulary; a
chain of each head's likeliest token. Biases are read only with `medusa_fc_bias`. A smaller
vocabulary (`token_map`) requires one LM head that all heads share (`original_lm_head`).

Shape legend: K heads, H hidden size, V target vocabulary, D draft vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from checkpoints.folders import Ledger
from checkpoints.formats.exported import Exported, served_name
from modules.contracts.shapes import TargetShape
from modules.drafters.heads.medusa import Medusa

if TYPE_CHECKING:
    from modules.contracts.target import Target

DRAFTER = Medusa
ENGINES = ("vLLM up to 0.32",)
_USAGE = (
    "vllm serve {target} --speculative-config "
    '\'{{"method": "medusa", "model": "FOLDER", "num_speculative_tokens": {heads}}}\''
)


# -- export ----------------------------------------------------------------------------------------


def exported(drafter: Medusa, target: Target) -> Exported:
    """The drafter in vLLM's layout; separate LM heads get all V rows (`whole_vocabulary`)."""
    shape, vocabulary = drafter.shape, drafter.vocabulary_D
    shared = not drafter.lm_heads
    config = {
        "model_type": "medusa",
        "architectures": ["MedusaModel"],
        "hidden_size": shape.hidden_size,
        "vocab_size": shape.vocab_size,
        "num_heads": drafter.heads,
        "num_hidden_layers": blocks_of(drafter),
        "truncated_vocab_size": drafter.draft_size if shared and vocabulary is not None else None,
        "medusa_fc_bias": True,
        "original_lm_head": shared,
        "dtype": str(drafter.precision)[6:],
    }
    tensors = {
        f"blocks.{head}.layers.{block}.{part}": tensor
        for head, block, part, tensor in block_tensors(drafter)
    }
    # A shared LM head is the target's, trimmed; others cover the whole vocabulary.
    if shared:
        every = torch.arange(shape.vocab_size)
        rows = target.lm_head_rows((every if vocabulary is None else vocabulary).to(target.device))
        tensors["lm_heads.0.weight"] = rows.to(drafter.precision)
        tensors |= {} if vocabulary is None else {"token_map": vocabulary}
    else:
        tensors |= {
            f"lm_heads.{head}.weight": rows for head, rows in enumerate(whole_heads(drafter))
        }
    return Exported(config, tensors, usage=usage(drafter, target.name), notes=_notes(drafter))


def usage(drafter: Medusa, name: str) -> str:
    """The command that starts an engine with it; `name` is the target's."""
    return _USAGE.format(target=served_name(name), heads=drafter.heads)


def _notes(drafter: Medusa) -> tuple[str, ...]:
    chain = "the engine drafts a chain of each head's likeliest token, not this project's tree"
    if drafter.vocabulary_D is None or not drafter.lm_heads:
        return (chain,)
    return chain, (
        f"LM heads over {drafter.draft_size} tokens are written with {drafter.shape.vocab_size} "
        "rows: other tokens get the mean row, which is never the likeliest"
    )


def blocks_of(drafter: Medusa) -> int:
    """Number of residual blocks per head."""
    return drafter.arguments["blocks"]


def block_tensors(drafter: Medusa) -> list[tuple[int, int, str, Tensor]]:
    """Entries of the blocks: head, block, `weight` or `bias`, and the tensor."""
    entries = []
    for name, tensor in drafter.blocks.state_dict().items():
        head, block, _, part = name.split(".")
        entries.append((int(head), int(block), part, tensor))
    return entries


def whole_heads(drafter: Medusa) -> list[Tensor]:
    """The LM heads [V,H] over the whole vocabulary."""
    heads = [head.get_parameter("weight").detach() for head in drafter.lm_heads]
    return [
        whole_vocabulary(rows, drafter.vocabulary_D, drafter.shape.vocab_size) for rows in heads
    ]


def whole_vocabulary(rows_DH: Tensor, vocabulary_D: Tensor | None, size: int) -> Tensor:
    """LM-head rows [V,H] whose likeliest token is that of the rows [D,H].

    A token outside the draft vocabulary gets the mean of all rows, so its logit is the mean of all
    logits: below the highest one, unless all are equal.
    """
    if vocabulary_D is None:
        return rows_DH
    whole_VH = rows_DH.double().mean(0).to(rows_DH.dtype).expand(size, -1).clone()
    whole_VH[vocabulary_D] = rows_DH
    return whole_VH


# -- import ----------------------------------------------------------------------------------------


def recognises(config: Mapping[str, Any]) -> bool:
    """Whether a config.json is of this format."""
    return config.get("model_type") == "medusa"


def component(config: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments, known dimensions and target of the drafter that a config describes."""
    size, trimmed = config["vocab_size"], config.get("truncated_vocab_size")
    arguments = {
        "heads": config["num_heads"],
        "blocks": config["num_hidden_layers"],
        "lm_head": "own",
        "draft_vocabulary": trimmed if trimmed and trimmed < size else None,
    }
    return {
        "arguments": arguments,
        "shape": {"hidden_size": config["hidden_size"], "vocab_size": size},
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
    size, tensors = shape.hidden_size, {}
    biased = bool(config.get("medusa_fc_bias")) or "blocks.0.layers.0.bias" in ledger
    for head in range(arguments["heads"]):
        for block in range(arguments["blocks"]):
            theirs, ours = f"blocks.{head}.layers.{block}", f"blocks.{head}.{block}.linear"
            weight = tensors[f"{ours}.weight"] = ledger.take(f"{theirs}.weight", size, size)
            tensors[f"{ours}.bias"] = (
                ledger.take(f"{theirs}.bias", size) if biased else weight.new_zeros(size)
            )
    return tensors | _lm_heads(ledger, shape, arguments, bool(config.get("original_lm_head")))


def _lm_heads(
    ledger: Ledger, shape: TargetShape, arguments: Mapping[str, Any], shared: bool
) -> dict[str, Tensor]:
    trimmed, tensors = arguments["draft_vocabulary"], {}
    # 1. A trimmed vocabulary, whose ids may be in any order and whose head may be untrimmed.
    order, whole = slice(None), shape.vocab_size
    if trimmed is not None:
        token_map = ledger.take("token_map", trimmed).long()
        if (
            len(token_map.unique()) < trimmed
            or int(token_map.min()) < 0
            or int(token_map.max()) >= whole
        ):
            raise ValueError(
                f"{ledger.source}: token_map does not hold {trimmed} different ids below {whole}: "
                "it is another vocabulary's, or damaged"
            )
        tensors["vocabulary"], order = token_map.sort()
        rows = len(ledger.tensors["lm_heads.0.weight"]) if "lm_heads.0.weight" in ledger else 0
        whole, order = (whole, tensors["vocabulary"]) if rows == whole else (trimmed, order)
    # 2. One LM head per head, or the first one for all.
    first = ledger.take("lm_heads.0.weight", whole, shape.hidden_size)[order]
    for head in range(arguments["heads"]):
        rows = (
            first
            if shared or not head
            else ledger.take(f"lm_heads.{head}.weight", whole, shape.hidden_size)[order]
        )
        tensors[f"lm_heads.{head}.weight"] = rows
    return tensors
