"""A target's config and tokenizer, read before any weight: unusable models are refused here."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from transformers import AutoTokenizer, PretrainedConfig
from transformers.utils.peft_utils import find_adapter_config_file

from modules.target.architecture import is_causal, reads_images
from modules.target.seq2seq.architecture import SEQ2SEQ


def check_config(name: str, folder: str, what: str = "target") -> Mapping[str, Any]:
    """The values of a target's config.json, or of another model's (`what`), whose embedding may
    have any width.

    Args:
        name: as in error messages.
        folder: a folder or Hub id; of an adapter (LoRA) its base model's config is read.

    Raises:
        ValueError: no config, an architecture that is not supported, code of its own, packed
            weights, or an embedding of another width than its layers.
    """
    # 1. The config, of an adapter that of its base model.
    with named(name, what):
        adapter = find_adapter_config_file(folder)
        if adapter is not None:
            with open(adapter, encoding="utf-8") as file:
                folder = json.load(file)["base_model_name_or_path"]
        values = PretrainedConfig.get_config_dict(folder)[0]
    label, kind = f"{what} {name!r}", values.get("model_type")
    # 2. A supported architecture, without code of the repository.
    if kind is None:
        raise ValueError(
            f"{label} has no config.json that names its architecture (model_type): give a whole "
            "model"
        )
    usable = is_causal(kind) or (what == "target" and (kind in SEQ2SEQ or reads_images(kind)))
    if not usable:
        code = " and brings code of its own, which is never run" if values.get("auto_map") else ""
        raise ValueError(
            f"{label} has architecture {kind!r}, which is not supported{code}: use a causal "
            f"language model that transformers has, {', '.join(SEQ2SEQ)}"
        )
    # 3. Weights and embeddings that drafters can be built on.
    if packed := packing(values):
        raise ValueError(
            f"{label} is stored packed ({packed}), which is not supported: give the model that it "
            "was made from in 16 bits (--dtype 8bit or 4bit packs that one for decoding)"
        )
    width = values.get("word_embed_proj_dim") or values.get("hidden_size")
    if width != values.get("hidden_size") and what == "target":
        raise ValueError(
            f"{label} has embeddings of width {width} and layers of width {values['hidden_size']}, "
            "which drafters cannot be built on: use a target whose widths are equal"
        )
    return values


def packing(config: Mapping[str, Any]) -> str:
    """How the weights of a checkpoint are packed, by its config: gptq, awq, compressed-tensors,
    fp8, mxfp4, 4bit, …; or nothing. (transformers unpacks some of them silently if their kernels
    are missing.)"""
    settings = config.get("quantization_config") or config.get("compression_config")
    if not settings:
        return ""
    bits = next((name for name in ("4bit", "8bit") if settings.get(f"load_in_{name}")), "")
    return str(settings.get("quant_method") or bits or "by an unnamed method")


def read_tokenizer(name: str, folder: str, chats: bool = True, what: str = "target") -> Any:
    """A target's tokenizer.

    Raises:
        ValueError: no tokenizer, one that cannot be read, or, where `chats` are wanted, one without
            a chat template.
    """
    with named(name, f"the tokenizer of {what}"):
        tokenizer: Any = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    if chats and not tokenizer.chat_template:
        raise ValueError(
            f"target {name!r} has a tokenizer without chat template: use a model tuned for chats, "
            "or add its chat_template.jinja to the folder"
        )
    return tokenizer


@contextmanager
def named(name: str, what: str = "target") -> Iterator[None]:
    """Turn any exception of a library that reads files into a ValueError of one line with the
    target's name.
    """
    try:
        yield
    except Exception as error:
        line = next((line.strip() for line in str(error).splitlines() if line.strip()), "")
        kind = (
            "" if isinstance(error, (OSError, ValueError)) and line else f"{type(error).__name__} "
        )
        raise ValueError(f"{what} {name!r} cannot be loaded: {kind}{line}") from error
