"""Medusa heads in the layout of the reference implementation (Cai et al. 2024):
`medusa_lm_head.pt`, and the same tensors as safetensors for servers that read them.

Names are those of its module list: `{head}.{block}.linear.weight`, and `{head}.{blocks}.weight` for
the LM head.

Shape legend: H hidden size, V target vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from torch import Tensor

from checkpoints.folders import Ledger
from checkpoints.formats.exported import Exported, served_name
from checkpoints.formats.medusa import block_tensors, blocks_of, whole_heads, whole_vocabulary
from modules.contracts.shapes import TargetShape
from modules.drafters.heads.medusa import Medusa

if TYPE_CHECKING:
    from modules.contracts.target import Target

DRAFTER = Medusa
ENGINES = ("the reference implementation", "vLLM 0.32")


def exported(drafter: Medusa, target: Target) -> Exported:
    """The drafter in the reference's layout.

    Raises:
        ValueError: several blocks per head, which the reference would share.
    """
    blocks = blocks_of(drafter)
    if blocks > 1:
        raise ValueError(
            f"blocks is {blocks}: the reference implementation repeats one block, so different "
            "ones would be lost; use --format medusa"
        )
    tensors = {
        f"{head}.{block}.linear.{part}": tensor
        for head, block, part, tensor in block_tensors(drafter)
    }
    tensors |= {
        f"{head}.{blocks}.weight": rows for head, rows in enumerate(_lm_heads(drafter, target))
    }
    config = {
        "medusa_num_heads": drafter.heads,
        "medusa_num_layers": blocks,
        "base_model_name_or_path": served_name(target.name),
    }
    return Exported(
        config,
        tensors,
        ("medusa_lm_head.safetensors", "medusa_lm_head.pt"),
        usage(drafter, target.name),
    )


def usage(drafter: Medusa, name: str) -> str:
    """The command that starts an engine with it; `name` is the target's."""
    return f'MedusaModel.from_pretrained("FOLDER")  # loads {served_name(name)} itself'


def _lm_heads(drafter: Medusa, target: Target) -> list[Tensor]:
    if drafter.lm_heads:
        return whole_heads(drafter)
    vocabulary = drafter.vocabulary_D
    rows = target.copy_weight("lm_head").to(drafter.precision)
    trimmed = rows if vocabulary is None else rows[vocabulary.to(rows.device)]
    return [
        whole_vocabulary(trimmed, vocabulary, drafter.shape.vocab_size)
        for _ in range(drafter.heads)
    ]


def recognises(config: Mapping[str, Any]) -> bool:
    """Whether a config.json is of this format."""
    return "medusa_num_heads" in config and config.get("model_type") != "medusa"


def component(config: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments and target of the drafter that a config describes, which has no dimensions."""
    arguments = {
        "heads": config["medusa_num_heads"],
        "blocks": config.get("medusa_num_layers", 1),
        "lm_head": "own",
    }
    return {"arguments": arguments, "shape": {}, "target": config.get("base_model_name_or_path")}


def weights(
    ledger: Ledger,
    shape: TargetShape,
    arguments: Mapping[str, Any],
    config: Mapping[str, Any],
    target: Target | None,
) -> dict[str, Tensor]:
    """The file's tensors under this project's names."""
    size, blocks, tensors = shape.hidden_size, arguments["blocks"], {}
    for head in range(arguments["heads"]):
        for block in range(blocks):
            name = f"{head}.{block}.linear"
            tensors[f"blocks.{name}.weight"] = ledger.take(f"{name}.weight", size, size)
            tensors[f"blocks.{name}.bias"] = ledger.take(f"{name}.bias", size)
        tensors[f"lm_heads.{head}.weight"] = ledger.take(
            f"{head}.{blocks}.weight", shape.vocab_size, size
        )
    return tensors
