"""A small language model that drafts, as a plain Hugging Face folder, which every engine and
library loads.

Any causal LM of a supported architecture with the target's tokenizer is imported the same way; if
the folder has a tokenizer, it must be the target's.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import AutoTokenizer

from checkpoints.folders import Ledger
from checkpoints.formats.exported import Exported, served_name
from modules.contracts.shapes import TargetShape
from modules.drafters.small_models.independent import Independent
from modules.target.architecture import is_causal
from modules.target.hf_models import config_of_dict, dict_of_config, fresh_model
from modules.target.tokenizers.vocabulary import check_tokenizer

if TYPE_CHECKING:
    from modules.contracts.target import Target

DRAFTER = Independent
ENGINES = ("vLLM", "SGLang", "Hugging Face")
_USAGE = (
    "vllm serve {target} --speculative-config "
    '\'{{"method": "draft_model", "model": "FOLDER", "num_speculative_tokens": {tokens}}}\''
)
FINAL_NORM = "model.norm.weight"
"""A tensor that a Llama has and an EAGLE drafter lacks."""
_OURS = "model."
"""Prefix of the stock model's tensor names in this project's drafter."""


def exported(drafter: Independent, target: Target) -> Exported:
    """Config, weights and the target's tokenizer.

    Raises:
        ValueError: a trimmed draft vocabulary, which a plain model cannot express.
    """
    if drafter.vocabulary is not None:
        raise ValueError(
            f"draft_vocabulary is {drafter.draft_size}: a plain model drafts from all tokens, and "
            "the others were never taught to be unlikely; train with draft_vocabulary: null for "
            "engines"
        )
    stock = drafter.stock
    config = {
        **dict_of_config(stock.config),
        "architectures": [type(stock).__name__],
        "dtype": str(drafter.precision)[6:],
        "base_model_name_or_path": served_name(target.name),
    }
    return Exported(
        config, _untied(stock), usage=usage(drafter, target.name), tokenizer=target.tokenizer
    )


def usage(drafter: Independent, name: str) -> str:
    """The command that starts an engine with it; `name` is the target's."""
    return _USAGE.format(target=served_name(name), tokens=drafter.arguments["draft_length"])


def recognises(config: Mapping[str, Any]) -> bool:
    """Whether a config.json is of this format."""
    return is_causal(config.get("model_type")) and any(
        "LMHead" in name or "CausalLM" in name for name in config.get("architectures") or ()
    )


def component(config: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments and target of the drafter that a config describes; the model's dimensions are not
    the target's.
    """
    model = {
        key: value
        for key, value in config.items()
        if key not in ("architectures", "base_model_name_or_path")
    }
    return {
        "arguments": {"model": model},
        "shape": {},
        "target": config.get("base_model_name_or_path"),
    }


def weights(
    ledger: Ledger,
    shape: TargetShape,
    arguments: Mapping[str, Any],
    config: Mapping[str, Any],
    target: Target | None,
) -> dict[str, Tensor]:
    """The file's tensors under this project's names; a tied LM head may be missing."""
    # 1. The tokenizer, and the tensors that the model expects.
    folder = Path(ledger.source)
    if target is not None and (folder / "tokenizer_config.json").is_file():
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
        check_tokenizer(tokenizer, f"drafter.model {str(folder)!r}", target)
    with torch.device("meta"):
        expected = fresh_model(config_of_dict(arguments["model"], None))
    stored = {name: ledger.take(name, *tensor.shape) for name, tensor in _untied(expected).items()}
    # 2. A tied LM head takes the embedding's weights.
    tied = set(expected.state_dict()) - set(stored)
    for name in tied:
        ledger.drop(name)
    embedding = next(
        (stored[name] for name in stored if name.endswith(("embed_tokens.weight", "wte.weight"))),
        None,
    )
    assert embedding is not None or not tied, tied
    whole = stored | {name: embedding for name in tied if embedding is not None}
    return {f"{_OURS}{name}": tensor for name, tensor in whole.items()}


def _untied(model: Any) -> dict[str, Tensor]:
    """A model's tensors, without an LM head that is its embedding."""
    state: dict[str, Tensor] = model.state_dict()
    if not model.config.tie_word_embeddings:
        return state
    return {name: tensor for name, tensor in state.items() if not name.endswith("lm_head.weight")}
