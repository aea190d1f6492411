"""Stock Hugging Face models as drafters: the model that a recipe names, and its config as plain
values.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig

from modules.contracts.shapes import TargetShape
from modules.contracts.target import Target
from modules.contracts.trainable import MOST
from modules.target.architecture import is_causal
from modules.target.loading import locate, truncated_config
from modules.target.outline import check_config, named, read_tokenizer
from modules.target.tokenizers.vocabulary import check_tokenizer

MOST_POSITIONS = 1 << 27
_NAMED = "drafter.model"
_COUNTED = ("num_hidden_layers", "max_position_embeddings")
_NOT_SAVED = (
    "_name_or_path",
    "architectures",
    "auto_map",
    "dtype",
    "quantization_config",
    "transformers_version",
)
"""Settings of a config that are not saved: its origin, names of code to import, and what the
weights determine.
"""


def config_named(name: str, layers: int | None) -> Any:
    """The config of a named model, cut to its first layers.

    Raises:
        ValueError: nothing there, an unsupported architecture, packed weights, or too few layers.
    """
    folder = locate(name)
    check_config(name, folder, _NAMED)
    with named(name, _NAMED):
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    return _checked(config, layers)


def config_of_dict(values: Mapping[str, Any], layers: int | None) -> Any:
    """The config with these plain values. ValueError: as `config_named`, or no `model_type`."""
    if not is_causal(values.get("model_type")):
        raise ValueError(
            f"drafter.model.model_type is {values.get('model_type')!r}: use that of a causal "
            "language model of transformers"
        )
    settings = {key: value for key, value in values.items() if key not in _NOT_SAVED}
    return _checked(AutoConfig.for_model(**settings), layers)


def config_of_shape(shape: TargetShape, layers: int | None) -> Any:
    """A config of the target's dimensions, for counting parameters before the target is loaded."""
    return LlamaConfig(
        vocab_size=shape.vocab_size,
        hidden_size=shape.hidden_size,
        intermediate_size=shape.intermediate_size,
        num_hidden_layers=kept_layers(layers, shape),
        num_attention_heads=shape.num_heads,
        num_key_value_heads=shape.num_kv_heads,
        head_dim=shape.head_dim,
        attention_bias=shape.attention_bias,
        tie_word_embeddings=True,
    )


def dict_of_config(config: Any) -> dict[str, Any]:
    """A config as JSON values, without its origin."""
    values = json.loads(json.dumps(config.to_diff_dict()))
    return {key: value for key, value in values.items() if key not in _NOT_SAVED}


def kept_layers(layers: int | None, shape: TargetShape) -> int:
    """How many of the target's layers are used: `layers`, or an eighth of them and at least two."""
    count = min(shape.num_layers, max(2, -(-shape.num_layers // 8))) if layers is None else layers
    return _within(count, shape.num_layers)


def _within(layers: int, available: int) -> int:
    if not 1 <= layers <= available:
        raise ValueError(
            f"drafter.layers must lie between 1 and {available}, the model's layers, got {layers}"
        )
    return layers


def _checked(config: Any, layers: int | None) -> Any:
    if not is_causal(config.model_type):
        raise ValueError(
            f"drafter.model has architecture {config.model_type!r}: use a causal language model of "
            "transformers"
        )
    if missing := [name for name in _COUNTED if getattr(config, name, None) is None]:
        raise ValueError(
            f"drafter.model has architecture {config.model_type!r}, which is not supported: no "
            f"{missing[0]} in its config, use another language model"
        )
    if not 1 <= config.num_hidden_layers <= MOST["layers"]:
        raise ValueError(
            f"drafter.model has {config.num_hidden_layers} layers, expected 1 to {MOST['layers']}"
        )
    if not 1 <= config.max_position_embeddings <= MOST_POSITIONS:
        raise ValueError(
            f"drafter.model has {config.max_position_embeddings} positions, expected 1 to "
            f"{MOST_POSITIONS}"
        )
    return (
        config
        if layers is None
        else truncated_config(config, _within(layers, config.num_hidden_layers))
    )


def fresh_model(config: Any) -> Any:
    """A model with random weights; code from elsewhere never runs."""
    loader: Any = AutoModelForCausalLM
    return loader.from_config(config, dtype=torch.get_default_dtype(), trust_remote_code=False)


def load_named(
    name: str | None, layers: int | None, target: Target
) -> tuple[Any, Mapping[str, Tensor]]:
    """Config and weights of the model that a recipe names: the target's first layers (`name` None)
    or another one.

    Raises:
        ValueError: as `config_named`, or a tokenizer that is not the target's.
    """
    # 1. The target's own first layers.
    if name is None:
        stock = target.stock
        if stock.config.get_text_config() is not stock.config:
            raise ValueError(
                f"drafter.model is not set, and {target.name!r} is a language model within a "
                "larger one, whose first layers are no model: name a small language model"
            )
        return truncated_config(stock.config, kept_layers(layers, target.shape)), stock.state_dict()
    # 2. Another model, which must have the target's tokenizer.
    config, loader, folder = config_named(name, layers), AutoModelForCausalLM, locate(name)
    tokenizer = read_tokenizer(name, folder, chats=False, what=_NAMED)
    check_tokenizer(tokenizer, f"{_NAMED} {name!r}", target)
    with named(name, _NAMED):
        return config, loader.from_pretrained(
            folder, dtype=torch.float32, trust_remote_code=False
        ).state_dict()
