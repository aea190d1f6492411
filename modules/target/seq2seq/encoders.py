"""Encoders of stock encoder-decoder models, as parts of a drafter."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn
from transformers import AutoConfig
from transformers.models.bart.modeling_bart import BartEncoder
from transformers.models.t5.modeling_t5 import T5EncoderModel

from modules.contracts.shapes import TargetShape
from modules.contracts.trainable import MOST
from modules.target.hf_models import dict_of_config
from modules.target.seq2seq.architecture import SEQ2SEQ


def encoder_of_config(values: Mapping[str, Any], shape: TargetShape) -> nn.Module:
    """An encoder with random weights.

    Args:
        values: the config of an encoder-decoder model (`config_of_encoder`).
        shape: of the target, whose vocabulary and hidden size it must have.

    Raises:
        ValueError: another kind of model, or other dimensions.
    """
    kind = values.get("model_type")
    if kind not in SEQ2SEQ:
        raise ValueError(f"encoder.model_type is {kind!r}: use one of {', '.join(SEQ2SEQ)}")
    config: Any = AutoConfig.for_model(**values)
    wanted = {"vocab_size": shape.vocab_size, "d_model": shape.hidden_size}
    for key, value in wanted.items():
        if getattr(config, key) != value:
            raise ValueError(
                f"encoder.{key} is {getattr(config, key)}, the target has {value}: train the "
                "drafter for this target"
            )
    if not 1 <= config.num_hidden_layers <= MOST["layers"]:
        raise ValueError(
            f"encoder has {config.num_hidden_layers} layers, expected 1 to {MOST['layers']}"
        )
    return T5EncoderModel(config).encoder if kind == "t5" else BartEncoder(config)


def config_of_encoder(encoder: Any) -> dict[str, Any]:
    """The config of a stock encoder as JSON values."""
    return dict_of_config(encoder.config)
